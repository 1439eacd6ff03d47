"""A whole federation on one machine, from a study to a report."""

from __future__ import annotations

import json
from pathlib import Path

from polyclinic.client.approval import prepare_and_approve
from polyclinic.client.ledger_books import create_ledger
from polyclinic.common.cost import Meter, append_cost
from polyclinic.common.files import write_atomic
from polyclinic.common.progress import say
from polyclinic.common.refusals import BadInput
from polyclinic.common.settings import SimulatedSite
from polyclinic.common.study import Study
from polyclinic.server.app import make_app
from polyclinic.server.base import Base, prepare_base
from polyclinic.server.checkpoints import rounds_done
from polyclinic.server.evaluation.judge import Judge
from polyclinic.server.link import registered_names
from polyclinic.server.plan_cost import keep_speed
from polyclinic.server.reference import split_reference
from polyclinic.server.report.html import write_report
from polyclinic.server.report.metrics import Metrics
from polyclinic.server.run_folder import SITES, open_run_folder
from polyclinic.server.summary import summarise
from polyclinic.simulation.data import Federation, make_federation
from polyclinic.simulation.grid import ask_names, run_in_process, run_on_ray


def simulate(
    study: Study, home: Path, data: Path | None, *, resume: bool, engine: str
) -> tuple[Path, Metrics]:
    """Run a study to its report.

    Args:
        study: With a simulation table.
        home: Where everything is kept.
        data: Data folder, for studies on a folder.
        resume: Go on with a run that is there.
        engine: `in-process` or `ray`.

    Returns:
        The run's folder and its metrics.

    Raises:
        BadInput: With one sentence; nothing is half-written.
        Refusal: A site or the server may not do it.
    """
    federation = make_federation(study, home, data)
    reference = split_reference(study, federation.reference)
    base = prepare_base(home, study, reference)
    run_dir = home / "runs" / base.resolved.run_name
    if rounds_done(run_dir) and not resume:
        raise BadInput(
            f"{run_dir} is there already; go on with --resume, or remove that folder to start anew"
        )
    say(f"run {run_dir}" + ("" if study.privacy.enabled else "  [NOT PRIVATE]"))
    homes = open_run(run_dir, base, federation)
    keep_speed(run_dir, study, base.files)
    judge = Judge(run_dir, base.resolved, reference, base.files, home / "features")
    judge.judge_missing()
    if engine == "ray":
        run_on_ray(make_app(run_dir, names=ask_names, after_round=judge.judge), homes)
    else:
        run_in_process(make_app(run_dir, names=registered_names, after_round=judge.judge), homes)
    metrics = summarise(run_dir)
    write_report(run_dir, metrics)
    return run_dir, metrics


def open_run(run_dir: Path, base: Base, federation: Federation) -> list[Path]:
    """Write a run's folder, prepare and approve at every site, and save the start.

    Returns:
        The sites' homes, in the order of their names.
    """
    homes = []
    for name, site in sorted(federation.settings.sites.items()):
        home = run_dir / SITES / name
        home.mkdir(parents=True, exist_ok=True, mode=0o700)
        write_policy(home, site, base.resolved.study)
        create_ledger(home, name, simulated=True)
        with Meter() as meter:
            prepare_and_approve(home, name, base.resolved, federation.sites[name], base.files)
        append_cost(home / "cost.jsonl", "cache", meter.measurement)
        homes.append(home)
    open_run_folder(run_dir, base)  # last: a preparation that was killed begins anew without --resume
    return homes


def write_policy(home: Path, site: SimulatedSite, study: Study) -> None:
    """Write what the people of a simulated hospital would have written.

    A simulation of a study without privacy, or with fixed randomness, allows it: nobody real is in it.
    """
    lines = [
        "# written by polyclinic-simulate for a simulated hospital",
        f"declared_patients = {site.declared_patients}",
        f"epsilon_per_study = {site.epsilon_cap}",
        f"epsilon_total = {site.epsilon_cap}",
        f"min_patients = {site.min_patients}",
        f"families = {json.dumps([study.generator.family])}",
        f"allow_not_private = {json.dumps(not study.privacy.enabled)}",
        f"allow_test_randomness = {json.dumps(study.training.test_key is not None)}",
    ]
    if site.lora_rank is not None:
        lines.append(f"lora_rank = {site.lora_rank}")
    path = home / "policy.toml"
    if not path.exists():
        write_atomic(path, ("\n".join(lines) + "\n").encode())
