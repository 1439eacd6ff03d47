"""The probe and faithfulness to the prompt: separation, chance, intervals that cover, refusals."""

import math

import pytest
import torch
from torch import Tensor

from polyclinic.common.refusals import BadInput
from polyclinic.server.evaluation.answers import Labelled, balanced_accuracy
from polyclinic.server.evaluation.bootstrap import balanced_accuracy_draws, draw_weights
from polyclinic.server.evaluation.linear_probe import FOLDS, _folds, train_probe
from polyclinic.server.evaluation.probe import (
    Faithfulness,
    faithfulness_change,
    measure_faithfulness,
)

D = 24


def _images(
    n: int, seed: int, signal: float = 3.0, each: int = 2, polyp_share: float = 0.5
) -> tuple[Tensor, list[dict[str, str]], list[str]]:
    """Features in which `polyp` moves one direction and `quadrant` (4 values) two others."""
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(n, D, generator=generator)
    labels, groups = [], []
    for i in range(n):
        polyp = bool(torch.rand(1, generator=generator) < polyp_share)
        quadrant = int(torch.randint(4, (1,), generator=generator))
        features[i, 0] += signal * (polyp - 0.5)
        features[i, 1] += signal * (quadrant % 2 - 0.5)
        features[i, 2] += signal * (quadrant // 2 - 0.5)
        labels.append({"polyp": "yes" if polyp else "no", "quadrant": "abcd"[quadrant]})
        groups.append(f"{seed}-{i // each}")
    return features, labels, groups


def _measure(
    signal: float = 3.0,
    wanted: list[dict[str, str]] | None = None,
    concepts: tuple[str, ...] = ("polyp", "quadrant"),
) -> Faithfulness:
    features, labels, prompts = _images(200, 1, signal)
    probe, holdout = _images(300, 2), _images(150, 3)
    return measure_faithfulness(
        Labelled(features, wanted or labels, prompts), Labelled(*probe), Labelled(*holdout), concepts
    )


def test_balanced_accuracy_by_hand() -> None:
    wanted = ["yes"] * 8 + ["no"] * 2
    assert balanced_accuracy(["yes"] * 10, wanted) == 0.5
    assert balanced_accuracy(["yes"] * 6 + ["no"] * 4, wanted) == pytest.approx((6 / 8 + 1) / 2)
    assert balanced_accuracy(list("aabbcc"), list("abbbca")) == pytest.approx((1 / 2 + 2 / 3 + 1) / 3)
    with pytest.raises(ValueError, match="as many"):
        balanced_accuracy(["yes"], [])


def test_probe_solves_its_own_objective() -> None:
    """At the optimum, the gradient of the class-balanced penalised loss, written out by hand, is zero."""
    features, labels, patients = _images(160, 4, signal=1.5, polyp_share=0.2)
    answers = [label["polyp"] for label in labels]
    probe = train_probe(features, answers, patients)
    z = (features.double() - probe.mean) / probe.scale
    truth = torch.tensor([[answer == name for name in probe.classes] for answer in answers]).double()
    weights = (truth / truth.sum(dim=0)).sum(dim=1)
    residual = ((z @ probe.weight + probe.bias).softmax(dim=1) - truth) * (weights / weights.sum())[:, None]
    torch.testing.assert_close(
        z.T @ residual + probe.l2 * probe.weight, torch.zeros_like(probe.weight), atol=1e-5, rtol=0
    )
    torch.testing.assert_close(residual.sum(dim=0), torch.zeros(2, dtype=torch.float64), atol=1e-5, rtol=0)
    # Standardised with the training images' own statistics.
    torch.testing.assert_close(z.std(dim=0), torch.ones(D, dtype=torch.float64))


def test_probe_separates_rare_and_many_classes() -> None:
    features, labels, patients = _images(400, 5, signal=6.0, polyp_share=0.1)
    test_features, test_labels, _ = _images(400, 6, signal=6.0, polyp_share=0.1)
    for concept, bar in (("polyp", 0.95), ("quadrant", 0.95)):
        probe = train_probe(features, [label[concept] for label in labels], patients)
        assert (
            balanced_accuracy(probe.predict(test_features), [label[concept] for label in test_labels]) > bar
        )


def test_probe_stays_at_chance_on_shuffled_labels_and_shrinks_its_weights() -> None:
    features, labels, patients = _images(300, 7)
    order = torch.randperm(300, generator=torch.Generator().manual_seed(0)).tolist()
    answers = [labels[i]["polyp"] for i in order]
    probe = train_probe(features, answers, patients)
    test_features, test_labels, _ = _images(400, 8)
    accuracy = balanced_accuracy(probe.predict(test_features), [label["polyp"] for label in test_labels])
    assert accuracy == pytest.approx(0.5, abs=0.1)
    # Nothing to learn: cross-validation must choose more shrinkage than where there is a signal.
    assert probe.l2 > train_probe(features, [label["polyp"] for label in labels], patients).l2


def test_a_probe_is_trained_again_where_anything_that_it_learns_from_differs() -> None:
    generator = torch.Generator().manual_seed(1)
    features = torch.randn(40, 6, generator=generator)
    labels, patients = ["yes", "no"] * 20, [str(row // 2) for row in range(40)]
    probe = train_probe(features, labels, patients)
    assert train_probe(features.clone(), list(labels), list(patients)) is probe
    moved = features.clone()
    moved[7, 3] += 1e-3
    assert not torch.equal(train_probe(moved, labels, patients).weight, probe.weight)
    assert not torch.equal(train_probe(features, ["no", *labels[1:]], patients).weight, probe.weight)
    assert train_probe(features, labels, [str(row) for row in range(40)]) is not probe


def test_cross_validation_sees_through_patient_shortcuts() -> None:
    """Labels constant within a patient plus a patient fingerprint: image-wise folds would leak."""
    generator = torch.Generator().manual_seed(9)
    fingerprints = torch.randn(30, 1, 40, generator=generator) * 3
    features = (fingerprints + 0.1 * torch.randn(30, 6, 40, generator=generator)).reshape(180, 40)
    answers = [("yes", "no")[(i // 6) % 2] for i in range(180)]
    patients = [f"p{i // 6}" for i in range(180)]
    assert train_probe(features, answers, patients).l2 > train_probe(features, answers).l2


def test_folds_are_patient_disjoint_and_hold_every_label() -> None:
    patients = [f"p{i // 3}" for i in range(90)]
    answers = ["yes" if i < 12 else "no" for i in range(90)]
    folds = _folds(answers, patients).tolist()
    assert len({(p, f) for p, f in zip(patients, folds, strict=True)}) == 30
    assert {f for f, a in zip(folds, answers, strict=True) if a == "yes"} == set(range(FOLDS))


def test_a_label_too_rare_for_folds_and_a_dead_feature_still_train() -> None:
    features = _images(60, 10)[0]
    features[:, 5] = 7.0
    features[0, 3] = 40.0
    probe = train_probe(features, ["yes"] + ["no"] * 59)
    assert probe.predict(features[:1]) == ["yes"]
    assert probe.logits(features).isfinite().all()
    with pytest.raises(ValueError, match="two or more"):
        train_probe(features, ["yes"] * 60)


def test_faithful_images_reach_the_ceiling_and_unfaithful_ones_stay_at_chance() -> None:
    good, bad = _measure(), _measure(signal=0.0)
    assert [row.concept for row in good.rows] == ["polyp", "quadrant"]
    assert [row.chance for row in good.rows] == [0.5, 0.25]
    for row, worse in zip([*good.rows, good.overall], [*bad.rows, bad.overall], strict=True):
        assert row.real is not None
        assert row.accuracy.low > row.chance  # type: ignore[operator]
        # Drawn from the same law, so the two intervals overlap.
        assert row.accuracy.low < row.real.high  # type: ignore[operator]
        assert row.real.low < row.accuracy.high  # type: ignore[operator]
        assert row.real.groups == 75
        assert worse.accuracy.low < worse.chance < worse.accuracy.high  # type: ignore[operator]
    assert sum(good.rows[0].counts.values()) == good.rows[0].accuracy.n == 200
    assert set(good.rows[1].counts) == set("abcd")
    assert good.rows[0].accuracy.groups == 100
    mean = sum(row.accuracy.value for row in good.rows) / 2
    assert good.overall.accuracy.value == pytest.approx(mean)
    assert good.overall.chance == pytest.approx(0.375)
    assert type(good).model_validate_json(good.model_dump_json()) == good


def test_concepts_move_together_in_the_overall_interval() -> None:
    """The same concept under two names adds no evidence: the interval must not shrink."""
    features, labels, prompts = _images(100, 11, signal=1.5)
    doubled = [{"polyp": label["polyp"], "again": label["polyp"]} for label in labels]
    real_features, real_labels, patients = _images(200, 12, signal=1.5)
    real = [{"polyp": label["polyp"], "again": label["polyp"]} for label in real_labels]
    result = measure_faithfulness(
        Labelled(features, doubled, prompts),
        Labelled(real_features[50:], real[50:], patients[50:]),
        Labelled(real_features[:50], real[:50], patients[:50]),
        ["polyp", "again"],
    )
    assert result.overall.accuracy.low == pytest.approx(result.rows[0].accuracy.low)
    assert result.overall.accuracy.high == pytest.approx(result.rows[0].accuracy.high)


@pytest.mark.parametrize(("prompts", "each", "same"), [(40, 1, 0.0), (24, 5, 0.8)])
def test_accuracy_interval_covers(prompts: int, each: int, same: float) -> None:
    """Images of a prompt fail together with chance `same`; recalls 0.9 and 0.7, so the truth is 0.8."""
    generator = torch.Generator().manual_seed(13)
    groups = [f"prompt{i // each}" for i in range(prompts * each)]
    bootstrap = draw_weights(groups, "prompts")
    given = ["yes" if (i // each) % 2 else "no" for i in range(prompts * each)]
    covered, trials = 0, 300
    for _ in range(trials):
        together = torch.rand(prompts, generator=generator)[:, None] < same
        shared, own = (
            torch.rand(prompts, 1, generator=generator),
            torch.rand(prompts, each, generator=generator),
        )
        luck = torch.where(together, shared, own).flatten().tolist()
        predicted = [
            g if u < (0.9 if g == "yes" else 0.7) else "other" for g, u in zip(given, luck, strict=True)
        ]
        draws = balanced_accuracy_draws(predicted, given, list(range(len(given))), bootstrap)
        low, high = draws.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
        covered += low <= 0.8 <= high
    assert covered / trials >= 0.93, covered / trials


def test_a_perfect_score_of_few_prompts_is_not_certain() -> None:
    features, labels, _ = _images(60, 14, signal=40.0)
    probe = _images(200, 15, signal=40.0)
    prompts = [f"{label['polyp']}-{i % 3}" for i, label in enumerate(labels)]
    result = measure_faithfulness(
        Labelled(features, labels, prompts),
        Labelled(*probe),
        Labelled(*_images(60, 16, signal=40.0)),
        ["polyp"],
    )
    accuracy = result.overall.accuracy
    assert accuracy.value == accuracy.high == 1.0
    assert accuracy.low < 0.95  # type: ignore[operator]


def test_prompts_may_be_silent_about_a_concept() -> None:
    _, labels, _ = _images(200, 1)
    wanted = [label if i % 2 else {"polyp": label["polyp"]} for i, label in enumerate(labels)]
    result = _measure(wanted=wanted)
    assert result.rows[0].accuracy.n == 200
    assert result.rows[1].accuracy.n == 100
    one_value = [{**label, "polyp": "yes"} for label in labels]
    result = _measure(wanted=one_value)
    assert [row.concept for row in result.rows] == ["quadrant"]
    assert "polyp" in result.warnings[0]
    with pytest.raises(BadInput, match="no concept"):
        _measure(wanted=one_value, concepts=("polyp",))


def test_faithfulness_refuses_what_does_not_fit() -> None:
    features, labels, prompts = _images(60, 17)
    probe, holdout = _images(60, 18), _images(60, 19)

    def measure(
        features: Tensor = features, wanted: list[dict[str, str]] = labels, held_out: list[str] = holdout[2]
    ) -> None:
        measure_faithfulness(
            Labelled(features, wanted, prompts),
            Labelled(*probe),
            Labelled(*holdout[:2], held_out),
            ["polyp"],
        )

    with pytest.raises(BadInput, match="both in the probe part"):
        measure(held_out=probe[2])
    with pytest.raises(BadInput, match="polyp = huge"):
        measure(wanted=[{"polyp": "huge"}, *labels[1:]])
    with pytest.raises(BadInput, match="one row an image"):
        measure(wanted=labels[:-1])
    with pytest.raises(BadInput, match="width must be 23"):
        measure(features=features[:, :-1])
    broken = features.clone()
    broken[0, 0] = math.nan
    with pytest.raises(BadInput, match="1 of 60 synthetic"):
        measure(features=broken)


def test_a_ceiling_that_lacks_a_value_is_left_out() -> None:
    features, labels, prompts = _images(80, 20)
    held_features, held_labels, held_patients = _images(80, 21)
    only_yes = [i for i, label in enumerate(held_labels) if label["polyp"] == "yes"]
    held = Labelled(
        held_features[only_yes],
        [held_labels[i] for i in only_yes],
        [held_patients[i] for i in only_yes],
    )
    result = measure_faithfulness(
        Labelled(features, labels, prompts), Labelled(*_images(80, 22)), held, ["polyp", "quadrant"]
    )
    assert result.rows[0].real is None
    assert result.rows[1].real is not None
    assert result.overall.real is None
    assert "no ceiling" in result.warnings[0]


def test_a_change_is_paired_by_prompt() -> None:
    weak, strong = _measure(1.0), _measure(3.0)
    change = faithfulness_change(weak, strong)
    assert change is not None
    gain = strong.overall.accuracy.value - weak.overall.accuracy.value
    assert change.value == pytest.approx(gain)
    assert change.low is not None
    assert change.high is not None
    assert 0 < change.low < gain < change.high
    # The same images twice: no prompt changed, so there is no doubt left.
    same = faithfulness_change(strong, strong)
    assert same is not None
    assert (same.value, same.low, same.high) == (0, 0, 0)


def test_a_paired_interval_is_narrower_where_prompts_differ_in_difficulty() -> None:
    # Half of the prompts are always right, half always wrong; the later round mends two of forty.
    from polyclinic.server.evaluation.probe import Tally

    def round_of(mended: int) -> Faithfulness:
        base = _measure(3.0)
        tallies = [
            Tally(
                concept="polyp",
                prompt=f"{i:02}",
                wanted="yes" if i % 4 < 2 else "no",
                images=5,
                hits=5 if i % 2 or i < mended else 0,
            )
            for i in range(40)
        ]
        return base.model_copy(update={"tallies": tallies})

    change = faithfulness_change(round_of(0), round_of(4))
    assert change is not None
    assert change.low is not None
    assert change.high is not None
    # Unpaired, each accuracy alone has an interval of about 0.3.
    assert change.high - change.low < 0.2


def test_rounds_that_were_asked_otherwise_are_not_compared() -> None:
    one = _measure(3.0)
    features, labels, prompts = _images(200, 1, 3.0)
    probe, holdout = _images(300, 2), _images(150, 3)
    renamed = Labelled(features, labels, [f"x{p}" for p in prompts])
    other = measure_faithfulness(renamed, Labelled(*probe), Labelled(*holdout), ("polyp", "quadrant"))
    assert faithfulness_change(one, other) is None
    assert faithfulness_change(one.model_copy(update={"tallies": []}), one) is None
