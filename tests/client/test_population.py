"""Rule 8: a patient is charged in one ledger; two ledgers only where their patients are proven apart."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from polyclinic.client import cli, population
from polyclinic.client.approval import prepare_and_approve
from polyclinic.client.check.preflight import preflight
from polyclinic.client.intake import make_snapshot, site_key, site_records
from polyclinic.client.ledger_books import create_ledger
from polyclinic.client.ledger_chain import inspect
from polyclinic.client.ledger_register import register
from polyclinic.client.population import compare, hold_apart
from polyclinic.common.data.table import Record
from polyclinic.common.generator_settings import GeneratorSettings
from polyclinic.common.generators.base import BaseFiles
from polyclinic.common.refusals import Refusal
from polyclinic.common.settings import DataSettings
from tests.common.made_sets import draw, write_dicom

MakeSite = Callable[..., Any]
PATIENTS = DataSettings(image_size=32)
IMAGES = DataSettings(image_size=32, unit="image")


@pytest.fixture(autouse=True)
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A list of ledgers of this test's own."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    return tmp_path / "state" / "polyclinic" / "ledgers"


def folder(path: Path, *patients: str, first: int = 0) -> Path:
    path.mkdir()
    rows = ["image,caption,patient"]
    for number, patient in enumerate(patients):
        draw(first + number).save(path / f"{number}.png")
        rows.append(f"{number}.png,x,{patient}")
    (path / "images.csv").write_text("\n".join(rows) + "\n")
    return path


def home(path: Path) -> Path:
    path.mkdir(mode=0o700)
    create_ledger(path, path.name, simulated=False)
    register(path)
    return path


def apart(own: Path, data: DataSettings, where: Path) -> list[population.Beside]:
    return hold_apart(own, data, where, site_records(own, data, where))


def test_a_patient_charged_elsewhere_is_refused_and_disjoint_ones_are_not(tmp_path: Path) -> None:
    one, other = home(tmp_path / "one"), home(tmp_path / "other")
    assert apart(one, PATIENTS, folder(tmp_path / "a", "p", "q")) == [(other, 0, "")]
    assert apart(other, PATIENTS, folder(tmp_path / "b", "r", "s")) == [(one, 0, "")]
    with pytest.raises(Refusal, match="charges 1 patients of this data") as caught:
        apart(other, PATIENTS, folder(tmp_path / "c", "s", "q", "t"))
    assert caught.value.reason.name == "charged-elsewhere"
    # What was refused charged nobody: the first ledger may still take `t`.
    assert apart(one, PATIENTS, folder(tmp_path / "d", "t")) == [(other, 0, "")]


def test_a_patient_who_left_the_snapshot_stays_charged(tmp_path: Path) -> None:
    one, other = home(tmp_path / "one"), home(tmp_path / "other")
    apart(one, PATIENTS, folder(tmp_path / "a", "p", "q"))
    apart(one, PATIENTS, folder(tmp_path / "b", "q"))
    with pytest.raises(Refusal):
        apart(other, PATIENTS, folder(tmp_path / "c", "p"))


def test_ids_are_kept_as_keyed_hashes_under_each_ledger_s_own_key(tmp_path: Path) -> None:
    one, other = home(tmp_path / "one"), home(tmp_path / "other")
    apart(one, PATIENTS, folder(tmp_path / "a", "MRN-17"))
    apart(other, PATIENTS, folder(tmp_path / "b", "MRN-18"))
    kept = [json.loads((h / "data" / "population.json").read_text())["patient"] for h in (one, other)]
    assert "MRN" not in json.dumps(kept)
    assert site_key(one) != site_key(other)
    assert (one / "data" / "population.json").stat().st_mode & 0o077 == 0
    # The same patient has another hash in the other home, and is found all the same.
    assert compare(other, PATIENTS, tmp_path / "a", [Record("MRN-17", tmp_path, ("x",))])[0].common == 1


def test_dicom_pseudonyms_of_two_keys_are_one_patient(tmp_path: Path) -> None:
    one, other = home(tmp_path / "one"), home(tmp_path / "other")
    import numpy as np

    where = tmp_path / "films"
    where.mkdir()
    for number in range(2):
        film = np.asarray(draw(number).convert("L"))[None]
        write_dicom(where / f"{number}.dcm", film, PatientID=f"MRN-{number}", SOPInstanceUID=f"1.2.{number}")
    films = DataSettings(source="dicom", caption="{Modality}", image_size=32)
    apart(one, films, where)
    with pytest.raises(Refusal, match="charges 2 patients"):
        apart(other, films, where)
    # And a table that has the same hospital numbers.
    with pytest.raises(Refusal, match="charges 1 patients"):
        apart(other, PATIENTS, folder(tmp_path / "table", "MRN-1", "MRN-9"))


def test_without_patient_ids_the_same_picture_is_found_under_any_name(tmp_path: Path) -> None:
    def pictures(path: Path, *numbers: int) -> Path:
        path.mkdir()
        for at, number in enumerate(numbers):
            draw(number).save(path / f"{at}.png")
        rows = "".join(f"{at}.png,x\n" for at in range(len(numbers)))
        (path / "images.csv").write_text(f"image,caption\n{rows}")
        return path

    one, other = home(tmp_path / "one"), home(tmp_path / "other")
    apart(one, IMAGES, pictures(tmp_path / "a", 1, 2))
    assert apart(other, IMAGES, pictures(tmp_path / "b", 3, 4))[0].common == 0  # the same file names
    with pytest.raises(Refusal, match="charges 1 images"):
        apart(other, IMAGES, pictures(tmp_path / "c", 5, 2))
    with pytest.raises(Refusal, match="one of the two has patient ids, the other only images"):
        apart(other, PATIENTS, folder(tmp_path / "d", "p", first=9))


def test_what_cannot_be_read_cannot_be_proven(tmp_path: Path) -> None:
    one, other = home(tmp_path / "one"), home(tmp_path / "other")
    apart(one, PATIENTS, folder(tmp_path / "a", "p"))
    (one / "data" / "population.json").write_text("{")
    with pytest.raises(Refusal, match="cannot be proven disjoint"):
        apart(other, PATIENTS, folder(tmp_path / "b", "q"))


def test_simulated_ledgers_and_the_own_one_do_not_count(tmp_path: Path) -> None:
    own, played = home(tmp_path / "own"), tmp_path / "played"
    played.mkdir()
    create_ledger(played, "site-a", simulated=True)
    register(played)
    data = folder(tmp_path / "a", "p")
    assert apart(own, PATIENTS, data) == []
    assert apart(own, PATIENTS, data) == []
    assert hold_apart(played, PATIENTS, data, []) == []


def test_check_names_them_as_a_person_s_decision(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, other = home(tmp_path / "one"), home(tmp_path / "other")
    data = folder(tmp_path / "a", "p", "q")
    apart(one, PATIENTS, data)
    facts = preflight(other, data, PATIENTS, GeneratorSettings(), fix=True)
    assert facts["waits_for"] == ["charged-elsewhere"]
    apart_data = folder(tmp_path / "b", "r", first=5)
    assert cli.main(["check", str(apart_data), "--home", str(other)]) == 0
    assert f"the ledger in {one} charges no patient of this data" in capsys.readouterr().out


def test_a_ledger_of_another_machine_is_compared_once_it_is_named(
    tmp_path: Path, state: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one, other = home(tmp_path / "one"), home(tmp_path / "other")
    data = folder(tmp_path / "a", "p", "q")
    apart(one, PATIENTS, data)
    state.unlink()
    assert cli.main(["check", str(data), "--home", str(other)]) == 0
    assert cli.main(["check", str(data), "--home", str(other), "--beside", str(tmp_path)]) == 2
    assert "no ledger.jsonl is in it" in capsys.readouterr().err
    assert cli.main(["check", str(data), "--home", str(other), "--beside", str(one)]) == 2
    assert "charges 2 patients of this data" in capsys.readouterr().out
    with pytest.raises(Refusal):
        apart(other, PATIENTS, data)


def test_an_approval_of_a_patient_charged_elsewhere_leaves_no_line(
    tmp_path: Path, make_site: MakeSite
) -> None:
    site = make_site(data=PATIENTS.model_dump())
    for name in ("ledger.jsonl", "ledger.head"):
        (site.home / name).unlink()
    create_ledger(site.home, "site-a", simulated=False)
    data = folder(tmp_path / "a", *(f"p{n}" for n in range(8)))
    elsewhere = home(tmp_path / "elsewhere")
    apart(elsewhere, PATIENTS, folder(tmp_path / "b", "p3"))

    def approve() -> Any:
        make_snapshot(site.home, PATIENTS, data)
        records = site_records(site.home, PATIENTS, data)
        return prepare_and_approve(
            site.home, "site-a", site.resolved, records, BaseFiles(vae=site.vae), data=data
        )

    with pytest.raises(Refusal, match="charges 1 patients"):
        approve()
    assert [line["kind"] for line in inspect(site.home)[0]] == ["open"]
    assert not (site.home / "approvals").exists()
    rows = (data / "images.csv").read_text().splitlines()
    (data / "images.csv").write_text("\n".join(row for row in rows if "p3" not in row) + "\n")
    approve()
    assert [line["kind"] for line in inspect(site.home)[0]][:2] == ["open", "earmark"]
    # And now the other way round.
    with pytest.raises(Refusal, match="charges 1 patients"):
        apart(elsewhere, PATIENTS, folder(tmp_path / "c", "p5"))


KILLED = """
import os, signal, sys
from pathlib import Path
from polyclinic.client import population
from polyclinic.client.intake import site_records
from polyclinic.common.settings import DataSettings
home, folder, at = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
data = DataSettings(image_size=32)
calls = 0
def die(*_):
    global calls
    calls += 1
    if calls == at:
        os.kill(os.getpid(), signal.SIGKILL)
