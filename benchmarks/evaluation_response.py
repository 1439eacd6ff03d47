"""How each metric answers to known damage: real images, spoiled step by step, against other patients'.

    python benchmarks/evaluation_response.py DIR --out table.md    DIR holds images.csv as a study's data do

Half of the patients play the generator, the other half the reference. A metric is of use for a kind of damage
if it moves away from its floor, and further with every level. `collapse` replaces images by copies of five;
`missing` replaces images of one value of a label (view = AP by default) by images of another value, as a
generator does that does not know it. `seen` is the row of that value in the faithfulness table: of the images
that were to show it, the share in which a probe sees it, trained on the reference's other half.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from polyclinic.common.data.holdout import position
from polyclinic.common.data.sources import read_records
from polyclinic.common.data.table import Record
from polyclinic.common.evaluation_settings import ExtractorSettings
from polyclinic.common.features.extractor import Extractor
from polyclinic.common.features.load import load_extractor
from polyclinic.common.progress import say
from polyclinic.common.refusals import BadInput
from polyclinic.common.settings import DataSettings
from polyclinic.server.evaluation.answers import Labelled
from polyclinic.server.evaluation.diversity import luminance, mean_similarity, pairs_within
from polyclinic.server.evaluation.estimate import Estimate, all_metrics, z_scores
from polyclinic.server.evaluation.features import FeatureStore
from polyclinic.server.evaluation.jackknife import Jackknifed
from polyclinic.server.evaluation.probe import measure_faithfulness
from polyclinic.server.evaluation.split import equal_n, floor

KEY = "evaluation-response"
METRICS = ("kid", "frechet", "cmmd", "precision", "recall", "density", "coverage", "vendi", "ms_ssim")
COPIED = 5  # images that a collapsed generator draws again and again
Damage = Callable[[Tensor], Tensor]


def blur(sigma: float) -> Damage:
    reach = max(1, round(3 * sigma))
    line = torch.exp(-((torch.arange(-reach, reach + 1) / sigma) ** 2) / 2)
    line = (line / line.sum()).repeat(3, 1, 1, 1)

    def damage(images: Tensor) -> Tensor:
        padded = F.pad(images, (reach,) * 4, mode="reflect")
        return F.conv2d(F.conv2d(padded, line, groups=3), line.transpose(2, 3), groups=3)

    return damage


def noise(level: float) -> Damage:
    return lambda x: x + level * torch.randn(x.shape, generator=torch.Generator().manual_seed(0))


def tint(level: float) -> Damage:
    """Raise red and lower blue by this share: a grey film's mean change grows in proportion."""
    return lambda x: x * torch.tensor([1 + level, 1.0, 1 - level])[:, None, None]


def collapse(share: float) -> Damage:
    def damage(images: Tensor) -> Tensor:
        changed = images.clone()
        rows = torch.arange(round(share * len(images)))
        changed[rows] = images[rows % COPIED]
        return changed

    return damage


LADDERS: dict[str, list[tuple[str, Damage]]] = {
    "blur": [(f"sigma {s:g} px", blur(s)) for s in (0.5, 1.0, 2.0)],
    "noise": [(f"std {s:g}", noise(s)) for s in (0.02, 0.05, 0.1)],
    "colour": [(f"red +{s:.0%}, blue -{s:.0%}", tint(s)) for s in (0.02, 0.05, 0.1, 0.2, 0.4)],
    "collapse": [(f"{s:.0%} copies of {COPIED}", collapse(s)) for s in (0.25, 0.5, 1.0)],
}


def without(records: list[Record], label: str, value: str, share: float, n: int) -> list[Record]:
    """The first n records, this share of those with the value replaced by later ones with another value."""
    spare = (r for r in records[n:] if r.labels.get(label) not in (value, None))
    found, seen = [], 0
    for record in records[:n]:
        if record.labels.get(label) == value:
            seen += 1
            if round(share * seen) > round(share * (seen - 1)):
                record = next(spare, record)
        found.append(record)
    return found


@dataclass(frozen=True)
class Response:
    """What one kind and level of damage does.

    Attributes:
        damage: Its kind; `none` for images as they are, `floor` for the other half of the reference.
        level: Its strength, in words.
        metrics: By name.
        seen: Share of the images that were to show the value in which a probe sees it; None for the floor.
    """

    damage: str
    level: str
    metrics: dict[str, Jackknifed]
    seen: Estimate | None


