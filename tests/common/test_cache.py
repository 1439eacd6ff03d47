"""The latent cache: what it holds, who may read it, and what is left after a crash or a full disk."""

import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from polyclinic.common.data import cache
from polyclinic.common.data.cache import Cached, Pieces, build_cache, load_cache
from polyclinic.common.data.images import open_image
from polyclinic.common.data.pixels import snapshot_hash
from polyclinic.common.data.preprocess import preprocess
from polyclinic.common.data.table import Record
from polyclinic.common.generator_settings import GeneratorSettings
from polyclinic.common.generators.msdm import Msdm
from polyclinic.common.refusals import BadInput, Refusal
from polyclinic.common.settings import DataSettings

SETTINGS = GeneratorSettings(size="msdm-tiny", max_tokens=16)
DATA = DataSettings(image_size=32)
SHARD = 3

# A real process of its own: it caches a folder of PNGs, three images a shard, one patient an image.
CHILD = f"""
import sys, time
from pathlib import Path
from polyclinic.common.data import cache
from polyclinic.common.data.table import Record
from polyclinic.common.generators.msdm import Msdm
from polyclinic.common.refusals import BadInput
from polyclinic.common.generator_settings import GeneratorSettings
from polyclinic.common.settings import DataSettings

images, vae, folder, hang_after = Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4])
cache.IMAGES_A_SHARD = {SHARD}
family = Msdm(GeneratorSettings(size="msdm-tiny", max_tokens=16), 32, vae)
encode, calls = family.encode_image, []

def encode_or_hang(pixels):
    calls.append(1)
    if len(calls) > hang_after:
        time.sleep(600)
    return encode(pixels)

family.encode_image = encode_or_hang
records = [Record(p.stem, p, ("a polyp",)) for p in sorted(images.glob("*.png"))]
try:
    print(cache.build_cache(records, family, DataSettings(image_size=32), folder))
except BadInput as error:
    print(error, file=sys.stderr)
    sys.exit(error.exit_code)
"""


@pytest.fixture(scope="module")
def encoders(tiny_vae: Path) -> Msdm:
    """msdm-tiny with its random-weight VAE and the real offline text encoder."""
    return Msdm(SETTINGS, 32, tiny_vae)


@pytest.fixture
def few_a_shard(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "IMAGES_A_SHARD", SHARD)


@pytest.fixture
def copied(drawn: list[Record], tmp_path: Path) -> list[Record]:
    """The drawings in a folder of this test's own, each its own patient."""
    folder = tmp_path / "images"
    folder.mkdir()
    return [
        replace(r, patient=r.image.stem, captions=("a polyp",), image=Path(shutil.copy(r.image, folder)))
        for r in drawn
    ]


def _shards(folder: Path) -> dict[str, tuple[int, int]]:
    """Name of each finished shard to its inode and time of writing."""
    return {p.name: (p.stat().st_ino, p.stat().st_mtime_ns) for p in folder.glob("*.safetensors")}


def _whole(tensor: torch.Tensor | Pieces) -> torch.Tensor:
    return tensor[[*range(tensor.shape[0])]]


def _equal(one: Cached, other: Cached) -> bool:
    tensors = [(one.image, other.image), (one.prompt, other.prompt)]
    return (one.patients, one.images, one.captions, one.empty) == (
        other.patients,
        other.images,
        other.captions,
        other.empty,
    ) and all(
        a.keys() == b.keys() and all(torch.equal(_whole(a[k]), _whole(b[k])) for k in a) for a, b in tensors
    )


