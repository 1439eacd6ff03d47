"""Negations apart; and phantoms, whose drawn attributes the probe's reported accuracy must agree with."""

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("efficientnet_lite_pytorch", reason="extractor packages (server extra) not installed")

from polyclinic.common.features.efficientnet import efficientnet
from polyclinic.server.evaluation.answers import Labelled
from polyclinic.server.evaluation.bootstrap import draw_weights
from polyclinic.server.evaluation.estimate import Estimate
from polyclinic.server.evaluation.negations import ValueFaithfulness, is_absence, value_row, value_shares
from polyclinic.server.evaluation.probe import Faithfulness, measure_faithfulness
from polyclinic.simulation.phantom import CLINICS, attributes, draw, patient_style

CONCEPTS = ("polyp", "instrument", "overlay")


def _covers(found: Estimate | None, truth: float) -> bool:
    assert found is not None
    assert found.low is not None
    assert found.high is not None
    return found.low <= truth <= found.high


def _phantoms(count: int, seed: int) -> tuple[Tensor, list[dict[str, str]]]:
    """Features of phantoms of as many patients, and what they show."""
    images, labels = [], []
    for number in range(count):
        rng, site = np.random.default_rng([seed, number]), list(CLINICS)[number % 3]
        style, shown = patient_style(rng, site), attributes(rng, site)
        images.append(torch.from_numpy(np.asarray(draw(rng, style, shown, 64)).copy()))
        labels.append({concept: shown.labels()[concept] for concept in CONCEPTS})
    return efficientnet().extract(torch.stack(images).permute(0, 3, 1, 2).float() / 255), labels


Drawn = tuple[Labelled, Labelled, tuple[Tensor, list[dict[str, str]]]]


@pytest.fixture(scope="module")
def drawn() -> Drawn:
    """Probe part, holdout, and phantoms that play the synthetic images."""
    features, labels = _phantoms(270, 1)
    patients = [f"patient-{i}" for i in range(270)]
    probe, holdout = (Labelled(features[s], labels[s], patients[s]) for s in (slice(100), slice(100, 170)))
    return probe, holdout, (features[170:], labels[170:])


def _judge(
    drawn: Drawn, wanted: Sequence[dict[str, str]], concepts: Sequence[str] = CONCEPTS
) -> Faithfulness:
    probe, holdout, (features, _) = drawn
    prompts = [f"{label} {i % 5}" for i, label in enumerate(wanted)]
    return measure_faithfulness(Labelled(features, wanted, prompts), probe, holdout, concepts)


def test_true_prompts_score_as_real_images_do(drawn: Drawn) -> None:
    found = _judge(drawn, drawn[2][1])
    for row in found.rows:
        assert row.accuracy.value > 0.9
        assert [value.value for value in row.values] == ["no", "yes"]
        assert [value.absence for value in row.values] == [True, False]
        for value in row.values:
            # Every image shows what its prompt says, exactly.
            assert _covers(value.shown, 1.0)
            assert value.otherwise.value < 0.2 < value.seen.value
    assert found.presence is not None
    assert found.presence.value == pytest.approx(
        sum(row.values[1].seen.value for row in found.rows) / 3, abs=1e-9
    )


def test_a_known_share_of_lies_is_recovered(drawn: Drawn) -> None:
    truth, share = drawn[2][1], 0.3
    generator = torch.Generator().manual_seed(3)
    flip = {"yes": "no", "no": "yes"}
    for concept in CONCEPTS:
        lies = (torch.rand(len(truth), generator=generator) < share).tolist()
        wanted = [
            {concept: flip[label[concept]] if lie else label[concept]}
            for label, lie in zip(truth, lies, strict=True)
        ]
        row = _judge(drawn, wanted, [concept]).rows[0]
        for value in row.values:
            of_value = [w[concept] == value.value for w in wanted]
            exact = sum(
                t[concept] == value.value for t, asked in zip(truth, of_value, strict=True) if asked
            ) / sum(of_value)
            assert _covers(value.shown, exact), (concept, value, exact)
            assert not _covers(value.shown, 1.0)
            # Uncorrected, the share is what known errors of the probe make of the exact one.
            assert value.seen.value == pytest.approx(exact, abs=0.12)


def test_images_that_never_show_anything_are_faithful_to_negations_only(drawn: Drawn) -> None:
    """A generator that always draws the same empty picture, asked for both in turn."""
    probe, holdout, (features, labels) = drawn
    empty = [i for i, label in enumerate(labels) if label["polyp"] == "no"]
    wanted = [{"polyp": ("no", "yes")[i % 2]} for i in range(len(empty))]
    synthetic = Labelled(features[empty], wanted, [f"{i % 8}" for i in range(len(empty))])
    found = measure_faithfulness(synthetic, probe, holdout, ["polyp"])
    absent, present = found.rows[0].values
    assert absent.seen.value > 0.9
    assert present.seen.value < 0.1
    # Seen as often where a polyp was asked for: the prompt is not what made it absent.
    assert absent.otherwise.value > 0.9
    assert found.absence is not None
    assert found.presence is not None
    assert found.absence.value - found.presence.value > 0.8
    assert found.overall.accuracy.value == pytest.approx(0.5, abs=0.1)


def _row(correct: float, prompts: int, patients: int, generator: torch.Generator) -> ValueFaithfulness:
    """Images show what was asked with chance `correct`; the probe knows 85 % of "yes" and 90 % of "no"."""

    def answers(truth: list[str]) -> list[str]:
        luck = torch.rand(len(truth), generator=generator).tolist()
        flip = {"yes": "no", "no": "yes"}
        return [t if u < {"yes": 0.85, "no": 0.9}[t] else flip[t] for t, u in zip(truth, luck, strict=True)]

    wanted = ["yes", "no"] * (2 * prompts)
    right = (torch.rand(len(wanted), generator=generator) < correct).tolist()
    shown = [w if r else {"yes": "no", "no": "yes"}[w] for w, r in zip(wanted, right, strict=True)]
    real = ["yes", "no"] * (patients // 2)
    groups = draw_weights([f"{i % 2}-{i // 4}" for i in range(len(wanted))], "prompts")
    known = draw_weights([str(i) for i in range(patients)], "held-out patients")
    rows, seen = list(range(len(wanted))), list(range(patients))
    synthetic = value_shares("yes", answers(shown), wanted, rows, groups)
    return value_row("yes", synthetic, groups, value_shares("yes", answers(real), real, seen, known), known)


@pytest.mark.parametrize("correct", [0.6, 0.95])
def test_the_corrected_share_covers_the_truth(correct: float) -> None:
    generator, trials = torch.Generator().manual_seed(4), 300
    rows = [_row(correct, 30, 60, generator) for _ in range(trials)]
    corrected, as_seen = (
        sum(_covers(getattr(row, side), correct) for row in rows) / trials for side in ("shown", "seen")
    )
    assert corrected >= 0.93
    # Without correction the probe's own errors count as the generator's.
    assert as_seen < corrected - 0.03


def test_a_probe_that_guesses_corrects_nothing() -> None:
    weights = draw_weights([str(i) for i in range(40)], "patients")
    given, guess = ["yes", "no"] * 20, ["yes", "yes", "no", "no"] * 10
    shares = value_shares("yes", guess, given, list(range(40)), weights)
    assert value_row("yes", shares, weights, shares, weights).shown is None
    assert [is_absence(value) for value in ("No", "none ", "yes", "not seen", "0")] == [
        True, True, False, False, True,
    ]  # fmt: skip
