"""The public base of a study: where VAE and start state come from, and how they are named."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from polyclinic.common.cost import Meter, append_cost
from polyclinic.common.data.cache import snapshot_hash
from polyclinic.common.files import canonical_json
from polyclinic.common.generators.base import Tensors, load_family, trainable_state
from polyclinic.common.generators.public import hash_base, hash_source, hash_state, load_start, resolve
from polyclinic.common.refusals import BadInput
from polyclinic.common.study import Resolved, Study
from polyclinic.common.training import pick_device
from polyclinic.server.pretrain import pretrain_generator, pretrain_vae
from polyclinic.server.reference import Reference

REFERENCE = "reference"


@dataclass(frozen=True)
class Base:
    """A study's public parts on this machine.

    Attributes:
        vae: Folder of the frozen autoencoder.
        start: Trainable state of round 0.
        resolved: The study with their hashes.
    """

    vae: Path
    start: Tensors
    resolved: Resolved


def prepare_base(home: Path, study: Study, reference: Reference) -> Base:
    """Find or train the VAE and the start state, and resolve the study.

    What is trained here is kept under `home/bases`, named by its recipe and by the public images it
    saw, and found again.

    Raises:
        BadInput: A part is missing, or is not the one whose hash the study names.
    """
    generator = study.generator
    pick_device(study.training.device)
    if study.data.image_size % 8:
        raise BadInput(f"`data.image_size = {study.data.image_size}`: must be a multiple of 8")
    if generator.vae == REFERENCE:
        vae = _vae(home, study, reference)
    else:
        vae = resolve(generator.vae, generator.vae_revision, "generator.vae")
    _check(hash_source(vae), generator.vae_sha256, "generator.vae_sha256")
    start = _start(home, study, reference, vae)
    text = resolve(generator.text_encoder, generator.text_encoder_revision, "generator.text_encoder")
    resolved = Resolved(
        study=study,
        base_hash=hash_base(vae, text, generator.max_tokens),
        start_hash=hash_state(start),
        reference_hash=reference.hash,
    )
    return Base(vae, start, resolved)


def _vae(home: Path, study: Study, reference: Reference) -> Path:
    recipe = [study.generator.vae_training.model_dump(mode="json"), _images(study, reference)]
    folder = home / "bases" / f"vae-{_name(recipe)}"
    if not folder.exists():
        with Meter() as meter:
            pretrain_vae(study, reference.pretrain, folder)
        append_cost(home / "bases" / f"{folder.name}.cost.jsonl", "pretraining", meter.measurement)
    return folder


def _start(home: Path, study: Study, reference: Reference, vae: Path) -> Tensors:
    generator = study.generator
    family = load_family(generator, study.data.image_size, vae, encoders=False)
    if generator.warm_start == "none":
        return trainable_state(family.module)
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
            append_cost(home / "bases" / f"{path.stem}.cost.jsonl", "pretraining", meter.measurement)
    else:
        path = resolve(generator.warm_start, None, "generator.warm_start")
    _check(hash_source(path), generator.warm_start_sha256, "generator.warm_start_sha256")
    state = load_start(path)
    missing, odd = family.module.load_state_dict(state, strict=False)
    if missing or odd:
        name = (missing or odd)[0]
        raise BadInput(
            f"{path}: not a state of size {generator.size}: {name} does not fit; name another warm start"
        )
    return trainable_state(family.module)


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
