"""What the report shows beside the headline: all metrics and extractors, leakage, limits, public hashes."""

from __future__ import annotations

from dataclasses import dataclass

from polyclinic.server.evaluation.estimate import Estimate, Fidelity
from polyclinic.server.evaluation.results import NearCopies, SiteGate
from polyclinic.server.report import panels, plots, wording
from polyclinic.server.report.metrics import (
    Metrics,
    RoundFacts,
    evaluated_rounds,
    first_and_last,
    why_no_fidelity,
)
from polyclinic.server.report.wording import DASH, GAP, number

# Name in the metrics to its title and what is better.
TITLES = {
    "kid": ("KID", "lower"),
    "frechet": ("Frechet distance", "lower"),
    "cmmd": ("CMMD", "lower"),
    "precision": ("precision", "higher"),
    "recall": ("recall", "higher"),
    "density": ("density", "near 1"),
    "coverage": ("coverage", "higher"),
    "vendi": ("Vendi score", "higher: more different images"),
    "ms_ssim": ("MS-SSIM within a prompt", "lower: less alike"),
}


@dataclass(frozen=True)
class MetricRow:
    """One metric on one extractor, at the first and the last judged round."""

    extractor: str
    title: str
    better: str
    start: Estimate | None
    final: Estimate
    first: bool


def measures(fidelity: Fidelity) -> dict[str, Estimate]:
    """All metrics of one extractor by name, the headline first."""
    found = {"kid": fidelity.kid, "frechet": fidelity.frechet, **fidelity.others}
    order = [*TITLES, *sorted(found.keys() - TITLES.keys())]
    return {name: found[name] for name in order if name in found}


def extractors(facts: RoundFacts) -> dict[str, Fidelity]:
    """Fidelity of a round by the name of its extractor, the headline's first."""
    every = [facts.fidelity] if facts.fidelity is not None else []
    return {found.extractor: found for found in (*every, *facts.second)}


def metric_rows(metrics: Metrics) -> list[MetricRow]:
    """Every metric on every extractor of the last judged round, the first judged round beside it."""
    ends = first_and_last(metrics)
    if ends is None:
        return []
    start = extractors(ends[0]) if ends[0].round != ends[1].round else {}
    rows = []
    for extractor, found in extractors(ends[1]).items():
        before = measures(start[extractor]) if extractor in start else {}
        for i, (name, final) in enumerate(measures(found).items()):
            title, better = TITLES.get(name, (name, ""))
            rows.append(MetricRow(extractor, title, better, before.get(name), final, first=i == 0))
    return rows


def resampled(estimate: Estimate) -> list[str]:
    """What an interval resampled, with how many of each; a bare count where an earlier release measured."""
    return [f"{n:,} {what}" for what, n in estimate.resampled.items()] or [f"{estimate.groups:,}"]


def interval_words(facts: RoundFacts) -> str:
    """What the intervals of the headline extractor's metrics are, each kind once."""
    kinds: dict[str, list[str]] = {}
    for name, estimate in measures(facts.fidelity).items() if facts.fidelity else ():
        kinds.setdefault(estimate.interval or "none", []).append(TITLES.get(name, (name, ""))[0])
    return "; ".join(f"{', '.join(names)}: {interval}" for interval, names in kinds.items())


def metric_panels(metrics: Metrics) -> list[tuple[str, str, plots.Chart]]:
    """Small charts over rounds: the headline extractor's other metrics, and KID on the other extractors."""
    judged = evaluated_rounds(metrics)
    if len(judged) < 2:
        return []
    series: dict[tuple[str, str], list[tuple[int, Estimate]]] = {}
    for r in judged:
        for i, (extractor, found) in enumerate(extractors(r).items()):
            shown = measures(found).items() if i == 0 else [("kid", found.kid)]
            for name, estimate in shown:
                if i or name not in ("kid", "frechet"):
                    series.setdefault((extractor, name), []).append((r.round, estimate))
    charts = []
    for i, ((extractor, name), over) in enumerate(series.items()):
        if len(over) > 1:
            title, better = TITLES.get(name, (name, ""))
            words = f"{title} on {extractor}" if name == "kid" else title
            line = (
                f"{number(over[-1][1].value)}; {better.partition(':')[0]} is better"
                if better
                else number(over[-1][1].value)
            )
            charts.append((words, line, panels.over_rounds(words, over, f"metric {i}")))
    return charts


def latest(metrics: Metrics, name: str) -> RoundFacts | None:
    """The last round that has a result of this name."""
    return next((r for r in reversed(metrics.rounds) if getattr(r, name) is not None), None)


def near_copies(metrics: Metrics) -> list[NearCopies]:
    """The last search for near copies among the public images, by each measure of distance."""
    return next((r.near_copies for r in reversed(metrics.rounds) if r.near_copies), [])


def shares(estimate: Estimate) -> str:
    """Write a small share in percent with its interval."""
    if estimate.low is None or estimate.high is None:
        return f"{100 * estimate.value:.1f}{GAP}%"
    return f"{100 * estimate.value:.1f}{GAP}% ({100 * estimate.low:.1f} to {100 * estimate.high:.1f}{GAP}%)"


def gate_words(gate: SiteGate) -> str:
    """What a site answered; that the images were held back is a person's veto, and is called so."""
    return "veto: not released" if gate.verdict == "not released" else gate.verdict


