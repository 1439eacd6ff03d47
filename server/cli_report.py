"""`polyclinic-server report`: a run's report again, while it runs, or for TensorBoard."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from polyclinic.common.cli import common_options, show
from polyclinic.common.progress import say
from polyclinic.common.refusals import BadInput
from polyclinic.common.study import explain

if TYPE_CHECKING:
    from polyclinic.common.cost_settings import CostSettings


def add_commands(commands: Any) -> None:
    """Add the command to the parser's group."""
    command = commands.add_parser("report", help="write a run's report again, finished or not")
    command.add_argument("run", metavar="RUN", help="run folder, or the study's name")
    command.add_argument("--watch", action="store_true", help="serve it; it renews itself after each round")
    command.add_argument("--host", default="127.0.0.1", help="address of --watch (%(default)s)")
    command.add_argument("--port", type=int, default=8642, help="its port; 0: a free one (%(default)s)")
    command.add_argument(
        "--cost",
        action="append",
        default=[],
        metavar="FIELD=VALUE",
        help="a field of the study's [cost] table for this report, e.g. grid_gco2_per_kwh=380",
    )
    command.add_argument("--tensorboard", type=Path, metavar="DIR", help="write its scalars and images there")
    common_options(command)
    command.set_defaults(act=_report)


def _report(arguments: argparse.Namespace) -> None:
    if arguments.watch and arguments.tensorboard is not None:
        raise BadInput(
            "--watch serves a page that goes on changing, --tensorboard writes its files once: give one of "
            "them, and run the other as a command of its own"
        )
    from polyclinic.server.release import check_run
    from polyclinic.server.report.html import write_report
    from polyclinic.server.run_folder import find_run
    from polyclinic.server.summary import summarise

    run_dir = find_run(arguments.home, arguments.run)
    check_run(run_dir)
    settings = _settings(run_dir, arguments.cost)
    if arguments.watch:
        _watch(run_dir, settings, arguments.host, arguments.port)
        return
    metrics = summarise(run_dir, settings=settings)
    page = write_report(run_dir, metrics)
    facts: dict[str, object] = {"report": str(page)}
    if arguments.tensorboard is not None:
        from polyclinic.server.report.tensorboard import write_tensorboard

        facts["tensorboard"] = str(write_tensorboard(run_dir, metrics, arguments.tensorboard))
    show(arguments, facts, "\n".join(str(path) for path in facts.values()))


def _settings(run_dir: Path, given: list[str]) -> CostSettings | None:
    """The study's cost table with the fields named on the command line; None where none is."""
    from polyclinic.common.cost_settings import CostSettings
    from polyclinic.server.app import load_resolved

    if not given:
        return None
    values = load_resolved(run_dir).study.cost.model_dump()
    for text in given:
        field, equals, value = text.partition("=")
        if not equals:
            raise BadInput(f"--cost {text}: write FIELD=VALUE, e.g. --cost grid_gco2_per_kwh=380")
        values[field] = value
    try:
        return CostSettings.model_validate(values)
    except ValidationError as error:
        raise BadInput(f"--cost: {explain(error)}") from error


def _watch(run_dir: Path, settings: CostSettings | None, host: str, port: int) -> None:
    from polyclinic.server.watch import LivePage, serve

    page = LivePage(run_dir, settings)
    page.current()  # what is wrong with the run is said before anybody is told an address
    server, address = serve(page, host, port)
    say("plain HTTP: use a tunnel where others can listen" if "token" in address else "this machine only")
    print(address, flush=True)
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        say("no longer served")
    finally:
        server.server_close()
