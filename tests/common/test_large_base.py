"""A large model's base: what its hash covers, and every way in which it can be the wrong one."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
import typing
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, Kandinsky5T2IPipeline
from transformers import Qwen2Tokenizer, Qwen2VLImageProcessorPil, Qwen2VLProcessor

from polyclinic.client.approval import check_base
from polyclinic.common.adapters import narrow
from polyclinic.common.cost import view_flops
from polyclinic.common.generator_settings import GeneratorSettings
from polyclinic.common.generators.base import BaseFiles, load_family
from polyclinic.common.generators.checkpoint import hash_checkpoint, hash_files, large_files
from polyclinic.common.generators.families import FAMILIES
from polyclinic.common.generators.lora import adapter_layers, adapter_state
from polyclinic.common.refusals import BadInput, Refusal
from polyclinic.common.study import Resolved, Study, parse_study
from polyclinic.server.base import prepare_base
from polyclinic.server.reference import Reference
from polyclinic.simulation.random_checkpoints import save
from tests.common.test_families import study_of

NAME = "stable-diffusion"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(NAME, tmp_path_factory.mktemp("base"))


@pytest.fixture
def copied(base: Path, tmp_path: Path) -> Path:
    return shutil.copytree(base, tmp_path / "copied-random-weights")


def test_the_families_of_a_study_are_those_there_are() -> None:
    named = GeneratorSettings.model_fields["family"].annotation
    assert set(named.__args__) == {"msdm", *FAMILIES}  # type: ignore[union-attr]


def test_the_hash_covers_what_is_read_and_nothing_else(base: Path, copied: Path) -> None:
    whole = hash_checkpoint(base)
    for beside in ("README.md", "unet/diffusion_pytorch_model.fp16.safetensors", "unet/notes.bin"):
        (copied / beside).write_bytes(b"x")
    (copied / "unet" / "diffusion_pytorch_model.safetensors.index.fp16.json").write_text("{}")
    assert hash_checkpoint(copied) == whole
    for read in ("model_index.json", "unet/config.json", "tokenizer/tokenizer.json", "vae/config.json"):
        path = copied / read
        kept = path.read_bytes()
        path.write_bytes(kept + b" ")
        hash_checkpoint.cache_clear()
        assert hash_checkpoint(copied) != whole, read
        path.write_bytes(kept)
    weights = copied / "text_encoder" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\0")
    hash_checkpoint.cache_clear()
    assert hash_checkpoint(copied) != whole


def test_a_frozen_a_is_base_and_a_trained_one_is_not(base: Path) -> None:
    def hashed(rule: str, **generator: Any) -> str:
        study = study_of(NAME, base, **generator)
        federation = study.federation.model_copy(update={"lora_aggregation": rule})
        return hash_files(BaseFiles(pipeline=base), study.model_copy(update={"federation": federation}))

    assert hashed("freeze-a") != hashed("freeze-a", init_seed=1)
    assert hashed("factors") == hashed("factors", init_seed=1)
    assert hashed("factors") != hashed("factors", precision="bf16")  # what the cache holds is another


def test_the_start_is_the_base_and_the_same_on_every_machine(base: Path) -> None:
    studies = [study_of(NAME, base, init_seed=seed) for seed in (0, 0, 1)]
    one, two, other = (
        adapter_state(load_family(s, large_files(s.generator), encoders=False).module) for s in studies
    )
    assert all(torch.equal(one[name], two[name]) for name in one)
    factors = [name for name in one if name.endswith(".lora_A.weight")]
    assert len(factors) * 2 == len(one)
    assert not any(torch.equal(one[name], other[name]) for name in factors)
    assert all(not one[name].any() for name in one if name.endswith(".lora_B.weight"))
    assert torch.cat([one[name].flatten() for name in factors]).std() == pytest.approx(1 / 4, rel=0.05)
    # By name, not by the order of layers: numbers that a later release must draw again.
    name = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q.lora_A.weight"
    assert one[name].flatten()[:3].tolist() == pytest.approx(FIRST, abs=1e-6)


def test_a_site_of_a_smaller_rank_holds_the_first_components_at_the_same_scale(base: Path) -> None:
    study = study_of(NAME, base)
    whole: Any = load_family(study, large_files(study.generator), encoders=False)
    small: Any = load_family(study, large_files(study.generator), encoders=False, rank=3)
    narrow_a = narrow(adapter_state(whole.module), 3)
    assert all(torch.equal(narrow_a[name], tensor) for name, tensor in adapter_state(small.module).items())
    scales = [{layer.scaling["default"] for layer in adapter_layers(f.module)} for f in (whole, small)]
    assert scales == [{2.0}, {2.0}]
    with pytest.raises(BadInput, match="rank of 5 is over the limit of the study"):
        load_family(study, large_files(study.generator), encoders=False, rank=5)


FIRST = [0.3431690, -0.2809794, 0.2031468]


def refused(study: Study) -> str:
    with pytest.raises(BadInput) as raised:
        load_family(study, large_files(study.generator), encoders=False)
    message = str(raised.value)
    assert "\n" not in message
    return message


def test_adapters_that_do_not_fit_are_refused(base: Path) -> None:
    assert "rank = 40` is over the limit of 16" in refused(study_of(NAME, base, lora={"rank": 40}))
    targets = ["to_q", "to_nowhere"]
    message = refused(study_of(NAME, base, lora={"rank": 2, "targets": targets}))
    assert '"to_nowhere" matches no layer' in message
    assert "to_out.0" in message
    study = study_of(NAME, base)
    odd = study.model_copy(update={"data": study.data.model_copy(update={"image_size": 36})})
    assert "needs a multiple of 8; write 40 or 32" in refused(odd)


def test_a_folder_that_is_no_such_pipeline_is_refused(base: Path, copied: Path, tmp_path: Path) -> None:
    assert "neither a folder that exists nor a Hugging Face id" in refused(study_of(NAME, Path("/no/where")))
    assert "holds no model_index.json" in refused(study_of(NAME, tmp_path))
    index = json.loads((copied / "model_index.json").read_text())
    (copied / "model_index.json").write_text(json.dumps(index | {"_class_name": "AudioLDMPipeline"}))
    assert "is a AudioLDMPipeline, but" in refused(study_of(NAME, copied))
    (copied / "model_index.json").write_text(json.dumps(index | {"unet": ["my_module", "Mine"]}))
    assert "it is never run" in refused(study_of(NAME, copied))
    (copied / "model_index.json").write_text(json.dumps(index))
    weights = copied / "unet" / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_suffix(".bin"))
    assert "cannot be loaded" in refused(study_of(NAME, copied))


def test_a_shift_that_the_familys_pipeline_does_not_know_is_refused(base: Path, copied: Path) -> None:
    index = json.loads((copied / "model_index.json").read_text())
    index["scheduler"] = ["diffusers", "FlowMatchEulerDiscreteScheduler"]
    (copied / "model_index.json").write_text(json.dumps(index))
    FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True).save_pretrained(copied / "scheduler")
    study = study_of(NAME, copied)
    family = load_family(study, large_files(study.generator), device="meta", encoders=False)
    with pytest.raises(BadInput, match=r"scheduler_config\.json: `use_dynamic_shifting`"):
        view_flops(family)  # as plan and approve count


def test_another_base_than_the_study_names_is_refused(base: Path) -> None:
    study = study_of(NAME, base, base_sha256="0" * 64)
    with pytest.raises(BadInput, match=r"generator\.base_sha256"):
        prepare_base(Path("unused"), study, Reference([], [], [], "r"))


def test_another_base_at_a_site_is_refused_by_name(base: Path, copied: Path) -> None:
    study = study_of(NAME, base)
    named = hash_files(BaseFiles(pipeline=base), study)
    resolved = Resolved(study=study, base_hash=named, start_hash="0" * 64, reference_hash="0" * 64)
    check_base(resolved, BaseFiles(pipeline=base))
    config = copied / "unet" / "config.json"
    config.write_text(config.read_text() + "\n")
    with pytest.raises(Refusal, match="approval-drift") as raised:
        check_base(resolved, BaseFiles(pipeline=copied))
    for said in (str(base), str(copied), named[:12], "not the study's"):
        assert said in str(raised.value)


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"family": NAME}, "needs base, e.g. base = "),
        ({"family": ["flux"]}, "generator.family"),
        ({"family": "kandinsky-5", "base": "a/b"}, "needs torchvision"),
        ({"family": "kandinsky-2-2", "base": "a/b"}, "needs prior, e.g. "),
        ({"family": NAME, "base": "a/b", "stages": ["prior"]}, "stages means nothing to family = "),
        (
            {"family": "kandinsky-2-2", "base": "a/b", "prior": "a/c", "stages": ["prior", "prior"]},
            "stages names one twice",
        ),
        ({"family": NAME, "base": "a/b", "size": "msdm-tiny"}, "size means nothing to family = "),
        ({"base": "a/b"}, 'base means nothing to family = "msdm"'),
        ({"family": NAME, "base": "a/b", "lora": {"rank": 0}}, "generator.lora.rank"),
        ({"family": "dall-e"}, "generator.family"),
    ],
)
def test_a_table_that_means_nothing_is_refused(values: dict[str, Any], sentence: str) -> None:
    with pytest.raises(BadInput) as raised:
        parse_study(
            {"name": "t", "generator": values, "evaluation": {"prompts": [{"text": "a"}]}}, "study.toml"
        )
    assert str(raised.value).startswith("study.toml: ")
    assert sentence in str(raised.value)


def test_kandinsky_5_cannot_be_loaded_here(tmp_path: Path) -> None:
    """Its checkpoints' tokenizer is this class; once it loads without torchvision, it can be added."""
    (tmp_path / "processor_config.json").write_text('{"processor_class": "Qwen2VLProcessor"}')
    Qwen2Tokenizer(vocab={"a": 0, "<|endoftext|>": 1}, merges=[]).save_pretrained(tmp_path)
    Qwen2VLImageProcessorPil().save_pretrained(tmp_path)
    hints = typing.get_type_hints(Kandinsky5T2IPipeline.__init__)
    assert hints["tokenizer"] is Qwen2VLProcessor
    with pytest.raises(ImportError, match="Torchvision"):
        Qwen2VLProcessor.from_pretrained(tmp_path)


