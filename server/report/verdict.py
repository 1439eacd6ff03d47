"""The verdict: what the numbers say, in plain words, and honest when they say no.

Two values count as different only where their 95 % intervals do not overlap, which is stricter than
a test of the difference; or, where rounds are compared prompt by prompt, where the interval of the
difference leaves out zero. Where intervals overlap or are missing the sentence says so instead of
taking a side.
"""

from __future__ import annotations

import math
from typing import Literal

from polyclinic.server.evaluation.estimate import Estimate
from polyclinic.server.evaluation.probe import Faithfulness, faithfulness_change
from polyclinic.server.report import wording
from polyclinic.server.report.costs import SERVER, total
from polyclinic.server.report.metrics import (
    Metrics,
    RoundFacts,
    bytes_moved,
    evaluated_rounds,
    first_and_last,
    why_no_fidelity,
    worst_epsilon,
)
from polyclinic.server.report.wording import listed, number, percent

Order = Literal["below", "above", "overlapping", "unknown"]


def order(a: Estimate, b: Estimate) -> Order:
    """Say on which side of estimate b the interval of estimate a lies."""
    if a.low is None or a.high is None or b.low is None or b.high is None:
        return "unknown"
    if a.high < b.low:
        return "below"
    return "above" if a.low > b.high else "overlapping"


def beside_floor(estimate: Estimate) -> Order:
    """Say on which side of its floor an estimate lies, each with its interval.

    Earlier releases kept no interval of the floor; there it is taken as exact.
    """
    if estimate.floor is None:
        return "unknown"
    if estimate.floor_low is None or estimate.floor_high is None:
        return against(estimate, estimate.floor)
    at_floor = {"value": estimate.floor, "low": estimate.floor_low, "high": estimate.floor_high}
    return order(estimate, estimate.model_copy(update=at_floor))


def floor_too_rough(kid: Estimate) -> bool:
    """Whether a KID is clearly above zero, but its floor too uncertain to say whether above that as well.

    KID has no bias: of images like real ones it is zero on average, as the floor is.
    """
    rough = kid.floor_low is not None and kid.floor_low <= 0
    return rough and against(kid, 0.0) == "above" and beside_floor(kid) == "overlapping"


def against(estimate: Estimate, level: float) -> Order:
    """Say on which side of a fixed level the interval of an estimate lies."""
    if estimate.low is None or estimate.high is None:
        return "unknown"
    if estimate.high < level:
        return "below"
    return "above" if estimate.low > level else "overlapping"


def written(estimate: Estimate) -> str:
    """Write an estimate with its interval."""
    text = wording.interval(estimate)
    return (
        f"{number(estimate.value)} (95 % interval {text})"
        if text
        else f"{number(estimate.value)} (no interval)"
    )


def written_share(estimate: Estimate) -> str:
    """Write a share with its interval in percent."""
    text = wording.percent_interval(estimate)
    return (
        f"{percent(estimate.value)} (95 % interval {text})"
        if text
        else f"{percent(estimate.value)} (no interval)"
    )


def fidelity_sentences(start: RoundFacts, final: RoundFacts) -> list[str]:
    """Compare the final images with the start's and with the floor."""
    assert start.fidelity is not None
    assert final.fidelity is not None
    kid, before = final.fidelity.kid, start.fidelity.kid
    said = []
    if start.round == final.round:
        said.append(f"Only round {final.round} was judged: KID to the reference is {written(kid)}.")
    else:
        side = order(kid, before)
        opening = {
            "below": "Fidelity got better",
            "above": "Fidelity got worse",
            "overlapping": "Fidelity did not change clearly",
            "unknown": "Whether fidelity changed is not known, for want of intervals",
        }[side]
        way = {"below": "down from", "above": "up from"}.get(side, "against")
        since = "the start" if start.round == 0 else f"round {start.round}"
        said.append(
            f"{opening}: KID to the reference is {written(kid)} after round {final.round}, "
            f"{way} {written(before)} at {since}."
        )
    said.append(floor_sentence(kid))
    return said


