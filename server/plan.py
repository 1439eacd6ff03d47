"""`polyclinic-server plan`: what a study means before anybody trains, in numbers and in words.

Everything follows from the study file alone: operations are counted on the meta device, privacy is
calibrated as a site would calibrate it, bytes are those of the trainable state.
"""

from __future__ import annotations

from collections.abc import Mapping

from polyclinic.common.calibration import study_noise
from polyclinic.common.cost import view_flops
from polyclinic.common.features.load import check_extractors
from polyclinic.common.generators.base import BaseFiles, load_family, trainable
from polyclinic.common.generators.checkpoint import large_files, licence
from polyclinic.common.generators.public import is_hub_id, resolve
from polyclinic.common.privacy.accounting import claim, epsilon_pld, epsilon_rdp
from polyclinic.common.refusals import BadInput
from polyclinic.common.settings import SimulatedSite
from polyclinic.common.study import Study
from polyclinic.server.plan_advice import Advice, advise
from polyclinic.server.plan_cost import (
    Speed,
    evaluation_flops,
    forecast,
    forecast_words,
    ledger_lines,
    travel_bytes,
)
from polyclinic.server.plan_fit import check_fit
from polyclinic.server.plan_gate import GatePlan, gate_plan, gate_words
from polyclinic.server.plan_memory import HEADROOM, Memory, training_memory
from polyclinic.server.plan_phases import count_phases, forward_flops
from polyclinic.server.report.cost_summary import summarise_forecast
from polyclinic.server.report.costs import CostEntry, CostSummary
from polyclinic.server.report.metrics import Part
from polyclinic.server.report.wording import GAP, bound, count, gpu_time, number, scaled

PIXELS_A_LATENT = 8
FP32 = 4  # bytes
EACH_SITE = "each site"


class SitePlan(Part):
    """What the study means at one site.

    Attributes:
        name: The site, or "each site" where the study names none.
        declared_patients: Public size; None where the study does not know it.
        sigma: Noise standard deviation in units of the clip bound; 0 without privacy.
        epsilon: Claimed for the whole study, the upper end of PRV; None without privacy.
        epsilon_pld: The same from privacy loss distributions: a check from below.
        epsilon_rdp: The same from Renyi accounting: a check from above.
        delta: Of every epsilon here; None without privacy.
        expected_patients: Mean number of patients in a step, q x declared.
        expected_views: Mean number of views in a step.
        flops: Forward and backward operations of the whole study at this site.
        gpu_seconds: What a GPU takes for them, by the study's stated peak and utilisation.
        noise_to_batch: sigma / (q x declared): noise on the mean gradient, in units of the clip bound.
        gate: What the leakage gate can find there; None without one, or where the size is not known.
    """

    name: str
    declared_patients: int | None = None
    sigma: float = 0.0
    epsilon: float | None = None
    epsilon_pld: float | None = None
    epsilon_rdp: float | None = None
    delta: float | None = None
    expected_patients: float | None = None
    expected_views: float | None = None
    flops: float | None = None
    gpu_seconds: float | None = None
    noise_to_batch: float | None = None
    gate: GatePlan | None = None