def responses(
    extractor: Extractor,
    generator: list[Record],
    reference: list[Record],
    store: FeatureStore,
    n: int,
    missing: tuple[str, str],
) -> Iterator[Response]:
    """Measure every kind and level of damage on one extractor, the weakest level of a kind first.

    Args:
        extractor: Gives the features.
        generator: Images that play the drawn ones; the first n are damaged.
        reference: Images of other patients, at least 2 n and some more, on whom the probe is trained.
        store: Keeps the features.
        n: Images a side.
        missing: Label and value that go missing.

    Raises:
        BadInput: Too few images for this n.
    """
    real = store.of_records(extractor, reference).double()

    def ready(features: Tensor) -> Tensor:
        return z_scores(features.double(), real) if extractor.standardise else features.double()

    patients = [r.patient for r in reference]
    chosen = equal_n([str(i) for i in range(n)], patients, KEY, minimum=n)
    if not chosen.has_floor:
        raise BadInput(f"the halves of the reference hold fewer than {n} images: lower -n")
    y, y_groups = ready(real)[chosen.reference], [patients[i] for i in chosen.reference]
    drawn, (label, value) = generator[:n], missing
    wanted = [{label: r.labels[label]} for r in drawn]
    compared = set(y_groups)
    probe, holdout = (
        Labelled(real[part], [{label: reference[i].labels[label]} for i in part], [patients[i] for i in part])
        for part in ([i for i, p in enumerate(patients) if p not in compared], chosen.reference)
    )

    def response(damage: str, level: str, images: Tensor, of: list[Record]) -> Response:
        names = [r.patient for r in of]
        features = store.of_images(extractor, images)
        faithful = measure_faithfulness(Labelled(features, wanted, names), probe, holdout, [label])
        (seen,) = (v.seen for v in faithful.rows[0].values if v.value == value)
        found = all_metrics(ready(features), y, names, y_groups)
        # Every fifth image counts as a draw of one prompt: copies of five repeat a prompt's first draw.
        prompts = [str(i % COPIED) for i in range(n)]
        pairs = pairs_within(prompts)
        found["ms_ssim"] = mean_similarity(luminance(images), pairs, [prompts[i] for i, _ in pairs])
        say(f"{extractor.name}: {damage} {level}")
        return Response(damage, level, found, seen)

    images = store.pixels(drawn)
    yield Response("floor", "", floor(ready(real), patients, KEY, n, all_metrics), None)
    yield response("none", "", images, drawn)
    for kind, ladder in LADDERS.items():
        for level, damage in ladder:
            yield response(kind, level, (damage(images).clamp(0, 1) * 255).round() / 255, drawn)
    for share in (0.25, 0.5, 0.75, 1.0):
        left = without(generator, label, value, share, n)
        if share == 1 and any(r.labels.get(label) == value for r in left):
            raise BadInput(f"too few images without {label}={value}: lower -n")
        yield response("missing", f"{share:.0%} of {label}={value}", store.pixels(left), left)


def halves(data: Path) -> tuple[list[Record], list[Record]]:
    """Read a data folder; half of its patients are the generator, the others the reference."""
    records = read_records(DataSettings(), data)
    order = sorted(records, key=lambda r: (position(r.patient, KEY), r.patient))
    first = [r for r in order if position(r.patient, KEY) < 0.5]
    return first, order[len(first) :]


def row(extractor: str, response: Response) -> str:
    """Write a row of the table."""
    cells = [
        f"{x.value:.3g} [{x.low:.3g}, {x.high:.3g}]" if (x := response.metrics.get(name)) else ""
        for name in METRICS
    ]
    seen = response.seen
    cells.append(f"{seen.value:.2f} [{seen.low:.2f}, {seen.high:.2f}]" if seen else "")
    return f"| {extractor} | {response.damage} | {response.level} | {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("-n", type=int, default=200, help="images a side")
    parser.add_argument("--missing", default="view=AP", help="label and value that go missing")
    parser.add_argument("--extractor", action="append", help="as in a study; may be given again")
    parser.add_argument("--features", type=Path, default=Path(".polyclinic/features"))
    arguments = parser.parse_args()
    generator, reference = halves(arguments.data)
    store = FeatureStore(arguments.features, arguments.size, "crop")
    label, value = arguments.missing.split("=")
    lines = [
        f"Measured {date.today()}, torch {torch.__version__}: {arguments.n} images a side at "
        f"{arguments.size} px, {len({r.patient for r in generator[: arguments.n]})} patients as generator; "
        "value [95 %].\n",
        f"| extractor | damage | level | {' | '.join(METRICS)} | seen {value} |",
        "|---|---|---|" + "---|" * (len(METRICS) + 1),
    ]
    for source in arguments.extractor or ["package:efficientnet-lite0", "radiomic"]:
        extractor = load_extractor(ExtractorSettings(source=source))
        found = responses(extractor, generator, reference, store, arguments.n, (label, value))
        lines += [row(extractor.name, response) for response in found]
    text = "\n".join(lines) + "\n"
    print(text)
    if arguments.out:
        arguments.out.write_text(text)


if __name__ == "__main__":
    main()
