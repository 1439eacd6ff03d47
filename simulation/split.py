"""From one table to hospitals: which patients are at which site, and which are the public reference.

Every patient is placed by a keyed hash of the id and by public numbers only, so adding or removing one
patient moves nobody else (PRIVACY.md, rule 7).
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Literal

import numpy as np

from polyclinic.common.data.holdout import part_of, position
from polyclinic.common.data.table import Record, patients_of
from polyclinic.common.refusals import BadInput


@dataclass
class Split:
    """A table divided by patient.

    Attributes:
        sites: Site name to its records, sorted by patient and image; a site may be empty.
        reference: Records of the coordinator's public reference, sorted in the same way.
    """

    sites: dict[str, list[Record]]
    reference: list[Record]


def split_table(
    records: list[Record],
    *,
    by: Literal["site", "dirichlet"],
    reference_fraction: float,
    key: str,
    dirichlet_alpha: float = 1.0,
    site_names: list[str] | None = None,
    label: str | None = None,
) -> Split:
    """Divide a table into a public reference and sites; a patient is in one place only.

    Args:
        records: The table.
        by: "site" takes the sites of the table; "dirichlet" makes sites whose shares of each value of
            `label` are drawn from a symmetric Dirichlet distribution.
        reference_fraction: Probability that a patient belongs to the reference, 0 to below 1.
        key: Name of the split; another key places the patients anew.
        dirichlet_alpha: Concentration, above 0; the smaller, the more the sites' case mixes differ.
        site_names: The sites. Needed for "dirichlet"; for "site" it must name the table's sites, and
            gives their order.
        label: Label that "dirichlet" skews; a patient's value is that of the first image by name.

    Raises:
        BadInput: A patient on two sites, a record without site or label, or arguments that do not fit.
    """
    patients = patients_of(records)
    _check_one_site(patients)
    if not 0 <= reference_fraction < 1:
        raise BadInput(f"reference_fraction is {reference_fraction}; it must be at least 0 and below 1")
    if site_names is not None and len(set(site_names)) < len(site_names):
        raise BadInput("site_names names a site twice; name each once")

    if by == "site":
        place = _by_site(patients, site_names)
        names = site_names or sorted(set(place.values()))
    elif by == "dirichlet":
        if not site_names or not label:
            raise BadInput('a split by "dirichlet" needs site_names and label; give both')
        place = _by_dirichlet(patients, site_names, label, dirichlet_alpha, key)
        names = site_names
    else:
        raise BadInput(f'a split is by "site" or "dirichlet", not by "{by}"')

    split = Split(sites={name: [] for name in names}, reference=[])
    shares = {"reference": reference_fraction, "site": 1 - reference_fraction}
    for patient, group in patients.items():
        held_out = part_of(patient, key, shares) == "reference"
        (split.reference if held_out else split.sites[place[patient]]).extend(group)
    return split


def _check_one_site(patients: dict[str, list[Record]]) -> None:
    """Refuse a patient whose records name two sites: two people with one id, or one person twice."""
    for patient, group in patients.items():
        sites = sorted({record.site for record in group if record.site is not None})
        if len(sites) > 1:
            raise BadInput(
                f"patient {patient} is on the sites {' and '.join(sites)}; keep each patient on one site, "
                "or give different people different ids"
            )


def _by_site(patients: dict[str, list[Record]], site_names: list[str] | None) -> dict[str, str]:
    """Place each patient on the site of the table."""
    place: dict[str, str] = {}
    for patient, group in patients.items():
        for record in group:
            if record.site is None:
                raise BadInput(f"{record.name} has no site; fill the site column, or split by dirichlet")
            place[patient] = record.site
    if site_names is not None and set(site_names) != set(place.values()):
        raise BadInput(
            f"the table's sites are {', '.join(sorted(set(place.values())))} but the study names "
            f"{', '.join(sorted(site_names))}; make them the same"
        )
    return place


def _by_dirichlet(
    patients: dict[str, list[Record]], site_names: list[str], label: str, alpha: float, key: str
) -> dict[str, str]:
    """Place each patient by its hash within the site shares of its label's value."""
    if not (np.isfinite(alpha) and alpha > 0):
        raise BadInput(f"dirichlet_alpha is {alpha}; it must be a number above 0")
    edges: dict[str, np.ndarray] = {}
    place: dict[str, str] = {}
    for patient, group in patients.items():
        first = group[0]
        if label not in first.labels:
            raise BadInput(f"{first.name} has no label {label}; add the column, or name another label")
        value = first.labels[label]
        if value not in edges:
            edges[value] = np.cumsum(_shares(len(site_names), alpha, key, value))
        # A key of its own: the hold-out has already used where the patient lies under `key`.
        where = int(np.searchsorted(edges[value], position(patient, f"{key}/sites"), side="right"))
        place[patient] = site_names[min(where, len(site_names) - 1)]
    return place


def _shares(sites: int, alpha: float, key: str, value: str) -> np.ndarray:
    """Draw the public shares of the sites for one label value, from (key, value) only."""
    digest = hashlib.blake2b(f"{len(key)}:{key}{value}".encode(), digest_size=16).digest()
    return np.random.default_rng(int.from_bytes(digest, "big")).dirichlet([alpha] * sites)