class Plan(Part):
    """A study in numbers.

    Attributes:
        name: Short name of the study.
        private: Whether sites train under differential privacy.
        unit: Privacy unit, `patient` or `image`.
        generator: Family and size, or what it adapts.
        licence: Terms of a large model's base; "" for MSDM.
        image_size: Pixels a side.
        trainable_parameters: Parameters that travel.
        rounds: Rounds of the study.
        steps_per_round: Steps a site takes in a round.
        steps: Steps a site takes over the study.
        sampling_rate: Chance q of a patient to be in a step.
        views: Views a sampled patient shows in a step.
        clip: Bound on a patient's gradient norm; None without privacy.
        noise: Where the noise comes from, in words.
        state_bytes: The trainable state in fp32, as the server keeps it.
        down_bytes: What a site is sent a round, as the study's transport writes it.
        up_bytes: What it sends back after the first round.
        transport: How both are written.
        forward_flops: Operations of one view, forward alone.
        view_flops: Operations of one view, forward and backward.
        patient_flops: Operations of the whole study for each declared patient.
        server_disk_bytes: Checkpoints: state and average of every round, the start included.
        site_replies_bytes: Replies that a site keeps over the study.
        cache_bytes_per_1000_images: A site's cache: moments of 1,000 images.
        cache_bytes_per_caption: A site's cache: embedding of one distinct caption.
        evaluation_images: Images drawn in one evaluation.
        evaluations: Rounds that are evaluated, the start included.
        evaluation_flops: Operations of the denoising network in one evaluation.
        sites: One entry for each site.
        warnings: Settings known to be poor.
        memory: GPU memory of a site's training; None where it was not asked for.
        forecast: The cost ledger before anything runs, to be compared with what it came to.
        forecast_summary: What it comes to: totals, CO2, money at the study's prices.
    """

    name: str
    private: bool
    unit: str
    generator: str
    licence: str
    image_size: int
    trainable_parameters: int
    rounds: int
    steps_per_round: int
    steps: int
    sampling_rate: float
    views: int
    clip: float | None
    noise: str
    state_bytes: int
    down_bytes: int
    up_bytes: int
    transport: str
    forward_flops: int
    view_flops: int
    patient_flops: float
    server_disk_bytes: int
    site_replies_bytes: int
    cache_bytes_per_1000_images: int
    cache_bytes_per_caption: int
    evaluation_images: int
    evaluations: int
    evaluation_flops: float
    sites: list[SitePlan]
    warnings: list[Advice]
    memory: Memory | None = None
    forecast: list[CostEntry]
    forecast_summary: CostSummary | None = None


def plan(
    study: Study,
    source: str = "study",
    *,
    speed: Speed | None = None,
    declared: Mapping[str, int | None] | None = None,
    memory: bool = False,
) -> Plan:
    """Work out what a study means.

    Args:
        study: The study.
        source: Name of its file, for error messages.
        speed: How fast this machine is, where the sites are simulated on it: gives seconds and joules.
        memory: Forecast memory too, and refuse what does not fit a declared GPU.
        declared: Site to its declared patients, where the sites are known; default: the simulation's.

    Raises:
        BadInput: The image size does not fit the autoencoder, a base or an extractor is not there, or epsilon
            cannot be met.
        Refusal: `accountant-disagrees`, `gpu-too-small`.
    """
    _check_size(study, source)
    check_extractors(study.evaluation.extractors, download=False)
    files = local_files(study, source)
    needed = training_memory(study, files) if memory else None
    if needed is not None:
        check_fit(study, files, needed)
    family = load_family(study, files, device="meta", encoders=False)
    state = {name: p.detach() for name, p in trainable(family.module).items()}
    parameters = sum(p.numel() for p in state.values())
    view, privacy, rounds = view_flops(family), study.privacy, study.training.rounds
    patient = float(view) * privacy.views * privacy.sampling_rate * study.total_steps
    sites = _sites(study, patient)
    state_bytes = FP32 * parameters
    traffic = [travel_bytes(state, study, number) for number in range(1, rounds + 1)]
    down, up = traffic[0]
    ups = sum(each for _, each in traffic)
    forward, shown = forward_flops(family), family.synthetic_views(1)
    evaluations = len({*range(0, rounds + 1, study.evaluation.every), rounds})
    drawn = evaluation_flops(study, forward)
    server_disk = 2 * state_bytes * (rounds + 1)
    expected = forecast(
        study,
        declared or {site.name: site.declared_patients for site in sites},
        patient_flops=patient,
        view_flops=view,
        phases=count_phases(study, files),
        traffic=(down * rounds, ups),
        drawing=(evaluations, drawn),
        disk=server_disk,
        speed=speed,
    )
    return Plan(
        name=study.name,
        private=privacy.enabled,
        unit=study.data.unit,
        generator=study.generator.words,
        licence=licence(study.generator, files.pipeline),
        image_size=study.data.image_size,
        trainable_parameters=parameters,
        rounds=rounds,
        steps_per_round=study.training.steps_per_round,
        steps=study.total_steps,
        sampling_rate=privacy.sampling_rate,
        views=privacy.views,
        clip=privacy.clip if privacy.enabled else None,
        noise=privacy.noise_words,
        state_bytes=state_bytes,
        down_bytes=down,
        up_bytes=up,
        transport=study.federation.transport,
        forward_flops=forward,
        view_flops=view,
        patient_flops=patient,
        server_disk_bytes=server_disk,
        site_replies_bytes=ups,
        cache_bytes_per_1000_images=1000 * FP32 * sum(t.numel() for t in shown.image.values()),
        cache_bytes_per_caption=FP32 * sum(t.numel() for t in shown.prompt.values()),
        evaluation_images=study.evaluation.images,
        evaluations=evaluations,
        evaluation_flops=drawn,
        sites=sites,
        memory=needed,
        warnings=advise(study, {site.name: site.noise_to_batch for site in sites}),
        forecast=expected,
        forecast_summary=summarise_forecast(expected, study.cost),
    )


