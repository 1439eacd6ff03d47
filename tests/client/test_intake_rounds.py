"""Small sets in every form go all the way: check, snapshot, approval with its cache, two rounds."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from polyclinic.client.approval import drift, prepare_and_approve
from polyclinic.client.check.preflight import preflight
from polyclinic.client.intake import make_snapshot, site_records
from polyclinic.client.ledger_chain import inspect
from polyclinic.client.training import answer_round
from polyclinic.common.generators.base import BaseFiles
from polyclinic.common.refusals import Refusal
from polyclinic.common.settings import DataSettings
from polyclinic.common.wire_reading import RoundOrder
from tests.common.made_sets import SETS, csv_folder

MakeSite = Callable[..., Any]


def ask(site: Any, number: int) -> bytes:
    order = RoundOrder(round=number, study_hash=site.resolved.hash)
    return answer_round(site.home, order, lambda _: site.state, in_time=lambda: True)


def approve(site: Any, data: DataSettings, folder: Path, *, renew: bool = False) -> Any:
    records = site_records(site.home, data, folder)
    files = BaseFiles(vae=site.vae)
    return prepare_and_approve(site.home, "site-a", site.resolved, records, files, data=folder, renew=renew)


SHORT = ("medvqa", "rocov2 parquet", "dicom")


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[] if n in SHORT else pytest.mark.long) for n in SETS]
)
def test_every_form_goes_through_check_snapshot_cache_and_two_rounds(
    name: str, tmp_path: Path, make_site: MakeSite
) -> None:
    folder = tmp_path / "data"
    data = SETS[name](folder)
    site = make_site(data=data.model_dump())
    facts = preflight(site.home, folder, data, site.resolved.study.generator, fix=True)
    made = make_snapshot(site.home, data, folder)
    approval = approve(site, data, folder)
    assert approval.snapshot_hash == made["snapshot"]
    assert made["images"] == facts["accepted"]
    assert ask(site, 1) != ask(site, 2)
    assert [line["kind"] for line in inspect(site.home)[0]].count("settle") == 2
    assert drift(site.home, approval) == []
    written = (site.home / "ledger.jsonl").read_text() + json.dumps(approval.resolved.model_dump(mode="json"))
    assert approval.snapshot_hash not in written


def test_a_new_snapshot_is_drift_and_inherits_every_charge(tmp_path: Path, make_site: MakeSite) -> None:
    """Rule 8: the ledger is the site's, whatever snapshot it trains on."""
    folder = tmp_path / "data"
    data = csv_folder(folder, 16)
    site = make_site(data=data.model_dump())
    make_snapshot(site.home, data, folder)
    first = approve(site, data, folder)
    ask(site, 1)
    before = inspect(site.home)[0]
    (folder / "images.csv").write_text((folder / "images.csv").read_text().rsplit("\n", 2)[0] + "\n")
    assert drift(site.home, first) == []  # the snapshot stands; the folder may grow beside it
    make_snapshot(site.home, data, folder)
    assert drift(site.home, first) == ["the data"]
    with pytest.raises(Refusal, match="approval-drift"):
        ask(site, 2)
    renewed = approve(site, data, folder, renew=True)
    assert renewed.snapshot_hash != first.snapshot_hash
    assert inspect(site.home)[0][: len(before)] == before
    ask(site, 2)
    assert sum(line["kind"] == "settle" for line in inspect(site.home)[0]) == 2
