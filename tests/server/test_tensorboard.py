"""A run for TensorBoard: what it reads back, and the sentence where it is not installed."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from polyclinic.common.refusals import BadInput
from polyclinic.server.report.tensorboard import scalars, write_tensorboard
from tests.server.report_fakes import fake_run, wider


def test_tensorboard_reads_the_scalars_and_grids_back(tmp_path: Path) -> None:
    reason = "TensorBoard is an optional extra: pip install 'polyclinic[tensorboard]'"
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator", reason=reason)
    metrics = wider(fake_run(tmp_path, last=4))
    folder = write_tensorboard(tmp_path, metrics, tmp_path / "tb")
    found = events.EventAccumulator(str(folder))
    found.Reload()
    kids = {event.step: event.value for event in found.Scalars("EfficientNet-Lite0/kid")}
    wanted = {r.round: r.fidelity.kid.value for r in metrics.rounds if r.fidelity is not None}
    assert kids == pytest.approx(wanted)
    assert set(found.Tags()["scalars"]) == {name for name, _, _ in scalars(metrics)}
    assert [event.step for event in found.Images("samples")] == sorted(wanted)
    with pytest.raises(BadInput, match="is there already"):
        write_tensorboard(tmp_path, metrics, tmp_path / "tb")


def test_scalars_are_finite_and_by_round(tmp_path: Path) -> None:
    metrics = fake_run(tmp_path, private=False, last=2)
    found = {(name, number): value for name, number, value in scalars(metrics)}
    assert not any(name.startswith("epsilon/") for name, _ in found)  # infinite without privacy
    assert found["cost/bytes up", 1] == 3 * 17_400_000
    assert ("faithfulness/polyp", 2) in found


def test_where_it_is_not_installed_a_sentence_says_how(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)  # as if the import failed
    with pytest.raises(BadInput, match=r"pip install 'polyclinic\[tensorboard\]'"):
        write_tensorboard(tmp_path, fake_run(tmp_path, last=2), tmp_path / "tb")
