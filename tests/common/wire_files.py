"""Look into the safetensors files that messages carry, and put other ones in their place."""

from hashlib import sha256

import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from safetensors.torch import load, save

from polyclinic.common.generators.base import Tensors

FILE = "safetensors"


def tensors_in(content: RecordDict, part: str) -> Tensors:
    """Tensors of one part of a message, in the types they travel in."""
    return load(bytes(content[part][FILE].data))


def raw(tensor: torch.Tensor) -> bytes:
    """A tensor's bytes in memory."""
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def file_of(data: bytes, stype: str = FILE) -> ArrayRecord:
    """Any bytes in a part's place."""
    return ArrayRecord({FILE: Array("uint8", (len(data),), stype, data)})


def put(content: RecordDict, part: str, tensors: Tensors) -> RecordDict:
    """Put other tensors into a part, with hashes that fit, as somebody who lies well would."""
    content[part] = file_of(save(tensors))
    return seal(content)


def seal(content: RecordDict) -> RecordDict:
    """Write the hashes of the tensors that are in a message now."""
    parts = [part for part, record in content.items() if isinstance(record, ArrayRecord)]
    found = {name: x for part in parts for name, x in tensors_in(content, part).items()}
    content["hashes"] = ConfigRecord({name: sha256(raw(x)).hexdigest() for name, x in found.items()})
    return content
