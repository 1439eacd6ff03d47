"""`polyclinic-server` start, health, run, status, stop, logs: a study in a real federation."""

from __future__ import annotations

import argparse
import sys
from collections import deque
from pathlib import Path
from typing import Any

from polyclinic.common.cli import common_options, show
from polyclinic.common.refusals import BadInput, Refusal
from polyclinic.common.study import load_study


def add_commands(commands: Any) -> None:
    """Add the commands to the parser's group."""
    command = commands.add_parser("start", help="run SuperLink, superexec and gateway until SIGTERM")
    command.add_argument("--host", default="0.0.0.0", help="address the gateway listens on (%(default)s)")
    command.add_argument("--port", type=int, default=8443, help="its port (%(default)s)")
    common_options(command)
    command.set_defaults(act=_start)

    command = commands.add_parser("health", help="can a run be launched? exit code 0 if so, 3 if not")
    common_options(command)
    command.set_defaults(act=_health)

    command = commands.add_parser("run", help="run a study with the enrolled sites, to its report")
    command.add_argument("study", help="study file, or the name of a packaged study")
    command.add_argument("--reference", type=Path, help="folder of the public images it is judged by")
    command.add_argument("--resume", action="store_true", help="go on after the last released round")
    command.add_argument("--detach", action="store_true", help="return once it is launched")
    common_options(command)
    command.set_defaults(act=_run)

    for name, act, text in (
        ("status", _status, "sites, round, quorum, ETA, epsilon as reported, bytes"),
        ("stop", _stop, "stop a run; it goes on with `run --resume`"),
        ("logs", _logs, "what a run's ServerApp said, or one of the coordinator's processes"),
    ):
        command = commands.add_parser(name, help=text)
        words = "; or superlink, superexec, gateway, gateway-access" if name == "logs" else ""
        command.add_argument("run", metavar="RUN", help=f"run folder, or the study's name{words}")
        if name == "logs":
            command.add_argument("-n", type=int, default=100, help="last lines (%(default)s)")
        common_options(command)
        command.set_defaults(act=act)


def _start(arguments: argparse.Namespace) -> None:
    from polyclinic.server.node import start

    start(arguments.home, arguments.host, arguments.port)


def _health(arguments: argparse.Namespace) -> None:
    from polyclinic.server.node import health

    faults = health(arguments.home)
    if faults:
        raise Refusal("not-healthy", "; ".join(faults))
    show(arguments, {"healthy": True}, "healthy: a run was launched and ended")


def _run(arguments: argparse.Namespace) -> None:
    from polyclinic.server.coordinate import report, run_study
    from polyclinic.server.reference import read_reference

    home, study = arguments.home, load_study(arguments.study)
    reference = read_reference(study, arguments.reference)
    try:
        run_dir = run_study(
            home,
            study,
            reference,
            resume=arguments.resume,
            detach=arguments.detach,
        )
    except KeyboardInterrupt:
        print(f"the run goes on; see `polyclinic-server status {study.name}`", file=sys.stderr)
        raise
    if arguments.detach:
        words = f"launched; `polyclinic-server run {arguments.study} --resume` follows it to its report"
        show(arguments, {"run": run_dir}, words)
        return
    metrics = report(run_dir)
    page = run_dir / "report.html"
    facts = {"run": run_dir, "report": page, "verdict": metrics.verdict}
    show(arguments, facts, "\n".join([*metrics.verdict, f"report: {page}"]))


def _status(arguments: argparse.Namespace) -> None:
    from polyclinic.server.coordinate import round_line, sites_line, status
    from polyclinic.server.progress_file import read_progress
    from polyclinic.server.run_folder import find_run

    run_dir = find_run(arguments.home, arguments.run)
    facts = status(run_dir)
    progress = read_progress(run_dir)
    lines = [f"run {run_dir}", *(round_line(run_dir, x["round"]) for x in facts["rounds"] if x["round"])]
    if progress:
        lines.append(sites_line(progress))
        lines.append(
            f"quorum {progress.quorum}, at least {progress.min_sites}; deadline {progress.deadline or 'none'}"
        )
    show(arguments, facts, "\n".join(lines))


def _stop(arguments: argparse.Namespace) -> None:
    from polyclinic.server.coordinate import running_attempt
    from polyclinic.server.node import stop_attempt
    from polyclinic.server.run_folder import find_run

    run_dir = find_run(arguments.home, arguments.run)
    running = running_attempt(arguments.home, run_dir)
    if running is None:
        raise BadInput(f"{run_dir.name} is not running")
    stop_attempt(arguments.home, running)
    show(arguments, {"stopped": running}, "stopped; go on with `polyclinic-server run STUDY --resume`")


def _logs(arguments: argparse.Namespace) -> None:
    from polyclinic.server.run_folder import find_run

    path = arguments.home / "node" / f"{arguments.run}.log"
    if not path.exists():
        path = find_run(arguments.home, arguments.run) / "server.log"
    if not path.exists():
        raise BadInput(f"{path}: nothing was said yet")
    with path.open(encoding="utf-8", errors="replace") as file:
        lines = list(deque(file, maxlen=max(1, arguments.n)))
    show(arguments, {"path": path, "lines": lines}, "".join(lines).rstrip())
