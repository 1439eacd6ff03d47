"""Training takes of the cache what it needs: weights are those of one in memory, and memory stays flat."""

import json
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from polyclinic.common.data.cache import Cached, load_cache
from polyclinic.common.generators.base import Tensors, trainable_state
from polyclinic.common.generators.msdm import Msdm
from polyclinic.common.privacy.random import KeyedRandom
from polyclinic.common.training import PrivateEngine, train
from tests.conftest import MakeStudy

# What a round does with a cache, in a process of its own: memory that no file backs, after each cache.
CHILD = """
import sys
from pathlib import Path
from polyclinic.common.data.cache import load_cache
from polyclinic.common.privacy.random import KeyedRandom
from polyclinic.common.privacy.views import draw_views, poisson_sample

def held():
    status = Path("/proc/self/status").read_text()
    print(next(line.split()[1] for line in status.splitlines() if line.startswith("RssAnon")))

random, kept = KeyedRandom(b"t" * 32), []
for name in sys.argv[2:]:
    cached = load_cache(Path(sys.argv[1]), name)
    kept.append(cached)
    for step in range(20):
        chosen = poisson_sample(random, cached.patients, step, 8 / len(cached.patients))
        draw_views(random, cached, chosen, step=step, views=2, normal_shape=(1, 1), prompt_dropout=0.1)
    held()
"""


def _kept(folder: Path, cached: Cached, sizes: dict[str, int]) -> str:
    """Write a cache as `build_cache` does, in shards of so many rows."""
    index: dict[str, object] = {"captions": cached.captions, "empty": cached.empty}
    owner = {
        row: patient for patient, rows in zip(cached.patients, cached.images, strict=True) for row in rows
    }
    index["patients"] = [owner[row] for row in range(len(owner))]
    for kind, tensors in (("image", cached.image), ("prompt", cached.prompt)):
        rows = next(iter(tensors.values())).shape[0]
        edges = [*range(0, rows, sizes[kind]), rows]
        index[f"{kind}_shards"] = [f"{kind}-{rows}-{low}" for low in edges[:-1]]
        for low, high in pairwise(edges):
            shard: Tensors = {name: tensor[[*range(low, high)]] for name, tensor in tensors.items()}
            save_file(shard, folder / f"{kind}-{rows}-{low}.safetensors")
    name = f"of-{len(owner)}"
    (folder / f"{name}.json").write_text(json.dumps(index))
    return name


@pytest.mark.parametrize("sizes", [{"image": 1, "prompt": 1}, {"image": 5, "prompt": 4}])
def test_weights_are_those_of_a_cache_in_memory(
    family: Msdm, cached: Cached, make_study: MakeStudy, tmp_path: Path, sizes: dict[str, int]
) -> None:
    study, start = make_study(), trainable_state(family.module)
    found: list[Tensors] = []
    for data in (cached, load_cache(tmp_path, _kept(tmp_path, cached, sizes))):
        family.module.load_state_dict(start, strict=False)
        random = KeyedRandom(b"t" * 32)
        engine = PrivateEngine(family, data, study, random, sigma=0.8, divisor=6.0, device="cpu")
        train(engine.step, 0, 3, "")
        found.append(trainable_state(family.module))
    assert all(torch.equal(found[0][name], found[1][name]) for name in start)
    assert any(not torch.equal(found[0][name], start[name]) for name in start)


def test_a_cache_eight_times_as_large_takes_no_more_memory(tmp_path: Path) -> None:
    def made(patients: int) -> str:
        rows = list(range(patients))
        shown = {"mean": torch.randn(patients, 8, 32, 32), "std": torch.rand(patients, 8, 32, 32)}
        said = {"states": torch.randn(patients, 16, 512)}
        named = [f"p{row:04d}" for row in rows]
        cached = Cached(named, [[row] for row in rows], [[row] for row in rows], shown, said, 0)
        return _kept(tmp_path, cached, {"image": 64, "prompt": 256})

    names = [made(256), made(2048)]
    on_disk = sum(path.stat().st_size for path in tmp_path.glob("*-2048-*.safetensors"))
    assert on_disk > 190e6
    command = [sys.executable, "-c", CHILD, str(tmp_path), *names]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    small, large = (int(line) * 1024 for line in done.stdout.split())
    assert large - small < 0.05 * on_disk