def floor_sentence(kid: Estimate) -> str:
    """Put a KID beside what two halves of the reference differ by."""
    if kid.floor is None:
        return "No floor was measured, so it is not known how close two sets of real images would be."
    side = beside_floor(kid)
    floor = f"two patient-disjoint halves of the reference differ by {number(kid.floor)}"
    if kid.floor_low is not None and kid.floor_high is not None:
        nothing = ", which cannot be told from zero" if kid.floor_low <= 0 else ""
        floor += f" (95 % interval {number(kid.floor_low)} to {number(kid.floor_high)}{nothing})"
    if side == "above":
        times = f", {number(kid.ratio, 2)} times less" if kid.ratio is not None and kid.ratio > 1 else ""
        return f"Real images are closer to each other than these are to them: {floor}{times}."
    if side == "unknown":
        return f"For comparison, {floor}."
    if floor_too_rough(kid):
        return (
            "The images differ from real ones, but whether by more than real ones do among themselves cannot "
            f"be told with this reference: {floor}."
        )
    return f"By this measure the images cannot be told apart from real ones at this sample size: {floor}."


def best_round_sentence(metrics: Metrics) -> str | None:
    """Name an earlier round that was clearly better than the last one."""
    judged = evaluated_rounds(metrics)
    kids = {r.round: r.fidelity.kid for r in judged if r.fidelity is not None}
    if len(kids) < 2:
        return None
    best = min(kids, key=lambda number_of_round: kids[number_of_round].value)
    if best == judged[-1].round or order(kids[best], kids[judged[-1].round]) != "below":
        return None
    return f"Round {best} was clearly better than the last one: KID {written(kids[best])}."


def faithfulness_sentences(start: Faithfulness | None, final: Faithfulness | None) -> list[str]:
    """Compare agreement with the prompts with chance, with the start, and concept by concept."""
    if final is None:
        return ["Faithfulness to the prompts was not measured."]
    accuracy, chance = final.overall.accuracy, final.overall.chance
    opening = {
        "above": "Images show what their prompt asks for more often than chance",
        "below": "Images show what their prompt asks for less often than chance",
        "overlapping": "Whether images follow their prompt cannot be told from chance",
        "unknown": "Faithfulness has no interval, so it cannot be told from chance",
    }[against(accuracy, chance)]
    text = f"{opening}: balanced accuracy {written_share(accuracy)}, chance {percent(chance)}"
    if final.overall.real is not None:
        text += f", real images {percent(final.overall.real.value)}"
    said = [text + "."]
    if start is not None:
        change = faithfulness_change(start, final)
        side = order(accuracy, start.overall.accuracy) if change is None else against(change, 0.0)
        words = {
            "above": "Faithfulness is clearly better than",
            "below": "Faithfulness got worse: it is clearly below",
            "overlapping": "Faithfulness is not clearly different from",
            "unknown": "Faithfulness cannot be compared, for want of intervals, with",
        }[side]
        text = f"{words} the start's {written_share(start.overall.accuracy)}"
        if change is not None and change.low is not None and change.high is not None:
            text += (
                f"; paired by prompt, it changed by {100 * change.value:+.1f} points "
                f"(95 % interval {100 * change.low:+.1f} to {100 * change.high:+.1f})"
            )
        said.append(text + ".")
    weak = [row.concept for row in final.rows if against(row.accuracy, row.chance) != "above"]
    if weak and len(final.rows) > 1:
        said.append(f"Not shown to be above chance: {listed(weak)}.")
    return said


