"""A made-up run for the report's tests: numbers of a believable shape and drawn pictures."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from polyclinic.common.cost_settings import CostSettings
from polyclinic.common.files import write_json_atomic
from polyclinic.common.study import Resolved, Study
from polyclinic.server.evaluation.audit import LowerBound, Measured, SiteAudit
from polyclinic.server.evaluation.estimate import Estimate, Fidelity
from polyclinic.server.evaluation.negations import ValueFaithfulness
from polyclinic.server.evaluation.probe import ConceptFaithfulness, Faithfulness
from polyclinic.server.evaluation.results import (
    ConceptUtility,
    FederatedFidelity,
    MedvqaScores,
    NearCopies,
    PromptCosine,
    SiteGate,
    Utility,
)
from polyclinic.server.report.costs import CostEntry, entry, figure
from polyclinic.server.report.metrics import Metrics, RoundFacts, SampleSheet, SiteFacts, StudyFacts

PROMPTS = [
    "Generate an image with a polyp, no instrument and a green/black box artefact.",
    "Generate an image with no polyp and no instrument.",
    "Generate an image containing a polyp.",
    "Generate an image with an instrument.",
    "Generate an image with a polyp of size 5-10mm in the upper-left.",
]
SITES = {"north": 400, "coast": 400, "valley": 380}


def begun_run(home: Path, study: Study) -> Path:
    """The folder of a run that has its study and no round yet."""
    resolved = Resolved(study=study, base_hash="b" * 64, start_hash="0" * 64, reference_hash="0" * 64)
    folder = home / "runs" / "tiny-12345678"
    folder.mkdir(parents=True)
    write_json_atomic(folder / "study.json", resolved.model_dump(mode="json"))
    return folder


def estimate(value: float, half: float, floor: float | None = None, note: str = "") -> Estimate:
    """An estimate with a symmetric interval."""
    ratio = value / floor if floor else None
    return Estimate(
        value=value, low=value - half, high=value + half, interval="95 %, jackknife over patients",
        n=320, groups=96, resampled={"patients": 96, "prompts": 40},
        floor=floor, floor_low=floor and 0.6 * floor, floor_high=floor and 1.4 * floor,
        ratio=ratio, note=note,
    )  # fmt: skip


def fidelity(kid: float, half: float = 0.009) -> Fidelity:
    """A fidelity with a KID of this value."""
    return Fidelity(
        extractor="EfficientNet-Lite0",
        preprocessing="resized to 128 px, bicubic",
        weights="e1fe" * 16,
        protocol="polyclinic-fidelity-1",
        kid=estimate(kid, half, 0.0061),
        frechet=estimate(900 * kid + 110, 12, 131.0),
        warnings=["Measured on 320 images a side; below 500 the intervals are wide."],
    )


def faithfulness(polyp: float, instrument: float, overlay: float) -> Faithfulness:
    """Three concepts of these accuracies."""
    values = {"polyp": polyp, "instrument": instrument, "overlay": overlay}
    ceilings = {"polyp": 0.93, "instrument": 0.97, "overlay": 0.99}
    rows = [
        ConceptFaithfulness(
            concept=name, counts={"yes": 160, "no": 160}, accuracy=estimate(value, 0.05),
            real=estimate(ceilings[name], 0.02), chance=0.5,
            values=[value_row(shown, 2 * value - 0.4 if shown == "yes" else 0.4) for shown in ("no", "yes")],
        )
        for name, value in values.items()
    ]  # fmt: skip
    mean = sum(values.values()) / 3
    overall = ConceptFaithfulness(
        concept="overall", counts={}, accuracy=estimate(mean, 0.035), real=estimate(0.963, 0.012), chance=0.5
    )
    return Faithfulness(
        rows=rows, overall=overall, presence=estimate(2 * mean - 0.4, 0.05), absence=estimate(0.4, 0.05),
        protocol="polyclinic-faithfulness-1", warnings=[],
    )  # fmt: skip


def value_row(value: str, seen: float) -> ValueFaithfulness:
    """A value seen in this share of the images asked for it, and in 0.3 of the others."""
    return ValueFaithfulness(
        value=value, absence=value == "no", seen=estimate(seen, 0.04), otherwise=estimate(0.3, 0.03),
        real=estimate(0.94, 0.02), shown=estimate(seen + 0.01, 0.05),
    )  # fmt: skip


def picture(rng: np.random.Generator, clarity: float, prompt: int, size: int) -> Image.Image:
    """A drawing of a lumen, clearer with training."""
    big = Image.new("RGB", (128, 128), (20, 8, 8))
    pen = ImageDraw.Draw(big)
    pen.ellipse((4, 4, 124, 124), fill=(190, 96, 84))
    for ring in range(5):
        inset = 14 + 10 * ring
        pen.ellipse(
            (inset, inset + 4, 128 - inset, 124 - inset),
            fill=(170 - 30 * ring, 80 - 15 * ring, 70 - 12 * ring),
        )
    if prompt in (0, 2, 4):
        x, y = rng.integers(20, 70, 2)
        pen.ellipse((x, y, x + 36, y + 32), fill=(226, 120, 118))
    if prompt == 3:
        pen.line((128, 110, 70, 70), fill=(150, 160, 175), width=14)
    if prompt == 0:
        pen.rectangle((4, 92, 40, 122), fill=(10, 90, 40))
    noise = Image.fromarray(rng.integers(0, 255, (128, 128, 3), dtype=np.uint8)).filter(
        ImageFilter.GaussianBlur(3)
    )
    return Image.blend(noise, big, clarity).resize((size, size), Image.Resampling.LANCZOS)


def costs(rounds: list[RoundFacts], training_cpu_s: float) -> list[CostEntry]:
    """A ledger of a simulation: the sites take turns, the coordinator judges."""
    trained = [(r.round, site) for r in rounds for site in r.replied]
    found = [
        entry("cache", site, cpu_s=figure(12.8, "measured"), wall_s=figure(13, "measured")) for site in SITES
    ]
    for number, site in trained:
        cpu = training_cpu_s / len(trained) * (1.1 if site == "coast" else 0.95)
        found.append(
            entry(
                "train", site, number,
                wall_s=figure(1.04 * cpu, "measured"), cpu_s=figure(cpu, "measured"),
                peak_bytes=figure(1.42e9, "sampled"), flops=figure(3.1e13 / len(trained), "estimated"),
                energy_j=figure(10 * cpu, "estimated"),
                down_bytes=figure(17_400_000, "counted"), up_bytes=figure(17_400_000, "counted"),
            )
        )  # fmt: skip
    for r in rounds:
        if r.evaluated:
            found.append(
                entry("sample", "server", r.round, cpu_s=figure(11, "measured"), wall_s=figure(9, "measured"))
            )
            found.append(
                entry(
                    "evaluate",
                    "server",
                    r.round,
                    cpu_s=figure(2, "measured"),
                    energy_j=figure(20, "estimated"),
                )
            )
    return found


def wider(metrics: Metrics) -> Metrics:
    """The run with everything the wider evaluation can find, believable and made up."""
    rounds = []
    for r in metrics.rounds:
        if r.fidelity is None:
            rounds.append(r)
            continue
        share = r.round / metrics.rounds[-1].round
        others = {
            "cmmd": estimate(0.91 - 0.55 * share, 0.06, 0.08),
            "precision": estimate(0.31 + 0.3 * share, 0.05, 0.86),
            "recall": estimate(0.12 + 0.25 * share, 0.05, 0.84),
            "density": estimate(0.2 + 0.4 * share, 0.06, 0.98),
            "coverage": estimate(0.15 + 0.45 * share, 0.05, 0.95),
            "vendi": estimate(9.1 + 6 * share, 0.8, 24.0),
            "ms_ssim": estimate(0.62 - 0.2 * share, 0.03, 0.29),
        }
        main = r.fidelity.model_copy(update={"others": others})
        dino = r.fidelity.model_copy(
            update={
                "extractor": "microsoft/rad-dino", "preprocessing": "518 px", "weights": "d170" * 16,
                "warnings": [],
                "kid": estimate(1.9 - 1.2 * share, 0.2, 0.11), "frechet": estimate(310 - 120 * share, 14, 40),
            }
        )  # fmt: skip
        update = {
            "fidelity": main,
            "second": [dino],
            "state_hash": f"{r.round:02d}5a" * 16,
            "cosine": PromptCosine(
                model="ikim-uk-essen/BiomedCLIP", cosine=estimate(0.24 + 0.05 * share, 0.01),
                shuffled=estimate(0.23, 0.01), lift=estimate(0.01 + 0.05 * share, 0.01),
                warning="Such scores do not understand negations.", weights="c11b" * 16,
                protocol="polyclinic-cosine-1",
            ),
        }  # fmt: skip
        rounds.append(r.model_copy(update=update))
    concepts = [
        ConceptUtility(
            concept=name, synthetic=estimate(0.61 + 0.05 * i, 0.05), real=estimate(0.84 + 0.04 * i, 0.04),
            both=estimate(0.86 + 0.04 * i, 0.04), gain=estimate(0.02, 0.015), chance=0.5,
        )
        for i, name in enumerate(("polyp", "instrument", "overlay"))
    ]  # fmt: skip
    rounds[-1] = rounds[-1].model_copy(
        update={
            "utility": Utility(
                extractor="EfficientNet-Lite0", rows=concepts, protocol="polyclinic-utility-1",
                overall=concepts[1].model_copy(update={"concept": "overall"}), warnings=["Linear probes."],
            ),
            "near_copies": [
                NearCopies(
                    found=2, n=320, images=2, share=estimate(0.00625, 0.005), expected=0.01, alpha=0.01,
                    threshold=0.08, measure=measure, note="Distances do not predict who was trained on.",
                )
                for measure in ("cosine distance of features", "correlation of aligned pixels")
            ],
            "medvqa": MedvqaScores(
                extractor="BiomedCLIP", fbd=412.0, fidelity=0.31, agreement=0.71, diversity=0.68, pairs=24,
                note="64 px where the competition has 256.", weights="fbd0" * 16,
                protocol="polyclinic-medvqa-1",
            ),
        }
    )  # fmt: skip
    sigma = Measured(value=1.362, low=1.341, high=1.383, claimed=1.37)
    audit = [
        SiteAudit(
            site=site, coordinates=2000, sigma=sigma, sigma_by_round={1: sigma, 2: sigma}, revealed=True,
            small=Measured(value=0.49, low=0.46, high=0.52, claimed=0.5),
            large=Measured(value=1.01, low=0.97, high=1.05, claimed=1.0),
            bound=LowerBound(epsilon=1.1, ceiling=5.4, guesses=400, right=260, canaries=1000), epsilon=7.8,
        )
        for site in SITES
    ]  # fmt: skip
    return metrics.model_copy(
        update={
            "rounds": rounds,
            "audit": audit if metrics.private else [],
            "federated_fidelity": FederatedFidelity(
                cmmd=estimate(0.21, 0.03, 0.09), epsilon=0.5, delta=1e-5, sites=list(SITES), patients=1188.0,
                features=2048, note="Its interval is that of the noise alone.",
            ),
            "gates": [
                SiteGate(
                    site="north", verdict="released", near_copies=estimate(1.4, 3.1), epsilon=0.3, delta=1e-5
                ),
                SiteGate(site="coast", verdict="not released"),
                SiteGate(site="valley", verdict="not asked"),
            ],
            "cost_settings": CostSettings(
                grid_gco2_per_kwh=381, grid_source="a made-up grid agency, 2024", price_cpu_hour=0.04,
            ),
            "cost_notes": ["FLOPs of sampling are those of the denoising network alone."],
        }
    )  # fmt: skip


def write_sheet(run_dir: Path, number: int, clarity: float, size: int = 64, columns: int = 3) -> SampleSheet:
    """Draw a sheet of pictures into the run directory."""
    sheet = Image.new("RGB", (columns * size, len(PROMPTS) * size))
    for row in range(len(PROMPTS)):
        for column in range(columns):
            rng = np.random.default_rng([row, column])
            sheet.paste(picture(rng, clarity, row, size), (column * size, row * size))
    path = Path("samples") / f"round-{number:03d}.png"
    (run_dir / "samples").mkdir(parents=True, exist_ok=True)
    sheet.save(run_dir / path)
    return SampleSheet(path=str(path), rows=len(PROMPTS), columns=columns, image_size=size)


def fake_run(
    run_dir: Path,
    *,
    private: bool = True,
    last: int = 12,
    final_kid: float = 0.043,
    name: str = "phantom-demo-dp",
    title: str = "Colonoscopy phantoms at three sites: federated, private",
) -> Metrics:
    """A run of `last` rounds whose KID moves from 0.152 to `final_kid`; its sheets are drawn."""
    rounds = []
    for number in range(last + 1):
        share = 1 - math.exp(-3.2 * number / last)
        share /= 1 - math.exp(-3.2)
        judged = number % 2 == 0 or number == last
        epsilon = {
            s: 0.4 * (number > 0) + (7.4 - 0.5 * i) * math.sqrt(number / last) for i, s in enumerate(SITES)
        }
        missing = {"valley"} if number == 5 else set()
        refused = {"coast": "refused [1013 site-not-ready]: the site's cache or snapshot is not there"}
        rounds.append(
            RoundFacts(
                round=number,
                released=True,
                epsilon={s: e if private else math.inf for s, e in epsilon.items()} if number else {},
                replied=[s for s in SITES if s not in missing] if number else [],
                refused=refused if number == min(8, last) else {},
                absent=sorted(missing),
                bytes_down=3 * 17_400_000 * (number > 0),
                bytes_up=3 * 17_400_000 * (number > 0),
                seconds=16.0 * (number > 0),
                evaluated=judged,
                fidelity=fidelity(0.152 + (final_kid - 0.152) * share) if judged else None,
                faithfulness=faithfulness(0.51 + 0.2 * share, 0.53 + 0.3 * share, 0.5 + 0.04 * share)
                if judged
                else None,
                samples=write_sheet(run_dir, number, 0.1 + 0.85 * share) if judged else None,
            )
        )
    sites = [
        SiteFacts(
            name=s, declared_patients=n, epsilon=rounds[-1].epsilon[s], delta=1e-5 if private else None,
            epsilon_cap=8.0, sigma=1.37 if private else None, rounds_answered=last - (s == "valley"),
            rounds_absent=int(s == "valley"), refusals=[],
        )
        for s, n in SITES.items()
    ]  # fmt: skip
    training = 311 if private else 262
    forecast = [
        entry("train", site, flops=figure(1e13, "estimated"), cpu_s=figure(95, "estimated"),
              down_bytes=figure(17.3e6 * last, "counted"))
        for site in SITES
    ] + [entry("combine", "server", disk_bytes=figure(4.1e7, "estimated"))]  # fmt: skip
    promise = ["For each site, (epsilon, delta)-differential privacy for adding or removing one patient."]
    return Metrics(
        study=StudyFacts(
            name=name, title=title, resolved_hash="6f3a" * 16, base_hash="b01d" * 16,
            generator="MSDM, size msdm-tiny", trainable_parameters=4_350_000, image_size=64,
        ),
        simulated=True, private=private, created="2025-11-22", code_version="0.1.0", sites=sites,
        rounds=rounds, cost=costs(rounds, training), forecast=forecast, prompts=PROMPTS,
        guarantee=promise * private,
        not_covered=["A patient in two hospitals: the epsilons add.", "Reply timing and participation.",
                     "The public reference's patients."],
        study_json={"name": name, "privacy": {"enabled": private, "epsilon": 8.0}},
        seconds_total=334.0,
    )  # fmt: skip
