"""What the raters' answers say: detection, agreement, consistency and opinions, each with its interval.

Accuracy against a generator is over its images and the real ones, of which a study has equally many, so
that guessing gets one half whatever a reader prefers to say. First showings count; the hidden second
ones serve only to ask whether a reader agrees with himself.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.stats import norm, t

from polyclinic.common.reader_study.alpha import Alpha, Scale, krippendorff
from polyclinic.common.reader_study.answers import Answers
from polyclinic.common.reader_study.detection import (
    TWO_SIDED,
    Array,
    Crossed,
    Estimate,
    Group,
    bias,
    crossed,
    d_prime,
    mean_d_prime,
    mean_of_wilson,
    proportion_of,
    wilson,
)
from polyclinic.common.reader_study.images import REAL
from polyclinic.common.reader_study.key import CERTAINTY, LEVELS, POINTS, Key
from polyclinic.common.reader_study.size import POWER
from polyclinic.common.refusals import BadInput

FEW = 50  # images a group
SEVERAL = 3  # readers, of whom something can be said about readers in general
SYNTHETIC = len(LEVELS) // 2  # answers above this say "synthetic"


@dataclass(frozen=True)
class Table:
    """First and second showings, as numbers.

    Attributes:
        raters: Names, in the key's order.
        first: Answers to the first showing, [questions + 1, raters, images]; NaN where missing.
        second: Answers to the hidden repeat, likewise.
        groups: Group to the numbers of its images.
    """

    raters: list[str]
    first: Array
    second: Array
    groups: dict[str, list[int]]

    def said(self, group: str, raters: Sequence[int] | None = None) -> Array:
        """Whether each of these raters called an image synthetic, [raters, images all of them answered]."""
        return (self.complete(group, 0, raters) > SYNTHETIC).astype(float)

    def complete(self, group: str, question: int, raters: Sequence[int] | None = None) -> Array:
        """Answers of these raters to a group's images, [raters, images all of them answered]."""
        rows = self.first[question][:, self.groups[group]]
        rows = rows if raters is None else rows[list(raters)]
        return np.asarray(rows[:, ~np.isnan(rows).any(axis=0)])


def tabulate(key: Key, answers: Sequence[Answers]) -> Table:
    """Put the raters' answers into the order of the key's images.

    Raises:
        BadInput: No answers, or a rater's twice.
    """
    given = {one.rater: one.given for one in answers}
    if not answers or len(given) != len(answers):
        twice = sorted(one.rater for one in answers)
        raise BadInput(
            f"the answers of {', '.join(twice) or 'nobody'} were named; name one file of each rater"
        )
    raters = [rater for rater in key.raters if rater in given]
    shape = (1 + len(key.questions), len(raters), len(key.images))
    first, second = np.full(shape, np.nan), np.full(shape, np.nan)
    for row, rater in enumerate(raters):
        for showing in key.raters[rater]:
            if showing.id in given[rater]:
                (second if showing.repeat else first)[:, row, showing.image] = given[rater][showing.id]
    groups = {
        group: [number for number, its in enumerate(key.images) if its == group]
        for group in (REAL, *key.generators)
    }
    table = Table(raters, first, second, groups)
    for group, row in itertools.product(groups, range(len(raters))):
        if table.said(group, [row]).size < 2:
            raise BadInput(f"{raters[row]} answered fewer than two images of {group}; let them go on")
    if any(table.said(group).shape[1] < 2 for group in groups):
        raise BadInput("no two images of a group were answered by all raters; leave out who stopped early")
    return table


def score(key: Key, commitment: str, answers: Sequence[Answers]) -> dict[str, Any]:
    """Compute everything that a study shows, as JSON has it.

    Raises:
        BadInput: As `tabulate`.
    """
    table = tabulate(key, answers)
    names = key.generators
    return {
        "format": "polyclinic-reader-study-results 1",
        "study": key.study,
        "title": key.title,
        "key_sha256": commitment,
        "real_is_public": key.real_is_public,
        "raters": table.raters,
        "absent": [rater for rater in key.raters if rater not in table.raters],
        "images": {group: len(numbers) for group, numbers in table.groups.items()},
        "generators": [_generator(table, name) for name in names],
        "comparisons": [_comparison(table, a, b) for a, b in itertools.combinations(names, 2)],
        "readers": [_reader(table, row, names) for row in range(len(table.raters))],
        "real_called_synthetic": _number(_called_synthetic(table, REAL)),
        "agreement": _agreement(table),
        "repeats": _repeats(table, range(len(table.raters))),
        "certainty": _certainty(table),
        "questions": [_question(table, i, q.name, q.text) for i, q in enumerate(key.questions, 1)],
        "notes": _notes(table, key),
    }


