"""`polyclinic-client check, snapshot, cache`: a site's data, before anything is approved."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from polyclinic.client.check.report import page, words
from polyclinic.client.cli_approval import read_resolved
from polyclinic.common.cli import common_options, show
from polyclinic.common.data.units import WITHOUT_PATIENTS
from polyclinic.common.files import write_atomic, write_json_atomic
from polyclinic.common.generator_settings import GeneratorSettings
from polyclinic.common.refusals import BadInput
from polyclinic.common.settings import DataSettings
from polyclinic.common.study import load_study

Commands = Any  # argparse gives its subparsers no public type


def add_commands(commands: Commands) -> None:
    """Add the commands to `polyclinic-client`."""
    command = commands.add_parser("check", help="look at every image and caption before anything is spent")
    _data_options(command)
    command.add_argument("--fix", action="store_true", help="write what is accepted and what is quarantined")
    command.add_argument(
        "--quarantine", action="append", default=[], metavar="CODE", help="treat this warning as an error"
    )
    command.add_argument(
        "--beside",
        action="append",
        default=[],
        type=Path,
        metavar="HOME",
        help="another ledger of this hospital, which this machine has not seen: compare patients with it, "
        "now and from now on",
    )
    command.set_defaults(act=_check)
    command = commands.add_parser("snapshot", help="fix the table that approvals bind, by content")
    _data_options(command)
    command.set_defaults(act=_snapshot)
    command = commands.add_parser("cache", help="encode the images of a study ahead of its approval")
    _data_options(command)
    command.set_defaults(act=_cache)


def _data_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("data", type=Path, metavar="DATA", help="the data folder")
    command.add_argument(
        "--study",
        type=Path,
        metavar="STUDY",
        help="study the data is for (default: the kit's, if there is one)",
    )
    command.add_argument("--source", help="form of the folder, where there is no study yet (data.source)")
    common_options(command)


def _settings(arguments: argparse.Namespace) -> tuple[DataSettings, GeneratorSettings]:
    """How the folder is read: as the named study says, or the kit's, or by its form alone.

    Raises:
        BadInput: No such study, or no such form.
    """
    study = arguments.study or arguments.home / "kit" / "study.json"
    if arguments.source is None and (arguments.study or study.exists()):
        found = load_study(study) if study.suffix == ".toml" else read_resolved(study).study
        return found.data, found.generator
    from polyclinic.common.data.sources import DOORS

    source = arguments.source or "folder"
    if source not in DOORS:
        raise BadInput(f"--source {source}: no such form; choose of {', '.join(DOORS)}")
    unit = "image" if source in WITHOUT_PATIENTS else "patient"
    return DataSettings.model_validate({"source": source, "unit": unit}), GeneratorSettings()


def _check(arguments: argparse.Namespace) -> None:
    from polyclinic.client.check.preflight import preflight
    from polyclinic.client.intake import data_home, reading
    from polyclinic.client.ledger_register import register

    data, generator = _settings(arguments)
    home, folder = arguments.home, arguments.data
    for other in arguments.beside:
        if not (other / "ledger.jsonl").is_file():
            raise BadInput(f"--beside {other}: no ledger.jsonl is in it; name the home that holds one")
        register(other)
    facts = preflight(
        home, folder, data, generator, fix=arguments.fix, harder=frozenset(arguments.quarantine)
    )
    stem = data_home(home) / reading(data, folder)
    facts["report"] = str(stem.with_suffix(".html"))
    write_json_atomic(stem.with_suffix(".json"), facts, mode=0o600)
    write_atomic(stem.with_suffix(".html"), page(facts).encode("utf-8", "replace"), mode=0o600)
    show(arguments, facts, f"{words(facts)}\nreport: {facts['report']} (it stays here)")
    grave = [row for row in facts["findings"] if row["severity"] in ("stop", "error")]
    if grave and not facts.get("fixed"):
        count = sum(row["count"] for row in grave)
        raise BadInput(
            f"{folder}: {count} findings keep it from being used as it is; mend them, or give --fix"
        )


def _snapshot(arguments: argparse.Namespace) -> None:
    from polyclinic.client.intake import make_snapshot

    data, _ = _settings(arguments)
    facts = make_snapshot(arguments.home, data, arguments.data)
    how = "of what `check --fix` accepted" if facts["checked"] else "NOT CHECKED: run `check --fix` first"
    show(
        arguments,
        facts,
        f"snapshot {facts['snapshot'][:16]}: {facts['images']:,} images of {facts['patients']:,} "
        f"{data.unit}s, {how}. Approvals bind it; the hash stays here. The ledger goes on: "
        "earlier charges count for it.",
    )


def _cache(arguments: argparse.Namespace) -> None:
    from polyclinic.client.approval import check_base
    from polyclinic.client.base_intake import use_hub
    from polyclinic.client.binding import site_base
    from polyclinic.client.intake import site_records
    from polyclinic.common.data.cache import build_cache
    from polyclinic.common.device import pick_device
    from polyclinic.common.generators.base import load_family

    home = arguments.home
    use_hub(home)
    path = arguments.study or home / "kit" / "study.json"
    if path.suffix == ".toml":
        raise BadInput(f"{path}: only a resolved study names its base; give the kit's study.json")
    resolved = read_resolved(path)
    study = resolved.study
    records = site_records(home, study.data, arguments.data)
    files = site_base(home, resolved)
    check_base(resolved, files)
    family = load_family(study, files, device=pick_device(study.training.device), network=False)
    name = build_cache(records, family, study.data, home / "cache")
    facts = {"cache": name, "images": len(records), "folder": str(home / "cache")}
    show(arguments, facts, f"{len(records):,} images are encoded for {study.name}: {home / 'cache'}")
