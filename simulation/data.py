"""From a study and a data folder to sites and a public reference."""

from __future__ import annotations

import csv
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

from polyclinic.client.intake import site_records
from polyclinic.common.data.holdout import part_of
from polyclinic.common.data.images import open_image
from polyclinic.common.data.sources import REFERENCE_MARK, read_records
from polyclinic.common.data.table import Record
from polyclinic.common.files import write_json_atomic
from polyclinic.common.progress import track
from polyclinic.common.refusals import BadInput
from polyclinic.common.settings import SimulationSettings
from polyclinic.common.study import Study
from polyclinic.simulation.phantom import write_phantoms
from polyclinic.simulation.split import Split, split_table


@dataclass(frozen=True)
class Federation:
    """What one machine plays.

    Attributes:
        settings: The study's simulation table.
        sites: Site name to its records.
        reference: The coordinator's public records.
    """

    settings: SimulationSettings
    sites: dict[str, list[Record]]
    reference: list[Record]


def make_federation(study: Study, home: Path, data: Path | None) -> Federation:
    """Read or draw the data and divide it.

    Args:
        study: Says where the data is from and how it is split.
        home: Phantoms are drawn under it, once.
        data: Data folder, or the folder that holds the sites' own.

    Raises:
        BadInput: No data, or sites other than the study's.
    """
    if study.simulation is None:
        raise BadInput(
            f"study {study.name}: has no [simulation] table; add one with a [simulation.sites.NAME] each"
        )
    settings = study.simulation
    if any(site.folder for site in settings.sites.values()):
        records = _own_folders(study, settings, home, data)
    else:
        records = read_records(study.data, _folder(study, home, data))
    split = _split(study, settings, records)
    empty = [name for name, site in split.sites.items() if not site]
    if empty:
        raise BadInput(
            f"site {empty[0]} has no patients after the split; change simulation.split or its sites"
        )
    return Federation(settings, split.sites, split.reference)


def _own_folders(study: Study, settings: SimulationSettings, home: Path, data: Path | None) -> list[Record]:
    """Read each site's own folder, in its own form; from its snapshot, where one was made in this home.

    Ids of two sites are two patients.
    """
    if data is None:
        raise BadInput(f"study {study.name}: give the folder that holds the sites' folders with --data DIR")
    return [
        replace(record, site=name, patient=f"{name}/{record.patient}")
        for name, site in settings.sites.items()
        for record in site_records(home, site.data(study.data), data / site.folder)
    ]


def _split(study: Study, settings: SimulationSettings, records: list[Record]) -> Split:
    names = list(settings.sites)
    fraction, key = study.reference.fraction, study.reference.key
    if settings.split == "pooled":
        # The same patients as in the split by site, under one roof.
        parts = {"reference": fraction, "site": 1 - fraction}
        held = [r for r in records if part_of(r.patient, key, parts) == "reference"]
        kept = [r for r in records if part_of(r.patient, key, parts) == "site"]
        return Split({names[0]: kept}, held)
    return split_table(
        records,
        by=settings.split,
        reference_fraction=fraction,
        key=key,
        dirichlet_alpha=settings.dirichlet_alpha,
        site_names=names,
        label=settings.dirichlet_label,
    )


def _folder(study: Study, home: Path, data: Path | None) -> Path:
    if study.data.source != "phantoms":
        if data is None:
            raise BadInput(f"study {study.name}: give its data folder with --data DIR")
        return data
    phantoms = study.data.phantoms
    folder = home / "data" / f"phantoms-{phantoms.seed}-{phantoms.patients_per_site}-{study.data.image_size}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    if not folder.exists():
        with track("draw phantoms", 3 * phantoms.patients_per_site) as advance:
            done = 0

            def report(count: int, _: int) -> None:
                nonlocal done
                advance(count - done)
                done = count

            write_phantoms(
                folder,
                patients_per_site=phantoms.patients_per_site,
                seed=phantoms.seed,
                size=study.data.image_size,
                on_progress=report,
            )
    return folder


def write_reference(records: list[Record], folder: Path) -> None:
    """Write the public reference as a data folder of its own, for `polyclinic-server pretrain`.

    Raises:
        BadInput: The folder exists.
    """
    if folder.exists():
        raise BadInput(f"{folder} exists; name a new folder")
    part = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    (part / "images").mkdir(parents=True)
    labels = sorted({label for record in records for label in record.labels})
    with (part / "images.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["image", "caption", "patient", "site", *labels])
        writer.writeheader()
        for number, record in enumerate(records):
            name = _copy(record, part, f"images/{number:06d}")
            facts = {"image": name, "patient": record.patient, "site": record.site or "", **record.labels}
            writer.writerows({**facts, "caption": caption} for caption in record.captions)
    write_json_atomic(part / REFERENCE_MARK, {"form": "folder", "images": len(records)})
    part.rename(folder)


def _copy(record: Record, folder: Path, name: str) -> str:
    """Copy an image file; a frame or row becomes a PNG of its own."""
    suffix = record.image.suffix.lower()
    if record.part or suffix not in (".png", ".jpg", ".jpeg"):
        suffix = ".png"
        open_image(record.image, record.part).save(folder / f"{name}{suffix}")
    else:
        shutil.copyfile(record.image, folder / f"{name}{suffix}")
    return f"{name}{suffix}"