def test_moments_and_embeddings_are_those_of_direct_encoding(
    encoders: Msdm, drawn: list[Record], tmp_path: Path, few_a_shard: None
) -> None:
    # Two images of one patient, and two captions of one image; the table is not in patient order.
    records = [
        *reversed(drawn[:7]),
        replace(drawn[7], patient=drawn[0].patient, captions=("a polyp", "large polyp")),
    ]
    cached = load_cache(tmp_path / "cache", build_cache(records, encoders, DATA, tmp_path / "cache"))
    assert cached.patients == sorted({r.patient for r in records})
    assert [len(rows) for rows in cached.images] == [2, 1, 1, 1, 1, 1, 1]
    texts = ["", "a polyp", "large polyp", "no polyp"]
    torch.testing.assert_close(
        _whole(cached.prompt["states"]),
        torch.cat([encoders.encode_prompt([t])["states"] for t in texts]),
        atol=1e-5,
        rtol=1e-5,
    )
    assert cached.empty == 0
    by_patient = {patient: [r for r in records if r.patient == patient] for patient in cached.patients}
    for patient, rows in zip(cached.patients, cached.images, strict=True):
        held = sorted(by_patient[patient], key=lambda r: str(r.image))
        for row, record in zip(rows, held, strict=True):
            direct = encoders.encode_image(preprocess(open_image(record.image), 32, "crop")[None])
            for name in ("mean", "std"):
                torch.testing.assert_close(cached.image[name][[row]], direct[name], atol=1e-5, rtol=1e-5)
            assert [texts[caption] for caption in cached.captions[row]] == list(record.captions)


