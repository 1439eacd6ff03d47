"""The preflight in words and as one HTML page; both stay at the site."""

from __future__ import annotations

from importlib import resources
from typing import Any

from jinja2 import Environment

NOTHING = "default-src 'none'; style-src 'unsafe-inline'"
OLDER = (
    "the snapshot of this folder was made of another list, and approvals stay bound to it: run `snapshot` "
    "again, then `approve` again"
)
PRIVATE = "This page is about patients. It stays at this site."
HEADINGS = {
    "stop": (
        "A person decides first",
        "Nothing is accepted before: what compares patients is never resolved by a rule.",
    ),
    "error": (
        "Put aside by --fix",
        "For what is visible in the image or caption alone; no original is touched.",
    ),
    "warning": ("Stays in, and deserves a look", "`--quarantine CODE` treats one as an error."),
    "note": ("Good to know", "Nothing to do."),
}


def words(facts: dict[str, Any]) -> str:
    """Say what was found, for a terminal."""
    spread = facts["images_a_patient"]
    lines = [
        f"{facts['folder']} ({facts['source']}): {facts['images']:,} images of {facts['patients']:,} "
        f"{facts['unit']}s, {facts['captions']:,} captions; images a {facts['unit']}: {spread['least']} to "
        f"{spread['most']}, median {spread['median']:g}",
        f"looked at {facts['looked_at']:,} images, remembered {facts['remembered']:,}",
        *facts["apart_from"],
    ]
    for row in facts["findings"]:
        lines.append(
            f"\n{row['severity']:8}{row['count']:>8,}  {row['title']} [{row['code']}]; {row['remedy']}"
        )
        lines += [f"{'':18}{example['where']}: {example['detail']}" for example in row["examples"][:3]]
    if not facts["findings"]:
        lines.append("nothing was found")
    return "\n".join([*lines, "", *_after(facts)])


def _after(facts: dict[str, Any]) -> list[str]:
    """Say what `--fix` did, and what comes next."""
    if facts.get("fixed"):
        return [
            *([OLDER] if facts["older_snapshot"] else []),
            f"accepted {facts['accepted']:,} images of {facts['accepted_patients']:,} {facts['unit']}s: "
            f"{facts['accepted_list']}",
            f"quarantined {facts['quarantined']:,} images or rows, left out {facts['captions_left_out']:,} "
            f"captions: {facts['quarantine_list']}; no original was touched",
            f"next: polyclinic-client snapshot {facts['folder']}",
        ]
    if "waits_for" in facts:
        return [f"nothing was accepted: a person must first decide about {', '.join(facts['waits_for'])}"]
    return []


def page(facts: dict[str, Any]) -> str:
    """Write the page: self-contained, it loads nothing."""
    spread = facts["images_a_patient"]
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in facts["findings"]:
        groups.setdefault(row["severity"], []).append(
            row | {"examples": [_short(e, facts) for e in row["examples"]]}
        )
    tone, verdict = _verdict(facts, groups)
    after = _after(facts)
    if not facts.get("fixed") and tone != "stop":
        after = [f"next: polyclinic-client check {facts['folder']} --fix"]
    template = (
        resources.files("polyclinic.client.check").joinpath("report.html.j2").read_text(encoding="utf-8")
    )
    return Environment(autoescape=True).from_string(template).render(
        facts=facts,
        nothing=NOTHING,
        private=PRIVATE,
        tone=tone,
        verdict=verdict,
        after=[*facts["apart_from"], *after],
        groups=groups,
        headings=HEADINGS,
        numbers={
            f"{facts['unit']}s": f"{facts['patients']:,}",
            "images": f"{facts['images']:,}",
            "captions": f"{facts['captions']:,}",
            f"images a {facts['unit']}": f"{spread['least']} to {spread['most']}",
        },
    )  # fmt: skip


def _verdict(facts: dict[str, Any], groups: dict[str, list[dict[str, Any]]]) -> tuple[str, str]:
    """Answer whether the folder can be used: the severity that decides, and a sentence."""
    counts = {severity: sum(row["count"] for row in rows) for severity, rows in groups.items()}
    look = f" {counts['warning']:,} warnings deserve a look." if counts.get("warning") else ""
    if counts.get("stop"):
        return (
            "stop",
            f"A person must decide about {counts['stop']:,} findings before anything can be used.{look}",
        )
    if facts.get("fixed"):
        return "good", (
            f"{facts['accepted']:,} images of {facts['accepted_patients']:,} {facts['unit']}s are accepted, "
            f"{facts['quarantined']:,} images or rows are put aside.{look}"
        )
    if counts.get("error"):
        return "error", f"{counts['error']:,} findings keep the folder from being used as it is.{look}"
    return "good", f"The folder can be used as it is.{look}"


def _short(example: dict[str, str], facts: dict[str, Any]) -> dict[str, str]:
    """Leave the data folder's own path out of an example: the page names it once."""
    return {name: text.replace(f"{facts['folder']}/", "") for name, text in example.items()}
