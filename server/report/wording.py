"""Numbers as people read them: three significant digits, units chosen by size, intervals spelled out."""

from __future__ import annotations

import math
from collections.abc import Sequence

from polyclinic.server.evaluation.estimate import Estimate
from polyclinic.server.report.metrics import Metrics

DASH = "–"
# Between a number and its unit: it never breaks, so that no column or sheet of paper parts the two.
GAP = "\u00a0"


def number(value: float | None, digits: int = 3) -> str:
    """Write a number with a few significant digits; a dash where it is unknown."""
    if value is None or math.isnan(value):
        return DASH
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    if value == 0:
        return "0"
    size = math.floor(math.log10(abs(value)))
    if size < -4 or size >= 15:
        mantissa, _, exponent = f"{value:.{digits - 1}e}".partition("e")
        text = f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"
    else:
        text = f"{round(value, digits - 1 - size):,.{max(0, digits - 1 - size)}f}"
        text = text.rstrip("0").rstrip(".") if "." in text else text
    return "−" + text[1:] if value < 0 else text


def bound(value: float | None) -> str:
    """Write an upper bound (epsilon, delta) to three digits, rounded up: it is never under-reported."""
    if value is None or not math.isfinite(value) or value == 0:
        return number(value)
    step = 10.0 ** (math.floor(math.log10(abs(value))) - 2)
    # A value that has three digits already must not climb by the last bit of a double.
    return number(math.ceil(value / step * (1 - 1e-12)) * step)


def percent(value: float | None) -> str:
    """Write a share as a whole percentage."""
    return DASH if value is None else f"{100 * value:.0f}{GAP}%"


def interval(estimate: Estimate) -> str:
    """Write an estimate's interval, or nothing where it has none."""
    if estimate.low is None or estimate.high is None:
        return ""
    return f"{number(estimate.low)} to {number(estimate.high)}"


def floor_interval(estimate: Estimate) -> str:
    """Write the interval of an estimate's floor, or nothing where it has none."""
    if estimate.floor_low is None or estimate.floor_high is None:
        return ""
    return f"{number(estimate.floor_low)} to {number(estimate.floor_high)}"


def percent_interval(estimate: Estimate) -> str:
    """Write the interval of a share in percent, or nothing where it has none."""
    if estimate.low is None or estimate.high is None:
        return ""
    return f"{100 * estimate.low:.0f} to {percent(estimate.high)}"


def points(share: float) -> str:
    """Write a difference of two shares in percentage points, with its sign."""
    return f"{100 * share:+.1f}"


def points_interval(estimate: Estimate) -> str:
    """Write the interval of such a difference, or nothing where it has none."""
    if estimate.low is None or estimate.high is None:
        return ""
    return f"{points(estimate.low)} to {points(estimate.high)}"


def seconds(value: float) -> str:
    """Write a duration in seconds, minutes, hours or days."""
    if value < 120:
        return f"{number(value)}{GAP}s"
    for size, unit in ((86400.0 * 2, "days"), (7200.0, "h"), (120.0, "min")):
        if value >= size:
            return f"{number(value / {'days': 86400.0, 'h': 3600.0, 'min': 60.0}[unit])}{GAP}{unit}"
    return f"{number(value)}{GAP}s"


def gpu_time(spent: float) -> str:
    """Write seconds of GPU time in hours, or in less where it is little."""
    if spent < 1:
        return f"{number(1e3 * spent)}{GAP}ms"
    return seconds(spent) if spent < 360 else f"{number(spent / 3600)}{GAP}h"


def scaled(value: float, unit: str, step: float = 1000.0) -> str:
    """Write a quantity with a decimal prefix, as in 3.2 GB."""
    prefixes = ("", "k", "M", "G", "T", "P", "E", "Z")
    size = 0
    while abs(value) >= step and size < len(prefixes) - 1:
        value, size = value / step, size + 1
    return f"{number(value)}{GAP}{prefixes[size]}{unit}"


def axis_unit(largest: float, unit: str) -> tuple[float, str]:
    """Choose one unit for a whole axis by its largest value: what to divide by, and the unit's name."""
    steps: tuple[tuple[float, float, str], ...]
    if unit == "s":
        steps = ((7200.0, 3600.0, "h"), (120.0, 60.0, "min"))
    else:
        prefixes = ("k", "M", "G", "T", "P", "E", "Z")
        steps = tuple(
            (10.0 ** (3 * i), 10.0 ** (3 * i), p + unit) for i, p in reversed(list(enumerate(prefixes, 1)))
        )
    return next(((size, name) for least, size, name in steps if largest >= least), (1.0, unit))


def energy(joules: float) -> str:
    """Write an energy in joules, watt-hours or kilowatt-hours."""
    if joules < 360:
        return f"{number(joules)}{GAP}J"
    hours = joules / 3600
    return f"{number(hours)}{GAP}Wh" if hours < 1000 else f"{number(hours / 1000)}{GAP}kWh"


def quantity(value: float, unit: str) -> str:
    """Write a figure of cost in the unit a person would choose for its size."""
    if unit == "s":
        return seconds(value)
    return energy(value) if unit == "J" else scaled(value, unit)


def count(value: int, noun: str) -> str:
    """Write a count with its noun in the right number, as in "1 round", "12 rounds"."""
    return f"{value:,} {noun}" if value == 1 else f"{value:,} {noun}s"


def plural(value: int, one: str, many: str) -> str:
    """Write a count with a noun of irregular plural, as in "2 missing replies"."""
    return f"{value:,} {one if value == 1 else many}"


def listed(words: Sequence[str], most: int = 6) -> str:
    """Join words as in a sentence; a long list is cut and its rest counted."""
    if len(words) > most:
        return f"{', '.join(words[:most])} and {len(words) - most} more"
    if len(words) < 2:
        return "".join(words)
    return f"{', '.join(words[:-1])} and {words[-1]}"


def arm_names(arms: list[Metrics]) -> list[str]:
    """Short names of a comparison's arms: the study names without the beginning they share."""
    names = [arm.study.name for arm in arms]
    while len(names) > 1 and len({n.split("-", 1)[0] for n in names}) == 1 and all("-" in n for n in names):
        names = [n.split("-", 1)[1] for n in names]
    if len(set(names)) < len(names):
        names = [f"{n} {arm.study.resolved_hash[:6]}" for n, arm in zip(names, arms, strict=True)]
    return names


def notices(arms: list[Metrics]) -> list[str]:
    """Sentences that arms' studies want every page to open with, each once."""
    return list(dict.fromkeys(arm.study.notice for arm in arms if arm.study.notice))


def shared_title(arms: list[Metrics]) -> str:
    """Words that all arms' titles begin with; the first arm's study name where there are none."""
    titles = [arm.study.title.split() for arm in arms]
    words = []
    for column in zip(*titles, strict=False):
        if len(set(column)) > 1:
            break
        words.append(column[0])
    return " ".join(words).strip(" ,:;–-(") or arms[0].study.name