sys.addaudithook(lambda name, args: die() if name in ("os.rename", "open", "os.mkdir") and armed else None)
armed = False
records = site_records(home, data, folder)
armed = True
population.hold_apart(home, data, folder, records)
print("charged", calls, flush=True)
"""


def test_killed_at_any_moment_a_patient_is_never_charged_unremembered(tmp_path: Path) -> None:
    """Whoever returned from `hold_apart` may charge: then, and from then on, the other ledger is refused."""
    data = folder(tmp_path / "a", "p")
    for at in (2, 7, 12, 1000):
        one, other = home(tmp_path / f"one{at}"), home(tmp_path / f"other{at}")
        # Ledgers of earlier turns are out of the way.
        (Path(os.environ["XDG_STATE_HOME"]) / "polyclinic" / "ledgers").write_text(f"{one}\n{other}\n")
        done = subprocess.run(
            [sys.executable, "-c", KILLED, str(one), str(data), str(at)],
            capture_output=True, text=True, timeout=120, check=False,
        )  # fmt: skip
        if at == 1000:
            assert done.stdout.startswith("charged"), done.stderr
        else:
            assert done.returncode == -signal.SIGKILL, (at, done.stdout)
        if done.stdout.startswith("charged"):
            with pytest.raises(Refusal):
                apart(other, PATIENTS, data)
        else:
            apart(one, PATIENTS, data)  # the next attempt goes through, and the lists are whole
