"""Pictures that are there twice: found as brute force finds them, with work that grows with their number."""

import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from polyclinic.client.check import duplicates
from polyclinic.client.check import seen as packed
from polyclinic.client.check.duplicates import BITS, BLOCK, WIDE, nearly_same, same
from polyclinic.client.check.look import FINE, resemblance
from tests.common.made_sets import draw


def test_bands_find_every_pair_that_brute_force_finds() -> None:
    random = np.random.default_rng(0)
    base = random.integers(0, 2**63, 300, dtype=np.uint64)
    # Copies with up to nine bits turned: what lies within BITS must be a candidate, the rest must not join.
    flips = [random.choice(64, random.integers(0, 10), replace=False) for _ in base]
    masks = np.array([sum(1 << int(b) for b in f) for f in flips], dtype=np.uint64)
    hashes = np.concatenate([base, base ^ masks])
    fine = np.tile(random.integers(-127, 128, (300, FINE), dtype=np.int8), (2, 1))
    groups = nearly_same(hashes, fine).groups
    expected = [[i, i + 300] for i, f in enumerate(flips) if len(f) <= BITS]
    assert sorted(groups) == expected
    assert 0 < len(expected) < 300


def test_alike_bodies_are_not_one_picture() -> None:
    grounds = [draw(n, (64, 64)) for n in range(40)]
    shown = [resemblance(image.convert("L")) for image in grounds]
    hashes = np.zeros(40, dtype=np.uint64)  # the worst case: every hash alike
    fine = np.stack([np.frombuffer(bytes.fromhex(one["fine"]), np.int8) for one in shown])
    assert nearly_same(hashes, fine).groups == []


def test_a_chain_of_copies_is_one_group_whatever_order_its_pairs_come_in() -> None:
    random = np.random.default_rng(1)
    ends = random.integers(-127, 128, (2, FINE)).astype(np.float32)
    # Each is like its neighbours; the first and the last are not alike.
    fine = np.stack([(ends[0] * (1 - t) + ends[1] * t).round() for t in np.linspace(0, 1, 12)])
    order = random.permutation(12)
    assert nearly_same(np.zeros(12, np.uint64), fine[order].astype(np.int8)).groups == [list(range(12))]
    assert nearly_same(np.zeros(2, np.uint64), fine[[0, 11]].astype(np.int8)).groups == []


@pytest.mark.parametrize("turned", [0, 3])
def test_comparisons_of_thousands_of_like_pictures_grow_with_their_number(turned: int) -> None:
    random = np.random.default_rng(2)
    base = random.integers(-100, 101, FINE)
    found = []
    for many in (10_000, 20_000):
        fine = (base + random.integers(-9, 10, (many, FINE), dtype=np.int8)).astype(np.int8)
        bits = random.integers(0, 64, (many, turned)).astype(np.uint64)
        hashes = np.bitwise_xor.reduce(np.uint64(1) << bits, axis=1, initial=np.uint64(0))
        found.append(nearly_same(hashes, fine))
        assert found[-1].groups == [list(range(many))]
        assert len(found[-1].cut) == 0  # what is in one group needs no further look
        assert many - 1 <= found[-1].details < 2 * many
        assert found[-1].hashes < many * (WIDE + BLOCK)


def test_a_crowded_bucket_is_searched_near_each_hash_and_whose_search_was_cut_is_said(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(duplicates, "WIDE", 64)
    monkeypatch.setattr(duplicates, "BLOCK", 16)
    monkeypatch.setattr(duplicates, "MOST", 8)
    random, many = np.random.default_rng(3), 2000
    # Bodies alike: the first two bands say nothing. Copies have one or two other bits turned.
    hashes = random.integers(0, 2**46, many, dtype=np.uint64) << np.uint64(18)
    copies = hashes[:200].copy()
    for place in range(200):
        for bit in random.choice(np.arange(18, 64), 1 + place % 2, replace=False):
            copies[place] ^= np.uint64(1) << np.uint64(bit)
    fine = random.integers(-127, 128, (many, FINE), dtype=np.int8)
    near = nearly_same(np.concatenate([hashes, copies]), np.concatenate([fine, fine[:200]]))
    assert near.groups == [[place, many + place] for place in range(200)]
    assert len(near.cut) == many + 200
    # All hashes equal, no picture like another: the worst there is.
    worst = nearly_same(np.zeros(many, np.uint64), fine)
    assert worst.groups == []
    assert worst.hashes <= 7 * many * (64 + 16)
    assert worst.details <= many * (8 + 2 * 16)
    assert len(worst.cut) > 0.99 * many


def test_equal_keys_are_grouped_and_an_empty_one_is_like_no_other() -> None:
    assert same(np.array([b"x", b"", b"y", b"x", b"", b"y", b"z"])) == [[0, 3], [2, 5]]
    assert same(np.array([], dtype="S32")) == []


def test_what_is_kept_of_an_image_does_not_grow_with_what_was_seen_of_it(tmp_path: Path) -> None:
    """80,000 images take 13 MB, whole at the start; their grey copies lie on disk, without a name."""
    random, many = np.random.default_rng(0), 16_001
    hashed = random.integers(0, 2**64, many, dtype=np.uint64)  # the last image has the first one's
    fine = random.integers(-127, 128, (8, FINE), dtype=np.int8)
    with packed.opened(many, tmp_path) as seen:
        tracemalloc.start()
        for number in range(many):
            alike = {"hash": f"{hashed[number % (many - 1)]:016x}", "fine": fine[number % 8].tobytes().hex()}
            look = {"pixels": f"{number:032x}", **alike}
            seen.add(f"{number:064x}:12", look, known=False)
        grown, _ = tracemalloc.get_traced_memory()
        places, hashes, details = seen.comparable()
        assert np.array_equal(details[-1], fine[(many - 1) % 8])
        tracemalloc.reset_peak()
        groups = nearly_same(hashes, details).groups
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        held = seen.contents.nbytes + seen.pixels.nbytes + seen.hashes.nbytes + seen.compared.nbytes
        assert list(tmp_path.iterdir()) == []
    assert grown < 1_000_000
    assert held <= 160 * many
    assert peak < 150_000_000  # bounded by BLOCK x WIDE, whatever the number of images
    assert len(places) == many
    assert [0, many - 1] in groups