def privacy_sentences(metrics: Metrics) -> list[str]:
    """State what was spent, or that nothing protects the patients."""
    if not metrics.private:
        return [
            "NOT PRIVATE: nothing bounds what this generator may reveal about a patient it was trained on."
        ]
    epsilon = worst_epsilon(metrics)
    if epsilon is None:
        return ["No site stated an epsilon, so no privacy claim can be made."]
    if math.isinf(epsilon):
        return [
            "At least one site spent without bound (epsilon is infinite), so no privacy claim can be made."
        ]
    deltas = [s.delta for s in metrics.sites if s.delta is not None]
    delta = f", delta {wording.bound(max(deltas))}" if deltas else ""
    sites = "the one site" if len(metrics.sites) == 1 else f"each of the {len(metrics.sites)} sites"
    said = [f"At {sites} the privacy loss is at most epsilon {wording.bound(epsilon)}{delta}."]
    over = [
        s.name
        for s in metrics.sites
        if s.epsilon is not None and s.epsilon_cap is not None and s.epsilon > s.epsilon_cap
    ]
    if over:
        said.append(
            f"Above the site's own cap: {listed(over)}. This must not happen; read the site's ledger."
        )
    alarmed = [a.site for a in metrics.audit if a.alarms]
    if alarmed:
        said.append(
            f"AUDIT ALARM at {listed(alarmed)}: the noise, scale or clip threshold is not what was claimed; "
            "do not rely on the epsilon before that is explained."
        )
    if epsilon > 10:
        said.append("An epsilon above 10 is a weak guarantee.")
    return said


def utility_sentences(facts: RoundFacts | None) -> list[str]:
    """Say whether adding the images to real ones helps, and what they are worth alone."""
    if facts is None or facts.utility is None or facts.utility.overall is None:
        return []
    row = facts.utility.overall
    gain = row.gain
    opening = {
        "above": "Adding the images to real ones helps a classifier",
        "below": "Adding the images to real ones harms a classifier",
        "overlapping": "Adding the images to real ones neither helps nor harms a classifier measurably",
        "unknown": "Whether adding the images to real ones helps is not known, for want of an interval",
    }[against(gain, 0.0)]
    text = f"{opening}: {100 * gain.value:+.1f} points of balanced accuracy"
    if gain.low is not None and gain.high is not None:
        text += f" (95 % interval {100 * gain.low:+.1f} to {100 * gain.high:+.1f})"
    return [
        text + ".",
        f"A classifier that has seen only drawn images reaches {written_share(row.synthetic)}; one that has "
        f"seen real images {written_share(row.real)}; chance is {percent(row.chance)}.",
    ]


def leakage_verdict(metrics: Metrics) -> list[str]:
    """Say which sites withheld their release."""
    held = [gate.site for gate in metrics.gates if gate.verdict == "not released"]
    return [f"NOT RELEASED by {listed(held)}, after its own search for copies."] if held else []


def participation_sentences(metrics: Metrics) -> list[str]:
    """Name what went missing on the way."""
    refused = sum(len(r.refused) for r in metrics.rounds)
    absent = sum(len(r.absent) for r in metrics.rounds)
    rejected = sum(len(r.rejected) for r in metrics.rounds)
    lost = [r.round for r in metrics.rounds if r.round > 0 and not r.released]
    said = []
    if refused or absent:
        replies = wording.plural(absent, "missing reply", "missing replies")
        said.append(f"On the way, sites gave {wording.count(refused, 'refusal')} and {replies}.")
    if rejected:
        thrown = wording.plural(rejected, "reply", "replies")
        said.append(f"The server threw away {thrown} that no honest site sends.")
    if lost:
        said.append(
            f"{wording.count(len(lost), 'round')} released nothing for want of sites, yet budget was spent."
        )
    return said


def cost_sentence(metrics: Metrics) -> str:
    """State wall time, compute and bytes."""
    parts = [f"{wording.seconds(metrics.seconds_total)} from start to end"]
    measured = [row for row in metrics.cost if metrics.simulated or row.where == SERVER]
    gpu, cpu = total(measured, "gpu_s"), total(measured, "cpu_s")
    if gpu:
        parts.append(f"{wording.seconds(gpu)} of GPU time")
    if cpu:
        parts.append(f"{wording.seconds(cpu)} of CPU time")
    down, up = bytes_moved(metrics)
    if down or up:
        parts.append(f"{wording.scaled(down, 'B')} sent to sites and {wording.scaled(up, 'B')} received")
    own = "" if metrics.simulated else " The computing is the coordinator's: sites keep theirs to themselves."
    return f"It took {listed(parts)}.{own}"


