"""The preflight in words and as one HTML page; both stay at the site."""

from __future__ import annotations

from html import escape
from typing import Any

_STYLE = """
:root{--ink:#1b2430;--soft:#5b6776;--line:#dde3ea;--paper:#fff;
--stop:#8f1d2c;--error:#b4461b;--warning:#8a6a00;--note:#4a6072}
body{font:15px/1.5 system-ui,sans-serif;color:var(--ink);background:#f4f6f9;margin:0}
main{max-width:1000px;margin:0 auto;padding:32px 24px 64px}
h1{font-size:24px;margin:0 0 4px}h2{font-size:17px;margin:32px 0 8px}p{margin:4px 0;color:var(--soft)}
.numbers{display:flex;flex-wrap:wrap;gap:12px;margin:20px 0}
.numbers div{background:var(--paper);border:1px solid var(--line);border-radius:8px;
padding:10px 16px;min-width:110px}
.numbers b{display:block;font-size:22px}.numbers span{color:var(--soft);font-size:13px}
.finding{background:var(--paper);border:1px solid var(--line);border-left:5px solid var(--c);
border-radius:8px;padding:12px 16px;margin:10px 0}
.finding b{color:var(--c);text-transform:uppercase;font-size:12px;letter-spacing:.05em;margin-right:8px}
.finding .count{float:right;font-variant-numeric:tabular-nums;color:var(--soft)}
.finding ul{margin:8px 0 0;padding-left:18px}
.finding li{overflow-wrap:anywhere;color:var(--soft);font-size:13px}
code{font-size:13px}table{border-collapse:collapse;width:100%;
background:var(--paper);border:1px solid var(--line)}
td,th{text-align:left;padding:6px 10px;border-bottom:1px solid var(--line);font-size:14px;vertical-align:top}
"""
_NOTHING = "default-src 'none'; style-src 'unsafe-inline'"
NOTHING = "default-src 'none'; style-src 'unsafe-inline'"
OLDER = (
    "the snapshot of this folder was made of another list, and approvals stay bound to it: run `snapshot` "
    "again, then `approve` again"
)
PRIVATE = "This page is about patients. It stays at this site."


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
        lines += [f"{'':18}{_example(example)}" for example in row["examples"][:3]]
    if not facts["findings"]:
        lines.append("nothing was found")
    return "\n".join([*lines, "", *_fixed(facts)])


def _example(example: dict[str, str]) -> str:
    return f"{example['where']}: {example['detail']}"


def _fixed(facts: dict[str, Any]) -> list[str]:
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
    numbers = {
        f"{facts['unit']}s": f"{facts['patients']:,}",
        "images": f"{facts['images']:,}",
        "captions": f"{facts['captions']:,}",
        f"images a {facts['unit']}": f"{spread['least']} to {spread['most']}",
    }
    cards = "".join(
        f"<div><b>{value}</b><span>{escape(name)}</span></div>" for name, value in numbers.items()
    )
    found = "".join(_finding(row) for row in facts["findings"]) or "<p>Nothing was found.</p>"
    after = "".join(f"<p>{escape(line)}</p>" for line in _fixed(facts))
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Preflight</title>'
        f'<meta http-equiv="Content-Security-Policy" content="{NOTHING}">'
        f"<style>{_STYLE}</style></head><body><main><h1>Preflight of the data</h1>"
        f"<p><code>{escape(facts['folder'])}</code>, read as {escape(facts['source'])}</p><p>{PRIVATE}</p>"
        f'<div class="numbers">{cards}</div><h2>Findings</h2>{found}{after}{_labels(facts["labels"])}'
        "</main></body></html>\n"
    )


def _finding(row: dict[str, Any]) -> str:
    examples = "".join(f"<li>{escape(_example(example))}</li>" for example in row["examples"])
    return (
        f'<div class="finding" style="--c:var(--{row["severity"]})">'
        f'<span class="count">{row["count"]:,}</span>'
        f"<b>{row['severity']}</b>{escape(row['title'])} <code>{escape(row['code'])}</code>"
        f"<p>{escape(row['remedy'])}</p><ul>{examples}</ul></div>"
    )


def _labels(labels: dict[str, Any]) -> str:
    if not labels:
        return ""
    rows = "".join(
        f"<tr><td>{escape(name)}</td><td>{label['share']:.0%}</td><td>{label['values']:,}</td><td>"
        + escape(", ".join(f"{value} ({count:,})" for value, count in label["most"].items()))
        + "</td></tr>"
        for name, label in labels.items()
    )
    return (
        "<h2>Labels</h2><table><tr><th>label</th><th>images that have it</th><th>values</th>"
        f"<th>the commonest</th></tr>{rows}</table>"
    )