def counts(facts: dict[str, Any]) -> dict[str, Any]:
    """Take out what a person may decide to hand on: how often each rater gave each answer to each group.

    No id, order, file name or prompt, and nothing about a single image.
    """
    private = not facts["real_is_public"]
    return {
        "format": "polyclinic-reader-study-counts 1",
        "study": facts["study"],
        "key_sha256": facts["key_sha256"],
        "images": facts["images"],
        "levels": list(LEVELS),
        "answers": {reader["rater"]: reader["answers"] for reader in facts["readers"]},
        "questions": [
            {"text": q["text"], "counts": {g["group"]: g["counts"] for g in q["groups"]}}
            for q in facts["questions"]
        ],
        "statement": "counts of answers about private images, handed on by a person; no privacy mechanism "
        "covers them"
        if private
        else "counts of answers about public and synthetic images",
    }


def _generator(table: Table, name: str) -> dict[str, Any]:
    said, real = table.said(name), table.said(REAL)
    groups = [proportion_of(0.5, said), proportion_of(0.5, 1 - real)]
    these = crossed([group.averaged() for group in groups])
    accuracy = these.proportion()
    d = mean_d_prime(said, real)
    if len(table.raters) == 1:
        accuracy = wilson(int(said.sum() + (1 - real).sum()), said.size + real.size)
        d = d_prime(int(said.sum()), said.size, int(real.sum()), real.size)
    return {
        "name": name,
        "accuracy": _number(accuracy),
        "accuracy_any_reader": _any_reader(table, crossed(groups).proportion),
        "called_synthetic": _number(_called_synthetic(table, name)),
        "d_prime": _number(d),
        "verdict": "told apart" if accuracy.low > 0.5 else "swapped" if accuracy.high < 0.5 else "not shown",
        "detectable": _detectable(these),
        "power": POWER,
    }


def _any_reader(table: Table, interval: Callable[[], Estimate]) -> dict[str, Any] | None:
    return _number(interval()) if len(table.raters) >= SEVERAL else None


def _detectable(found: Crossed) -> float:
    """Smallest accuracy that a study as uncertain as this one would show with power 80 %."""
    reach = (float(t.ppf(TWO_SIDED, found.df)) + float(norm.ppf(POWER))) * math.sqrt(found.variance)
    return min(1.0, 0.5 + reach)


def _called_synthetic(table: Table, group: str) -> Estimate:
    return crossed([proportion_of(1.0, table.said(group)).averaged()]).proportion()


def _comparison(table: Table, a: str, b: str) -> dict[str, Any]:
    """Difference of the rates at which two generators' images are recognised; the real ones cancel."""
    groups = [proportion_of(1.0, table.said(a)), proportion_of(-1.0, table.said(b))]
    difference = crossed([group.averaged() for group in groups]).interval(-1, 1)
    shown = difference.low > 0 or difference.high < 0
    return {
        "a": a,
        "b": b,
        "difference": _number(difference),
        "difference_any_reader": _any_reader(table, lambda: crossed(groups).interval(-1, 1)),
        "harder_to_recognise": (b if difference.value > 0 else a) if shown else None,
    }


def _reader(table: Table, row: int, names: Sequence[str]) -> dict[str, Any]:
    real = table.said(REAL, [row])
    mistaken, reals = int(real.sum()), real.size
    right_real = wilson(reals - mistaken, reals)
    against, caught_in_all, in_all = [], 0, 0
    for name in names:
        said = table.said(name, [row])
        caught, n = int(said.sum()), said.size
        caught_in_all, in_all = caught_in_all + caught, in_all + n
        against.append(
            {
                "generator": name,
                "accuracy": _number(wilson(caught + reals - mistaken, n + reals)),
                "called_synthetic": _number(wilson(caught, n)),
                "d_prime": _number(d_prime(caught, n, mistaken, reals)),
                "bias": bias(caught, n, mistaken, reals),
            }
        )
    whole = (
        against[0]["accuracy"]
        if len(names) == 1
        else _number(mean_of_wilson([wilson(caught_in_all, in_all), right_real]))
    )
    levels = table.first[0][row]
    return {
        "rater": table.raters[row],
        "accuracy": whole,
        "real_called_real": _number(right_real),
        "against": against,
        "repeats": _repeats(table, [row]),
        "answers": {group: _counts(levels[numbers], len(LEVELS)) for group, numbers in table.groups.items()},
    }


