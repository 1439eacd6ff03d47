"""A run's scalars and sample grids as TensorBoard's event files; TensorBoard is an optional extra."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from polyclinic.common.refusals import BadInput
from polyclinic.server.report.costs import ADDITIVE, NAMES, merged
from polyclinic.server.report.metrics import Metrics
from polyclinic.server.report.view_metrics import extractors, measures


def write_tensorboard(run_dir: Path, metrics: Metrics, folder: Path) -> Path:
    """Write one run of TensorBoard's, its steps being rounds.

    Args:
        run_dir: The run; its sample sheets are drawn images.
        metrics: Its numbers.
        folder: TensorBoard's log folder; the run gets a folder of its own in it.

    Returns:
        The run's folder there.

    Raises:
        BadInput: TensorBoard is not installed, or the run is there already.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise BadInput("--tensorboard needs TensorBoard: pip install 'polyclinic[tensorboard]'") from error
    target = folder / run_dir.resolve().name
    if target.exists():
        raise BadInput(f"{target} is there already; name another folder, or remove it")
    with SummaryWriter(str(target)) as writer:  # type: ignore[no-untyped-call]
        for name, number, value in scalars(metrics):
            writer.add_scalar(name, value, number)  # type: ignore[no-untyped-call]
        for r in metrics.rounds:
            if r.samples is not None:
                with Image.open(run_dir / r.samples.path) as sheet:
                    pixels = np.asarray(sheet.convert("RGB"))
                writer.add_image("samples", pixels, r.round, dataformats="HWC")  # type: ignore[no-untyped-call]
    return target


def scalars(metrics: Metrics) -> Iterator[tuple[str, int, float]]:
    """Name, round and value of everything that is one finite number a round."""
    for name, number, value in _scalars(metrics):
        if math.isfinite(value):
            yield name, number, value


def _scalars(metrics: Metrics) -> Iterator[tuple[str, int, float]]:
    for r in metrics.rounds:
        for extractor, fidelity in extractors(r).items():
            for name, estimate in measures(fidelity).items():
                yield f"{extractor}/{name}", r.round, estimate.value
                if estimate.floor is not None:
                    yield f"{extractor}/{name} floor", r.round, estimate.floor
        if r.faithfulness is not None:
            for row in (*r.faithfulness.rows, r.faithfulness.overall):
                yield f"faithfulness/{row.concept}", r.round, row.accuracy.value
        for site, epsilon in r.epsilon.items():
            yield f"epsilon/{site}", r.round, epsilon
        spent = merged(e for e in metrics.cost if e.round == r.round)
        for quantity in ADDITIVE:
            if quantity in spent:
                yield f"cost/{NAMES[quantity][0]}", r.round, spent[quantity].value