def words(plan: Plan) -> str:
    """Say a plan in words, for the terminal."""
    lines = [
        f"Study {plan.name}: {plan.generator}, {plan.image_size} px, "
        f"{plan.trainable_parameters / 1e6:.1f} M trainable parameters.",
        *([f"Terms of the base: {plan.licence}"] if plan.licence else []),
        f"{count(plan.rounds, 'round')} x {count(plan.steps_per_round, 'step')} = "
        f"{plan.steps:,} steps a site.",
        "",
        _privacy_words(plan),
    ]
    lines += [f"  {_site_words(site, plan)}" for site in plan.sites]
    lines += [
        "",
        "Cost",
        f"  one view: {scaled(plan.view_flops, 'FLOP')} forward and backward, "
        f"{scaled(plan.forward_flops, 'FLOP')} of them forward (counted on the meta device)",
    ]
    lines += [
        f"  {site.name}: {scaled(site.flops, 'FLOP')} over the study{_gpu_words(site)}"
        for site in plan.sites
        if site.flops
    ] or [f"  {EACH_SITE}: {scaled(plan.patient_flops, 'FLOP')} over the study for each declared patient"]
    lines += _memory_words(plan.memory)
    lines += [
        f"  network: {scaled(plan.down_bytes, 'B')} down and {scaled(plan.up_bytes, 'B')} up "
        f"a round and site ({plan.transport})",
        f"  disk at the server: {scaled(plan.server_disk_bytes, 'B')} (state and average of every round)",
        f"  disk at a site: {scaled(plan.site_replies_bytes, 'B')} of replies; cache "
        f"{scaled(plan.cache_bytes_per_1000_images, 'B')} per 1,000 images and "
        f"{scaled(plan.cache_bytes_per_caption, 'B')} per distinct caption",
        f"  evaluation: {count(plan.evaluation_images, 'image')} each of {count(plan.evaluations, 'time')}",
    ]
    lines += [
        "",
        "Forecast of the cost ledger, over the whole study",
        *(f"  {x}" for x in ledger_lines(plan.forecast)),
        *(f"  {x}" for x in forecast_words(plan.forecast_summary)),
    ]
    if plan.warnings:
        lines += ["", "Warnings", *(f"  ! {advice.text}" for advice in plan.warnings)]
    return "\n".join(lines).replace(GAP, " ")


def _gpu_words(site: SitePlan) -> str:
    return f", {gpu_time(site.gpu_seconds)} at the stated utilisation" if site.gpu_seconds else ""


def _memory_words(memory: Memory | None) -> list[str]:
    if memory is None:
        return []
    b = {name: scaled(value, "B") for name, value in memory.model_dump().items()}
    return [
        f"  GPU memory at a site: {b['total']}, the driver's context and {number(100 * HEADROOM)} % headroom "
        "included:",
        f"    {b['frozen']} frozen and {b['trained']} trained weights, {b['moments']} of AdamW's averages, "
        f"{b['sums']} of sums,",
        f"    and {b['working']} for a micro-batch or {b['noise']} for the noise, whichever is more "
        "(the real step, on tensors without data)",
    ]


