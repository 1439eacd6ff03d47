"""Randomness of a private run: one key an attempt, every draw a named stream of it.

PRIVACY.md, rule 1: the key comes from the operating system, is never written, sent or set by a
study, and each draw is a function of (key, purpose, patient, step, view), so that one patient's
presence never changes another's draws. The streams are AES-256-CTR keystreams under keys derived
with HMAC-SHA-256; numbers come from the keystream by Box-Muller in float64. Noise that protects
patients is the sum of four such draws, halved, which defeats attacks on the floating-point
representation of a single Gaussian (Holohan & Braghin 2021, 2107.10138).
"""

from __future__ import annotations

import hashlib
import hmac
import math
import secrets

import numpy as np
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from numpy.typing import NDArray
from torch import Tensor

Floats = NDArray[np.float64]
_BLOCK = 1 << 20  # normals made at once: bounds the memory of a large noise tensor


class KeyedRandom:
    """Named random streams of one secret key."""

    def __init__(self, key: bytes) -> None:
        self._key = key

    @staticmethod
    def from_os() -> KeyedRandom:
        """A fresh key from the operating system: what every private attempt uses."""
        return KeyedRandom(secrets.token_bytes(32))

    @staticmethod
    def for_test(test_key: str, site: str, round_number: int) -> KeyedRandom:
        """A fixed key, for simulations whose own policy allows it; such runs are NOT PRIVATE."""
        return KeyedRandom(hashlib.sha256(f"{test_key}|{site}|{round_number}".encode()).digest())

    def stream(self, *name: str | int) -> Stream:
        """Open the stream with this name; the same name always gives the same numbers."""
        label = "|".join(f"{len(str(part))}:{part}" for part in name)
        return Stream(hmac.new(self._key, label.encode(), hashlib.sha256).digest())


class Stream:
    """A sequence of random numbers from one keystream."""

    def __init__(self, key: bytes) -> None:
        # A key is used for one stream only, so a constant initial counter is safe.
        self._cipher = Cipher(algorithms.AES(key), modes.CTR(bytes(16))).encryptor()

    def uniform(self, count: int) -> Floats:
        """Draw `count` numbers in [0, 1) with 53 random bits each."""
        words = np.frombuffer(self._cipher.update(bytes(8 * count)), dtype="<u8")
        return (words >> np.uint64(11)).astype(np.float64) * 2.0**-53

    def below(self, limit: int) -> int:
        """Draw an integer in [0, limit); the bias is under limit / 2^53."""
        return int(self.uniform(1)[0] * limit)

    def normal(self, count: int) -> Floats:
        """Draw `count` standard normal numbers by Box-Muller in float64."""
        pairs = (count + 1) // 2
        # 1 - u lies in (0, 1], so the logarithm is finite.
        radius = np.sqrt(-2 * np.log(1 - self.uniform(pairs)))
        angle = 2 * math.pi * self.uniform(pairs)
        return np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])[:count]

    def protective_normal(self, shape: torch.Size | tuple[int, ...], std: float) -> Tensor:
        """Gaussian noise that protects patients: sum of four draws, halved.

        It stays in float64 until it is added: noise already rounded to fp32 would tell a sum of zero from
        any other by the low bits of the result, which is what the four draws defend against.

        Args:
            shape: Shape of the tensor.
            std: Standard deviation.

        Returns:
            Float64 tensor on the CPU.
        """
        count = math.prod(shape)
        out = np.empty(count, dtype=np.float64)
        for start in range(0, count, _BLOCK):
            size = min(_BLOCK, count - start)
            out[start : start + size] = sum(self.normal(size) for _ in range(4)) * (0.5 * std)
        return torch.from_numpy(out).reshape(shape)
