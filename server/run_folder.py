"""A run's folder before its first round, and how a person names it."""

from __future__ import annotations

from pathlib import Path

from polyclinic.common.files import write_atomic, write_json_atomic
from polyclinic.common.refusals import BadInput
from polyclinic.server.base import Base
from polyclinic.server.checkpoints import Checkpoint, RoundRecord, rounds_done, save_checkpoint

BASE_COSTS = "base_costs.json"  # what training the base on this machine cost, as lines of `append_cost`
SITES = "sites"  # homes of a simulation's sites; a real run's folder has no such thing


def is_simulated(run_dir: Path) -> bool:
    """Whether a run's sites were simulated on this machine."""
    return (run_dir / SITES).is_dir()


def open_run_folder(run_dir: Path, base: Base) -> None:
    """Write the resolved study, where its frozen parts lie, and the checkpoint of round 0."""
    run_dir.mkdir(parents=True, exist_ok=True)
    write_json_atomic(run_dir / "study.json", base.resolved.model_dump(mode="json"))
    write_atomic(run_dir / "base.json", base.files.model_dump_json().encode())
    write_json_atomic(run_dir / BASE_COSTS, base.costs)
    if not rounds_done(run_dir):
        record = RoundRecord(round=0, state_hash=base.resolved.start_hash)
        save_checkpoint(run_dir, Checkpoint(record, base.start, base.start))


def find_run(home: Path, named: str) -> Path:
    """Find the run a person means: its folder, that folder's name, or the study's (the newest run).

    Raises:
        BadInput: There is no such run.
    """
    if (Path(named) / "study.json").exists():
        return Path(named)
    study = Path(named).stem
    found = [x for x in (home / "runs").glob("*/study.json") if x.parent.name.rpartition("-")[0] == study]
    if (home / "runs" / named / "study.json").exists():
        return home / "runs" / named
    if not found:
        raise BadInput(f"{named}: no such run in {home / 'runs'}; name a run folder or a study that was run")
    return max(found, key=lambda path: path.stat().st_mtime).parent
