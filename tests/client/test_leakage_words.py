"""What the gate tells a person: before they approve, and when they decide."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from polyclinic.client.approval import find_approval
from polyclinic.client.approval_terms import terms, words
from polyclinic.client.leakage import Findings, Looks, Pair, folder_of, nearest_pair, read_findings
from polyclinic.client.leakage_page import page, verdict_words
from polyclinic.client.membership import idle_words
from polyclinic.common.data.table import Record
from polyclinic.common.features.near import thumbnails
from polyclinic.common.generators.base import BaseFiles
from polyclinic.common.refusals import BadInput
from polyclinic.common.settings import DataSettings
from polyclinic.common.study import NearScale
from tests.client.test_leakage import give_final

SCALE = NearScale(features=0.2, pixels=0.2, chance=0.02, patients=49, more=1)


def pair(ratio: float, record: Record | None = None) -> Pair:
    found = record or Record("p", Path("p.png"), ())
    return Pair(
        patient=found.patient,
        image=found.image,
        part="",
        drawn=0,
        features=1.0,
        pixels=0.2 * ratio,
        near=ratio < 1,
        ratio=ratio,
    )


def findings(ratios: list[float], chance: float, records: list[Record] | None = None) -> Findings:
    given: Sequence[Record | None] = records or [None] * len(ratios)
    return Findings(
        run="tiny-00000000",
        model="m" * 64,
        created="now",
        images=1,
        seed="s",
        scale=SCALE,
        trained=[pair(ratio, record) for ratio, record in zip(ratios, given, strict=True)],
        held_out=[],
        expected=0.04 * len(ratios),
        chance=chance,
        membership=None,
    )


def test_an_exact_copy_is_a_finding_by_itself_whatever_the_count() -> None:
    generator = torch.Generator().manual_seed(8)
    images, features = (
        torch.rand(12, 3, 32, 32, generator=generator),
        torch.randn(12, 20, generator=generator),
    )
    small = thumbnails(images)
    drawn = Looks(features[:9], small[:9])
    pairs = [
        nearest_pair([Record(f"p{i}", Path(f"{i}.png"), ())], Looks(features[[i]], small[[i]]), drawn, SCALE)
        for i in range(12)
    ]
    assert [found.near for found in pairs] == [True] * 9 + [False] * 3
    assert [found.drawn for found in pairs[:9]] == [*range(9)]
    for found in pairs:
        assert Pair.model_validate_json(found.model_dump_json()) == found
    many = findings([2.0] * 200, chance=1.0)
    nine = many.model_copy(update={"trained": [*many.trained, *pairs]})
    assert (nine.advice, nine.exact, nine.found) == ("veto", 9, 9)
    assert "almost exact copies of 9 of 212 patients" in verdict_words(nine)
    assert "9 near copies: look at each" in verdict_words(nine)


@pytest.mark.parametrize("near", [1, 3])
def test_near_copies_that_chance_explains_are_named_and_never_called_nothing(near: int) -> None:
    said = verdict_words(findings([0.7] * near + [1.5] * 30, chance=0.4))
    assert said.startswith(f"{near} near {'copy' if near == 1 else 'copies'}, ")
    assert "look at each" in said
    assert "No near copy" not in said
    assert "No near copy was drawn" in verdict_words(findings([1.5] * 30, chance=1.0))


def test_every_near_pair_is_on_the_page(drawn: list[Record]) -> None:
    records = [*drawn, *drawn, *drawn]
    shown = page(
        findings([0.9] * 30 + [0.1] + [1.5] * 5, 0.5, records), torch.rand(1, 3, 32, 32), DataSettings()
    )
    assert (shown.count(", NEAR<"), shown.count(", ALMOST EXACT<"), shown.count("<figure")) == (30, 1, 31)


def test_a_limit_of_nothing_is_no_scale() -> None:
    for field, value in (("features", 0.0), ("pixels", 0.0), ("pixels", float("nan")), ("more", 0.5)):
        with pytest.raises(ValidationError):
            NearScale.model_validate({**SCALE.model_dump(), field: value})


def test_before_approval_a_site_is_told_what_the_gate_can_find(make_site: Any) -> None:
    site = make_site(
        "allow_not_private = true\n",
        releases={"leakage_gate": True, "held_out": 0.3},
        privacy={"enabled": False, "canaries": 0},
    )
    told = terms(site.home, "site-a", site.resolved, site.records, BaseFiles(vae=site.vae))
    gate, said = told["gate"], " ".join(words(told).split())
    assert gate["trained"] + gate["held_out"] == 12
    assert gate["held_out"] < 5
    assert f"{gate['trained']} patients are trained on and {gate['held_out']} are not" in said
    assert f"the alarm from near copies of {gate['fewest_copied']} of them on" in said
    assert "The membership test cannot be made: fewer than 5 patients on one side (releases.held_out)" in said
    # Forty images of each: chance finds everybody.
    many = [record for record in site.records for _ in range(40)]
    said = " ".join(words(terms(site.home, "a", site.resolved, many, BaseFiles(vae=site.vae))).split())
    assert "its count can raise no alarm" in said


def test_a_membership_test_that_can_find_nothing_says_so() -> None:
    assert "cannot be made" in idle_words(18, 4)
    assert "cannot raise an alarm" in idle_words(5, 5)  # the clearest order comes once in 252
    assert idle_words(18, 5) == ""


def test_findings_that_cannot_be_read_are_to_be_made_again(make_site: Any) -> None:
    site = make_site(
        "allow_not_private = true\n",
        releases={"leakage_gate": True},
        privacy={"enabled": False, "canaries": 0},
    )
    approval = site.approve()
    assert not give_final(site).has_error()
    assert find_approval(site.home, site.resolved.hash) == approval
    folder = folder_of(site.home, approval)
    folder.mkdir(parents=True)
    (folder / "findings.json").write_text(findings([0.5], 0.5).model_dump_json().replace("0.5", "null"))
    with pytest.raises(BadInput, match="run `polyclinic-client leakage"):
        read_findings(site.home, approval)