def test_only_the_owner_may_read_it(encoders: Msdm, drawn: list[Record], tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    folder.mkdir(mode=0o777)
    before = os.umask(0)
    try:
        build_cache(drawn[:2], encoders, DATA, folder)
    finally:
        os.umask(before)
    assert folder.stat().st_mode & 0o777 == 0o700
    assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {0o600}


def test_a_second_run_encodes_nothing_and_gives_the_same_name(
    encoders: Msdm, copied: list[Record], tmp_path: Path, few_a_shard: None
) -> None:
    folder = tmp_path / "cache"
    name = build_cache(copied, encoders, DATA, folder)
    before = _shards(folder)
    assert build_cache(list(reversed(copied)), encoders, DATA, folder) == name
    assert _shards(folder) == before
    assert len(before) == 12 // SHARD + 1


def test_changed_image_caption_preprocessing_or_base_is_another_key(
    encoders: Msdm, tiny_vae: Path, copied: list[Record], tmp_path: Path, few_a_shard: None
) -> None:
    folder = tmp_path / "cache"
    name, snapshot = build_cache(copied, encoders, DATA, folder), snapshot_hash(copied)
    whole, names, snapshots = set(_shards(folder)), {name}, {snapshot}

    def grown(records: list[Record], family: Msdm, data: DataSettings) -> int:
        names.add(build_cache(records, family, data, folder))
        more = set(_shards(folder)) - whole
        whole.update(more)
        return len(more)

    # A caption: one new shard of prompts, no image encoded again.
    captioned = [replace(copied[0], captions=("another caption",)), *copied[1:]]
    assert grown(captioned, encoders, DATA) == 1
    snapshots.add(snapshot_hash(captioned))
    # One image: its own shard alone.
    Image.new("RGB", (40, 40), (1, 2, 3)).save(copied[5].image)
    assert grown(copied, encoders, DATA) == 1
    snapshots.add(snapshot_hash(copied))
    # Preprocessing and base: everything.
    assert grown(copied, encoders, DataSettings(image_size=32, fit="pad")) == 5
    assert grown(copied, encoders, DataSettings(image_size=48)) == 5
    longer = Msdm(SETTINGS.model_copy(update={"max_tokens": 12}), 32, tiny_vae)
    assert grown(copied, longer, DATA) == 5
    assert len(names) == 6
    # Another patient for the same pixels is another snapshot and index, but nothing to encode.
    moved = [replace(copied[0], patient=copied[1].patient), *copied[1:]]
    assert grown(moved, encoders, DATA) == 0
    assert len(names) == 7
    assert len(snapshots | {snapshot_hash(moved)}) == 4


def test_snapshot_hash_does_not_depend_on_paths_or_order(copied: list[Record], tmp_path: Path) -> None:
    elsewhere = [
        replace(r, image=Path(shutil.copy(r.image, tmp_path / f"x{i}"))) for i, r in enumerate(copied)
    ]
    assert snapshot_hash(elsewhere[::-1]) == snapshot_hash(copied)


def test_missing_parts_are_a_refusal_that_says_to_cache(
    encoders: Msdm, drawn: list[Record], tmp_path: Path
) -> None:
    folder = tmp_path / "cache"
    name = build_cache(drawn, encoders, DATA, folder)
    next(folder.glob("*.safetensors")).unlink()
    with pytest.raises(Refusal, match=r"site-not-ready.*polyclinic-client cache"):
        load_cache(folder, name)
    with pytest.raises(Refusal, match="site-not-ready"):
        load_cache(folder, "0" * 32)


@pytest.mark.parametrize("damage", ["truncated", "gone bad"])
def test_a_corrupt_image_is_named_and_finished_shards_stay(
    encoders: Msdm, copied: list[Record], tmp_path: Path, few_a_shard: None, damage: str
) -> None:
    bad = copied[7].image
    whole = bad.read_bytes()
    bad.write_bytes(whole[: len(whole) // 2] if damage == "truncated" else b"not an image")
    folder = tmp_path / "cache"
    with pytest.raises(BadInput, match=f"{bad}: unreadable image"):
        build_cache(copied, encoders, DATA, folder)
    finished = _shards(folder)
    assert len(finished) == 2
    assert not list(folder.glob("*.json"))
    bad.write_bytes(whole)
    load_cache(folder, build_cache(copied, encoders, DATA, folder))
    assert _shards(folder).items() >= finished.items()


# ---------------------------------------------------------------- processes of their own


def _child(images: Path, vae: Path, folder: Path, hang_after: int = 1000) -> list[str]:
    return [sys.executable, "-c", CHILD, str(images), str(vae), str(folder), str(hang_after)]


def test_after_kill_9_finished_shards_are_not_redone(
    encoders: Msdm, tiny_vae: Path, copied: list[Record], tmp_path: Path, few_a_shard: None
) -> None:
    folder = tmp_path / "cache"
    child = subprocess.Popen(
        _child(tmp_path / "images", tiny_vae, folder, hang_after=2), stderr=subprocess.DEVNULL
    )
    try:
        deadline = time.monotonic() + 90
        while len(_shards(folder)) < 2 and time.monotonic() < deadline and child.poll() is None:
            time.sleep(0.05)
    finally:
        child.send_signal(signal.SIGKILL)
    assert child.wait(10) == -signal.SIGKILL
    finished = _shards(folder)
    assert len(finished) == 2
    for shard in finished:
        assert load_file(str(folder / shard))["mean"].shape == (SHARD, 8, 4, 4)
    name = build_cache(copied, encoders, DATA, folder)
    assert _shards(folder).items() > finished.items()
    undisturbed = tmp_path / "undisturbed"
    assert build_cache(copied, encoders, DATA, undisturbed) == name
    assert _equal(load_cache(folder, name), load_cache(undisturbed, name))


def test_full_disk_ends_with_exit_code_2_and_whole_shards(
    encoders: Msdm, tiny_vae: Path, copied: list[Record], tmp_path: Path, few_a_shard: None
) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=12k", "none", str(disk)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting a small disk needs root with the right to mount")
    try:
        # A shard of three images takes one page of 4 kB; three fit.
        command = _child(tmp_path / "images", tiny_vae, disk / "cache")
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 2, done.stderr
        assert "Traceback" not in done.stderr
        sentence = done.stderr.strip().splitlines()[-1]
        assert sentence.startswith(f"cannot write {disk}/cache/")
        assert sentence.endswith("the disk is full or its quota is used up; free space there and run again")
        left = sorted((disk / "cache").iterdir())
        assert 1 <= len(left) < 5
        for path in left:
            assert load_file(str(path))["std"].shape == (SHARD, 8, 4, 4)
        # With room again, the same folder is completed and nothing is redone.
        before = _shards(disk / "cache")
        subprocess.run(["mount", "-o", "remount,size=4m", str(disk)], check=True)
        load_cache(disk / "cache", build_cache(copied, encoders, DATA, disk / "cache"))
        assert _shards(disk / "cache").items() > before.items()
    finally:
        subprocess.run(["umount", str(disk)], check=True)
