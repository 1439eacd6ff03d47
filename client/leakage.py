"""The leakage gate at a hospital: images that the site draws itself against its own (PRIVACY.md, rule 16).

For each patient: the nearest drawn image by features and by aligned pixels, and whether that is nearer than
public patients are to each other. All of it stays here, with pictures, for a person who decides; what that
person says leaves by `releases.decide`. A near copy is a finding; finding none proves nothing.
"""

from __future__ import annotations

import json
import secrets
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor

from polyclinic.client.approval import Approval, images_path, set_apart, site_extractor
from polyclinic.client.final import load_final
from polyclinic.client.membership import Membership, membership_test
from polyclinic.common.data.cache import load_cache
from polyclinic.common.data.pixels import load_pixels
from polyclinic.common.data.table import Record, patients_of
from polyclinic.common.device import pick_device
from polyclinic.common.drawing import sample
from polyclinic.common.features.copies import ALARM, Tally, chance_of
from polyclinic.common.features.extractor import Extractor
from polyclinic.common.features.near import EXACT, Nearest, nearest_by_features, nearest_by_pixels, thumbnails
from polyclinic.common.files import write_atomic
from polyclinic.common.generators.base import Family, Tensors, load_family, load_trainable_state
from polyclinic.common.generators.public import hash_state
from polyclinic.common.progress import track
from polyclinic.common.refusals import BadInput
from polyclinic.common.study import NearScale


