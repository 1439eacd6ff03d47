"""One folder a round: the state, its average and the record, all there or not at all."""

from __future__ import annotations

import json
import shutil
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from pydantic import BaseModel, ConfigDict
from safetensors.torch import load_file, save

from polyclinic.common.files import naming_full_disk, sync_folder, write_atomic, write_json_atomic
from polyclinic.common.generators.base import Tensors
from polyclinic.common.stored import read_stored
from polyclinic.server.server_optimizer import MOMENTS
from polyclinic.server.spool import write_tensors

TAPS = "taps.safetensors"


class RoundRecord(BaseModel):
    """What happened in a round. Infinite epsilon (not private) is written as the string "inf".

    Attributes:
        round: From 0, the start.
        released: Enough sites replied, so the state changed.
        state_hash: Hash of the state after the round.
        replied: Site to the facts of its reply.
        sent_hash: Hash of the state before it as the sites decoded it: what their ledgers name.
        refused: Site to its refusal, code and words.
        rejected: Site to why its reply was thrown away, code and words.
        absent: Sites that did not answer by the deadline.
        bytes_down: Payload to all sites.
        bytes_up: Payload from all sites.
        down: The same by site.
        up: The same by site; a rejected reply counts, too.
        seconds: Wall time.
    """

    model_config = ConfigDict(extra="forbid", ser_json_inf_nan="strings")

    round: int
    released: bool = True
    state_hash: str
    sent_hash: str = ""
    replied: dict[str, dict[str, float | int | str]] = {}
    refused: dict[str, str] = {}
    rejected: dict[str, str] = {}
    absent: list[str] = []
    bytes_down: int = 0
    bytes_up: int = 0
    down: dict[str, int] = {}
    up: dict[str, int] = {}
    seconds: float = 0.0

    @property
    def refusals(self) -> dict[str, str]:
        """Site to why nothing of it was released, whoever said no."""
        return self.refused | {site: f"reply rejected, {why}" for site, why in self.rejected.items()}


@dataclass(frozen=True)
class Checkpoint:
    """Everything a run needs to go on, and beside it what the sites' audit taps sent.

    Attributes:
        record: What happened in the round.
        state: Trainable state after it.
        average: Moving average of the states.
        taps: Site to the tensors of its tap; kept in a file of their own, never loaded with a state.
        moments: Spooled file of what the server's optimizer remembers; moved into the checkpoint.
    """

    record: RoundRecord
    state: Tensors
    average: Tensors
    taps: dict[str, Tensors] = field(default_factory=dict)
    moments: Path | None = None


def save_checkpoint(run_dir: Path, checkpoint: Checkpoint) -> None:
    """Write a checkpoint's folder in one rename."""
    folder = run_dir / "checkpoints"
    folder.mkdir(parents=True, exist_ok=True)
    place = folder / f"round-{checkpoint.record.round:04d}"
    temporary = Path(tempfile.mkdtemp(dir=folder, prefix=".writing-"))
    try:
        with naming_full_disk(place):
            for name, tensors in (("state", checkpoint.state), ("average", checkpoint.average)):
                write_tensors(temporary / f"{name}.safetensors", sorted(tensors.items()), tensors, sync=True)
            if checkpoint.moments:
                checkpoint.moments.rename(temporary / MOMENTS)
            if checkpoint.taps:
                flat = {f"{site}/{n}": t for site, tap in checkpoint.taps.items() for n, t in tap.items()}
                write_atomic(temporary / TAPS, save(flat))
            write_json_atomic(temporary / "record.json", json.loads(checkpoint.record.model_dump_json()))
            temporary.rename(place)
            sync_folder(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def checkpoint_folder(run_dir: Path, number: int) -> Path:
    """Where a round's checkpoint lies."""
    return run_dir / "checkpoints" / f"round-{number:04d}"


def rounds_done(run_dir: Path) -> list[int]:
    """Numbers of the rounds that have a checkpoint, ascending."""
    return sorted(int(path.name.removeprefix("round-")) for path in (run_dir / "checkpoints").glob("round-*"))


def load_checkpoint(run_dir: Path, number: int) -> Checkpoint:
    """Read a round's checkpoint."""
    folder = checkpoint_folder(run_dir, number)
    return Checkpoint(
        load_record(run_dir, number),
        load_file(str(folder / "state.safetensors")),
        load_file(str(folder / "average.safetensors")),
    )


def load_record(run_dir: Path, number: int) -> RoundRecord:
    """Read a round's record alone."""
    path = checkpoint_folder(run_dir, number) / "record.json"
    return read_stored(path, RoundRecord, "use the release that wrote it, or run the study anew")


def load_taps(run_dir: Path, number: int) -> dict[str, Tensors]:
    """Read what the sites' audit taps sent in a round: site to tensors by name; empty without a tap."""
    path = checkpoint_folder(run_dir, number) / TAPS
    taps: dict[str, Tensors] = {}
    for name, tensor in (load_file(str(path)) if path.exists() else {}).items():
        site, *rest = name.rsplit("/", 2)  # a site's name may hold slashes, a tap's tensor has one
        taps.setdefault(site, {})["/".join(rest)] = tensor
    return taps
