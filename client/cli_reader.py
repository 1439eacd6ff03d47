"""`polyclinic-client reader-study make, score, size`: a blinded reading of real and synthetic images."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from polyclinic.common.cli import common_options, show
from polyclinic.common.files import write_atomic, write_json_atomic
from polyclinic.common.reader_study import wording
from polyclinic.common.reader_study.key import ASKED, read_key
from polyclinic.common.refusals import BadInput

NAMES = ", ".join(ASKED)


def add_commands(commands: Any) -> None:
    """Add the commands to `polyclinic-client`."""
    parser = commands.add_parser("reader-study", help="can experts tell the images from real ones?")
    commands = parser.add_subparsers(required=True, metavar="WHAT")
    _add_make(commands.add_parser("make", help="write a blinded form for each rater, and a sealed key"))
    command = commands.add_parser("score", help="what the raters' answers say, with intervals")
    command.add_argument("answers", type=Path, nargs="+", metavar="CSV", help="one file of each rater")
    command.add_argument(
        "--sealed", type=Path, required=True, metavar="FOLDER", help="the sealed folder, or its key.json"
    )
    command.add_argument(
        "--out",
        type=Path,
        metavar="FOLDER",
        help="for results.json and results.html; default: the sealed one",
    )
    command.add_argument("--incomplete", action="store_true", help="score raters who did not finish, too")
    command.add_argument(
        "--counts", type=Path, metavar="FILE", help="write the counts of answers alone, to be handed on"
    )
    command.add_argument("--yes", action="store_true", help="do not ask before the counts are written")
    common_options(command)
    command.set_defaults(act=_score)
    _add_size(commands.add_parser("size", help="how many images and readers are needed"))


def _add_make(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--real", type=Path, required=True, metavar="DIR", help="real images: data folder, or just images"
    )
    command.add_argument(
        "--synthetic",
        action="append",
        required=True,
        metavar="NAME=DIR",
        help="a generator's images, or its run folder; once for each generator",
    )
    command.add_argument("--raters", type=int, default=2, metavar="N", help="forms (%(default)s)")
    command.add_argument(
        "--per-group",
        type=int,
        default=50,
        metavar="M",
        help="images of each generator, and as many real ones (%(default)s)",
    )
    command.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="new folder for the forms")
    command.add_argument(
        "--sealed", type=Path, metavar="FOLDER", help="new folder for the key; default: OUT-sealed, beside it"
    )
    command.add_argument("--title", default="Reader study", help="printed on the forms (%(default)s)")
    command.add_argument("--size", type=int, metavar="PX", help="side of every image; default: the smallest")
    command.add_argument("--fit", choices=("crop", "pad"), default="crop", help="square by (%(default)s)")
    command.add_argument(
        "--gray", action="store_true", help="take colour from all images; done anyway where a group has none"
    )
    command.add_argument("--prompts", action="store_true", help="show prompts; every image must have one")
    command.add_argument(
        "--ask",
        action="append",
        default=[],
        metavar="WHAT",
        help=f"also rate from 1 to 5: {NAMES}, or a sentence of your own; may be repeated",
    )
    command.add_argument(
        "--repeats", type=float, default=0.1, metavar="SHARE", help="images shown twice (%(default)s)"
    )
    command.add_argument("--table", default="images.csv", help="CSV of data folders (%(default)s)")
    command.add_argument(
        "--real-is-public", action="store_true", help="the real images are public; nothing here is private"
    )
    common_options(command)
    command.set_defaults(act=_make)


def _add_size(command: argparse.ArgumentParser) -> None:
    command.add_argument("--accuracy", type=float, help="that readers are expected to have, such as 0.65")
    command.add_argument("--images", type=int, help="real and synthetic ones together: what do they show?")
    command.add_argument("--power", type=float, default=0.8, help="(%(default)s)")
    command.add_argument("--readers", type=int, default=1, help="who all read the same images (%(default)s)")
    command.add_argument(
        "--icc-images",
        type=float,
        default=0.0,
        help="share of an answer's variance that is the image's: some are easy for all (%(default)s)",
    )
    command.add_argument(
        "--icc-readers",
        type=float,
        default=0.0,
        help="share that is the reader's: some are better (%(default)s)",
    )
    common_options(command)
    command.set_defaults(act=_size)


def _make(arguments: argparse.Namespace) -> None:
    from polyclinic.common.reader_study.make import Plan, make_study

    synthetic: dict[str, Path] = {}
    for text in arguments.synthetic:
        name, _, folder = text.partition("=")
        if not name or not folder or name == "real" or name in synthetic:
            raise BadInput(f"--synthetic {text}: write NAME=DIR, with a name of its own that is not `real`")
        synthetic[name] = Path(folder)
    out = arguments.out
    sealed = arguments.sealed or out.parent / f"{out.name}-sealed"
    plan = Plan(
        real=arguments.real,
        synthetic=synthetic,
        per_group=arguments.per_group,
        raters=arguments.raters,
        repeats=arguments.repeats,
        size=arguments.size,
        fit=arguments.fit,
        gray=arguments.gray,
        prompts=arguments.prompts,
        ask=tuple(dict.fromkeys(arguments.ask)),
        real_is_public=arguments.real_is_public,
        title=arguments.title,
        table=arguments.table,
    )
    facts = {"out": str(out), "sealed": str(sealed), **make_study(plan, out, sealed)}
    show(arguments, facts, wording.made(facts))


def _score(arguments: argparse.Namespace) -> None:
    from polyclinic.common.reader_study.answers import read_answers
    from polyclinic.common.reader_study.form import render
    from polyclinic.common.reader_study.score import score

    key, commitment = read_key(arguments.sealed)
    answers = [read_answers(p, key, commitment, incomplete=arguments.incomplete) for p in arguments.answers]
    facts = score(key, commitment, answers)
    sealed = arguments.sealed if arguments.sealed.is_dir() else arguments.sealed.parent
    out = arguments.out or sealed
    out.mkdir(parents=True, exist_ok=True, mode=0o700)
    page = out / "results.html"
    write_json_atomic(out / "results.json", facts, mode=0o600)
    write_atomic(page, render("results", facts=facts, words=wording).encode(), mode=0o600)
    words = f"{wording.summary(facts)}\n\n{page}"
    if arguments.counts:
        # Asked after the results are seen: they are what is handed on.
        print(words, file=sys.stderr if arguments.json else sys.stdout, flush=True)
        _hand_on(arguments, facts)
        words = f"{arguments.counts}: counts of answers, for you to hand on"
    show(arguments, facts, words)


def _hand_on(arguments: argparse.Namespace, facts: wording.Facts) -> None:
    from polyclinic.common.reader_study.score import counts

    if not facts["real_is_public"] and not arguments.yes:
        print("\nTo write the counts, type the study's id: ", end="", file=sys.stderr, flush=True)
        if sys.stdin.readline().strip() != facts["study"]:
            raise BadInput(f"no counts were written: type {facts['study']} when asked, or give --yes")
    write_json_atomic(arguments.counts, counts(facts), mode=0o600)


def _size(arguments: argparse.Namespace) -> None:
    from polyclinic.common.reader_study import size

    facts = size.advice(
        arguments.accuracy,
        arguments.images,
        arguments.power,
        arguments.readers,
        arguments.icc_images,
        arguments.icc_readers,
    )
    show(arguments, facts, wording.advice(facts))