def _agreement(table: Table) -> dict[str, Any]:
    """Alpha across raters for the choice and for the six levels, over all images and by kind."""
    kinds = {
        "all": list(range(table.first.shape[2])),
        "real": table.groups[REAL],
        "synthetic": [i for group, numbers in table.groups.items() if group != REAL for i in numbers],
    }
    return {
        kind: {
            "choice": _alpha(_choice(table.first[0][:, numbers]), "nominal", 2),
            "six_levels": _alpha(table.first[0][:, numbers], "ordinal", len(LEVELS)),
        }
        for kind, numbers in kinds.items()
    }


def _choice(levels: Array) -> Array:
    return np.where(np.isnan(levels), np.nan, 1 + (levels > SYNTHETIC))


def _repeats(table: Table, rows: Sequence[int]) -> dict[str, Any] | None:
    """Agreement of readers with themselves; every reader's image is a unit of its own."""
    pairs = np.stack([table.first[0][list(rows)].ravel(), table.second[0][list(rows)].ravel()])
    pairs = pairs[:, ~np.isnan(pairs).any(axis=0)]
    if not pairs.size:
        return None
    choice = _choice(pairs)
    return {
        "same_choice": _number(wilson(int((choice[0] == choice[1]).sum()), pairs.shape[1])),
        "within_one_level": _number(wilson(int((abs(pairs[0] - pairs[1]) <= 1).sum()), pairs.shape[1])),
        "choice": _alpha(choice, "nominal", 2),
        "six_levels": _alpha(pairs, "ordinal", len(LEVELS)),
    }


def _certainty(table: Table) -> list[dict[str, Any]]:
    """How often answers of each certainty were right, all readers and images together."""
    answers, rows = table.first[0], []
    synthetic = np.ones(answers.shape[1], dtype=bool)
    synthetic[table.groups[REAL]] = False
    for level, word in enumerate(CERTAINTY, 1):
        of_these = np.isin(answers, (level, len(LEVELS) + 1 - level))
        right = of_these & ((answers > SYNTHETIC) == synthetic)
        n = int(of_these.sum())
        share = _number(wilson(int(right.sum()), n)) if n else None
        rows.append({"certainty": word, "n": n, "right": share})
    return rows


def _question(table: Table, index: int, name: str, text: str) -> dict[str, Any]:
    groups = []
    for group, numbers in table.groups.items():
        rows = table.complete(group, index)
        ends = np.tile([1.0, float(POINTS)], (len(rows), 1))
        mean = crossed([Group(1.0, rows, ends).averaged()]).interval(1, POINTS)
        counts = _counts(table.first[index][:, numbers], POINTS)
        groups.append({"group": group, "mean": _number(mean), "counts": counts})
    return {
        "name": name,
        "text": text,
        "groups": groups,
        "agreement": _alpha(table.first[index], "ordinal", POINTS),
    }


def _notes(table: Table, key: Key) -> list[str]:
    notes = []
    raters, images = len(table.raters), min(map(len, table.groups.values()))
    if raters < SEVERAL:
        notes.append(
            f"{raters} of at least {SEVERAL} readers: the intervals are about these readers and other "
            "images, and say nothing about other readers"
        )
    if images < FEW:
        notes.append(f"{images} images of a group are few; `reader-study size` tells what they can show")
    if np.isnan(table.first).any():
        notes.append(
            "answers are missing; what is over all readers uses the images that all of them answered"
        )
    if len(key.generators) > 1:
        notes.append("every interval is for its own comparison; with many, some err by chance")
    return notes


def _counts(levels: Array, most: int) -> list[int]:
    return [int((levels == level).sum()) for level in range(1, most + 1)]


def _number(estimate: Estimate) -> dict[str, Any]:
    se = {} if math.isnan(estimate.se) else {"se": estimate.se}
    return {"value": estimate.value, "low": estimate.low, "high": estimate.high, "n": estimate.n, **se}


def _alpha(answers: Array, scale: Scale, levels: int) -> dict[str, Any] | None:
    found: Alpha | None = krippendorff(answers, scale, levels)
    return (
        None
        if found is None
        else {"value": found.value, "low": found.low, "high": found.high, "n": found.units}
    )
