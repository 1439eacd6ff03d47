"""What sites say after the last round, through a whole simulated federation."""

from pathlib import Path

import pytest

from polyclinic.client.ledger_chain import read_lines
from polyclinic.common.study import Study, load_study
from polyclinic.server.report.html import read_metrics
from polyclinic.simulation.run import simulate
from tests.simulation.conftest import write_study

RELEASES = """
[releases]
fidelity_epsilon = 1.0
fourier_features = 256
"""


def study_with(folder: Path, vae: Path, releases: str) -> Study:
    """The tiny study with more phantoms, half of them public, and with extra releases."""
    path = write_study(folder / "tiny.toml", vae, rounds=1)
    text = path.read_text().replace("patients_per_site = 12", "patients_per_site = 24")
    text = text.replace("fraction = 0.2", "fraction = 0.4\npretrain = 0.0\nprobe = 0.0\nevaluate = 1.0")
    path.write_text(text.replace("draws = 1", "draws = 4") + releases)
    return load_study(path)


@pytest.mark.timeout(300)
def test_dp_cmmd_reaches_the_report_and_is_asked_once(random_vae: Path, tmp_path: Path) -> None:
    study = study_with(tmp_path, random_vae, RELEASES)
    run_dir, metrics = simulate(study, tmp_path / "home", None, resume=False, engine="in-process")
    found = metrics.federated_fidelity
    assert found is not None
    assert found.sites == ["coast", "north", "valley"]
    assert found.epsilon is None  # NOT PRIVATE: no noise, so the number is exact
    assert found.patients == pytest.approx(round(found.patients), abs=1e-3)
    assert 24 < found.patients < 60
    assert found.cmmd.value > 0.05  # an untrained generator draws no phantoms
    assert read_metrics(run_dir / "metrics.json").federated_fidelity == found
    before = [read_lines(home) for home in sorted((run_dir / "sites").iterdir())]
    assert all([line["kind"] for line in lines][-2:] == ["reserve", "settle"] for lines in before)
    again = simulate(study, tmp_path / "home", None, resume=True, engine="in-process")[1]
    assert again.federated_fidelity == found
    assert [read_lines(home) for home in sorted((run_dir / "sites").iterdir())] == before
