"""One round with 16 sites in a process of its own: prints bytes of a state, of a reply, and of the peak."""

from __future__ import annotations

import dataclasses
import re
import sys
from hashlib import sha256
from pathlib import Path
from typing import Any, cast

import torch
from flwr.app import ConfigRecord, Message, RecordDict
from safetensors.torch import save

from polyclinic.common.cost import Meter
from polyclinic.common.generators.base import Tensors
from polyclinic.common.generators.public import hash_state
from polyclinic.server.checkpoints import Checkpoint, RoundRecord, save_checkpoint
from polyclinic.server.replies import payload_bytes
from polyclinic.server.rounds import run_rounds
from polyclinic.simulation.grid import InProcessGrid, _identify
from tests.common.wire_files import file_of, raw
from tests.server.rounds_home import facts_for, resolved

SITES = 16
SHAPES = {f"layer{i:02d}": (1024, 1024) for i in range(12)}


class Fast(InProcessGrid):  # type: ignore[misc]
    """Reads each reply from disk when it is pulled: a site's own memory is not the server's."""

    file, tensor_hash, bytes_of_reply = Path(), "", 0

    def _answer(self, message: Message) -> Message:
        facts = ConfigRecord(dataclasses.asdict(facts_for(message)))
        hashes = ConfigRecord(dict.fromkeys(SHAPES, self.tensor_hash))
        difference = file_of(self.file.read_bytes())
        content = RecordDict({"difference": difference, "facts": facts, "hashes": hashes})
        Fast.bytes_of_reply = payload_bytes(content)
        return Message(content, reply_to=message)


def memory(field: str) -> int:
    """Bytes of this process, by the kernel's count."""
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return 1024 * int(found[1])


def main(run_dir: Path, transport: str, rule: str) -> None:
    state: Tensors = {name: torch.randn(shape) for name, shape in SHAPES.items()}
    size = sum(tensor.numel() * 4 for tensor in state.values())
    first = Checkpoint(RoundRecord(round=0, state_hash=hash_state(state)), state, state)
    save_checkpoint(run_dir, first)
    del state, first
    study = resolved(transport=transport, aggregation=rule, deadline_s=600.0)
    training = study.study.training.model_copy(update={"rounds": 1})
    study = study.model_copy(update={"study": study.study.model_copy(update={"training": training})})
    _identify(1)
    grid = Fast([Path("/sites") / f"s{i:02d}" for i in range(SITES)], cast(Any, None))
    tensor = torch.full((1024, 1024), 0.0625, dtype=torch.bfloat16 if transport == "bf16" else torch.float32)
    Fast.file, Fast.tensor_hash = run_dir / "reply", sha256(raw(tensor)).hexdigest()
    Fast.file.write_bytes(save({name: tensor.clone() for name in SHAPES}))
    del tensor
    before = memory("VmRSS")
    # A meter, since the round has meters of its own, which reset the kernel's high-water mark.
    with Meter() as meter:
        run_rounds(grid, study, run_dir)
    print(size, Fast.bytes_of_reply, meter.measurement.peak_bytes - before)


main(Path(sys.argv[1]), sys.argv[2], sys.argv[3])
