"""Draw the study's fixed prompts with its fixed seeds and measure what came out."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from polyclinic.common.cost import Meter, append_cost
from polyclinic.common.device import pick_device
from polyclinic.common.drawing import sample
from polyclinic.common.features.efficientnet import efficientnet
from polyclinic.common.files import naming_full_disk, write_atomic
from polyclinic.common.generators.base import BaseFiles, Family, Tensors, load_family, named
from polyclinic.common.stored import read_stored
from polyclinic.common.study import Resolved
from polyclinic.server.checkpoints import Checkpoint, load_checkpoint, rounds_done
from polyclinic.server.evaluation.features import FeatureStore
from polyclinic.server.evaluation.federated import keep_final
from polyclinic.server.evaluation.measure import Judgement, drawn_for, measure
from polyclinic.server.reference import Reference


class Judge:
    """Judges checkpoints of one run; loads models and features once.

    Args:
        run_dir: Where samples and judgements go.
        resolved: The study.
        reference: Split by patient.
        files: Where the frozen parts lie.
        features: Folder in which features are kept by hash.
    """

    def __init__(
        self, run_dir: Path, resolved: Resolved, reference: Reference, files: BaseFiles, features: Path
    ) -> None:
        self.run_dir, self.resolved, self.study = run_dir, resolved, resolved.study
        self.reference, self.files = reference, files
        self._store = FeatureStore(features, self.study.data.image_size, self.study.data.fit)
        self._family: Family | None = None

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
        with Meter(self._device) as drawing:
            images = self.draw(checkpoint.average, f"draw round {number}")
        with Meter(self._device) as judging:
            drawn = drawn_for(self.study, images)
            judgement = measure(number, drawn, self.reference, self.study, self._store)
            if self.resolved.public is not None and number == self.study.training.rounds:
                keep_final(final_path(self.run_dir), self._store.of_images(efficientnet(), images))
        draws = self.study.evaluation.draws
        _write_sheet(sheet_path(self.run_dir, number), images, draws, judgement.columns)
        path = judgement_path(self.run_dir, number)
        path.parent.mkdir(exist_ok=True)
        write_atomic(path, judgement.model_dump_json(indent=1).encode())
        for phase, meter in (("sample", drawing), ("evaluate", judging)):
            append_cost(self.run_dir / "cost.jsonl", phase, meter.measurement, round=number)

    def draw(self, state: Tensors, label: str) -> Tensor:
        """Draw all prompts, `[prompts * draws, 3, H, W]` in [0, 1], a prompt's draws side by side."""
        settings = self.study.evaluation
        if self._family is None:
            self._family = load_family(self.study, self.files, device=self._device)
        load_state(self._family, state)
        wanted = [(prompt.text, draw) for prompt in settings.prompts for draw in range(settings.draws)]
        return sample(self._family, self.study, wanted, label)

    @property
    def _device(self) -> str:
        return pick_device(self.study.training.device)


def load_state(family: Family, state: Tensors) -> None:
    """Put a trainable state into a family, whatever part of it trains."""
    parameters = named(family.module)
    with torch.no_grad():
        for name, tensor in state.items():
            parameters[name].copy_(tensor)


def final_path(run_dir: Path) -> Path:
    """Features of the last round's images, for what the sites' sums are compared with."""
    return run_dir / "releases" / "final.safetensors"


def sheet_path(run_dir: Path, number: int) -> Path:
    """Sample sheet of a round."""
    return run_dir / "samples" / f"round-{number:04d}.png"


def judgement_path(run_dir: Path, number: int) -> Path:
    """Judgement of a round."""
    return run_dir / "judgements" / f"round-{number:04d}.json"


def read_judgement(run_dir: Path, number: int) -> Judgement | None:
    """Read a round's judgement, if there is one."""
    path = judgement_path(run_dir, number)
    fix = "remove that file and run with --resume: the round is judged again"
    return read_stored(path, Judgement, fix) if path.exists() else None


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