def headline(metrics: Metrics) -> str:
    """Say in one sentence what came of the run: closeness to real images, prompts, privacy."""
    ends = first_and_last(metrics)
    drawn = [r for r in metrics.rounds if r.evaluated]
    final = ends[1] if ends else drawn[-1] if drawn else None
    if ends is not None:
        parts = [_closeness(*ends)]
    elif final is not None:
        parts = ["How close the images are to real ones was not measured"]
    else:
        parts = [
            "The images were not judged" if metrics.finished else "Nothing is known about the images yet"
        ]
    if final is not None and final.faithfulness is not None:
        overall = final.faithfulness.overall
        parts.append(
            "they follow their prompts more often than chance"
            if against(overall.accuracy, overall.chance) == "above"
            else "it is not shown that they follow their prompts"
        )
    epsilon = worst_epsilon(metrics)
    if not metrics.private:
        parts.append("nothing protects the patients behind them")
    elif any(a.alarms for a in metrics.audit):
        parts.append("an audit alarm stands against the privacy that was claimed")
    elif epsilon is not None and math.isfinite(epsilon):
        parts.append(f"each site’s patients lost at most epsilon {wording.bound(epsilon)}")
    else:
        parts.append("no privacy claim can be made")
    held = [gate.site for gate in metrics.gates if gate.verdict == "not released"]
    parts += [f"{listed(held)} did not release it"] if held else []
    return "; ".join(parts) + "."


def _closeness(start: RoundFacts, final: RoundFacts) -> str:
    """Say how the final images stand to the start's and to real ones."""
    assert start.fidelity is not None
    assert final.fidelity is not None
    kid = final.fidelity.kid
    apart = beside_floor(kid) in ("above", "unknown") or floor_too_rough(kid)
    far = (
        "can still be told apart from them" if apart else "cannot be told apart from them at this sample size"
    )
    if start.round == final.round:
        verb = "differ measurably from real ones" if apart else "cannot be told apart from real ones"
        return f"The images {verb}" + ("" if apart else " at this sample size")
    moved = {
        "below": "came closer to real ones",
        "above": "moved away from real ones",
        "overlapping": "came no clearly closer to real ones",
        "unknown": "may or may not have come closer to real ones",
    }[order(kid, start.fidelity.kid)]
    return f"The images {moved} {'but' if moved.startswith('came closer') and apart else 'and'} {far}"


def verdict(metrics: Metrics) -> list[str]:
    """Say in plain words what a run achieved, for whom, and at what cost.

    Args:
        metrics: A run's numbers; its own `verdict` field is not read.

    Returns:
        Sentences, most important first.
    """
    ends = first_and_last(metrics)
    said: list[str] = []
    drawn = [r for r in metrics.rounds if r.evaluated]
    if ends is None and drawn:
        said.append(why_no_fidelity(metrics))
        earlier = drawn[0].faithfulness if len(drawn) > 1 else None
        said += faithfulness_sentences(earlier, drawn[-1].faithfulness)
    elif ends is None:
        said.append("No round was judged, so nothing is known about the images.")
    else:
        start, final = ends
        said += fidelity_sentences(start, final)
        best = best_round_sentence(metrics)
        said += [best] if best else []
        earlier = start.faithfulness if start.round != final.round else None
        said += faithfulness_sentences(earlier, final.faithfulness)
    said += utility_sentences(next((r for r in reversed(metrics.rounds) if r.utility is not None), None))
    said += privacy_sentences(metrics)
    said += leakage_verdict(metrics)
    said += participation_sentences(metrics)
    said.append(cost_sentence(metrics))
    return said
