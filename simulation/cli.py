"""`polyclinic-simulate`: a whole federation on one machine."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from polyclinic.common.cli import common_options, run_command, show
from polyclinic.common.refusals import BadInput
from polyclinic.common.study import load_study, parse_study, read_values


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="polyclinic-simulate", description="a whole federation on one machine"
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, run, text in (
        ("run", _run, "run a study to its report"),
        (
            "compare",
            _compare,
            "pooled, federated and private arms of a study, or of several systems, on one page",
        ),
    ):
        command = commands.add_parser(name, help=text, description=text)
        command.add_argument("study", help="study file, or the name of a packaged study (phantom-demo)")
        command.add_argument("--data", type=Path, help="data folder, for studies on a folder")
        command.add_argument("--resume", action="store_true", help="go on with a run that is there")
        command.add_argument(
            "--engine",
            choices=["in-process", "ray"],
            default="in-process",
            help="who runs the sites (%(default)s)",
        )
        if run is _compare:
            command.add_argument(
                "--epsilon",
                type=float,
                action="append",
                default=[],
                help="a private arm with this epsilon; may be given again (default: the study's own)",
            )
        common_options(command)
        command.set_defaults(act=run)
    text = "write a study's public reference as a data folder of its own"
    command = commands.add_parser("reference", help=text, description=text)
    command.add_argument("study")
    command.add_argument("--data", type=Path, help="data folder, for studies on a folder")
    command.add_argument("--out", type=Path, required=True, help="folder to write")
    common_options(command)
    command.set_defaults(act=_reference)
    return run_command(parser, argv)


def _run(arguments: argparse.Namespace) -> None:
    from polyclinic.simulation.run import simulate

    study = load_study(arguments.study)
    run_dir, metrics = simulate(
        study, arguments.home, arguments.data, resume=arguments.resume, engine=arguments.engine
    )
    words = "\n".join([*metrics.verdict, f"report: {run_dir / 'report.html'}"])
    show(arguments, {"run": run_dir, "report": run_dir / "report.html", "verdict": metrics.verdict}, words)


def _reference(arguments: argparse.Namespace) -> None:
    from polyclinic.simulation.data import make_federation, write_reference

    records = make_federation(load_study(arguments.study), arguments.home, arguments.data).reference
    write_reference(records, arguments.out)
    show(
        arguments,
        {"out": str(arguments.out), "images": len(records)},
        f"{arguments.out}: {len(records)} images",
    )


def _compare(arguments: argparse.Namespace) -> None:
    from polyclinic.simulation.compare import compare, compare_systems

    values, name = read_values(arguments.study)
    how = {"resume": arguments.resume, "engine": arguments.engine}
    if "compare" not in values:
        study = parse_study(values, name)
        page = compare(study, arguments.home, arguments.data, epsilons=arguments.epsilon, **how)
    elif arguments.epsilon:
        raise BadInput(f"{name}: systems are compared at one epsilon: write privacy.epsilon, not --epsilon")
    else:
        page = compare_systems(values, name, arguments.home, arguments.data, **how)
    show(arguments, {"page": page}, f"comparison: {page}")


if __name__ == "__main__":
    raise SystemExit(main())
