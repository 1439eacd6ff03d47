"""The page that compares systems, each pooled, federated and private, at equal images and GPU-hours."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from polyclinic.common.files import write_atomic
from polyclinic.common.study import Study
from polyclinic.server.evaluation.estimate import Estimate
from polyclinic.server.report import wording
from polyclinic.server.report.comparability import comparability
from polyclinic.server.report.comparison import link_to, side_by_side
from polyclinic.server.report.contest import final_faithfulness, final_kid, unjudged, winner
from polyclinic.server.report.costs import LEARNING, merged, total
from polyclinic.server.report.html import REPORT, environment
from polyclinic.server.report.metrics import Metrics, bytes_moved, first_and_last, worst_epsilon
from polyclinic.server.report.systems_chart import BUDGETS, Point, systems_frontier
from polyclinic.server.report.verdict import written

SHOWN = "private"  # whose images stand side by side


@dataclass(frozen=True)
class Entry:
    """One arm of one system.

    Attributes:
        system: Whose arm it is.
        mode: How it was trained: pooled, federated or private.
        budgets: Keys of `BUDGETS` under which it stands.
        study: Its system's private federated study: steps, rates and the GPU.
        memory: Bytes that its training is forecast to take on a GPU.
        metrics: What it came to.
        folder: Its run.
    """

    system: str
    mode: str
    budgets: tuple[str, ...]
    study: Study
    memory: int
    metrics: Metrics
    folder: Path

    @property
    def name(self) -> str:
        """System and mode."""
        return f"{self.system}, {self.mode}"

    @property
    def flops(self) -> float:
        """Operations of the training at all sites together, as they were planned."""
        return total(self.metrics.forecast, "flops", ("train",)) or 0.0

    @property
    def gpu_seconds(self) -> float:
        """GPU time of the training at the study's stated peak and utilisation."""
        return self.study.cost.gpu_seconds(self.flops) or 0.0

    @property
    def images(self) -> float:
        """Views that the training is expected to show, at all sites together."""
        privacy, simulation = self.study.privacy, self.study.simulation
        patients = sum(site.declared_patients for site in simulation.sites.values()) if simulation else 0
        return patients * privacy.sampling_rate * privacy.views * self.study.total_steps


@dataclass(frozen=True)
class Row:
    """One line of the table, in finished words but for estimates."""

    name: str
    generator: str
    link: str
    epsilon: float | None
    private: bool
    kid: Estimate | None
    faithfulness: Estimate | None
    utility: Estimate | None
    steps: str
    images: str
    gpu: str
    flops: str
    peak: str
    memory: str
    energy: str
    bytes: str


def row_of(entry: Entry, page: Path) -> Row:
    """Prepare one line."""
    metrics, training = entry.metrics, entry.study.training
    ends = first_and_last(metrics)
    utility = ends[1].utility.overall if ends and ends[1].utility else None
    spent = merged(row for row in metrics.cost if row.phase == "train")
    peak = spent.get("gpu_peak_bytes") or spent.get("peak_bytes")
    energy = total(metrics.cost, "energy_j", LEARNING)
    return Row(
        entry.name,
        metrics.study.generator,
        link_to(entry.folder / REPORT, page),
        worst_epsilon(metrics),
        metrics.private,
        final_kid(metrics),
        final_faithfulness(metrics),
        utility.synthetic if utility else None,
        f"{training.rounds} × {training.steps_per_round}",
        wording.number(entry.images),
        wording.gpu_time(entry.gpu_seconds),
        wording.scaled(entry.flops, "FLOP"),
        wording.DASH if peak is None else wording.scaled(peak.value, "B"),
        wording.scaled(entry.memory, "B"),
        wording.DASH if energy is None else wording.energy(energy),
        wording.scaled(sum(bytes_moved(metrics)), "B"),
    )


def verdict(entries: Sequence[Entry]) -> list[str]:
    """Say what is unequal between the arms, then who wins on fidelity at each budget and way of training."""
    names, arms = [e.name for e in entries], [e.metrics for e in entries]
    said = comparability(names, arms)
    for budget, words in BUDGETS.items():
        for mode in dict.fromkeys(e.mode for e in entries):
            own = [e for e in entries if e.mode == mode and budget in e.budgets]
            sentence = winner(
                [e.system for e in own],
                [final_kid(e.metrics) for e in own],
                lowest=True,
                subject=f"At {words}, {mode}",
                write=lambda e: f"KID {written(e)}",
            )
            said += [sentence] if sentence else []
    return said + unjudged(names, arms)


def write_systems(path: Path, title: str, entries: Sequence[Entry]) -> Path:
    """Write the page.

    Args:
        path: Where it will stand.
        title: Of the comparison.
        entries: Arms in the order in which they are shown.

    Returns:
        The path.

    Raises:
        BadInput: A sample sheet is missing or broken, or the disk is full.
    """
    groups = {
        f"At {words}": [row_of(e, path) for e in entries if budget in e.budgets]
        for budget, words in BUDGETS.items()
    }
    arms = [e.metrics for e in entries]
    kids = [(e, kid) for e in entries if (kid := final_kid(e.metrics)) is not None]
    floors = [kid.floor for _, kid in kids if kid.floor is not None]
    points = [
        Point(e.mode, e.system, budget, e.gpu_seconds, kid.value, kid.low, kid.high)
        for e, kid in kids
        for budget in e.budgets
    ]
    drawn = [e for e in entries if e.mode == SHOWN and "images" in e.budgets]
    cost = entries[0].study.cost
    values = {
        "title": title,
        "notices": wording.notices(arms),
        "groups": groups,
        "systems": list(dict.fromkeys(e.system for e in entries)),
        "arms": len(entries),
        "modes": list(dict.fromkeys(e.mode for e in entries)),
        "verdict": verdict(entries),
        "unfair": comparability([e.name for e in entries], arms),
        "open_arms": list(dict.fromkeys(e.mode for e in entries if not e.metrics.private)),
        "simulated": any(arm.simulated for arm in arms),
        "created": max(arm.created for arm in arms),
        "code_version": arms[0].code_version,
        "chart": systems_frontier(points, max(floors, default=None)),
        "samples": side_by_side(
            [e.system for e in drawn], [e.metrics for e in drawn], [e.folder for e in drawn]
        ),
        "speed": wording.scaled(cost.gpu_flops_per_s or 0.0, "FLOP/s"),
        "utilisation": wording.percent(cost.gpu_utilisation),
        "notes": notes(entries),
    }
    text = environment().get_template("systems.html.j2").render(values)
    write_atomic(path, text.encode())
    return path


def notes(entries: Sequence[Entry]) -> list[str]:
    """What a reader of the table must know."""
    held = [e.flops for e in entries if "hours" in e.budgets and e.flops]
    said = []
    if held:
        spread = max(held) / min(held) - 1
        said.append(
            "Steps are whole numbers, so that the operations of arms at equal GPU-hours are within "
            f"{wording.percent(spread)} of each other."
        )
    said += sorted({note for e in entries for note in e.metrics.cost_notes if note.startswith("Energy")})
    ends = [first_and_last(e.metrics) for e in entries]
    said += sorted({w for pair in ends if pair and pair[1].fidelity for w in pair[1].fidelity.warnings})
    return said
