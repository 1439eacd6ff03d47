"""What the probe sees where a prompt asks for a value, value by value: absence apart from presence.

A generator that ignores its prompt scores 1 / values on average, but may look good on "no polyp", because
most images show none. So each value stands beside the same answer on images that were asked for *another*
value, and the mean over absences beside the mean over presences.

A probe errs on real images, too. `shown` corrects for that (Rogan & Gladen 1978): with s the share of real
images of a value that the probe knows as such, and f the share of the others that it takes for it, a share
p of answers means (p - f) / (s - f) images. It holds as far as the probe errs on synthetic images as it
does on real ones.
"""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import BaseModel, ConfigDict

from polyclinic.server.evaluation.answers import INTERVAL, Answer, estimate
from polyclinic.server.evaluation.bootstrap import RESAMPLES, Bootstrap, group_counts, share_draws
from polyclinic.server.evaluation.estimate import Estimate

# Values, in lower case, by which a table says that something is not there.
ABSENT = frozenset({"no", "none", "absent", "negative", "false", "0"})
# A probe that tells real images apart less well than this says nothing about synthetic ones.
FEWEST_TOLD_APART = 0.3


class ValueFaithfulness(BaseModel):
    """What the probe sees in images whose prompts ask for one value of a concept.

    Attributes:
        value: The value.
        absence: Whether it says that something is not there ("no polyp").
        seen: Share of these images in which the probe sees the value; `groups` counts prompts.
        otherwise: Share of images asked for another value in which it sees this one, too: as high where
            the prompt is ignored.
        real: Share of held-out real images of this value in which it does: the ceiling of `seen`.
        shown: `seen` corrected for the probe's errors on held-out real images; None where it errs too much.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    value: str
    absence: bool
    seen: Estimate
    otherwise: Estimate
    real: Estimate | None
    shown: Estimate | None


def is_absence(value: str) -> bool:
    """Whether a label's value says that something is not there."""
    return value.strip().casefold() in ABSENT


def value_shares(
    value: str, predicted: Sequence[str], given: Sequence[str], rows: Sequence[int], bootstrap: Bootstrap
) -> tuple[Answer, Answer]:
    """Share of answers that are this value, where it was given and where another was.

    Args:
        value: The value.
        predicted: Predicted label of each of the rows.
        given: Wanted or true label of each of them; some are the value and some are not.
        rows: Which rows of the bootstrap's set they are.
        bootstrap: Weights of that set's groups.
    """
    sides = [[i for i, g in enumerate(given) if (g == value) is where] for where in (True, False)]
    hits = [[predicted[i] == value for i in side] for side in sides]
    counts = [
        group_counts([rows[i] for i in side], hit, bootstrap) for side, hit in zip(sides, hits, strict=True)
    ]
    draws = share_draws(counts, bootstrap.weights)
    seen, otherwise = (
        Answer([rows[i] for i in side], sum(hit) / len(hit), drawn)
        for side, hit, drawn in zip(sides, hits, draws, strict=True)
    )
    return seen, otherwise


def value_row(
    value: str,
    synthetic: tuple[Answer, Answer],
    prompts: Bootstrap,
    real: tuple[Answer, Answer] | None,
    patients: Bootstrap,
) -> ValueFaithfulness:
    """Put a value's shares on synthetic and on real images together; see `value_shares`."""
    return ValueFaithfulness(
        value=value,
        absence=is_absence(value),
        seen=estimate(synthetic[:1], prompts),
        otherwise=estimate(synthetic[1:], prompts),
        real=None if real is None else estimate(real[:1], patients),
        shown=None if real is None else _corrected(synthetic[0], prompts, *real),
    )


def _corrected(seen: Answer, prompts: Bootstrap, known: Answer, mistaken: Answer) -> Estimate | None:
    apart = known.value - mistaken.value
    if apart < FEWEST_TOLD_APART:
        return None
    # The two bootstraps may have been drawn from one seed; moved on by half, they are independent.
    s, f = (answer.draws.roll(RESAMPLES // 2) for answer in (known, mistaken))
    draws = ((seen.draws - f) / (s - f).clamp_min(0.05)).clamp(0, 1)
    value = min(1.0, max(0.0, (seen.value - mistaken.value) / apart))
    found = estimate([Answer(seen.rows, value, draws)], prompts)
    return found.model_copy(update={"interval": INTERVAL.format(unit="prompts and held-out patients")})
