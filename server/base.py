"""The public base of a study: where VAE and start state come from, and how they are named."""

from __future__ import annotations

import hashlib
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from polyclinic.common.cost import Meter, append_cost, read_costs
from polyclinic.common.data.pixels import snapshot_hash
from polyclinic.common.device import pick_device
from polyclinic.common.drawing import sample
from polyclinic.common.files import canonical_json
from polyclinic.common.generators.base import (
    BaseFiles,
    Tensors,
    load_family,
    load_trainable_state,
    load_weights,
    trainable_state,
)
from polyclinic.common.generators.checkpoint import hash_checkpoint, hash_files, large_files, licence
from polyclinic.common.generators.public import hash_source, hash_state, resolve
from polyclinic.common.refusals import BadInput
from polyclinic.common.study import PublicScale, Resolved, Study
from polyclinic.server.evaluation.features import FeatureStore
from polyclinic.server.evaluation.public_scale import public_scale
from polyclinic.server.evaluation.ready import check_evaluation
from polyclinic.server.pretrain import pretrain_generator, pretrain_vae
from polyclinic.server.reference import Reference

REFERENCE = "reference"


@dataclass(frozen=True)
class Base:
    """A study's public parts on this machine.

    Attributes:
        files: Where the frozen parts lie.
        start: Trainable state of round 0.
        resolved: The study with their hashes.
        costs: What training the base here cost, one line a part; empty where it came from elsewhere.
    """

    files: BaseFiles
    start: Tensors
    resolved: Resolved
    costs: list[dict[str, Any]]


def prepare_base(home: Path, study: Study, reference: Reference) -> Base:
    """Find or train the VAE and the start state, and resolve the study.

    What is trained here is kept under `home/bases`, named by its recipe and by the public images it
    saw, and found again.

    Raises:
        BadInput: A part is missing, or is not the one whose hash the study names; or the evaluation lacks
            something that it will need.
    """
    generator = study.generator
    pick_device(study.training.device)
    check_evaluation(study, reference)
    store = FeatureStore(home / "features", study.data.image_size, study.data.fit)
    public_scale(study, reference, store)  # what it refuses, before anything is trained
    if generator.large:
        return _prepare_large(study, reference, store)
    if study.data.image_size % 8:
        raise BadInput(f"`data.image_size = {study.data.image_size}`: must be a multiple of 8")
    if generator.vae == REFERENCE:
        vae = _vae(home, study, reference)
    else:
        vae = resolve(generator.vae, generator.vae_revision, "generator.vae")
    _check(hash_source(vae), generator.vae_sha256, "generator.vae_sha256")
    path = _start(home, study, reference, vae)
    # Where only a part of the network trains, the rest of the warm start is base: it never travels.
    frozen = path if generator.train != "all" else None
    files = BaseFiles(vae=vae.resolve(), frozen=frozen and frozen.resolve())
    family = load_family(study, files, encoders=False)
    if path is not None:
        load_weights(family.module, path)
    start = trainable_state(family.module)

    resolved = Resolved(
        study=study,
        base_hash=hash_files(files, study),
        start_hash=hash_state(start),
        reference_hash=reference.hash,
        public=_scale(study, reference, store, files, None if path is None else start),
    )
    costs = [line for part in (vae, path) if part for line in _read_cost(home, part)]
    return Base(files, start, resolved, costs)


def _prepare_large(study: Study, reference: Reference, store: FeatureStore) -> Base:
    """Find a pretrained model, and draw its adapters' start from the study's public seed."""
    files = large_files(study.generator)
    assert files.pipeline is not None
    print(f"Terms of the base: {licence(study.generator, files.pipeline)}", file=sys.stderr)
    _check(hash_checkpoint(files.pipeline), study.generator.base_sha256, "generator.base_sha256")
    if files.prior is not None:
        _check(hash_checkpoint(files.prior), study.generator.prior_sha256, "generator.prior_sha256")
    start = trainable_state(load_family(study, files, encoders=False).module)
    resolved = Resolved(
        study=study,
        base_hash=hash_files(files, study),
        start_hash=hash_state(start),
        reference_hash=reference.hash,
        public=_scale(study, reference, store, files, start),
    )
    return Base(files, start, resolved, [])


def _scale(
    study: Study, reference: Reference, store: FeatureStore, files: BaseFiles, start: Tensors | None
) -> PublicScale | None:
    """Take the releases' scales; with no `start`, without what it draws."""
    if start is None:
        return public_scale(study, reference, store)

    def draw() -> Tensor:
        settings = study.evaluation.model_dump(mode="json")
        recipe = ["start", hash_state(start), hash_files(files, study), settings]
        return store.once(recipe, lambda: draw_start(study, files, start))

    return public_scale(study, reference, store, draw)


def draw_start(study: Study, files: BaseFiles, start: Tensors) -> Tensor:
    """Draw what a site's gate will draw, by the start: `[N, 3, H, W]` in [0, 1]."""
    family = load_family(study, files, device=pick_device(study.training.device))
    load_trainable_state(family.module, start)
    wanted = [(p.text, draw) for p in study.evaluation.prompts for draw in range(study.evaluation.draws)]
    return sample(family, study, wanted, "draw by the start, for the leakage gate")


def _vae(home: Path, study: Study, reference: Reference) -> Path:
    recipe = [study.generator.vae_training.model_dump(mode="json"), _images(study, reference)]
    folder = home / "bases" / f"vae-{_name(recipe)}"
    if not folder.exists():
        with Meter() as meter:
            pretrain_vae(study, reference.pretrain, folder)
        append_cost(_cost_path(folder), "pretrain", meter.measurement)
    return folder


def _start(home: Path, study: Study, reference: Reference, vae: Path) -> Path | None:
    """Find or train the warm start; None for untrained weights."""
    generator = study.generator
    if generator.warm_start == "none":
        return None
    if generator.warm_start == REFERENCE:
        recipe = [
            generator.model_dump(mode="json", exclude={"vae_training", "warm_start", "train"}),
            hash_source(vae),
            _images(study, reference),
        ]
        path = home / "bases" / f"start-{_name(recipe)}.safetensors"
        if not path.exists():
            device = pick_device(study.training.device)
            with Meter(device) as meter:
                pretrain_generator(study, reference.pretrain, vae, path, device=device)
            append_cost(_cost_path(path), "pretrain", meter.measurement)
    else:
        path = resolve(generator.warm_start, None, "generator.warm_start")
    _check(hash_source(path), generator.warm_start_sha256, "generator.warm_start_sha256")
    return path


def _cost_path(part: Path) -> Path:
    return part.with_name(f"{part.stem}.cost.jsonl")


def _read_cost(home: Path, part: Path) -> list[dict[str, Any]]:
    path = _cost_path(part)
    return read_costs(path) if part.parent == home / "bases" and path.exists() else []


def _images(study: Study, reference: Reference) -> list[object]:
    return [snapshot_hash(reference.pretrain), study.data.image_size, study.data.fit]


def _name(recipe: object) -> str:
    return hashlib.sha256(canonical_json(recipe)).hexdigest()[:12]


def _check(found: str, wanted: str | None, field: str) -> None:
    if wanted is not None and found != wanted:
        raise BadInput(
            f"`{field}` names {wanted[:12]}..., but what is here hashes to {found[:12]}...; "
            "name the right part"
        )