HUB = {"gated": (403, "GatedRepo"), "missing": (401, "RepoNotFound"), "old": (404, "RevisionNotFound")}


class Hub(BaseHTTPRequestHandler):
    """A hub that answers as the real one does to those who may not have a model."""

    def do_GET(self) -> None:
        owner = next(owner for owner in HUB if f"/{owner}/" in self.path)
        status, code = HUB[owner]
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("X-Error-Message", "as the hub says")
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_HEAD = do_GET

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@pytest.fixture
def hub() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_what_the_hub_says_becomes_one_sentence_with_the_fix(hub: str, tmp_path: Path) -> None:
    """In a process of its own, which may use the network: its hub is this test's server."""
    script = """
import sys
from polyclinic.client.approval import check_base
from polyclinic.common.generator_settings import GeneratorSettings
from polyclinic.common.generators.checkpoint import large_files
from polyclinic.common.refusals import BadInput, Refusal
for owner in ("gated", "missing", "old", "no network"):
    if owner == "no network":
        import huggingface_hub.constants
        huggingface_hub.constants.HF_HUB_OFFLINE = True
    values = dict(family="stable-diffusion", base=f"{owner.split()[0]}/model", base_revision="v1")
    for weights in (True, False):
        try:
            large_files(GeneratorSettings(**values), weights=weights)
        except BadInput as error:
            print(error)
try:
    large_files(GeneratorSettings(family="stable-diffusion", base="some/model"))
except BadInput as error:
    print(error)
"""
    environment = {**os.environ, "HF_ENDPOINT": hub, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script], capture_output=True, text=True, env=environment
    )
    print(done.stdout, done.stderr)
    lines = done.stdout.splitlines()
    assert len(lines) == 9, done.stderr
    for row, words in enumerate(
        ("licence must be accepted", "correct the id", "no such revision", "(HF_HUB_OFFLINE)")
    ):
        assert all(words in line for line in lines[2 * row : 2 * row + 2]), lines
    assert "needs generator.base_revision" in lines[8]
