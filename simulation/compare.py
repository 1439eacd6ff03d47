"""Arms on equal examples, pooled, federated and private: of one study, or of systems at two budgets."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from polyclinic.common.progress import say
from polyclinic.common.refusals import BadInput
from polyclinic.common.study import Study, parse_study
from polyclinic.server.report.comparison import write_comparison
from polyclinic.server.report.systems import Entry, write_systems
from polyclinic.simulation.comparison_study import systems_of
from polyclinic.simulation.run import simulate

MODES = ("pooled", "federated", "private")


def arms(study: Study, epsilons: Sequence[float] = ()) -> list[Study]:
    """Derive the arms. Every arm sees the same patients at the same rate for the same steps.

    Args:
        study: The private federated study.
        epsilons: Of the private arms, one each; none: one arm with the study's own.

    Returns:
        Pooled not private, federated not private, and the private arms.
    """
    if study.simulation is None:
        raise BadInput(f"study {study.name}: has no [simulation] table to compare on")
    title = study.title or study.name
    declared = sum(site.declared_patients for site in study.simulation.sites.values())
    site = {"declared_patients": declared}
    pooled = {"split": "pooled", "sites": {"all-sites": site}}
    private = [
        _derive(
            study,
            f"epsilon-{epsilon:g}".replace(".", "-"),
            f"{title}: federated, epsilon {epsilon:g}",
            privacy={"enabled": True, "epsilon": epsilon},
        )
        for epsilon in dict.fromkeys(epsilons)
    ] or [_derive(study, "private", f"{title}: federated, private", privacy={"enabled": True})]
    return [
        _derive(
            study,
            "pooled",
            f"{title}: pooled, not private",
            privacy={"enabled": False},
            simulation=pooled,
            federation={"min_sites": 1, "quorum": 0, "weights": "equal"},
        ),
        _derive(study, "federated", f"{title}: federated, not private", privacy={"enabled": False}),
        *private,
    ]


def compare_systems(
    values: dict[str, Any], source: str, home: Path, data: Path | None, *, resume: bool, engine: str
) -> Path:
    """Run every system's arms at equal images seen and at equal GPU-hours, and write their page.

    Args:
        values: Of a file with a `compare` table.
        source: Its name.
        home: Where everything is kept.
        data: Data folder, for studies on a folder.
        resume: Go on with runs that are there.
        engine: `in-process` or `ray`.

    Returns:
        The page.

    Raises:
        BadInput: Before anything runs, where the file or a base is not right.
    """
    systems = systems_of(values, source, home)
    wanted = [
        (system, budgets, study, mode, arm)
        for system in systems
        for budgets, study in system.budgets
        for mode, arm in zip(MODES, arms(study), strict=True)
    ]
    entries = []
    for number, (system, budgets, study, mode, arm) in enumerate(wanted, 1):
        say(f"arm {number} of {len(wanted)}: {arm.name}")
        folder, metrics = simulate(arm, home, data, resume=resume, engine=engine)
        memory = system.memory[arm.privacy.enabled]
        entries.append(Entry(system.name, mode, budgets, study, memory, metrics, folder))
    page = home / "runs" / f"{values['name']}-compare.html"
    return write_systems(page, str(values.get("title") or values["name"]), entries)


def _derive(study: Study, arm: str, title: str, **changes: dict[str, Any]) -> Study:
    values = study.model_dump(mode="json")
    values["name"], values["title"] = f"{study.name[: 39 - len(arm)]}-{arm}", title
    for table, fields in changes.items():
        values[table] = fields if table == "simulation" else {**values[table], **fields}
    return parse_study(values, f"{study.name}, arm {arm}")


def compare(
    study: Study,
    home: Path,
    data: Path | None,
    *,
    epsilons: Sequence[float] = (),
    resume: bool,
    engine: str,
) -> Path:
    """Run the arms and draw them on one page.

    Returns:
        The page.
    """
    results = []
    for arm in arms(study, epsilons):
        say(f"arm {arm.name}")
        results.append(simulate(arm, home, data, resume=resume, engine=engine))
    page = home / "runs" / f"{study.name}-compare.html"
    write_comparison(page, [metrics for _, metrics in results], [run_dir for run_dir, _ in results])
    return page
