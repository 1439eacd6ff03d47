"""Draw the study's fixed prompts with its fixed seeds and measure what came out."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from pydantic import BaseModel, ConfigDict
from safetensors.torch import load_file, save
from torch import Tensor

from polyclinic.common.cost import Meter, append_cost
from polyclinic.common.data.folder import open_image
from polyclinic.common.data.preprocess import preprocess
from polyclinic.common.data.table import Record
from polyclinic.common.device import pick_device
from polyclinic.common.features.efficientnet import extract, preprocessing
from polyclinic.common.files import canonical_json, naming_full_disk, sha256_file, write_atomic
from polyclinic.common.generators.base import BaseFiles, Family, Tensors, in_batches, load_family
from polyclinic.common.progress import track
from polyclinic.common.study import Resolved
from polyclinic.server.checkpoints import Checkpoint, load_checkpoint, rounds_done
from polyclinic.server.evaluation.estimate import Fidelity, measure_fidelity
from polyclinic.server.evaluation.probe import Faithfulness, measure_faithfulness
from polyclinic.server.evaluation.results import MedvqaScores, NearCopies, PromptCosine, Utility
from polyclinic.server.reference import Reference

SHEET_COLUMNS = 6


class Judgement(BaseModel):
    """What was measured after a round.

    Attributes:
        round: 0 is the start.
        columns: Draws of each prompt on the sample sheet.
        fidelity: Distance to the reference; None below 50 images, where it would mean nothing.
        faithfulness: Agreement with the prompts; None where the study names no concepts.
        second: Fidelity on the study's other extractors.
        cosine: CLIP-type agreement, where the study names a model.
        utility: What the images are worth to train on.
        near_copies: Images close to one of the public reference, by features and by pixels.
        medvqa: The official MedVQA-GI 2025 scores, where the study asks for them.
    """

    model_config = ConfigDict(extra="forbid")

    round: int
    columns: int
    fidelity: Fidelity | None
    faithfulness: Faithfulness | None
    second: list[Fidelity] = []
    cosine: PromptCosine | None = None
    utility: Utility | None = None
    near_copies: list[NearCopies] = []
    medvqa: MedvqaScores | None = None


class Judge:
    """Judges checkpoints of one run; loads models and reference features once.

    Args:
        run_dir: Where samples and judgements go.
        resolved: The study.
        reference: Split by patient.
        files: Where the frozen parts lie.
        features: Folder in which reference features are kept by hash.
    """

    def __init__(
        self, run_dir: Path, resolved: Resolved, reference: Reference, files: BaseFiles, features: Path
    ) -> None:
        self.run_dir, self.resolved, self.study = run_dir, resolved, resolved.study
        self.reference, self.files, self.folder = reference, files, features
        self._family: Family | None = None
        self._features: dict[str, Tensor] = {}

    def due(self, number: int) -> bool:
        """Whether the study wants a judgement after this round."""
        last = self.study.training.rounds
        return number in (0, last) or number % self.study.evaluation.every == 0

    def judge_missing(self) -> None:
        """Judge every checkpoint that is due and was not judged yet: after a crash, or at the start."""
        for number in rounds_done(self.run_dir):
            if self.due(number) and not judgement_path(self.run_dir, number).exists():
                self.judge(load_checkpoint(self.run_dir, number))

    def judge(self, checkpoint: Checkpoint) -> None:
        """Draw, measure, and write the round's sample sheet and judgement."""
        number = checkpoint.record.round
        if not self.due(number):
            return
        with Meter(self._device) as meter:
            images = self.draw(checkpoint.average, f"draw round {number}")
            judgement = self._measure(number, images)
        columns = min(SHEET_COLUMNS, self.study.evaluation.draws)
        _write_sheet(sheet_path(self.run_dir, number), images, self.study.evaluation.draws, columns)
        path = judgement_path(self.run_dir, number)
        path.parent.mkdir(exist_ok=True)
        write_atomic(path, judgement.model_dump_json(indent=1).encode())
        append_cost(self.run_dir / "cost.jsonl", "evaluation", meter.measurement, round=number)

    def draw(self, state: Tensors, label: str) -> Tensor:
        """Draw all prompts, `[prompts * draws, 3, H, W]` in [0, 1], a prompt's draws side by side."""
        settings = self.study.evaluation
        if self._family is None:
            self._family = load_family(
                self.study.generator,
                self.study.data.image_size,
                self.files.vae,
                frozen=self.files.frozen,
                device=self._device,
            )
        load_state(self._family, state)
        wanted = [(prompt.text, draw) for prompt in settings.prompts for draw in range(settings.draws)]
        return sample(self._family, self.study, wanted, label)

    @property
    def _device(self) -> str:
        return pick_device(self.study.training.device)

    def _measure(self, number: int, images: Tensor) -> Judgement:
        settings = self.study.evaluation
        groups = [prompt.text for prompt in settings.prompts for _ in range(settings.draws)]
        found = extract(images)
        evaluate, probe = self.reference.evaluate, self.reference.probe
        fidelity = None
        if len(images) >= 50 and len(evaluate) >= 50:
            fidelity = measure_fidelity(
                found,
                groups,
                self._of(evaluate),
                [r.patient for r in evaluate],
                self.study.reference.key,
                preprocessing=preprocessing(),
            )
        faithfulness = None
        concepts = self.study.reference.concepts
        if concepts and probe:
            faithfulness = measure_faithfulness(
                found,
                [dict(prompt.labels) for prompt in settings.prompts for _ in range(settings.draws)],
                groups,
                self._of(probe),
                [_known(r, concepts) for r in probe],
                [r.patient for r in probe],
                self._of(evaluate),
                [_known(r, concepts) for r in evaluate],
                list(concepts),
                [r.patient for r in evaluate],
            )
        columns = min(SHEET_COLUMNS, settings.draws)
        return Judgement(round=number, columns=columns, fidelity=fidelity, faithfulness=faithfulness)

    def _of(self, records: list[Record]) -> Tensor:
        """Features of reference images, preprocessed as the training images were; kept by hash."""
        data = self.study.data
        what = [data.image_size, data.fit, preprocessing(), [sha256_file(r.image) for r in records]]
        key = hashlib.sha256(canonical_json(what)).hexdigest()[:32]
        if key not in self._features:
            path = self.folder / f"{key}.safetensors"
            if not path.exists():
                self.folder.mkdir(parents=True, exist_ok=True)
                parts = []
                with track("reference features", len(records)) as advance:
                    for batch in in_batches(records, 64):
                        pixels = [preprocess(open_image(r.image), data.image_size, data.fit) for r in batch]
                        parts.append(extract(torch.stack(pixels) / 2 + 0.5))
                        advance(len(batch))
                write_atomic(path, save({"features": torch.cat(parts)}))
            self._features[key] = load_file(str(path))["features"]
        return self._features[key]