def leakage_sentences(metrics: Metrics) -> list[str]:
    """Say what was looked for and what was found, the worst first."""
    said = []
    held = [g.site for g in metrics.gates if g.verdict == "not released"]
    passed = [g.site for g in metrics.gates if g.verdict == "released"]
    if held:
        said.append(f"Not released by {wording.listed(held)}. A site’s veto gives no reasons.")
    if passed:
        said.append(
            f"Released by {wording.listed(passed)}, where drawn images were compared with the site’s own."
        )
    if not metrics.gates:
        said.append("No site has compared drawn images with its own: the study has no leakage gate.")
    for near in near_copies(metrics):
        if near.images is None:
            said.append(
                f"By {near.measure}, {near.found:,} of {near.n:,} drawn images are nearer to a public image "
                f"than public patients lie to each other: {shares(near.share)}. An earlier release measured "
                "this; it took smooth pictures for copies."
            )
            continue
        said.append(
            f"By {near.measure}, to {near.found:,} of {near.n:,} public patients whom the start has seen a "
            f"drawn image comes nearer than the threshold: {shares(near.share)}. Of public patients whom it "
            f"has not seen {100 * near.expected:.1f}{GAP}% fall below it. Such drawn images: {near.images:,}."
        )
    return said


def limits(metrics: Metrics) -> list[str]:
    """What these numbers cannot say, from the run's own settings and warnings."""
    said: list[str] = []
    if not metrics.finished:
        said.append("The run is not finished: everything here may still change.")
    if metrics.simulated:
        said.append("Simulated: every site ran on one machine, on data that one person holds.")
    ends = first_and_last(metrics)
    final = ends[1] if ends else None
    if final is not None and final.fidelity is not None:
        for found in extractors(final).values():
            said += [f"{found.extractor}: {w}" if final.second else w for w in found.warnings]
        if not final.second:
            said.append(
                "One extractor only; in medicine no single extractor is trusted. Name more in the study."
            )
    if missing := why_no_fidelity(metrics):
        said.append(missing)
    for name in ("faithfulness", "cosine", "utility"):
        facts = latest(metrics, name)
        result = getattr(facts, name) if facts else None
        if result is not None:
            said += [result.warning] if name == "cosine" else result.warnings
    if latest(metrics, "utility") is None:
        said.append("Whether the images help somebody who trains on them was not measured.")
    if not metrics.gates:
        said.append("No site has looked for near copies of its own patients’ images.")
    said.append(
        "No expert has judged these images here; `polyclinic-client reader-study` makes the form for it."
    )
    said += [f"Departs from the released MSDM: {words}." for words in metrics.study.departures]
    if metrics.private:
        said += metrics.not_covered
    return list(dict.fromkeys(said))


def hashes(metrics: Metrics) -> list[tuple[str, str]]:
    """Every public hash of the run, by what it names."""
    generator = metrics.study_json.get("study", {}).get("generator", {})
    named = [
        ("resolved study", metrics.study.resolved_hash),
        ("frozen base", metrics.study.base_hash),
        ("start", metrics.study.start_hash),
        ("public reference", metrics.study.reference_hash),
        ("autoencoder", generator.get("vae_sha256")),
        ("warm start", generator.get("warm_start_sha256")),
        ("base's checkpoint", generator.get("base_sha256")),
        ("prior's checkpoint", generator.get("prior_sha256")),
        ("final state", metrics.rounds[-1].state_hash if metrics.rounds else ""),
        *model_hashes(metrics),
    ]
    return [(name, value) for name, value in named if value]


def model_hashes(metrics: Metrics) -> list[tuple[str, str]]:
    """Weights of every model that judged the images, each once: by what it is to what it hashes to."""
    named = []
    for r in reversed(metrics.rounds):
        named += [(f"extractor {e.extractor}", e.weights) for e in extractors(r).values()]
        named += [(f"CLIP-type model {r.cosine.model}", r.cosine.weights)] if r.cosine else []
        named += [(f"MedVQA-GI model {r.medvqa.extractor}", r.medvqa.weights)] if r.medvqa else []
    # A run that went on with other weights shows both.
    return list(dict.fromkeys(named))


def scores(metrics: Metrics) -> list[tuple[str, str, str]]:
    """The official MedVQA-GI 2025 scores: name, value, what it is."""
    facts = latest(metrics, "medvqa")
    if facts is None or facts.medvqa is None:
        return []
    found = facts.medvqa
    return [
        ("FBD", number(found.fbd), "Frechet BiomedCLIP distance, lower is better"),
        ("fidelity", number(found.fidelity), f"over {found.pairs} pairs of prompts, higher is better"),
        ("agreement", number(found.agreement), "cosine between two phrasings’ images, higher is better"),
        ("diversity", number(found.diversity), "pairwise distance, higher is more diverse"),
    ]


def noted(estimate: Estimate) -> str:
    """An estimate with its interval in one line."""
    interval = wording.interval(estimate)
    return number(estimate.value) + (f" ({interval})" if interval else "")


def epsilon_charge(epsilon: float | None, delta: float | None) -> str:
    """What an extra release cost a site's patients."""
    if epsilon is None:
        return DASH
    return f"epsilon {wording.bound(epsilon)}" + (
        f", delta {wording.bound(delta)}" if delta is not None else ""
    )
