"""DP-CMMD at the coordinator: against brute force, known truths, and the interval's own claim."""

import math
from typing import Any

import pytest
import torch

from polyclinic.common.calibration import calibrate
from polyclinic.common.features.fourier import BOUND, CONSTANT, fourier, frequencies
from polyclinic.common.privacy.sums import TAU
from polyclinic.common.refusals import BadInput
from polyclinic.common.wire import ReleaseFacts
from polyclinic.server.evaluation.federated import keep_final, measure_federated, noisy_mmd
from tests.server.cmmd_studies import Case, spread_of, truth

BANDWIDTH = math.sqrt(128)


def mapped(rows: int, shift: float, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, 16, generator=generator)
    x[:, 0] += shift
    return fourier(x, frequencies("s", 16, 256, 6.0))


def test_without_noise_it_is_the_u_statistic_over_all_pairs() -> None:
    real, drawn = mapped(30, 0.0, 1), mapped(24, 1.0, 2)
    groups = [f"prompt {i // 4}" for i in range(24)]
    phi, psi = real[:, :-1], drawn[:, :-1]
    among = [float(phi[i] @ phi[j]) for i in range(30) for j in range(30) if i != j]
    within = [float(psi[i] @ psi[j]) for i in range(24) for j in range(24) if groups[i] != groups[j]]
    across = float((phi @ psi.T).mean())
    found = noisy_mmd(real.sum(0), 0.0, drawn, groups)
    assert found.value == pytest.approx(sum(among) / len(among) - 2 * across + sum(within) / len(within))
    assert found.patients == pytest.approx(30.0)
    assert found.deviation == 0.0


def test_accuracy_with_a_noisy_number_of_patients() -> None:
    # The check of docs/evaluation.md, short: 1,500 patients at 5 sites, epsilon 1.
    shift = 1.8
    exact = truth(shift, BANDWIDTH)
    assert 0.014 < exact < 0.016
    case, repeats = Case(1500, 5, 300, 256, calibrate(1.0, 1e-5, 1.0, 1)), 16
    row = spread_of(case, shift, BANDWIDTH, repeats)
    assert row["value"] == pytest.approx(exact, abs=3 * row["sd"] / math.sqrt(repeats) + 0.0005)
    assert row["patients"] == pytest.approx(1500, abs=3 * row["patients_sd"] / math.sqrt(repeats))
    # Of the spread, the noise's part is what is stated; patients, images and frequencies add their own.
    assert 0.5 * row["stated"] < row["sd"] < 2.0 * row["stated"]


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_the_table_of_the_docs(capsys: pytest.CaptureFixture[str]) -> None:
    shift, repeats = 1.8, 40
    lines = [f"truth {truth(shift, BANDWIDTH):.4f}; 1,500 patients, 5 sites, 1,000 images"]
    for features in (512, 2048):
        for epsilon, delta in ((None, 1e-5), (3.0, 1e-5), (1.0, 1e-5), (1.0, 1e-3)):
            noise = 0.0 if epsilon is None else calibrate(epsilon, delta, 1.0, 1)
            row = spread_of(Case(1500, 5, 1000, features, noise), shift, BANDWIDTH, repeats)
            lines.append(
                f"epsilon {epsilon}, delta {delta:g}, D {features}: {row['value']:.4f} +- {row['sd']:.4f} "
                f"(of the noise, stated: {row['stated']:.4f}); "
                f"patients {row['patients']:.0f} +- {row['patients_sd']:.0f}"
            )
            assert row["value"] == pytest.approx(truth(shift, BANDWIDTH), abs=4 * row["sd"] / repeats**0.5)
    with capsys.disabled():
        print("\n" + "\n".join(lines))


def test_stated_deviation_is_that_of_the_noise_alone() -> None:
    real, drawn = mapped(400, 0.0, 3), mapped(200, 1.5, 4)
    groups = [str(i % 20) for i in range(200)]
    whole, variance = real.sum(0), (3.0 * BOUND) ** 2
    generator = torch.Generator().manual_seed(5)
    found = [
        noisy_mmd(
            whole + math.sqrt(variance) * torch.randn(257, generator=generator, dtype=torch.float64),
            variance,
            drawn,
            groups,
        )
        for _ in range(400)
    ]
    values = torch.tensor([one.value for one in found])
    stated = sum(one.deviation for one in found) / len(found)
    assert float(values.std()) == pytest.approx(stated, rel=0.15)
    quiet = noisy_mmd(whole, 0.0, drawn, groups).value
    assert float(values.mean()) == pytest.approx(quiet, abs=4 * float(values.std()) / 20)
    covered = sum(abs(one.value - quiet) <= 1.96 * one.deviation for one in found) / len(found)
    assert covered > 0.9


@pytest.mark.parametrize("patients", [0, 20])
def test_more_noise_than_patients_is_said_and_no_number_given(patients: int) -> None:
    whole = mapped(patients, 0.0, 6).sum(0) if patients else torch.zeros(257, dtype=torch.float64)
    with pytest.raises(BadInput, match="nothing can be told"):
        noisy_mmd(whole, (40.0 * BOUND) ** 2, mapped(20, 0.0, 7), [str(i) for i in range(20)])


def facts(site: str, noise: float, resolved: Any) -> ReleaseFacts:
    return ReleaseFacts(
        release="fidelity",
        verdict="",
        model="",
        sigma=noise,
        bound=BOUND,
        tau=TAU,
        epsilon=1.0,
        delta=1e-3,
        code_version="0",
        study_hash=resolved.hash,
        approval=site,
        ledger_sequence=1,
        ledger_hash="h",
    )


def test_sites_sums_add_up_and_tau_is_undone(make_site: Any, tmp_path: Any) -> None:
    site = make_site(
        releases={"fidelity_epsilon": 1.0, "fourier_features": 256},
        evaluation={"prompts": [{"text": "a"}, {"text": "b"}, {"text": "c"}], "draws": 40},
    )
    resolved = site.resolved
    drawn = frequencies(resolved.hash, 16, 256, resolved.public.bandwidth)
    generator = torch.Generator().manual_seed(8)
    real, synthetic = torch.randn(600, 16, generator=generator), torch.randn(120, 16, generator=generator)
    rows = fourier(real, drawn) / (1 + TAU)
    sums = {
        "a": (rows[:200].sum(0).float(), facts("a", 0.0, resolved)),
        "b": (rows[200:].sum(0).float(), facts("b", 0.0, resolved)),
    }
    keep_final(tmp_path / "final.safetensors", synthetic)
    found = measure_federated(resolved, sums, tmp_path / "final.safetensors")
    assert found is not None
    assert found.patients == pytest.approx(600, abs=1e-3)
    assert found.sites == ["a", "b"]
    assert (found.cmmd.n, found.cmmd.groups, found.features) == (120, 3, 256)
    assert abs(found.cmmd.value) < 0.02
    assert rows[0, -1] * (1 + TAU) == pytest.approx(CONSTANT)
    noisy = {name: (total, facts(name, 2.0, resolved)) for name, (total, _) in sums.items()}
    wide = measure_federated(resolved, noisy, tmp_path / "final.safetensors")
    assert wide is not None
    assert wide.cmmd.low is not None
    assert wide.cmmd.low < wide.cmmd.value
    assert measure_federated(resolved, {}, tmp_path / "final.safetensors") is None
