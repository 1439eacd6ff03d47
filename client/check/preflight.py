"""The whole preflight: table, images, duplicates, captions; what is accepted and what is quarantined."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from polyclinic.client.check.captions import Limit, examine
from polyclinic.client.check.codes import CODES, SEVERITIES
from polyclinic.client.check.duplicates import nearly_same, same
from polyclinic.client.check.look import THUMB
from polyclinic.client.check.store import Store, opened
from polyclinic.client.check.workers import Workers, started
from polyclinic.client.intake import (
    accepted_path,
    as_line,
    data_home,
    patient_key,
    quarantine_path,
    write_list,
)
from polyclinic.common.data.pixels import spread
from polyclinic.common.data.pixels import workers as workers_here
from polyclinic.common.data.sources import read_table
from polyclinic.common.data.table import Record, Table
from polyclinic.common.progress import track
from polyclinic.common.refusals import BadInput
from polyclinic.common.settings import DataSettings, GeneratorSettings

EXAMPLES = 5
# A look that says nothing about the image itself is asked for again next time.
AGAIN = {"decoder-crashed", "decoder-hung"}
Example = tuple[str, str]


@dataclass
class Seen:
    """What is known of the images of a table, by their places in it.

    Attributes:
        contents: Content hashes; "" where a file could not be read at all.
        pixels: Hashes of decoded pixels; "" where it could not be decoded.
        compared: Places that near-duplicates are looked for among.
        hashes: Of those, `[M]` uint64.
        thumbs: Of those, `[M, THUMB * THUMB]` uint8: one kilobyte an image.
        quarantined: Place to (code, detail).
        remembered: Images that an earlier check had looked at.
    """

    contents: list[str] = field(default_factory=list)
    pixels: list[str] = field(default_factory=list)
    compared: list[int] = field(default_factory=list)
    hashes: np.ndarray = field(default_factory=lambda: np.empty(0, dtype=np.uint64))
    thumbs: np.ndarray = field(default_factory=lambda: np.empty((0, THUMB * THUMB), dtype=np.uint8))
    quarantined: dict[int, Example] = field(default_factory=dict)
    remembered: int = 0


@dataclass
class Findings:
    """Counts and a few examples by code; `harder` are warnings that a person wants treated as errors."""

    harder: frozenset[str] = frozenset()
    counts: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[Example]] = field(default_factory=dict)

    def add(self, code: str, where: str, detail: str) -> None:
        """Count one, and keep the first few."""
        self.counts[code] += 1
        kept = self.examples.setdefault(code, [])
        if len(kept) < EXAMPLES:
            kept.append((where, detail))

    def severity(self, code: str) -> str:
        """Severity of a code, as this person wants it."""
        return "error" if code in self.harder else CODES[code].severity

    def rows(self) -> list[dict[str, Any]]:
        """JSON-safe, the gravest first."""
        order = sorted(self.counts, key=lambda c: (SEVERITIES.index(self.severity(c)), list(CODES).index(c)))
        return [
            {
                "code": code,
                "severity": self.severity(code),
                "title": CODES[code].title,
                "count": self.counts[code],
                "remedy": CODES[code].remedy,
                "examples": [{"where": where, "detail": text} for where, text in self.examples[code]],
            }
            for code in order
        ]


def preflight(
    home: Path,
    folder: Path,
    data: DataSettings,
    generator: GeneratorSettings,
    *,
    fix: bool = False,
    harder: frozenset[str] = frozenset(),
) -> dict[str, Any]:
    """Check a data folder; originals are only ever read.

    Args:
        home: The site's home.
        folder: The data folder.
        data: How it is read, and the image size it is wanted at.
        generator: Whose text encoder limits captions.
        fix: Write what is accepted and what is quarantined.
        harder: Codes of warnings to quarantine for, too.

    Returns:
        JSON-safe facts: counts, labels, findings, and what `fix` wrote.

    Raises:
        BadInput: The source as a whole cannot be read, or a code of `harder` may not lead to a quarantine.
    """
    for code in harder:
        if code not in CODES or CODES[code].across or CODES[code].severity == "stop":
            raise BadInput(
                f"--quarantine {code}: not a finding that one image alone shows; choose of "
                + ", ".join(c for c, row in CODES.items() if row.severity == "warning" and not row.across)
            )
    table = read_table(data, folder, patient_key(home, data))
    findings = Findings(harder)
    for problem in table.problems:
        findings.add("left-aside" if problem.skipped else problem.code, problem.where, problem.what)
    with opened(data_home(home) / "looks.sqlite") as store, started() as workers:
        seen = _look_at_all(table.records, store, workers, findings, data.image_size)
    _find_duplicates(table.records, seen, findings)
    captions = _check_captions(table.records, generator, findings)
    facts = {
        "folder": str(folder.resolve()),
        "source": data.source,
        "unit": data.unit,
        **_counts(table),
        "looked_at": len(table.records) - seen.remembered,
        "remembered": seen.remembered,
        "findings": findings.rows(),
    }
    return facts | (_fix(home, folder, data, table, seen, captions, findings) if fix else {})


def _look_at_all(
    records: list[Record], store: Store, workers: Workers, findings: Findings, wanted: int
) -> Seen:
    seen = Seen(
        hashes=np.zeros(len(records), np.uint64), thumbs=np.zeros((len(records), THUMB * THUMB), np.uint8)
    )

    def act(record: Record) -> tuple[str, dict[str, Any], bool]:
        try:
            content = store.content_of(record)
        except (OSError, BadInput) as error:
            return "", {"found": [("unreadable", getattr(error, "what", str(error)))]}, False
        suffix = record.image.suffix.lower()
        known = store.find(content, suffix)
        if known is not None:
            return content, known, True
        fresh = workers.look(record.image, record.part)
        if not AGAIN & {code for code, _ in fresh["found"]}:
            store.keep(content, suffix, fresh)
        return content, fresh, False

    threads = min(workers_here(), 1 + len(records) // 64)  # a worker takes most of a second to start
    with track("look at images", len(records)) as advance:
        for place, (content, look, known) in enumerate(spread(act, records, threads)):
            seen.remembered += known
            seen.contents.append(content)
            seen.pixels.append(look.get("pixels", ""))
            if "thumb" in look:
                seen.hashes[len(seen.compared)] = int(look["hash"], 16)
                seen.thumbs[len(seen.compared)] = np.frombuffer(bytes.fromhex(look["thumb"]), np.uint8)
                seen.compared.append(place)
            said = [*look["found"]]
            if "size" in look and 16 <= min(look["size"]) < wanted:
                said.append(
                    ("upscaled", f"{look['size'][0]} x {look['size'][1]} pixels, {wanted} are wanted")
                )
            for code, detail in said:
                findings.add(code, records[place].name, detail)
                if findings.severity(code) == "error":
                    seen.quarantined.setdefault(place, (code, detail))
            advance()
    seen.hashes, seen.thumbs = seen.hashes[: len(seen.compared)], seen.thumbs[: len(seen.compared)]
    return seen


def _find_duplicates(records: list[Record], seen: Seen, findings: Findings) -> None:
    there = [place for place, pixels in enumerate(seen.pixels) if pixels]
    equal = [[there[i] for i in group] for group in same([seen.pixels[place] for place in there])]
    _say(records, equal, "duplicate", findings)
    known = {place: number for number, group in enumerate(equal) for place in group}
    with track("compare images", 1) as advance:
        near = [[seen.compared[i] for i in group] for group in nearly_same(seen.hashes, seen.thumbs)]
        advance()
    # A group of equal pictures has been said already.
    near = [group for group in near if len({known.get(place, -1 - place) for place in group}) > 1]
    _say(records, near, "near-duplicate", findings)


def _say(records: list[Record], groups: list[list[int]], kind: str, findings: Findings) -> None:
    for group in groups:
        across = len({records[place].patient for place in group}) > 1
        names = [records[place].name for place in group]
        shown = " = ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
        findings.add(f"{kind}-{'across-patients' if across else 'within-patient'}", names[0], shown)


def _check_captions(
    records: list[Record], generator: GeneratorSettings, findings: Findings
) -> dict[str, Example]:
    """Examine each distinct caption once; returns those that may not be used, with the reason."""
    distinct = sorted({caption for record in records for caption in record.captions})
    limit = Limit(generator)
    bad: dict[str, Example] = {}
    found: dict[str, list[Example]] = {}
    with track("read captions", len(distinct)) as advance:
        for caption, tokens in zip(distinct, limit.lengths(distinct), strict=True):
            said = examine(caption)
            if tokens > limit.most:
                said.append(("caption-too-long", f"{tokens} tokens of {limit.most}"))
            if said:
                found[caption] = said
            for code, detail in said:
                if findings.severity(code) == "error":
                    bad.setdefault(caption, (code, detail))
            advance()
    for record in records:
        for caption in record.captions:
            for code, detail in found.get(caption, ()):
                findings.add(code, record.name, detail)
        if len(set(record.captions)) < len(record.captions):
            findings.add("caption-repeated", record.name, f"{len(record.captions)} captions")
    return bad


def _counts(table: Table) -> dict[str, Any]:
    images = Counter(record.patient for record in table.records)
    sizes = sorted(images.values()) or [0]
    names = sorted({name for record in table.records for name in record.labels})
    labels = {}
    for name in names:
        values = Counter(record.labels.get(name, "") for record in table.records)
        absent = values.pop("", 0)
        labels[name] = {
            "share": 1 - absent / len(table.records),
            "values": len(values),
            "most": dict(values.most_common(6)),
        }
    return {
        "patients": len(images),
        "images": len(table.records),
        "captions": sum(len(record.captions) for record in table.records),
        "images_a_patient": {"least": sizes[0], "median": median(sizes), "most": sizes[-1]},
        "labels": labels,
    }


def _fix(
    home: Path,
    folder: Path,
    data: DataSettings,
    table: Table,
    seen: Seen,
    captions: dict[str, Example],
    findings: Findings,
) -> dict[str, Any]:
    """Write the accepted table and the quarantine, unless a person must decide something first."""
    stops = [code for code in findings.counts if findings.severity(code) == "stop"]
    if stops:
        return {"fixed": False, "waits_for": stops}
    accepted, aside = [], []
    for place, record in enumerate(table.records):
        kept = tuple(caption for caption in record.captions if caption not in captions)
        line = as_line(record, folder, seen.contents[place])
        reason = seen.quarantined.get(place) or (None if kept else captions[record.captions[0]])
        if reason:
            aside.append({**line, "captions": [], "code": reason[0], "detail": reason[1]})
        else:
            accepted.append({**line, "captions": list(kept)})
    aside += [
        {"image": problem.image, "code": problem.code, "detail": str(problem)}
        for problem in table.problems
        if not problem.skipped
    ]
    if not accepted:
        raise BadInput(f"{folder}: nothing is left after the quarantine; see the report")
    paths = accepted_path(home, data, folder), quarantine_path(home, data, folder)
    write_list(paths[1], aside)
    write_list(paths[0], accepted)
    lost = sum(len(r.captions) for r in table.records) - sum(len(line["captions"]) for line in accepted)
    return {
        "fixed": True,
        "accepted": len(accepted),
        "accepted_patients": len({line["patient"] for line in accepted}),
        "quarantined": len(aside),
        "captions_left_out": lost,
        "accepted_list": str(paths[0]),
        "quarantine_list": str(paths[1]),
    }
