"""The study file: what it refuses and how it says so, what it defaults to, and what names it."""

import copy
import hashlib
import json
import math
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import pytest
from pydantic import BaseModel

from polyclinic.common.refusals import BadInput
from polyclinic.common.section import Section
from polyclinic.common.study import Resolved, Study, load_study, parse_study

STUDY = """
name = "polyps"
[reference]
concepts = ["polyp"]
[[evaluation.prompts]]
text = "Generate an image containing a polyp."
labels = {polyp = "yes"}
[simulation.sites.north]
declared_patients = 500
[simulation.sites.south]
declared_patients = 800
"""


def _values(**tables: Any) -> dict[str, Any]:
    """A valid study with some tables updated; a value that is no table replaces the field."""
    values: dict[str, Any] = {
        "name": "polyps",
        "reference": {"concepts": ["polyp"]},
        "evaluation": {"prompts": [{"text": "a polyp", "labels": {"polyp": "yes"}}]},
        "simulation": {"sites": {"north": {"declared_patients": 500}, "south": {"declared_patients": 800}}},
    }
    for name, update in tables.items():
        values[name] = {**values.get(name, {}), **update} if isinstance(update, dict) else update
    return values


def _refusal(tmp_path: Path, text: str | bytes) -> str:
    """The message with which a file is refused; it names the file and is one line."""
    path = tmp_path / "polyps.toml"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    with pytest.raises(BadInput) as caught:
        load_study(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message
    assert caught.value.exit_code == 2
    return message.removeprefix(f"{path}: ")


def test_file_is_read_and_bounds_are_where_they_should_be(tmp_path: Path) -> None:
    path = tmp_path / "polyps.toml"
    # The byte order mark is what Windows editors write.
    path.write_text(STUDY, encoding="utf-8-sig")
    study = load_study(path)
    assert study == parse_study(
        _values(
            evaluation={
                "prompts": [{"text": "Generate an image containing a polyp.", "labels": {"polyp": "yes"}}]
            }
        ),
        "x",
    )
    assert study.total_steps == study.training.rounds * study.training.steps_per_round == 200


CASES: dict[str, tuple[str | bytes, str]] = {
    "unknown field": (
        STUDY + "[privacy]\nepsilom = 8.0\n",
        "unknown field `privacy.epsilom`; remove it or correct its spelling",
    ),
    "unknown table": (STUDY + "[privat]\n", "unknown field `privat`; remove it or correct its spelling"),
    "epsilon zero": (
        STUDY + "[privacy]\nepsilon = 0.0\n",
        "field `privacy.epsilon`: input should be greater than 0, not 0.0",
    ),
    "epsilon negative": (
        STUDY + "[privacy]\nepsilon = -1\n",
        "field `privacy.epsilon`: input should be greater than 0, not -1",
    ),
    "epsilon infinite": (
        STUDY + "[privacy]\nepsilon = inf\n",
        "field `privacy.epsilon`: input should be a finite number, not inf",
    ),
    "epsilon not a number": (
        STUDY + "[privacy]\nepsilon = nan\n",
        "field `privacy.epsilon`: input should be a finite number, not nan",
    ),
    "missing field": (
        STUDY.replace("declared_patients = 500", ""),
        "field `simulation.sites.north.declared_patients` is missing; add it",
    ),
    "missing name": (STUDY.replace('name = "polyps"', ""), "field `name` is missing; add it"),
    "wrong type": (
        STUDY + '[training]\nrounds = "ten"\n',
        "field `training.rounds`: input should be a valid integer, "
        "unable to parse string as an integer, not 'ten'",
    ),
    "wrong choice": (
        STUDY + '[training]\nschedule = "linear"\n',
        "field `training.schedule`: input should be 'constant' or 'cosine', not 'linear'",
    ),
    "bad decay": (
        STUDY + "[training]\nbetas = [0.9, 1.0]\n",
        "field `training.betas.1`: input should be less than 1, not 1.0",
    ),
    "odd widths": (
        STUDY + "[generator.vae_training]\nwidths = [16, 32, 64, 100]\n",
        "field `generator.vae_training.widths.3`: input should be a multiple of 16, not 100",
    ),
    "delta too large": (
        STUDY + "[privacy]\ndelta = 0.0005\n",
        "privacy.delta must be at most 1/(10 x 500) for site north: write 2.0e-04 or less",
    ),
    "weights mismatch": (
        STUDY + "[federation.weights]\nnorth = 1.0\neast = 1.0\n",
        "federation.weights must name exactly the sites of the simulation",
    ),
    "weight zero": (
        STUDY + "[federation.weights]\nnorth = 1.0\nsouth = 0.0\n",
        "field `federation`: weights.south = 0 must be above 0",
    ),
    "test key with privacy on": (
        STUDY + '[training]\ntest_key = "k"\n',
        "training.test_key fixes the randomness: allowed only with privacy.enabled = false",
    ),
    "quorum below minimum": (
        STUDY + "[federation]\nquorum = 1\n",
        "federation.quorum must be at least federation.min_sites",
    ),
    "minimum above sites": (
        STUDY + "[federation]\nmin_sites = 3\n",
        "federation.min_sites is larger than the 2 sites of the simulation",
    ),
    "reference shares": (
        STUDY.replace("[reference]", "[reference]\npretrain = 0.5"),
        "field `reference`: pretrain + probe + evaluate must add up to 1",
    ),
    "unknown concept": (
        STUDY.replace('concepts = ["polyp"]', ""),
        "evaluation.prompts use labels not in reference.concepts: ['polyp']",
    ),
    "Dirichlet without label": (
        STUDY + '[simulation]\nsplit = "dirichlet"\n',
        "simulation.dirichlet_label is needed for a Dirichlet split",
    ),
    "attention without warm start": (
        STUDY + '[generator]\ntrain = "attention"\n',
        'generator.train = "attention" needs a generator.warm_start',
    ),
    "several mistakes": (STUDY + "[privacy]\nepsilon = 0.0\nclip = 0.0\n", "not 0.0 (and 1 more)"),
    "bad TOML": (STUDY + "[privacy\n", "not a TOML file"),
    "not UTF-8": (STUDY.encode() + b"# caf\xe9\n", "not UTF-8 text"),
}


@pytest.mark.parametrize("case", CASES)
def test_a_mistake_is_one_sentence_with_file_field_and_fix(case: str, tmp_path: Path) -> None:
    text, sentence = CASES[case]
    assert sentence in _refusal(tmp_path, text)


def test_missing_file_names_what_to_give(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"nowhere\.toml: no such study file; give the path of a TOML file"):
        load_study(tmp_path / "nowhere.toml")
    with pytest.raises(BadInput, match=r"^nowhere: no such study file"):
        load_study("nowhere")


def test_delta_may_stand_at_its_limit_and_test_key_without_privacy() -> None:
    assert parse_study(_values(privacy={"delta": 1 / 8000}), "x").privacy.delta == 1 / 8000
    with pytest.raises(BadInput, match=r"1/\(10 x 800\) for site south"):
        parse_study(_values(privacy={"delta": 1 / 7999}), "x")
    off = _values(privacy={"enabled": False, "delta": 0.5}, training={"test_key": "k"})
    assert parse_study(off, "x").training.test_key == "k"


def test_defaults_are_the_released_training() -> None:
    study = parse_study(_values(), "x")
    generator, training, evaluation = study.generator, study.training, study.evaluation
    assert (generator.family, generator.size, generator.max_tokens) == ("msdm", "msdm", 64)
    assert (generator.prediction, generator.loss, generator.snr_gamma) == ("epsilon", "l1", None)
    assert (generator.prompt_dropout, generator.train) == (0.2, "all")
    assert generator.vae_training.widths == (64, 128, 256, 512)
    assert generator.vae_training.latent_channels == 8
    assert (training.learning_rate, training.betas, training.weight_decay) == (1e-4, (0.9, 0.999), 0.0)
    assert (training.schedule, training.max_grad_norm, study.federation.ema) == ("constant", 1.0, 0.0)
    assert (evaluation.steps, evaluation.eta, evaluation.guidance) == (150, 1.0, 4.5)


def test_a_study_cannot_be_changed_after_loading() -> None:
    study = parse_study(_values(), "x")
    with pytest.raises(ValueError, match="frozen"):
        study.privacy.epsilon = 100.0  # type: ignore[misc]


# ---------------------------------------------------------------- the hash


def _resolved(study: Study, **hashes: str) -> Resolved:
    return Resolved(
        **({"base_hash": "a" * 64, "start_hash": "b" * 64, "reference_hash": "c" * 64} | hashes), study=study
    )


def _leaves(obj: Any, path: tuple[str | int, ...] = ()) -> list[tuple[str | int, ...]]:
    """Paths of every value of a JSON object."""
    if isinstance(obj, dict) and obj:
        return [leaf for key, value in obj.items() for leaf in _leaves(value, (*path, key))]
    if isinstance(obj, list) and obj:
        return [leaf for place, value in enumerate(obj) for leaf in _leaves(value, (*path, place))]
    return [path]


def _other(value: Any) -> Any:
    """Another value of the same kind."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value + 1
    if isinstance(value, str):
        return value + "x"
    return "other" if value is None else ["other"]


def test_hash_is_that_of_the_content_not_of_the_writing(tmp_path: Path) -> None:
    first = tmp_path / "a.toml"
    first.write_text(STUDY)
    second = tmp_path / "b.toml"
    second.write_text("# a comment\n" + STUDY + "[privacy]\nepsilon = 8\n\n[data]\nimage_size = 64\n")
    one, two = _resolved(load_study(first)), _resolved(load_study(second))
    assert one.hash == two.hash
    assert len(one.hash) == 64
    assert one.run_name == f"polyps-{one.hash[:8]}"


def test_hash_survives_a_round_trip_and_is_pinned_to_the_bytes() -> None:
    resolved = _resolved(parse_study(_values(), "x"))
    assert Resolved.model_validate_json(resolved.model_dump_json()).hash == resolved.hash
    # Computed apart: sorted keys, no spaces, ASCII.

    text = json.dumps(json.loads(resolved.model_dump_json()), sort_keys=True, separators=(",", ":"))
    assert hashlib.sha256(text.encode("ascii")).hexdigest() == resolved.hash


@pytest.mark.filterwarnings("ignore:Pydantic serializer warnings")
def test_every_single_value_moves_the_hash() -> None:
    resolved = _resolved(parse_study(_values(), "x"))
    whole = resolved.model_dump(mode="json")
    seen = {resolved.hash}
    leaves = _leaves(whole)
    assert len(leaves) > 80
    for path in leaves:
        changed = copy.deepcopy(whole)
        place: Any = changed
        for key in path[:-1]:
            place = place[key]
        place[path[-1]] = _other(place[path[-1]])
        # Not validated: the hash must not depend on a value being allowed.
        hashed = _rebuilt(Resolved, changed).hash
        assert hashed not in seen, path
        seen.add(hashed)


def _rebuilt(kind: type[BaseModel], values: dict[str, Any]) -> Any:
    """Build a model and the models in it without validation."""
    hints = get_type_hints(kind)
    parts = {}
    for name, value in values.items():
        inner = next((t for t in (hints[name], *get_args(hints[name])) if isinstance(t, type)), object)
        nested = issubclass(inner, BaseModel) and isinstance(value, dict)
        parts[name] = _rebuilt(inner, value) if nested else value
    return kind.model_construct(**parts)


# ---------------------------------------------------------------- learning rate


def test_constant_rate_is_constant() -> None:
    study = parse_study(_values(training={"learning_rate": 3e-4}), "x")
    assert {study.learning_rate(step) for step in range(study.total_steps)} == {3e-4}


def test_cosine_rate_falls_from_its_peak_to_almost_nothing_across_rounds() -> None:
    training = {"learning_rate": 2e-3, "schedule": "cosine", "rounds": 5, "steps_per_round": 8}
    study = parse_study(_values(training=training), "x")
    rates = [study.learning_rate(step) for step in range(study.total_steps)]
    assert rates[0] == 2e-3
    assert rates[20] == pytest.approx(1e-3)
    assert rates[10] == pytest.approx(2e-3 * math.cos(math.pi / 8) ** 2)
    assert all(later < earlier for earlier, later in pairwise(rates))
    assert 0 < rates[-1] < 1e-5


def test_private_steps_have_a_rate_of_their_own_only_while_private() -> None:
    values = _values(training={"learning_rate": 1e-4}, privacy={"learning_rate": 1e-3})
    assert parse_study(values, "x").learning_rate(0) == 1e-3
    values["privacy"]["enabled"] = False
    assert parse_study(values, "x").learning_rate(0) == 1e-4


# ---------------------------------------------------------------- documentation


def _sections(kind: type[Section] = Section) -> list[type[Section]]:
    """Of the study file: which other modules a worker has imported must not matter."""
    found = [s for child in kind.__subclasses__() for s in (child, *_sections(child))]
    return [s for s in found if s.__module__.endswith(("settings", "common.study"))]


@pytest.mark.parametrize("section", _sections(), ids=lambda s: s.__name__)
def test_every_field_says_what_it_is(section: type[Section]) -> None:
    """By a description, by bounds or choices that explain it, or by a documented table of its own."""
    assert section.__doc__
    hints = get_type_hints(section)
    for name, field in section.model_fields.items():
        kinds = (hints[name], *get_args(hints[name]))
        choices = get_origin(hints[name]) is Literal
        nested = any(isinstance(kind, type) and issubclass(kind, Section) for kind in kinds)
        listed = f"\n    {name}: " in section.__doc__ or f"\n        {name}: " in section.__doc__
        assert field.description or field.metadata or choices or nested or listed or name == "code_version", (
            name
        )