def sample(family: Family, study: Any, wanted: list[tuple[str, int]], label: str) -> Tensor:
    """Draw images through the family's own pipeline.

    Args:
        family: Loaded with its encoders and the state to sample from.
        study: Gives the sampling settings.
        wanted: Prompt and draw number of each image; an image depends on nothing else.
        label: What the progress bar says.

    Returns:
        `[N, 3, H, W]` in [0, 1], on the CPU.
    """
    settings, size = study.evaluation, study.data.image_size
    pipeline = family.pipeline()
    images: list[Tensor] = []
    with track(label, len(wanted)) as advance, torch.no_grad():
        for batch in in_batches(wanted, settings.batch_size):
            seeds = [
                hashlib.sha256(f"{settings.seed}|{text}|{draw}".encode()).digest() for text, draw in batch
            ]
            generators = [torch.Generator().manual_seed(int.from_bytes(s[:7], "big")) for s in seeds]
            output = pipeline(
                prompt=[text for text, _ in batch],
                height=size,
                width=size,
                num_inference_steps=settings.steps,
                guidance_scale=settings.guidance,
                eta=settings.eta,
                generator=generators,
                output_type="pt",
            )
            images.append(output.images.float().cpu())
            advance(len(batch))
    return torch.cat(images)


def load_state(family: Family, state: Tensors) -> None:
    """Put a trainable state into a family, whatever part of it trains."""
    parameters = dict(family.module.named_parameters())
    with torch.no_grad():
        for name, tensor in state.items():
            parameters[name].copy_(tensor)


def sheet_path(run_dir: Path, number: int) -> Path:
    """Sample sheet of a round."""
    return run_dir / "samples" / f"round-{number:04d}.png"


def judgement_path(run_dir: Path, number: int) -> Path:
    """Judgement of a round."""
    return run_dir / "judgements" / f"round-{number:04d}.json"


def read_judgement(run_dir: Path, number: int) -> Judgement | None:
    """Read a round's judgement, if there is one."""
    path = judgement_path(run_dir, number)
    return Judgement.model_validate(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else None


def picture(images: Tensor, columns: int) -> Image.Image:
    """Lay images `[N, 3, H, W]` in [0, 1] on a grid, row by row, without gaps."""
    count, _, height, width = images.shape
    rows = -(-count // columns)
    canvas = np.zeros((rows * height, columns * width, 3), dtype=np.uint8)
    pixels = (images.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).numpy()
    for i in range(count):
        y, x = divmod(i, columns)
        canvas[y * height : (y + 1) * height, x * width : (x + 1) * width] = pixels[i]
    return Image.fromarray(canvas)


def write_picture(path: Path, image: Image.Image) -> None:
    """Write a PNG whole or not at all."""
    import io

    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    path.parent.mkdir(parents=True, exist_ok=True)
    with naming_full_disk(path):
        write_atomic(path, buffer.getvalue())


def _write_sheet(path: Path, images: Tensor, draws: int, columns: int) -> None:
    kept = images.reshape(-1, draws, *images.shape[1:])[:, :columns].flatten(0, 1)
    write_picture(path, picture(kept, columns))


def _known(record: Record, concepts: tuple[str, ...]) -> dict[str, str]:
    return {concept: record.labels[concept] for concept in concepts if record.labels.get(concept)}
