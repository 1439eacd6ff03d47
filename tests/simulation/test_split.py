"""Splits keep patients whole, move nobody when one patient leaves, and skew as asked."""

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from polyclinic.common.data.table import Record
from polyclinic.common.refusals import BadInput
from polyclinic.simulation.split import Split, split_table

NAMES = ["a", "b", "c", "d"]


def table(patients: int = 200) -> list[Record]:
    """Patients of three hospitals with 1 to 3 images; the finding differs between a patient's images."""
    rng = np.random.default_rng(0)
    records = []
    for number in range(patients):
        for image in range(int(rng.integers(1, 4))):
            labels = {"finding": str(rng.choice(["none", "polyp", "ulcer"]))}
            path = Path(f"images/{number:04d}-{image}.png")
            records.append(Record(f"p{number:04d}", path, ("x",), f"site-{number % 3}", labels))
    rng.shuffle(records)  # type: ignore[arg-type]
    return records


def split(
    records: list[Record], by: str, key: str = "k", alpha: float = 0.5, reference: float = 0.2
) -> Split:
    if by == "site":
        return split_table(records, by="site", reference_fraction=reference, key=key)
    return split_table(
        records,
        by="dirichlet",
        reference_fraction=reference,
        key=key,
        dirichlet_alpha=alpha,
        site_names=NAMES,
        label="finding",
    )


def places(done: Split) -> dict[str, set[str]]:
    """Where each patient is, by name."""
    found: dict[str, set[str]] = {}
    for name, group in [*done.sites.items(), ("reference", done.reference)]:
        for record in group:
            found.setdefault(record.patient, set()).add(name)
    return found


@pytest.mark.parametrize("by", ["site", "dirichlet"])
def test_every_record_is_in_one_place_with_its_patient(by: str) -> None:
    records = table()
    done = split(records, by)
    together = [record for group in [*done.sites.values(), done.reference] for record in group]
    assert sorted(map(repr, together)) == sorted(map(repr, records))
    assert all(len(where) == 1 for where in places(done).values())
    assert 0.12 < len({record.patient for record in done.reference}) / 200 < 0.28


def test_sites_of_the_table_are_kept() -> None:
    done = split(table(), "site")
    assert list(done.sites) == ["site-0", "site-1", "site-2"]
    assert all(record.site == name for name, group in done.sites.items() for record in group)
    ordered = split_table(
        table(), by="site", reference_fraction=0, key="k", site_names=["site-2", "site-0", "site-1"]
    )
    assert list(ordered.sites) == ["site-2", "site-0", "site-1"]
    assert ordered.reference == []


@pytest.mark.parametrize("by", ["site", "dirichlet"])
def test_removing_one_patient_moves_nobody_else(by: str) -> None:
    records = table(40)
    whole = places(split(records, by))
    for gone in whole:
        left = places(split([record for record in records if record.patient != gone], by))
        assert left == {patient: where for patient, where in whole.items() if patient != gone}


def test_removing_the_only_patient_with_a_value_moves_nobody_else() -> None:
    records = [*table(40), Record("rare", Path("z.png"), ("x",), "site-0", {"finding": "rare"})]
    whole = places(split(records, "dirichlet"))
    assert places(split(records[:-1], "dirichlet")) == {p: w for p, w in whole.items() if p != "rare"}


@pytest.mark.parametrize("by", ["site", "dirichlet"])
def test_order_of_the_table_does_not_matter_but_the_key_does(by: str) -> None:
    records = table()
    assert split(records, by) == split(records[::-1], by)
    assert split(records, by) != split(records, by, key="other")


def test_reference_does_not_depend_on_how_sites_are_made() -> None:
    assert split(table(), "site").reference == split(table(), "dirichlet").reference


def skew(alpha: float) -> float:
    """Mean total variation distance between a site's case mix and that of all sites, over keys."""
    distances = []
    for key in range(12):
        done = split(table(), "dirichlet", key=str(key), alpha=alpha, reference=0)
        counts = np.array(
            [
                [
                    sum(record.labels["finding"] == value for record in group)
                    for value in ("none", "polyp", "ulcer")
                ]
                for group in done.sites.values()
            ],
            dtype=float,
        )
        overall = counts.sum(0) / counts.sum()
        mixes = counts[counts.sum(1) > 0] / counts[counts.sum(1) > 0].sum(1, keepdims=True)
        distances.append(float(np.abs(mixes - overall).sum(1).mean() / 2))
    return float(np.mean(distances))


def test_case_mix_differs_more_as_alpha_falls() -> None:
    assert all(more > 1.2 * less for more, less in pairwise([skew(0.1), skew(1), skew(100)]))


def test_large_alpha_fills_sites_evenly_whatever_the_reference_takes() -> None:
    # Sharing one hash between hold-out and site would leave the first site short here.
    done = split(table(2000), "dirichlet", alpha=1e6, reference=0.5)
    shares = np.array(
        [len({record.patient for record in group}) for group in done.sites.values()], dtype=float
    )
    assert np.abs(shares / shares.sum() - 0.25).max() < 0.06


def test_mistakes_are_named() -> None:
    records = table(10)
    twice = [*records, replace(records[0], image=Path("other.png"), site="elsewhere")]
    for by in ("site", "dirichlet"):
        with pytest.raises(
            BadInput, match=f"patient {records[0].patient} is on the sites elsewhere and site-"
        ):
            split(twice, by)
    with pytest.raises(BadInput, match="has no site"):
        split([*records, replace(records[0], image=Path("new.png"), patient="new", site=None)], "site")
    with pytest.raises(BadInput, match="has no label finding"):
        split([*records, Record("new", Path("new.png"), ("x",))], "dirichlet")
    with pytest.raises(BadInput, match="the study names site-0"):
        split_table(records, by="site", reference_fraction=0, key="k", site_names=["site-0"])
    with pytest.raises(BadInput, match="dirichlet_alpha is 0"):
        split(records, "dirichlet", alpha=0)
    with pytest.raises(BadInput, match="reference_fraction is 1"):
        split(records, "site", reference=1)
    with pytest.raises(BadInput, match="give both"):
        split_table(records, by="dirichlet", reference_fraction=0, key="k", site_names=NAMES)