class _Local(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Pair(_Local):
    """A patient and the drawn image that comes nearest.

    Attributes:
        patient: Id.
        image: File of the patient's own image.
        part: Which part of that file it is; empty for the whole.
        drawn: Number of the drawn image.
        features: Smallest feature distance over the patient's images.
        pixels: Smallest distance of aligned pixels.
        near: Either is below its threshold.
        ratio: The smaller of both in units of its threshold; below 1 where near, below `EXACT` where the
            drawn image is that image, or almost.
    """

    patient: str
    image: Path
    part: str
    drawn: int
    features: float
    pixels: float
    near: bool
    ratio: float


class Findings(_Local):
    """What the gate found; it never leaves the site.

    Attributes:
        run: The study's run name.
        model: Hash of the final generator.
        created: When, UTC.
        images: Images drawn.
        seed: They were drawn with; the site's own.
        scale: Thresholds, and what they are worth.
        trained: Patients that were trained on.
        held_out: Patients that were not.
        expected: Near copies expected by chance among those trained on, at most.
        chance: Of so many or more, had nothing been memorised (`copies.chance_of`).
        membership: The membership test; None where too few patients were held out.
    """

    run: str
    model: str
    created: str
    images: int
    seed: str
    scale: NearScale
    trained: list[Pair]
    held_out: list[Pair]
    expected: float
    chance: float
    membership: Membership | None

    @property
    def found(self) -> int:
        """Patients trained on, of whom a near copy was drawn."""
        return sum(pair.near for pair in self.trained)

    @property
    def exact(self) -> int:
        """Patients trained on, of whom an almost exact copy was drawn."""
        return sum(pair.ratio < EXACT for pair in self.trained)

    @property
    def reasons(self) -> list[str]:
        """Why a person may want to say `not released`."""
        reasons = []
        if self.exact:
            reasons.append(
                f"almost exact copies of {self.exact} of {len(self.trained)} patients were drawn, at "
                f"less than {EXACT:g} of the distance that counts as near"
            )
        if self.chance < ALARM:
            reasons.append(
                f"near copies of {self.found} of {len(self.trained)} patients were drawn, where chance "
                f"explains {self.expected:.1f}"
            )
        if self.membership and self.membership.alarming:
            reasons.append(
                f"who was trained on can be told by the loss: AUC {self.membership.auc:.2f} "
                f"({self.membership.low:.2f} to {self.membership.high:.2f}), where 0.5 tells nothing"
            )
        return reasons

    @property
    def advice(self) -> Literal["release", "veto"]:
        """What the numbers suggest; a person decides."""
        return "veto" if self.reasons else "release"


@dataclass(frozen=True)
class Looks:
    """What images are compared by: features `[n, d]` and thumbnails `[n, S, S]`."""

    features: Tensor
    small: Tensor

    @staticmethod
    def of(images: Tensor, extractor: Extractor) -> Looks:
        """Look at images `[n, 3, H, W]` in [0, 1]."""
        return Looks(extractor.extract(images), thumbnails(images))


def inspect_final(home: Path, approval: Approval) -> tuple[Findings, Tensor]:
    """Draw from the final generator and compare with the site's own images.

    Args:
        home: The site's home.
        approval: Of a study with a gate.

    Returns:
        The findings, and the drawn images `[n, 3, H, W]` in [0, 1].

    Raises:
        BadInput: The study has no gate, or an image cannot be read any more.
        Refusal: `final-missing`, or `approval-drift` of the feature extractor.
    """
    resolved, study = approval.resolved, approval.resolved.study
    extractor = site_extractor(resolved)
    scale = resolved.public.near if resolved.public else None
    if not study.releases.leakage_gate or extractor is None or scale is None:
        raise BadInput(f"{resolved.run_name}: its study has no leakage gate (releases.leakage_gate)")
    state = load_final(home, approval)
    family = _family(approval, state)
    seed = secrets.token_hex(16)
    wanted = [(p.text, draw) for p in study.evaluation.prompts for draw in range(study.evaluation.draws)]
    images = sample(family, study, wanted, f"draw {resolved.run_name}", seed)
    drawn = Looks.of(images, extractor)
    groups = set_apart(_records(home, approval), resolved)
    trained, held_out = (_pairs(group, drawn, extractor, approval, scale) for group in groups)
    sizes = [len(own) for own in patients_of(groups[0]).values()]
    membership = None
    if approval.held_out_index:
        caches = [load_cache(home / "cache", i) for i in (approval.cache_index, approval.held_out_index)]
        membership = membership_test(family, caches[0], caches[1])
    findings = Findings(
        run=resolved.run_name,
        model=hash_state(state),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        images=len(images),
        seed=seed,
        scale=scale,
        trained=trained,
        held_out=held_out,
        # Of a patient with k images, each of which is found near with chance alpha at most.
        expected=sum(min(1.0, size * scale.alpha) for size in sizes),
        chance=chance_of(_tally(trained, scale), _tally(held_out, scale), sizes, scale),
        membership=membership,
    )
    return findings, images


def nearest_pair(records: list[Record], own: Looks, drawn: Looks, scale: NearScale) -> Pair:
    """Find the drawn image nearest to one patient: a function of this patient's images and public things."""
    by_features: Nearest = nearest_by_features(own.features, drawn.features)
    by_pixels: Nearest = nearest_by_pixels(own.small, drawn.small)
    ratios = torch.stack([by_features.distances / scale.features, by_pixels.distances / scale.pixels])
    which, row = divmod(int(ratios.argmin()), len(records))
    features, pixels = float(by_features.distances.min()), float(by_pixels.distances.min())
    return Pair(
        patient=records[row].patient,
        image=records[row].image,
        part=records[row].part,
        drawn=int((by_features, by_pixels)[which].rows[row]),
        features=features,
        pixels=pixels,
        near=features < scale.features or pixels < scale.pixels,
        ratio=float(ratios.min()),
    )


def _pairs(
    records: list[Record], drawn: Looks, extractor: Extractor, approval: Approval, scale: NearScale
) -> list[Pair]:
    """One patient at a time, so that nobody's result can depend on who else is there."""
    data = approval.resolved.study.data
    pairs = []
    patients = patients_of(records)
    with track("compare patients", len(patients)) as advance:
        for own in patients.values():
            looks = Looks.of(load_pixels(own, data.image_size, data.fit) / 2 + 0.5, extractor)
            pairs.append(nearest_pair(own, looks, drawn, scale))
            advance(1)
    return pairs


def _tally(pairs: list[Pair], scale: NearScale) -> Tally:
    return Tally(
        patients=len(pairs),
        features=sum(pair.features < scale.features for pair in pairs),
        pixels=sum(pair.pixels < scale.pixels for pair in pairs),
        either=sum(pair.near for pair in pairs),
    )


def _family(approval: Approval, state: Tensors) -> Family:
    study = approval.resolved.study
    family = load_family(study, approval.files, device=pick_device(study.training.device))
    load_trainable_state(family.module, state)
    return family


def _records(home: Path, approval: Approval) -> list[Record]:
    path = images_path(home, approval)
    if not path.exists():
        raise BadInput(f"{path}: no such file; approve the study again: `polyclinic-client approve`")
    rows = json.loads(path.read_text(encoding="utf-8"))
    return [Record(patient, Path(image), (), part=part) for patient, image, part in rows]


def folder_of(home: Path, approval: Approval) -> Path:
    """Where the gate's report lies; only the site's own people may read it."""
    return home / "leakage" / approval.resolved.run_name


def write_findings(folder: Path, findings: Findings, page: str) -> None:
    """Keep the findings and their page, whole, for nobody else's eyes."""
    folder.parent.mkdir(mode=0o700, exist_ok=True)
    folder.mkdir(mode=0o700, exist_ok=True)
    write_atomic(folder / "report.html", page.encode(), mode=0o600)
    write_atomic(folder / "findings.json", findings.model_dump_json(indent=1).encode(), mode=0o600)


def read_findings(home: Path, approval: Approval) -> Findings:
    """Read what was found about the final generator that the site holds.

    Raises:
        BadInput: Nobody has looked yet, or at another generator.
        Refusal: `final-missing`.
    """
    path = folder_of(home, approval) / "findings.json"
    model = hash_state(load_final(home, approval))
    try:
        findings = Findings.model_validate_json(path.read_bytes()) if path.exists() else None
    except ValidationError:  # of another release, or damaged
        findings = None
    if findings is None or findings.model != model:
        raise BadInput(
            f"{path}: nobody has looked at this generator; run `polyclinic-client leakage "
            f"{approval.resolved.run_name}` and read its report before you decide"
        )
    return findings
