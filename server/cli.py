"""`polyclinic-server`: what the coordinator runs."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from polyclinic.common.cli import common_options, run_command, show
from polyclinic.common.refusals import BadInput
from polyclinic.common.study import load_study
from polyclinic.server import cli_report, cli_run, cli_sites


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="polyclinic-server", description="the coordinator's side of Polyclinic"
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    command = commands.add_parser("plan", help="check a study and say what it means")
    command.add_argument("study", help="study file, or the name of a packaged study")
    command.add_argument(
        "--measure", action="store_true", help="time the network here, to forecast seconds and energy too"
    )
    common_options(command)
    command.set_defaults(act=_plan)

    command = commands.add_parser("pretrain", help="train the VAE or a warm start on the public reference")
    command.add_argument("part", choices=["vae", "generator"])
    command.add_argument("study")
    command.add_argument("--reference", type=Path, required=True, help="folder of public images with its CSV")
    command.add_argument(
        "--out", type=Path, required=True, help="folder (vae) or safetensors file (generator)"
    )
    command.add_argument("--vae", type=Path, help="for `generator`: folder of the VAE; default: the study's")
    common_options(command)
    command.set_defaults(act=_pretrain)

    command = commands.add_parser("generate", help="draw images from a finished study")
    command.add_argument("run", type=Path, help="run folder", metavar="RUN")
    command.add_argument("--prompt", action="append", required=True, help="may be given again")
    command.add_argument("-n", type=int, default=8, help="images of each prompt (%(default)s)")
    command.add_argument(
        "--out",
        type=Path,
        default=Path("grid.png"),
        help="PNG of them all, or a new folder for one PNG each and images.csv (%(default)s)",
    )
    command.add_argument("--round", type=int, help="round to draw from; default: the last")
    command.add_argument("--seed", type=int, default=0)
    common_options(command)
    command.set_defaults(act=_generate)

    command = commands.add_parser("export", help="save the generator as diffusers loads it")
    command.add_argument(
        "--merged", action="store_true", help="a large model's whole pipeline instead of its adapters"
    )
    command.add_argument("run", type=Path, metavar="RUN")
    command.add_argument("--out", type=Path, required=True, help="folder to write")
    command.add_argument("--round", type=int)
    common_options(command)
    command.set_defaults(act=_export)

    cli_sites.add_commands(commands)
    cli_run.add_commands(commands)
    cli_report.add_commands(commands)
    return run_command(parser, argv)


def _plan(arguments: argparse.Namespace) -> None:
    from polyclinic.server.plan import local_files, plan, words
    from polyclinic.server.plan_cost import measure_speed

    study = load_study(arguments.study)
    files = local_files(study, str(arguments.study), weights=arguments.measure)
    speed = measure_speed(study, files) if arguments.measure else None
    planned = plan(study, speed=speed, memory=True)
    show(arguments, json.loads(planned.model_dump_json()), words(planned))


def _pretrain(arguments: argparse.Namespace) -> None:
    from polyclinic.common.device import pick_device
    from polyclinic.common.generators.public import hash_source, resolve
    from polyclinic.server.pretrain import pretrain_generator, pretrain_vae
    from polyclinic.server.reference import read_reference

    study = load_study(arguments.study)
    part = read_reference(study, arguments.reference).pretrain
    if study.generator.large:
        raise BadInput(
            f"{arguments.study}: family = '{study.generator.family}' starts from generator.base; only MSDM "
            "is pretrained here"
        )
    if not part:
        raise BadInput("the reference's pretrain part is empty; raise reference.pretrain in the study")
    out: Path = arguments.out
    facts: dict[str, object] = {"path": str(out)}
    if arguments.part == "vae":
        facts["psnr_db"] = round(pretrain_vae(study, part, out), 2)
    else:
        vae = arguments.vae or resolve(study.generator.vae, study.generator.vae_revision, "generator.vae")
        pretrain_generator(study, part, vae, out, device=pick_device(study.training.device))
    facts["sha256"] = hash_source(out)
    field = "vae_sha256" if arguments.part == "vae" else "warm_start_sha256"
    show(arguments, facts, f'{out}\ngenerator.{field} = "{facts["sha256"]}"')


def _generate(arguments: argparse.Namespace) -> None:
    from polyclinic.common.drawing import sample
    from polyclinic.server.evaluation.judge import picture, write_picture
    from polyclinic.server.release import open_generator, write_images

    out: Path = arguments.out
    if arguments.n < 1:
        raise BadInput(f"-n {arguments.n}: ask for at least one image")
    if not all(prompt.strip() for prompt in arguments.prompt):
        raise BadInput("--prompt is empty; write what the images should show")
    if out.suffix.lower() not in ("", ".png") or (out.suffix == "" and out.exists()):
        raise BadInput(f"--out {out}: name a .png file, or a new folder")
    resolved, family = open_generator(arguments.run, arguments.round)
    study = resolved.study
    settings = study.evaluation.model_copy(update={"seed": arguments.seed})
    wanted = [(prompt, draw) for prompt in dict.fromkeys(arguments.prompt) for draw in range(arguments.n)]
    images = sample(family, study.model_copy(update={"evaluation": settings}), wanted, "draw")
    if out.suffix:
        write_picture(out, picture(images, min(4, arguments.n)))
    else:
        write_images(out, images, [prompt for prompt, _ in wanted])
    show(arguments, {"out": str(out), "images": len(images)}, f"{out}: {len(images)} images")


def _export(arguments: argparse.Namespace) -> None:
    from polyclinic.server.release import export, open_generator

    resolved, family = open_generator(arguments.run, arguments.round)
    export(family, arguments.out, merged=arguments.merged)
    adapters = resolved.study.generator.large and not arguments.merged
    words = "load it with diffusers"
    if resolved.study.generator.large:
        words = (
            f"{'adapters' if adapters else 'the whole pipeline'}; its README.md says how diffusers loads it"
        )
    show(arguments, {"out": str(arguments.out), "adapters": adapters}, f"{arguments.out}: {words}")


if __name__ == "__main__":
    raise SystemExit(main())
