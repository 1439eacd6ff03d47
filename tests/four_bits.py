"""NF4 weights where there is no GPU, for tests alone."""

from __future__ import annotations

import pytest


def lift_the_gpu_check(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let diffusers load NF4 on a CPU, where bitsandbytes computes it, too."""
    from diffusers.quantizers.bitsandbytes.bnb_quantizer import BnB4BitDiffusersQuantizer

    monkeypatch.setattr(BnB4BitDiffusersQuantizer, "validate_environment", lambda *_, **__: None)
    monkeypatch.setattr("polyclinic.common.generators.quantized.NEEDS_GPU", ())