def _check_size(study: Study, source: str) -> None:
    size = study.data.image_size
    if size % PIXELS_A_LATENT:
        low = size // PIXELS_A_LATENT * PIXELS_A_LATENT
        raise BadInput(
            f"{source}: field `data.image_size`: {size} is not a multiple of {PIXELS_A_LATENT}, by which the "
            f"autoencoder shrinks an image; write {low} or {low + PIXELS_A_LATENT}"
        )


def local_files(study: Study, source: str, *, weights: bool = False) -> BaseFiles:
    """Find the public parts where they are on this machine; a forecast downloads and trains none.

    A large model is counted from its configuration, which is fetched where it is named by an id; its weights
    are, too, where it is to be timed.
    """
    if study.generator.large:
        return large_files(study.generator, weights=weights)
    name = study.generator.vae
    if name == "reference" or is_hub_id(name):
        return BaseFiles()
    folder = resolve(name, study.generator.vae_revision, "generator.vae")
    if not (folder / "config.json").is_file():
        raise BadInput(
            f"{source}: field `generator.vae`: {folder} holds no config.json; "
            "name a folder that diffusers saved"
        )
    return BaseFiles(vae=folder)


def _sites(study: Study, patient_flops: float) -> list[SitePlan]:
    if study.simulation is None:
        return [_site(EACH_SITE, None, study, patient_flops)]
    return [_site(name, site, study, patient_flops) for name, site in sorted(study.simulation.sites.items())]


def _site(name: str, site: SimulatedSite | None, study: Study, patient_flops: float) -> SitePlan:
    privacy = study.privacy
    out = SitePlan(name=name)
    if privacy.enabled:
        # As a site's approval does: the smaller of the study's epsilon and the site's own cap.
        target = privacy.epsilon if site is None else min(privacy.epsilon, site.epsilon_cap)
        sigma, _, history = study_noise(study, target)
        out = SitePlan(
            name=name,
            sigma=sigma,
            epsilon=claim(history, privacy.delta),
            epsilon_pld=epsilon_pld(history, privacy.delta),
            epsilon_rdp=epsilon_rdp(history, privacy.delta),
            delta=privacy.delta,
        )
    if site is None:
        return out
    expected = privacy.sampling_rate * site.declared_patients
    return out.model_copy(
        update={
            "declared_patients": site.declared_patients,
            "expected_patients": expected,
            "expected_views": expected * privacy.views,
            "flops": patient_flops * site.declared_patients,
            "gpu_seconds": study.cost.gpu_seconds(patient_flops * site.declared_patients),
            "noise_to_batch": out.sigma / expected if privacy.enabled else None,
            "gate": gate_plan(study, site.declared_patients),
        }
    )


def _privacy_words(plan: Plan) -> str:
    if not plan.private:
        return "NOT PRIVATE: no clip, no noise; a site runs it only with allow_not_private in its own policy."
    return (
        f"Privacy, {plan.unit}-level: (epsilon, delta) for adding or removing one {plan.unit} of a site,\n"
        "over the whole study; PRV accountant, checked against PLD from below and RDP from above;\n"
        f"a {plan.unit}'s gradient is clipped to {number(plan.clip)};\n"
        f"noise comes from {plan.noise}."
    )


def _site_words(site: SitePlan, plan: Plan) -> str:
    parts = []
    if site.epsilon is not None:
        parts.append(
            f"epsilon {bound(site.epsilon)} at delta {number(site.delta)} "
            f"(PLD {number(site.epsilon_pld)}, RDP {number(site.epsilon_rdp)}), sigma {number(site.sigma, 4)}"
        )
    if site.expected_patients is None:
        parts.append(f"a step draws {number(100 * plan.sampling_rate)} % of the declared {plan.unit}s")
    else:
        parts.append(
            f"a step expects {number(site.expected_patients)} of "
            f"{count(site.declared_patients or 0, plan.unit)}, "
            f"{number(site.expected_views)} views"
        )
    return f"{site.name}: {'; '.join([*parts, *gate_words(site.gate, plan.unit)])}"
