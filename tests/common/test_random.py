"""PRIVACY.md, rule 1, at its root: named streams of one key, and what they are distributed like."""

import hashlib
import hmac
import threading
import time

import numpy as np
import pytest
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from polyclinic.common.privacy.random import DeviceNoise, KeyedRandom, StepNoise

KEY = bytes(range(32))


def test_a_stream_is_a_function_of_key_and_name_only() -> None:
    one = KeyedRandom(KEY)
    first = one.stream("view", 3, "p1", 0).normal(64)
    one.stream("view", 3, "p2", 0).normal(1000)
    assert np.array_equal(one.stream("view", 3, "p1", 0).normal(64), first)
    assert np.array_equal(KeyedRandom(KEY).stream("view", 3, "p1", 0).normal(64), first)
    assert not np.array_equal(KeyedRandom(KEY[::-1]).stream("view", 3, "p1", 0).normal(64), first)


@settings(max_examples=60)
@given(st.lists(st.text(max_size=4), max_size=3), st.lists(st.text(max_size=4), max_size=3))
def test_different_names_are_different_streams(one: list[str], other: list[str]) -> None:
    random = KeyedRandom(KEY)
    same = np.array_equal(random.stream(*one).uniform(4), random.stream(*other).uniform(4))
    assert same == (one == other)


def test_names_cannot_run_into_each_other() -> None:
    random = KeyedRandom(KEY)
    names: list[tuple[str | int, ...]] = [
        ("a", "bc"),
        ("ab", "c"),
        ("a|1:b", "c"),
        ("a", "b", "c"),
        ("abc",),
        (1, 11),
        (11, 1),
    ]
    assert len({random.stream(*name).uniform(1)[0] for name in names}) == len(names)


def test_uniform_is_the_top_53_bits_of_the_keystream() -> None:
    random = KeyedRandom(KEY)
    stream = random.stream("x")
    derived = hmac.new(KEY, b"1:x", hashlib.sha256).digest()
    raw = Cipher(algorithms.AES(derived), modes.CTR(bytes(16))).encryptor().update(bytes(80))
    want = [(int.from_bytes(raw[i : i + 8], "little") >> 11) / 2**53 for i in range(0, 80, 8)]
    assert stream.uniform(10).tolist() == want


def test_uniform_and_normal_have_their_distributions() -> None:
    random = KeyedRandom(KEY)
    uniform = random.stream("u").uniform(200_000)
    assert uniform.min() >= 0
    assert uniform.max() < 1
    assert stats.kstest(uniform, "uniform").pvalue > 1e-3
    normal = random.stream("n").normal(200_001)
    assert len(normal) == 200_001
    assert stats.kstest(normal, "norm").pvalue > 1e-3
    # Box-Muller's two halves of a pair must be independent too, and so must their squares.
    half = normal[:200_000].reshape(2, -1)
    assert abs(np.corrcoef(half[0], half[1])[0, 1]) < 0.015
    assert abs(np.corrcoef(half[0] ** 2, half[1] ** 2)[0, 1]) < 0.015


def test_streams_with_neighbouring_names_are_uncorrelated() -> None:
    random = KeyedRandom(KEY)
    draws = np.stack([random.stream("noise", step, "w").normal(50_000) for step in range(4)])
    assert np.abs(np.corrcoef(draws) - np.eye(4)).max() < 0.02


@pytest.mark.parametrize("limit", [1, 2, 7])
def test_below_is_even_and_stays_below(limit: int) -> None:
    stream = KeyedRandom(KEY).stream("below")
    counts = np.bincount([stream.below(limit) for _ in range(7000)], minlength=limit)
    assert len(counts) == limit
    assert stats.chisquare(counts).pvalue > 1e-3 if limit > 1 else counts[0] == 7000


def test_protective_noise_has_its_shape_deviation_and_distribution() -> None:
    # Many blocks of 2^14 and a part of one, so that the seams between blocks are crossed.
    noise = KeyedRandom(KEY).stream("noise").protective_normal(torch.Size((1100, 1000)), 0.7)
    assert noise.shape == (1100, 1000)
    assert abs(float(noise.std()) / 0.7 - 1) < 0.003
    assert abs(float(noise.mean())) < 0.003
    flat = noise.flatten().numpy()
    assert stats.kstest(flat[::5] / 0.7, "norm").pvalue > 1e-3
    assert len(np.unique(flat)) == len(flat)
    assert KeyedRandom(KEY).stream("noise").protective_normal((), 1.0).shape == ()


def test_protective_noise_is_not_rounded_to_fp32_before_it_is_added() -> None:
    noise = KeyedRandom(KEY).stream("noise").protective_normal((1000,), 1.0)
    assert noise.dtype == torch.float64
    assert float((noise == noise.float().double()).double().mean()) < 0.01


def test_every_private_attempt_has_another_key() -> None:
    draws = {KeyedRandom.from_os().stream("x").uniform(1)[0] for _ in range(20)}
    assert len(draws) == 20


def test_the_test_key_depends_on_site_and_round() -> None:
    draws = {
        KeyedRandom.for_test(key, site, number).stream("x").uniform(1)[0]
        for key in ("k", "l")
        for site in ("a", "b")
        for number in (1, 2)
    }
    assert len(draws) == 8


SHAPES = {"a": torch.Size((3, 50_000)), "b": torch.Size(()), "c": torch.Size((7,))}


def test_step_noise_is_the_streams_own_and_is_handed_out_once() -> None:
    random = KeyedRandom(KEY)
    noise = StepNoise(random, 5, SHAPES)
    for name, shape in reversed(SHAPES.items()):  # in whatever order it is asked for
        got = noise(name, shape, 0.7)
        assert got.dtype == torch.float64
        assert torch.equal(got, random.stream("noise", 5, name).protective_normal(shape, 0.7))
    with pytest.raises(KeyError):
        noise("a", SHAPES["a"], 0.7)


def test_step_noise_is_made_while_the_caller_does_something_else() -> None:
    before = threading.active_count()
    start = time.monotonic()
    noise = StepNoise(KeyedRandom(KEY), 0, {"w": torch.Size((4_000_000,))})
    started = time.monotonic() - start
    assert threading.active_count() == before + 1
    noise("w", torch.Size((4_000_000,)), 1.0)
    assert started < 0.2 * (time.monotonic() - start)
    while threading.active_count() > before:  # its thread ends by itself
        assert time.monotonic() - start < 60
        time.sleep(0.01)


def test_what_fails_in_the_noise_thread_surfaces_in_the_step() -> None:
    noise = StepNoise(KeyedRandom(KEY), 0, {"w": torch.Size((1 << 60,)), "v": torch.Size((3,))})
    with pytest.raises(RuntimeError, match=r"memory|storage|overflow|allocate"):
        noise("w", torch.Size((1 << 60,)), 1.0)
    assert noise("v", torch.Size((3,)), 1.0).shape == (3,)


def test_device_noise_is_keyed_anew_every_step() -> None:
    shape = torch.Size((200, 1000))
    draws = [DeviceNoise("cpu")("w", shape, 0.7) for _ in range(2)]
    assert draws[0].dtype == torch.float64
    assert abs(float(torch.corrcoef(torch.stack([d.flatten() for d in draws]))[0, 1])) < 0.02
    assert abs(float(draws[0].std()) / 0.7 - 1) < 0.01
    assert stats.kstest(draws[0].flatten().numpy()[::5] / 0.7, "norm").pvalue > 1e-4
    one = DeviceNoise("cpu")
    assert not torch.equal(one("w", shape, 1.0), one("v", shape, 1.0))
