"""What people read from a ledger: the spending by study and round, a check of the whole, an export.

Nothing here writes to the ledger or takes its lock, so a site can look while it trains.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from polyclinic.client.ledger import Ledger
from polyclinic.client.ledger_books import Books, open_books
from polyclinic.client.ledger_chain import inspect
from polyclinic.client.policy import Policy, load_policy
from polyclinic.common.chain import Line
from polyclinic.common.files import sha256_file, write_json_atomic
from polyclinic.common.privacy.accounting import History, claim, epsilon_prv
from polyclinic.common.refusals import BadInput, Refusal
from polyclinic.common.wire_reading import echoed

POINTS = 12  # rounds of a study whose epsilon is computed for its curve
BAR = 30  # characters

DETECTED = (
    "detected: a line edited, moved, taken out or put in; lines cut from the end behind ledger.head, a "
    "stored reply or an --anchor; a stored reply changed, lost or never reserved. Not detected: a ledger "
    "that somebody rewrote together with ledger.head and the replies, unless an --anchor from the "
    "coordinator's record contradicts it."
)


def spending(home: Path, delta: float | None = None) -> dict[str, Any]:
    """Add up what a site has spent and set aside.

    Args:
        home: The site's home.
        delta: Epsilon is computed at this delta; by default at each study's own.

    Returns:
        JSON-safe facts; an infinite epsilon is the string "inf".

    Raises:
        Refusal: As `inspect`.
        BadInput: A delta that is none.
    """
    if delta is not None and not 0 < delta < 1:
        raise BadInput(f"--delta {delta:g} must lie between 0 and 1")
    lines, _ = inspect(home)
    ledger = Books(home, lines)
    policy = load_policy(home) if (home / "policy.toml").exists() else None
    studies = [_study(ledger, line, delta) for line in lines if line["kind"] == "earmark"]
    return {
        "site": lines[0].get("site"),
        "simulated": lines[0].get("simulated"),
        "lines": len(lines),
        "head": {"sequence": lines[-1]["sequence"], "hash": lines[-1]["hash"]},
        "studies": studies,
        "total": _total(ledger, policy),
    }


def _study(ledger: Ledger, earmark: Line, delta: float | None) -> dict[str, Any]:
    approval = earmark["approval"]
    everything = ledger.of(approval, "reserve")
    reserved = [line for line in everything if isinstance(line["round"], int)]
    private = earmark["epsilon"] != "inf"
    at = earmark["delta"] if delta is None else delta
    steps = sum(line["steps"] for line in reserved)
    rounds = [
        {
            "round": reserved[n - 1]["round"],
            "steps": sum(line["steps"] for line in reserved[:n]),
            "epsilon": epsilon_prv(_history(ledger, reserved[n - 1]), at) if private else "inf",
        }
        for n in _spread(len(reserved))
    ]
    left = earmark["steps"] - steps
    closed = bool(ledger.of(approval, "close"))
    rounds_left = 0 if closed or not reserved else -(-left // reserved[-1]["steps"])
    return {
        "study": earmark["study"],
        "name": _name(ledger.folder, earmark["study"]),
        "approval": approval,
        "state": "closed" if closed else "complete" if not left else "open",
        "sigma": earmark["sigma"],
        "sampling_rate": earmark["rate"],
        "delta": at,
        "rounds": len(reserved),
        "releases": {
            name: {
                "sigma": noise,
                "epsilon": claim(((noise, 1.0, 1),), at) if private else "inf",
                "spent": any(line["round"] == name for line in everything),
            }
            for name, noise in earmark.get("releases", {}).items()
        },
        "rounds_failed": len(ledger.of(approval, "spent")),
        "steps": steps,
        "steps_set_aside": earmark["steps"],
        "epsilon": claim(ledger.history(approval), at) if private else "inf",
        "epsilon_set_aside": earmark["epsilon"],
        "delta_set_aside": earmark["delta"],
        "rounds_left": rounds_left if reserved or closed else None,
        "seconds_left": _seconds_left(reserved, rounds_left),
        "by_round": rounds,
    }


def _history(ledger: Ledger, last: Line) -> History:
    """What had been reserved under an approval when this line was written."""
    return Ledger(ledger.folder, ledger.lines[: last["sequence"] + 1]).history(last["approval"])


def _spread(count: int) -> list[int]:
    """Up to POINTS of the numbers 1 to count, evenly spread, the last among them."""
    if count <= POINTS:
        return list(range(1, count + 1))
    return [round(1 + (count - 1) * i / (POINTS - 1)) for i in range(POINTS)]


def _seconds_left(reserved: list[Line], rounds_left: int) -> float | None:
    """Time to the end of the schedule at the mean pace of the rounds so far."""
    if len(reserved) < 2:
        return None
    first, last = (datetime.fromisoformat(line["time"]) for line in (reserved[0], reserved[-1]))
    return rounds_left * (last - first).total_seconds() / (len(reserved) - 1)


def _name(home: Path, study: str) -> str | None:
    path = home / "approvals" / f"{study}.json"
    return json.loads(path.read_text())["resolved"]["study"]["name"] if path.exists() else None


def _total(ledger: Books, policy: Policy | None) -> dict[str, Any]:
    epsilon, delta = ledger.committed()
    total: dict[str, Any] = {"epsilon": _finite(epsilon), "delta": delta}
    if policy is not None:
        total |= {"epsilon_cap": policy.epsilon_total, "delta_cap": policy.delta_cap}
        total["epsilon_left"] = max(0.0, policy.epsilon_total - epsilon)
        total["delta_left"] = max(0.0, policy.delta_cap - delta)
    return total


def _finite(value: float) -> float | str:
    return "inf" if value == float("inf") else value


def words(facts: dict[str, Any]) -> str:
    """Lay the spending out for a terminal, with a bar a round."""
    rows = [
        f"{'study':18} {'state':9} {'rounds':>6} {'steps':>13} {'epsilon':>9} {'set aside':>10} {'delta':>9}"
    ]
    for study in facts["studies"]:
        label = f"{study['study'][:8]} {(study['name'] or '')[:9]}"
        steps = f"{study['steps']}/{study['steps_set_aside']}"
        rows.append(
            f"{label:18} {study['state']:9} {study['rounds']:>6} {steps:>13} {_number(study['epsilon']):>9} "
            f"{_number(study['epsilon_set_aside']):>10} {study['delta']:>9.2g}"
        )
        full = study["epsilon_set_aside"]
        for row in study["by_round"]:
            share = 1.0 if row["epsilon"] == "inf" else min(1.0, row["epsilon"] / full)
            bar = "#" * round(BAR * share)
            rows.append(f"  round {row['round']:>5} |{bar:{BAR}}| {_number(row['epsilon'])}")
        for name, row in study["releases"].items():
            when = "spent" if row["spent"] else "set aside"
            rows.append(f"  release {name}, {when}: epsilon {_number(row['epsilon'])} alone")
        if study["state"] == "open" and study["rounds_left"] is not None:
            pace = study["seconds_left"]
            when = "" if pace is None else f", {_duration(pace)} at the pace so far"
            rows.append(f"  {study['rounds_left']} rounds left{when}")
    total = facts["total"]
    line = (
        f"all studies: epsilon {_number(total['epsilon'])} and delta {total['delta']:.2g} set aside or spent"
    )
    if "epsilon_cap" in total:
        line += (
            f"; caps {total['epsilon_cap']:g} and {total['delta_cap']:.2g}"
            f"; left for new studies {total['epsilon_left']:.3f} and {total['delta_left']:.2g}"
        )
    return "\n".join([*rows, line])


def _number(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:.3f}"


def _duration(seconds: float) -> str:
    for unit, length in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.0f} seconds"


def svg(facts: dict[str, Any]) -> str:
    """Draw epsilon by round, one line a private study, its budget dashed; opens in any browser."""
    width, height, left, top = 640, 320, 56, 24
    private = [s for s in facts["studies"] if s["epsilon"] != "inf"]
    high = max([s["epsilon_set_aside"] for s in private], default=1.0)
    last = max([row["round"] for s in private for row in s["by_round"]], default=1)
    inner = height - top - 48

    def x(number: float) -> float:
        return round(left + (width - left - 130) * number / last, 1)

    def y(epsilon: float) -> float:
        return round(top + inner * (1 - min(epsilon / high, 1)), 1)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" font-family="sans-serif" '
        'font-size="12">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
        f'<path d="M{left} {top}V{y(0)}H{x(last)}" fill="none" stroke="black"/>',
        f'<text x="{left - 6}" y="{y(0) + 4}" text-anchor="end">0</text>',
        f'<text x="{left - 6}" y="{y(high) + 4}" text-anchor="end">{high:.2f}</text>',
        f'<text x="{left}" y="{top - 8}">epsilon spent</text>',
        f'<text x="{x(last)}" y="{y(0) + 18}" text-anchor="end">round {last}</text>',
    ]
    colours = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
    for number, study in enumerate(private):
        colour = colours[number % len(colours)]
        rows = [{"round": 0, "epsilon": 0.0}, *study["by_round"]]
        points = " ".join(f"{x(row['round'])},{y(row['epsilon'])}" for row in rows)
        budget = y(study["epsilon_set_aside"])
        parts += [
            f'<path d="M{left} {budget}H{x(last)}" stroke="{colour}" stroke-dasharray="4 4"/>',
            f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2"/>',
            f'<text x="{x(last) + 8}" y="{top + 12 + 16 * number}" fill="{colour}">{study["study"][:8]}: '
            f"{study['epsilon']:.2f}</text>",
        ]
    return "\n".join([*parts, "</svg>\n"])


def verify(home: Path, anchors: Sequence[str] = (), *, headless: bool = False) -> dict[str, Any]:
    """Check a ledger against itself, its head, the stored replies and anchors from outside.

    Args:
        home: The site's home.
        anchors: `SEQUENCE:HASH` of lines, as the coordinator's record of each round has them.
        headless: Go by the chain and the replies alone: `ledger.head` is known to be lost.

    Returns:
        What was checked.

    Raises:
        Refusal: `ledger-broken` or `reply-broken`, naming the first line or file that is wrong.
        BadInput: An anchor that cannot be read.
    """
    # Replies before lines: while we look, a round may be reserved and answered.
    replies = sorted((home / "replies").glob("*.safetensors"))
    lines, torn = inspect(home, headless=headless)
    ledger = Ledger(home, lines)
    settled = {ledger.reply_path(x["approval"], x["round"]): x for x in lines if x["kind"] == "settle"}
    for path, line in settled.items():
        if not path.exists() or sha256_file(path) != line["reply"]:
            raise Refusal("reply-broken", f"{path}, settled by line {line['sequence'] + 1}")
    reserved = {ledger.reply_path(x["approval"], x["round"]) for x in lines if x["kind"] == "reserve"}
    for path in replies:
        if path not in reserved:
            raise Refusal("ledger-broken", f"{path} is there, its reservation is not")
        _check_anchor(lines, *echoed(path.read_bytes()), f"the head echoed in {path}")
    for anchor in anchors:
        sequence, _, found = anchor.partition(":")
        if not sequence.isdecimal() or len(found) != 64:
            raise BadInput(f"--anchor {anchor}: write SEQUENCE:HASH, as in the coordinator's record")
        _check_anchor(lines, int(sequence), found, f"--anchor {anchor[:16]}...")
    return {
        "lines": len(lines),
        "head": {"sequence": lines[-1]["sequence"], "hash": lines[-1]["hash"]},
        "unfinished_line": bool(torn),
        "replies": len(replies),
        "anchors": len(anchors),
    }


def rewrite_head(home: Path, anchors: Sequence[str] = ()) -> None:
    """Accept a chain whose head is lost: a person's act, and it leaves a line.

    Raises:
        Refusal: As `verify`; `ledger-broken` where there is a head: then nothing is lost, or lines are.
    """
    if (home / "ledger.head").exists():
        raise Refusal("ledger-broken", "ledger.head is there; only one that is lost may be replaced")
    verify(home, anchors, headless=True)
    with open_books(home, headless=True) as ledger:
        ledger.anchor()


def _check_anchor(lines: list[Line], sequence: int, found: str, source: str) -> None:
    if not 0 <= sequence < len(lines) or lines[sequence]["hash"] != found:
        raise Refusal("ledger-broken", f"line {sequence + 1} is not the one in {source}")


def export(home: Path, path: Path, delta: float | None = None) -> dict[str, Any]:
    """Write a ledger's lines and their summary as one JSON file for an auditor.

    Raises:
        BadInput: The file is there already.
        Refusal: As `inspect`.
    """
    if path.exists():
        raise BadInput(f"{path} is there already; name a new file")
    facts = spending(home, delta)
    lines, _ = inspect(home)
    whole = {
        "format": "polyclinic-ledger 1",
        "exported": datetime.now(UTC).isoformat(timespec="seconds"),
        "lines": lines[: facts["lines"]],
        "summary": facts,
    }
    write_json_atomic(path, whole, mode=0o600)
    return {"path": str(path), "lines": facts["lines"], "head": facts["head"]}
