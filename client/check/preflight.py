"""The whole preflight: table, images, duplicates, captions; what is accepted and what is quarantined."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from polyclinic.client.check import seen as packed
from polyclinic.client.check.captions import Limit, examine
from polyclinic.client.check.codes import CODES, SEVERITIES
from polyclinic.client.check.duplicates import nearly_same, same
from polyclinic.client.check.fix import fix as write_lists
from polyclinic.client.check.seen import Example, Seen
from polyclinic.client.check.store import Store, opened
from polyclinic.client.check.workers import Workers, started
from polyclinic.client.intake import data_home, patient_key
from polyclinic.client.population import compare
from polyclinic.client.population import words as beside
from polyclinic.common.data.pixels import spread
from polyclinic.common.data.pixels import workers as workers_here
from polyclinic.common.data.sources import read_table
from polyclinic.common.data.table import Record, Table
from polyclinic.common.generator_settings import GeneratorSettings
from polyclinic.common.progress import track
from polyclinic.common.refusals import BadInput
from polyclinic.common.settings import DataSettings

EXAMPLES = 5
# A look that says nothing about the image itself is asked for again next time.
AGAIN = {"decoder-crashed", "decoder-hung"}


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
            kept.append((_printable(where), _printable(detail)))

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
    for other in (others := compare(home, data, folder, table.records)):
        if other.common != 0:
            findings.add("charged-elsewhere", str(other.home), beside(other, data.unit))
    with packed.opened(len(table.records), data_home(home)) as seen:
        with opened(data_home(home) / "looks.sqlite") as store, started() as workers:
            _look_at_all(table.records, store, workers, seen, findings, data.image_size)
        _find_duplicates(table.records, seen, findings)
    captions = _check_captions(table.records, generator, findings)
    facts = {
        "folder": str(folder.resolve()),
        "source": data.source,
        "unit": data.unit,
        **_counts(table),
        "looked_at": len(table.records) - seen.remembered,
        "remembered": seen.remembered,
        "apart_from": [beside(other, data.unit) for other in others if other.common == 0],
        "findings": findings.rows(),
    }
    if not fix:
        return facts
    stops = [code for code in findings.counts if findings.severity(code) == "stop"]
    if stops:
        return facts | {"fixed": False, "waits_for": stops}
    return facts | write_lists(home, folder, data, table, seen, captions)


def _look_at_all(
    records: list[Record], store: Store, workers: Workers, seen: Seen, findings: Findings, wanted: int
) -> None:
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
        for content, look, known in spread(act, records, threads):
            place = seen.add(content, look, known=known)
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


def _printable(text: str) -> str:
    """A file's name need be no UTF-8; a report is."""
    return text.encode("utf-8", "backslashreplace").decode()


def _find_duplicates(records: list[Record], seen: Seen, findings: Findings) -> None:
    equal = same(seen.pixels)
    _say(records, equal, "duplicate", findings)
    known = {place: number for number, group in enumerate(equal) for place in group}
    with track("compare images", 1) as advance:
        places, hashes, fine = seen.comparable()
        found = nearly_same(hashes, fine)
        near = [[int(places[i]) for i in group] for group in found.groups]
        advance()
    for place in places[found.cut]:
        findings.add("near-duplicates-cut", records[place].name, "compared with its nearest alone")
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
