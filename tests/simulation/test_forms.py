"""Every form of data goes through check, snapshot, cache and two federated rounds, to a report."""

import csv
import json
from pathlib import Path

import pytest

from polyclinic.client.check.preflight import preflight
from polyclinic.client.intake import make_snapshot
from polyclinic.client.ledger_chain import inspect
from polyclinic.common.generator_settings import GeneratorSettings
from polyclinic.common.refusals import BadInput
from polyclinic.common.study import load_study
from polyclinic.server.report.html import read_metrics
from polyclinic.simulation import cli
from polyclinic.simulation.data import make_federation
from tests.common.made_sets import SETS, write_dicom

UNITS = {
    "image": ("medvqa", "kvasir folder", "kvasir parquet", "kvasir arrow", "rocov2", "rocov2 parquet"),
    "patient": ("nih", "csv", "imagefolder", "dicom"),
}
IMAGES = {"image": 12, "patient": 24}  # two a patient
STUDY = """
name = "forms"
[data]
unit = "{unit}"
image_size = 32
[generator]
size = "msdm-tiny"
max_tokens = 8
vae = "{vae}"
[privacy]
delta = 1e-3
sampling_rate = 0.3
views = 1
[training]
rounds = 2
steps_per_round = 1
threads = 1
[federation]
min_sites = 2
[reference]
fraction = 0.3
[evaluation]
steps = 1
draws = 1
every = 2
prompts = [{{text = "An image with a polyp."}}, {{text = "A chest X-ray."}}]
"""
SITE = """
[simulation.sites.{name}]
folder = "{name}"
declared_patients = 10
min_patients = 2
source = "{data.source}"
table = "{data.table}"
caption = "{data.caption}"
"""


def spoil(folder: Path, form: str) -> None:
    """Add one image that only `check --fix` can put aside, in the form's own way."""
    if form == "medvqa":
        name = "cl8k2spoiled.jpg"
        (folder / "images" / name).write_bytes(b"no image")
        with (folder / "prompt-gt.csv").open("a", newline="") as file:
            file.write(f"Generate an image.;{name}\r\n")
    elif form == "rocov2":
        (folder / "train_images" / "ROCOv2_2023_train_999999.jpg").write_bytes(b"")
        with (folder / "train_captions.csv").open("a", newline="") as file:
            csv.writer(file).writerow(("ROCOv2_2023_train_999999", "A film."))
    elif form == "csv":
        with (folder / "images.csv").open("a") as file:
            file.write("gone.png,a picture,p99,north,yes\n")
    elif form == "dicom":
        write_dicom(folder / "empty.dcm", None, PatientID="MRN-9", Rows=4, Columns=4)


@pytest.mark.parametrize("unit", UNITS)
def test_sites_that_read_different_forms_train_together_to_a_report(
    unit: str, tmp_path: Path, random_vae: Path
) -> None:
    home, root = tmp_path / "home", tmp_path / "data"
    text, accepted = STUDY.format(unit=unit, vae=random_vae), {}
    for form in UNITS[unit]:
        name = form.replace(" ", "-")
        data = SETS[form](root / name, IMAGES[unit])
        spoil(root / name, form)
        facts = preflight(home, root / name, data, GeneratorSettings(), fix=True)
        made = make_snapshot(home, data, root / name)
        assert made["checked"]
        assert made["images"] == facts["accepted"]
        accepted[name] = made
        text += SITE.format(name=name, data=data)
    (tmp_path / "forms.toml").write_text(text)
    arguments = [str(tmp_path / "forms.toml"), "--data", str(root), "--home", str(home)]
    assert cli.main(["run", *arguments]) == 0
    (run,) = (home / "runs").iterdir()
    assert (run / "report.html").stat().st_size > 10_000
    metrics = read_metrics(run / "metrics.json")
    assert metrics.private
    assert [facts.round for facts in metrics.rounds] == [0, 1, 2]
    federation = make_federation(load_study(tmp_path / "forms.toml"), home, root)
    for name, made in accepted.items():
        site = run / "sites" / name
        assert [line["kind"] for line in inspect(site)[0]].count("settle") == 2
        # What was accepted is at the site or in the public reference, and nothing else is.
        public = [r for r in federation.reference if r.patient.startswith(f"{name}/")]
        assert len(federation.sites[name]) + len(public) == made["images"]
        cached = [
            len(facts["patients"])
            for path in (site / "cache").glob("*.json")
            if "patients" in (facts := json.loads(path.read_text()))
        ]
        assert cached == [len(federation.sites[name])]


@pytest.mark.parametrize(
    ("unit", "sites", "words"),
    [
        (
            "patient",
            "[simulation.sites.a]\nfolder = 'a'\nsource = 'rocov2'",
            "site a: rocov2 has no patient ids",
        ),
        (
            "patient",
            "[simulation.sites.a]\nfolder = 'a'\n[simulation.sites.b]",
            "`folder` is for every site or for none",
        ),
        ("patient", "[simulation.sites.a]\nfolder = '../a'", "simulation.sites.a.folder"),
    ],
)
def test_sites_folders_that_do_not_fit_are_a_sentence(
    unit: str, sites: str, words: str, tmp_path: Path
) -> None:
    lines = [f"{line}\ndeclared_patients = 10" if line[0] == "[" else line for line in sites.splitlines()]
    study = STUDY.format(unit=unit, vae="reference").replace("min_sites = 2", "min_sites = 1")
    (tmp_path / "bad.toml").write_text(study + "\n".join(lines) + "\n")
    with pytest.raises(BadInput) as caught:
        load_study(tmp_path / "bad.toml")
    assert words in str(caught.value)
