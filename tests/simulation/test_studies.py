"""The studies for real data fit the sets as they are handed out."""

from pathlib import Path

import pytest

from polyclinic.common.study import load_study
from polyclinic.server.reference import read_reference
from polyclinic.simulation.data import make_federation, write_reference
from tests.common import made_sets

STUDIES = Path(__file__).parents[2] / "studies"


@pytest.mark.parametrize("name", ["medvqa-gi", "rocov2"])
def test_a_study_divides_its_set_by_image_and_keeps_the_reference_apart(name: str, tmp_path: Path) -> None:
    study = load_study(STUDIES / f"{name}.toml")
    made = made_sets.medvqa if name == "medvqa-gi" else made_sets.rocov2_many
    made(tmp_path / "d", 240)
    federation = make_federation(study, tmp_path, tmp_path / "d")
    groups = [federation.reference, *federation.sites.values()]
    assert all(groups)
    ids = [record.patient for group in groups for record in group]
    assert len(ids) == len(set(ids)) == 240
    if name == "medvqa-gi":
        assert all({r.patient[:5] for r in records} == {site} for site, records in federation.sites.items())
    wanted = {(c, v) for prompt in study.evaluation.prompts for c, v in prompt.labels.items()}
    known = {(c, v) for record in federation.reference for c, v in record.labels.items()}
    assert {concept for concept, _ in wanted} <= {concept for concept, _ in known}
    # Written as a folder and read back, the same images fall into the same parts.
    write_reference(federation.reference, tmp_path / "reference")
    parts = read_reference(study, tmp_path / "reference")
    assert sum(len(part) for part in (parts.pretrain, parts.probe, parts.evaluate)) == len(
        federation.reference
    )
    assert {r.patient for r in parts.evaluate} <= {r.patient for r in federation.reference}
