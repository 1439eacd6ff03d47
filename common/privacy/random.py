"""Randomness of a private run: one key an attempt, every draw a named stream of it.

PRIVACY.md, rule 1: the key comes from the operating system, is never written, sent or set by a
study, and each draw is a function of (key, purpose, patient, step, view), so that one patient's
presence never changes another's draws. The streams are AES-256-CTR keystreams under keys derived
with HMAC-SHA-256; numbers come from the keystream by Box-Muller in float64. Noise that protects
patients is the sum of four such draws, halved, which defeats attacks on the floating-point
representation of a single Gaussian (Holohan & Braghin 2021, 2107.10138). A step's noise is made in a
thread of its own while the step's gradients are computed.
"""

from __future__ import annotations

import hashlib
import hmac
import math
import secrets
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from numpy.typing import NDArray
from torch import Tensor

Floats = NDArray[np.float64]
# Normals made at once: they stay in the processor's cache, and below the size from which torch would take
# the threads that compute the gradients.
_BLOCK = 1 << 12
_ZEROS = bytes(32 * _BLOCK)  # what the cipher turns into the four keystreams of a block


class KeyedRandom:
    """Named random streams of one secret key."""

    def __init__(self, key: bytes) -> None:
        self._key = key

    @staticmethod
    def from_os() -> KeyedRandom:
        """A fresh key from the operating system: what every private attempt uses."""
        return KeyedRandom(secrets.token_bytes(32))

    @staticmethod
    def for_attempt(test_key: str | None, site: str, number: int) -> KeyedRandom:
        """A fresh key; where the study names a test key, and so is not private, that one's."""
        return KeyedRandom.for_test(test_key, site, number) if test_key else KeyedRandom.from_os()

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
        numbers = (words >> np.uint64(11)).astype(np.float64)
        numbers *= 2.0**-53
        return numbers

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
        out = torch.empty(count, dtype=torch.float64)
        room = bytearray(64 * min(_BLOCK // 2, (count + 1) // 2) + 16)  # the cipher may want a block more
        for start in range(0, count, _BLOCK):
            size = min(_BLOCK, count - start)
            pairs = (size + 1) // 2
            # The numbers of four calls of `normal`, all at once and by torch, which is four times as fast.
            self._cipher.update_into(memoryview(_ZEROS)[: 64 * pairs], room)
            words = torch.frombuffer(room, dtype=torch.int64, count=8 * pairs).view(4, 2, pairs)
            uniform = (words >> 11).bitwise_and_((1 << 53) - 1).double().mul_(2.0**-53)
            radius = (1 - uniform[:, 0]).log_().mul_(-2).sqrt_()
            angle = uniform[:, 1].mul_(2 * math.pi)
            four = torch.stack([radius * angle.cos(), radius * angle.sin()], 1).sum(0)
            torch.mul(four.view(-1)[:size], 0.5 * std, out=out[start : start + size])
        return out.view(shape)


class StepNoise:
    """One step's noise, made in the background: a function of (key, step, name), whenever it is made.

    At most this one step's noise is in memory, 8 bytes a number.
    """

    def __init__(self, random: KeyedRandom, step: int, shapes: Mapping[str, torch.Size]) -> None:
        maker = ThreadPoolExecutor(max_workers=1)
        self._made = {
            name: maker.submit(random.stream("noise", step, name).protective_normal, shape, 1.0)
            for name, shape in shapes.items()
        }
        maker.shutdown(wait=False)  # the thread ends when the last tensor is made

    def __call__(self, name: str, shape: torch.Size, std: float) -> Tensor:
        """Hand out a tensor's noise, once: float64 on the CPU. What failed in the thread is raised here."""
        return self._made.pop(name).result().view(shape).mul_(std)


class DeviceNoise:
    """One step's noise from a GPU's own generator, keyed anew by the operating system. NOT cryptographic."""

    def __init__(self, device: str) -> None:
        self._generator = torch.Generator(device)
        self._generator.manual_seed(secrets.randbits(63))

    def __call__(self, name: str, shape: torch.Size, std: float) -> Tensor:
        """Draw a tensor's noise: float64 on the device, four draws as in `protective_normal`."""
        total = torch.zeros(shape, device=self._generator.device, dtype=torch.float64)
        for _ in range(4):
            total += torch.empty_like(total).normal_(generator=self._generator)
        return total.mul_(0.5 * std)
