"""Each large family, from a study to a release: two private rounds at two sites, export, plain diffusers."""

from __future__ import annotations

import csv
import html
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from polyclinic.client.ledger_chain import read_lines
from polyclinic.common.adapters import A, B, rank_of
from polyclinic.common.data.table import Record
from polyclinic.common.drawing import sample
from polyclinic.common.generators.families import FAMILIES
from polyclinic.common.study import Study, parse_study
from polyclinic.common.wire_reading import unpack_reply
from polyclinic.server.release import export, open_generator
from polyclinic.simulation.random_checkpoints import save
from polyclinic.simulation.run import simulate
from tests.reloaded import SIZE_OF, generator_table, reloaded

PROMPTS = ["a polyp", "no polyp"]
# Every family by another of the rules, and every rule by a family.
FEDERATION: dict[str, dict[str, Any]] = {
    "flux": {"lora_aggregation": "freeze-a"},
    "kandinsky-2-2": {"lora_aggregation": "freeze-a", "transport": "int8"},
    "kandinsky-3": {"lora_aggregation": "factors"},
    "stable-diffusion": {"lora_aggregation": "alternate", "transport": "int8"},
    "stable-diffusion-3": {"lora_aggregation": "stack", "transport": "int8"},
}
# One of them trains over 8-bit weights, where those can be had.
QUANTIZED = "stable-diffusion-3" if find_spec("torchao") else ""
RANK, OWN_RANK = 2, 1


def study_of(name: str, base: Path, **tables: dict[str, Any]) -> Study:
    values: dict[str, Any] = {
        "name": "tiny",
        "data": {"image_size": SIZE_OF.get(name, 32)},
        "generator": generator_table(
            name, base, lora={"rank": RANK}, quantize="int8" if name == QUANTIZED else "none"
        ),
        "privacy": {"delta": 1e-3, "sampling_rate": 0.5, "views": 2, "canaries": 0},
        "training": {"rounds": 2, "steps_per_round": 1, "learning_rate": 0.1, "device": "cpu", "threads": 1},
        "federation": {"min_sites": 2, **FEDERATION[name]},
        "reference": {"fraction": 0.2, "pretrain": 0.0, "probe": 0.0, "evaluate": 1.0},
        "evaluation": {
            "steps": 2,
            "draws": 1,
            "every": 2,
            "guidance": 3.0,
            "prompts": [{"text": text} for text in PROMPTS],
        },
        "simulation": {
            "sites": {
                "north": {"declared_patients": 5, "min_patients": 1, "lora_rank": OWN_RANK},
                "coast": {"declared_patients": 5, "min_patients": 1},
            }
        },
    }
    for table, update in tables.items():
        values[table] = {**values[table], **update}
    return parse_study(values, "tiny")


@pytest.fixture(scope="module")
def folder(drawn: list[Record], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data folder of two sites."""
    path = tmp_path_factory.mktemp("two-sites") / "images.csv"
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["image", "caption", "patient", "site"])
        for i, record in enumerate(drawn):
            shutil.copyfile(record.image, path.parent / record.image.name)
            writer.writerow(
                [record.image.name, record.captions[0], record.patient, ("north", "coast")[i % 2]]
            )
    return path.parent


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_two_rounds_over_two_sites_end_in_adapters_that_plain_diffusers_loads(
    name: str, folder: Path, tmp_path: Path
) -> None:
    base = save(name, tmp_path)
    study = study_of(name, base)
    run_dir, metrics = simulate(study, tmp_path / "home", folder, resume=False, engine="in-process")
    assert metrics.private
    assert [facts.round for facts in metrics.rounds] == [0, 1, 2]
    for site in ("north", "coast"):
        # Reserved with the bound that was tested in bf16.
        lines = [line for line in read_lines(run_dir / "sites" / site) if line["kind"] == "reserve"]
        assert [line["tau"] for line in lines] == [0.01, 0.01]
    rule = study.federation.lora_aggregation
    states = [
        load_file(run_dir / "checkpoints" / f"round-{number:04d}" / "state.safetensors")
        for number in (0, 1, 2)
    ]
    assert any(name.endswith(A) for name in states[0]) == (rule != "freeze-a")
    for number in (1, 2):
        before, after = states[number - 1 : number + 1]
        assert before.keys() == after.keys()
        moved = {name for name in before if not torch.equal(before[name], after[name])}
        turn = {name for name in before if rule != "alternate" or name.endswith(B if number == 1 else A)}
        assert moved == turn
        for site, rank in (("north", OWN_RANK), ("coast", RANK)):
            (stored,) = (run_dir / "sites" / site / "replies").glob(f"*-{number:04d}.safetensors")
            difference = unpack_reply(stored.read_bytes()).difference
            assert difference.keys() == turn
            assert rank_of(difference) == rank
            assert all(bool(tensor.any()) for tensor in difference.values())

    card = html.unescape((run_dir / "MODEL_CARD.md").read_text())
    terms = FAMILIES[name].distilled or FAMILIES[name].licence
    for said in (f"{name} LoRA of rank {RANK} on", "a folder", terms.split(":")[0]):
        assert said in card

    resolved, family = open_generator(run_dir, None)
    mine = sample(family, resolved.study, [(text, 0) for text in PROMPTS], "draw")
    export(family, tmp_path / "adapters")
    pipeline = reloaded(base, tmp_path / "adapters", torch.bfloat16)
    family.pipeline = lambda: pipeline  # type: ignore[method-assign]
    assert torch.equal(sample(family, resolved.study, [(text, 0) for text in PROMPTS], "draw"), mine)
