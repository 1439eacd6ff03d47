"""The verdict of a comparison: which arm wins on what, and by how much."""

from __future__ import annotations

import math
from collections.abc import Callable

from polyclinic.server.evaluation.estimate import Estimate
from polyclinic.server.report.comparability import comparability, final_fidelity
from polyclinic.server.report.costs import LEARNING, NAMES, Quantity, total
from polyclinic.server.report.metrics import Metrics, RoundFacts, bytes_moved, first_and_last, worst_epsilon
from polyclinic.server.report.verdict import order, written, written_share
from polyclinic.server.report.wording import arm_names, bound, listed, number, quantity


def final_kid(arm: Metrics) -> Estimate | None:
    """KID of the last judged round."""
    found = final_fidelity(arm)
    return found.kid if found else None


def final_faithfulness(arm: Metrics) -> Estimate | None:
    """Overall faithfulness of the last judged round."""
    ends = first_and_last(arm)
    return ends[1].faithfulness.overall.accuracy if ends and ends[1].faithfulness else None


def shared_start(arms: list[Metrics]) -> RoundFacts | None:
    """The judged public start that all arms began from, or None where they differ or it was not judged.

    No patient's image has touched it: epsilon 0, whatever an arm adds.
    """
    ends = [first_and_last(arm) for arm in arms]
    firsts = [e[0] for e in ends if e and e[0].round == 0 and e[1].round > 0]
    kids = [r.fidelity.kid.value for r in firsts if r.fidelity]
    if len(kids) < len(arms) or not all(math.isclose(kid, kids[0], rel_tol=1e-6) for kid in kids):
        return None
    return firsts[0] if firsts else None


def beyond_start(names: list[str], arms: list[Metrics]) -> str | None:
    """Say which arms are clearly better than the public start they all began from."""
    start = shared_start(arms)
    if start is None or start.fidelity is None:
        return None
    kid = start.fidelity.kid
    ends = zip(names, map(final_kid, arms), strict=True)
    ahead = [name for name, own in ends if own is not None and order(own, kid) == "below"]
    told = [f"clearly closer in KID: {listed(ahead) if ahead else 'no arm'}"]
    begun = f"KID {written(kid)}"
    if start.faithfulness is not None:
        seen = start.faithfulness.overall.accuracy
        begun += f", balanced accuracy {written_share(seen)}"
        finals = zip(names, map(final_faithfulness, arms), strict=True)
        better = [name for name, own in finals if own is not None and order(own, seen) == "above"]
        told.append(f"clearly more faithful: {listed(better) if better else 'no arm'}")
    return f"The public start, which no patient's image has touched, has {begun}; {', '.join(told)}."


def compute(arms: list[Metrics]) -> tuple[str, str, list[float | None]]:
    """Choose the measure of compute that every arm states: GPU time, else CPU time, else FLOPs.

    Returns:
        The quantity's name, its unit, and its value for each arm, judging apart.
    """
    options: tuple[Quantity, ...] = ("gpu_s", "cpu_s", "flops")
    found = {name: [total(arm.cost, name, LEARNING) for arm in arms] for name in options}
    chosen: Quantity = next((name for name in options if all(found[name])), "cpu_s")
    return *NAMES[chosen], found[chosen]


def winner(
    names: list[str],
    values: list[Estimate | None],
    *,
    lowest: bool,
    subject: str,
    write: Callable[[Estimate], str],
) -> str | None:
    """Name the best arm by an estimate, and those that cannot be told apart from it."""
    known = [(name, value) for name, value in zip(names, values, strict=True) if value is not None]
    if len(known) < 2:
        return None
    best, top = (min if lowest else max)(known, key=lambda pair: pair[1].value)
    side = "below" if lowest else "above"
    tied = [name for name, value in known if name != best and order(top, value) != side]
    if not tied:
        return f"{subject}: {best} wins clearly, {write(top)}."
    return f"{subject}: {best} has the best value, {write(top)}, but is not clearly ahead of {listed(tied)}."


def price_of_privacy(names: list[str], arms: list[Metrics]) -> str | None:
    """Compare the best private arm's KID with the best non-private arm's."""
    kids = [(name, arm, final_kid(arm)) for name, arm in zip(names, arms, strict=True)]
    private = [(kid, name) for name, arm, kid in kids if kid is not None and arm.private]
    open_ = [(kid, name) for name, arm, kid in kids if kid is not None and not arm.private]
    if not private or not open_:
        return None
    guarded, guarded_name = min(private, key=lambda pair: pair[0].value)
    bare, bare_name = min(open_, key=lambda pair: pair[0].value)
    side = order(guarded, bare)
    if side == "overlapping":
        return (
            f"The price of privacy does not show in KID: intervals of {guarded_name} and {bare_name} overlap."
        )
    if side == "unknown":
        return None
    if side == "below":
        return f"{guarded_name} is private and still has a lower KID than {bare_name}."
    times = f", {number(guarded.value / bare.value, 2)} times as high" if bare.value > 0 else ""
    return (
        f"The price of privacy in KID: {number(guarded.value)} for {guarded_name}, "
        f"{number(bare.value)} for {bare_name}{times}."
    )


