"""Utility: what synthetic images teach, intervals that cover, patients that are kept apart."""

import math

import pytest
import torch
from torch import Tensor

from polyclinic.common.refusals import BadInput
from polyclinic.server.evaluation.answers import Labelled, balanced_accuracy
from polyclinic.server.evaluation.bootstrap import RESAMPLES, draw_weights, paired_draws
from polyclinic.server.evaluation.estimate import Estimate
from polyclinic.server.evaluation.linear_probe import train_probe
from polyclinic.server.evaluation.results import Utility
from polyclinic.server.evaluation.utility import measure_utility

D = 16
CONCEPTS = ("polyp", "instrument")


def _set(n: int, seed: int, prefix: str, each: int = 2, strength: tuple[float, ...] = (2.5, 2.5)) -> Labelled:
    """Features in which each concept moves a direction of its own by `strength`; groups share an offset."""
    generator = torch.Generator().manual_seed(seed)
    signs = torch.randint(2, (n, 2), generator=generator)
    offset = torch.randn(-(-n // each), D, generator=generator).repeat_interleave(each, dim=0)[:n]
    features = torch.randn(n, D, generator=generator) + 0.5 * offset
    features[:, :2] += (signs - 0.5) * torch.tensor(strength)
    labels = [dict(zip(CONCEPTS, ("yes" if s else "no" for s in row), strict=True)) for row in signs.tolist()]
    return Labelled(features, labels, [f"{prefix}{i // each}" for i in range(n)])


def _measure(synthetic: Labelled, real: int = 60, concepts: tuple[str, ...] = CONCEPTS) -> Utility:
    return measure_utility(synthetic, _set(real, 2, "p"), _set(300, 3, "h"), concepts, "constructed")


def _ends(found: Estimate) -> tuple[float, float]:
    assert found.low is not None
    assert found.high is not None
    return found.low, found.high


def test_images_that_carry_a_concept_teach_it_and_images_that_omit_it_do_not() -> None:
    polyp, instrument = _measure(_set(400, 1, "s", strength=(0.0, 2.5))).rows
    assert _ends(instrument.synthetic)[0] > 0.75
    assert _ends(instrument.gain)[0] > 0  # 30 real patients are few: 400 faithful images help
    # No content, though the one probe that noise made may point a little to either side.
    assert polyp.synthetic.value == pytest.approx(polyp.chance, abs=0.1)
    assert polyp.real.value > 0.75
    # Labels without content drown the real ones: what `both` must show, not hide.
    assert polyp.gain.value < -0.02


def test_rows_are_what_training_and_testing_by_hand_gives() -> None:
    synthetic, real, held = _set(80, 4, "s"), _set(60, 2, "p"), _set(300, 3, "h")
    found = _measure(synthetic)
    wanted = [label["polyp"] for label in held.labels]
    by_hand = []
    for features, labels, groups in (
        (synthetic.features, synthetic.labels, synthetic.groups),
        (real.features, real.labels, real.groups),
        (
            torch.cat([synthetic.features, real.features]),
            [*synthetic.labels, *real.labels],
            [*synthetic.groups, *(f"1/{patient}" for patient in real.groups)],
        ),
    ):
        probe = train_probe(features, [label["polyp"] for label in labels], list(groups))
        by_hand.append(balanced_accuracy(probe.predict(held.features), wanted))
    row = found.rows[0]
    assert [row.synthetic.value, row.real.value, row.both.value] == pytest.approx(by_hand)
    assert row.gain.value == pytest.approx(row.both.value - row.real.value)
    assert (row.gain.n, row.gain.groups) == (300, 150)
    assert found.overall is not None
    assert found.overall.both.value == pytest.approx(sum(r.both.value for r in found.rows) / 2)
    assert Utility.model_validate_json(found.model_dump_json()) == found


def test_gain_is_paired_over_patients() -> None:
    row = _measure(_set(80, 4, "s")).rows[0]
    width = [high - low for low, high in map(_ends, (row.gain, row.both, row.real))]
    # Hard patients are hard for both probes: unpaired, the variances would add.
    assert width[0] < 0.8 * math.hypot(width[1], width[2])


def test_patients_of_the_probe_part_are_never_tested() -> None:
    real, held = _set(60, 2, "p"), _set(100, 3, "h")
    overlapping = Labelled(held.features, held.labels, ["p3", *held.groups[1:]])
    with pytest.raises(BadInput, match=r"1 patients, such as p3, are both in the probe part"):
        measure_utility(_set(80, 4, "s"), real, overlapping, CONCEPTS, "constructed")


def test_patients_and_prompts_are_not_split_between_folds(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[str]] = []

    def spy(features: Tensor, labels: list[str], groups: list[str]) -> object:
        seen.append(list(groups))
        return train_probe(features, labels, groups)

    monkeypatch.setattr("polyclinic.server.evaluation.utility.train_probe", spy)
    # A prompt named as a patient is: together they must still be two groups.
    measure_utility(_set(40, 4, "p"), _set(60, 2, "p"), _set(100, 3, "h"), ("polyp",), "constructed")
    assert [len(set(groups)) for groups in seen] == [20, 30, 50]


def test_values_that_one_side_lacks_are_named() -> None:
    synthetic, real, held = _set(80, 4, "s"), _set(60, 2, "p"), _set(100, 3, "h")

    def relabelled(known: Labelled, value: str) -> Labelled:
        return Labelled(known.features, [{**label, "polyp": value} for label in known.labels], known.groups)

    found = measure_utility(synthetic, real, relabelled(held, "no"), CONCEPTS, "constructed")
    assert [row.concept for row in found.rows] == ["instrument"]
    assert found.warnings == ["polyp: no utility; the held-out patients show no polyp = yes."]
    found = measure_utility(relabelled(synthetic, "no"), real, held, ("polyp",), "constructed")
    assert found.rows == []
    assert found.overall is None
    assert "prompts ask for 1 of its values" in found.warnings[0]

    third = Labelled(
        synthetic.features, [{"polyp": v} for v in ("yes", "no", "large", "no") * 20], synthetic.groups
    )
    found = measure_utility(third, real, held, ("polyp",), "constructed")
    assert found.rows[0].chance == 0.5
    assert "only no, yes; the probe part shows no polyp = large" in found.warnings[0]


def test_intervals_cover_the_accuracy_on_the_population() -> None:
    """Fixed probes, fresh held-out patients with 3 images each: 95 % intervals must cover at 93 %."""
    synthetic, real = _set(60, 4, "s"), _set(40, 2, "p")
    truth = measure_utility(synthetic, real, _set(30_000, 99, "h", each=3), ("polyp",), "constructed").rows[0]
    trials, covered = 250, dict.fromkeys(("synthetic", "both", "gain"), 0)
    # The probes are the same in every trial; training them again would only cost time.
    for trial in range(trials):
        held = _set(150, 1000 + trial, "h", each=3)
        row = _fixed(synthetic, real, held)
        for diet in covered:
            low, high = _ends(getattr(row, diet))
            covered[diet] += low <= getattr(truth, diet).value <= high
    assert all(count / trials >= 0.93 for count in covered.values()), covered


_PROBES: dict[int, object] = {}


def _fixed(synthetic: Labelled, real: Labelled, held: Labelled) -> object:
    """One row, with probes trained once."""
    with pytest.MonkeyPatch.context() as patch:

        def once(features: Tensor, labels: list[str], groups: list[str]) -> object:
            if len(labels) not in _PROBES:
                _PROBES[len(labels)] = train_probe(features, labels, groups)
            return _PROBES[len(labels)]

        patch.setattr("polyclinic.server.evaluation.utility.train_probe", once)
        return measure_utility(synthetic, real, held, ("polyp",), "constructed").rows[0]


def test_a_gain_of_nothing_still_has_a_width() -> None:
    """Two probes that agree on 40 patients may differ on the next: coverage where differences are rare."""
    trials, patients, differ = 600, 40, 0.02
    generator = torch.Generator().manual_seed(7)
    covered = 0
    for _ in range(trials):
        # Wins of 2 % among images of one class and none of losses: the true gain is 1 %.
        given = ["yes", "no"] * (patients // 2)
        wins = (torch.rand(patients, generator=generator) < differ).tolist()
        base = ["no" if w and g == "yes" else g for w, g in zip(wins, given, strict=True)]
        bootstrap = draw_weights([str(i) for i in range(patients)], "patients")
        draws = paired_draws(given, base, given, list(range(patients)), bootstrap)
        assert draws.shape == (RESAMPLES,)
        low, high = draws.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
        covered += low <= differ / 2 <= high
    assert covered / trials >= 0.93
