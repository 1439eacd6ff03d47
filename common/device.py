"""Where to train and to draw: a CPU or a GPU."""

from __future__ import annotations

import torch

from polyclinic.common.refusals import BadInput


def pick_device(asked: str) -> str:
    """Where to train: `cpu`, `cuda`, or for `auto` a GPU where there is one.

    Raises:
        BadInput: A GPU is asked for and there is none.
    """
    if asked == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if asked == "cuda" and not torch.cuda.is_available():
        raise BadInput(
            '`training.device = "cuda"`: this machine has no GPU that torch sees; write "auto" or "cpu"'
        )
    return asked