def cheapest(names: list[str], values: list[float | None], unit: str, subject: str) -> str | None:
    """Name the arm with the smallest cost, or say that the arms are within 5 % of each other."""
    known = [(value, name) for name, value in zip(names, values, strict=True) if value is not None]
    if len(known) < 2:
        return None
    known.sort()
    low, high = known[0], known[-1]

    near = [name for value, name in known if value <= 1.05 * low[0]]
    if len(near) == len(known):
        return f"{subject}: the arms are within 5 % of each other, about {quantity(low[0], unit)}."
    verb = "is the cheapest" if len(near) == 1 else "are the cheapest, within 5 % of each other,"
    most = f"{high[1]} took the most, {quantity(high[0], unit)}"
    return f"{subject}: {listed(near)} {verb} with {quantity(low[0], unit)}; {most}."


def comparison_verdict(arms: list[Metrics]) -> list[str]:
    """Say which arm wins on fidelity, faithfulness, privacy, compute and traffic.

    Args:
        arms: Metrics of the arms.

    Returns:
        Sentences, most important first; what was not equal between the arms before all others.
    """
    names = arm_names(arms)
    said = [
        winner(
            names,
            [final_kid(a) for a in arms],
            lowest=True,
            subject="Fidelity",
            write=lambda e: f"KID {written(e)}",
        ),
        winner(
            names,
            [final_faithfulness(a) for a in arms],
            lowest=False,
            subject="Faithfulness",
            write=lambda e: f"balanced accuracy {written_share(e)}",
        ),
        privacy(names, arms),
        price_of_privacy(names, arms),
        beyond_start(names, arms),
        frontier(names, arms),
    ]
    name, unit, values = compute(arms)
    said.append(cheapest(names, values, unit, f"{name}, judging apart"))
    said.append(cheapest(names, [float(sum(bytes_moved(a))) for a in arms], "B", "Traffic"))
    # What makes a comparison unfair is read before who won it.
    return [*comparability(names, arms), *(s for s in said if s), *unjudged(names, arms)]


def beaten(names: list[str], arms: list[Metrics]) -> dict[str, str]:
    """Arm to one that is at least as good in privacy, fidelity and compute, and better in one of them.

    By value: where intervals overlap, an arm may be beaten by chance. Arms that lack a value are left out.
    """
    _, _, prices = compute(arms)
    points = {}
    for name, arm, price in zip(names, arms, prices, strict=True):
        kid, epsilon = final_kid(arm), worst_epsilon(arm)
        if kid is not None and epsilon is not None and price is not None:
            points[name] = (epsilon, kid.value, price)
    found = {}
    for name, own in points.items():
        for other, theirs in points.items():
            if theirs != own and all(a <= b for a, b in zip(theirs, own, strict=True)):
                found[name] = other
    return found


def frontier(names: list[str], arms: list[Metrics]) -> str | None:
    """Name the arms that no other beats in privacy, fidelity and compute together."""
    worse = beaten(names, arms)
    left = [name for name in names if name not in worse]
    if len(arms) < 2 or not left:
        return None
    text = f"On the frontier of privacy, fidelity and compute, by value: {listed(left)}"
    lost = [f"{name} is beaten by {other}" for name, other in worse.items()]
    return f"{text}; {listed(lost)}." if lost else f"{text}: each is best at something."


def privacy(names: list[str], arms: list[Metrics]) -> str:
    """Name the private arms with their epsilon; the others protect nobody."""
    spent = [
        (epsilon, name)
        for name, arm in zip(names, arms, strict=True)
        if arm.private and (epsilon := worst_epsilon(arm)) is not None and math.isfinite(epsilon)
    ]
    if not spent:
        return "Privacy: no arm protects its patients."
    spent.sort()
    words = [f"{name} (epsilon {bound(epsilon)})" for epsilon, name in spent]
    if len(words) == 1:
        return f"Privacy: only {words[0]} protects its patients."
    (least, first), second, most = spent[0], spent[1][0], spent[-1][0]
    # No arm of a tie is named above the others.
    told = f"; {first} most" if least < second else ", alike" if least == most else ""
    return f"Privacy: {listed(words)} protect their patients{told}."


def unjudged(names: list[str], arms: list[Metrics]) -> list[str]:
    """Name the arms that were not judged."""
    found = [name for name, arm in zip(names, arms, strict=True) if first_and_last(arm) is None]
    return [f"Not judged: {listed(list(dict.fromkeys(found)))}."] if found else []
