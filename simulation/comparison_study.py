"""A comparison of systems as a file: a study without a generator, and a `[compare]` table of generators.

Everything outside that table is every system's alike: data, sites, privacy, rounds and evaluation. Each arm
that comes of it is an ordinary study.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, StringConstraints, ValidationError, model_validator

from polyclinic.common.cost import view_flops
from polyclinic.common.generators.base import load_family
from polyclinic.common.refusals import BadInput
from polyclinic.common.section import Section
from polyclinic.common.study import Study, explain, parse_study
from polyclinic.server.plan import local_files
from polyclinic.simulation.random_checkpoints import MAKERS, RANDOM_WEIGHTS, STAND_INS, save

NOTICE = (
    "Generators here stand on small checkpoints with random weights. These numbers describe plumbing, not "
    "quality: they say that everything runs, and nothing about how good any of these models is."
)
Name = Annotated[str, StringConstraints(pattern=r"^[a-z][a-z0-9-]{0,13}$")]
IMAGES, AT_IMAGES, AT_HOURS = "-images", " at equal images", " at equal GPU-hours"
NEAR = 0.05  # a number of steps so close to the wanted one is as good


class SystemSettings(Section):
    """One system: its generator, and what of the training goes with a generator."""

    generator: dict[str, Any] = Field(description="a study's `generator` table")
    learning_rate: float | None = Field(None, gt=0, description="default: training.learning_rate")
    private_learning_rate: float | None = Field(None, gt=0, description="default: privacy.learning_rate")
    clip: float | None = Field(None, gt=0, description="default: privacy.clip")


class CompareSettings(Section):
    """The `compare` table."""

    systems: dict[Name, SystemSettings] = Field(min_length=2, description="name to system")
    hours_of: str | None = Field(
        None, description="system whose GPU-hours at equal images all others get; default: the costliest's"
    )

    @model_validator(mode="after")
    def _hours_of_a_system(self) -> CompareSettings:
        if self.hours_of is not None and self.hours_of not in self.systems:
            raise ValueError(f'hours_of = "{self.hours_of}" is none of the systems')
        return self


@dataclass(frozen=True)
class System:
    """One system of a comparison, at both budgets.

    Attributes:
        name: Short name.
        flops: Operations of one view, forward and backward, as `plan` counts them.
        at_images: Its private study at as many images seen as every other.
        at_hours: The same with its steps scaled to as many operations as every other; the same study where
            that changes nothing.
    """

    name: str
    flops: int
    at_images: Study
    at_hours: Study

    @property
    def budgets(self) -> list[tuple[tuple[str, ...], Study]]:
        """Its studies with the budgets they stand for: one for both, where that is the same study."""
        if self.at_hours is self.at_images:
            return [(("images", "hours"), self.at_images)]
        return [(("images",), self.at_images), (("hours",), self.at_hours)]


def systems_of(values: dict[str, Any], source: str, home: Path) -> list[System]:
    """Check a comparison whole before anything runs: every base is found or made, every network counted.

    Args:
        values: The file's values; `compare` is one of them.
        source: Its name, for error messages.
        home: Random-weight checkpoints are made under its `bases`.

    Raises:
        BadInput: A table, base, size, target or rank is not right; names it and the fix.
    """
    shared = {name: value for name, value in values.items() if name != "compare"}
    if "generator" in shared:
        raise BadInput(
            f"{source}: remove the table [generator]: in a comparison each system has one of its own, "
            "[compare.systems.NAME.generator]"
        )
    try:
        settings = CompareSettings.model_validate(values["compare"])
    except ValidationError as error:
        raise BadInput(f"{source}: compare: {explain(error)}") from error
    if any(system.generator.get("base") == RANDOM_WEIGHTS for system in settings.systems.values()):
        shared = {**shared, "notice": NOTICE}
    studies = {name: _study(shared, name, system, source, home) for name, system in settings.systems.items()}
    if next(iter(studies.values())).cost.gpu_flops_per_s is None:
        raise BadInput(
            f"{source}: field `cost.gpu_flops_per_s` is missing: GPU-hours need a GPU's peak; add it"
        )
    flops = {}
    for name, study in studies.items():
        if study.simulation is None:
            raise BadInput(f"{source}: has no [simulation] table to compare on; add one")
        try:
            files = local_files(study, source, weights=True)
            flops[name] = view_flops(load_family(study, files, device="meta", encoders=False))
        except BadInput as error:
            raise BadInput(f"{source}: compare.systems.{name}: {error}") from error
    most = flops[settings.hours_of] if settings.hours_of else max(flops.values())
    return [System(n, flops[n], s, at_equal_hours(s, most / flops[n])) for n, s in studies.items()]


def at_equal_hours(study: Study, ratio: float) -> Study:
    """Scale a study's steps by a ratio, as near as whole rounds of whole steps come."""
    rounds, steps = scaled(study.training.rounds, study.training.steps_per_round, ratio)
    if (rounds, steps) == (study.training.rounds, study.training.steps_per_round):
        return study
    values = study.model_dump(mode="json")
    values["name"] = study.name.removesuffix(IMAGES) + "-hours"
    values["title"] = f"{study.title.removesuffix(AT_IMAGES)}{AT_HOURS}"
    values["training"] |= {"rounds": rounds, "steps_per_round": steps}
    return parse_study(values, study.name)


def scaled(rounds: int, steps: int, ratio: float) -> tuple[int, int]:
    """Find rounds and steps a round whose product is nearest to `ratio` times the given ones'.

    Where several come within 5 %, the one with the nearest number of rounds, since those move bytes.
    """
    wanted = max(1.0, rounds * steps * ratio)
    found = [(r, max(1, round(wanted / r))) for r in range(1, 4 * rounds + 1)]

    def badness(pair: tuple[int, int]) -> tuple[float, int]:
        error = abs(pair[0] * pair[1] / wanted - 1)
        return (0.0 if error <= NEAR else error, abs(pair[0] - rounds))

    return min(found, key=badness)


def _study(shared: dict[str, Any], name: str, system: SystemSettings, source: str, home: Path) -> Study:
    values = {**shared, "generator": dict(system.generator)}
    label = f"{source}: compare.systems.{name}"
    family = values["generator"].get("family", "msdm")
    if values["generator"].get("base") == RANDOM_WEIGHTS:
        if family not in MAKERS:
            raise BadInput(
                f'{label}: generator.base = "{RANDOM_WEIGHTS}" is made for {", ".join(sorted(MAKERS))}, '
                f'not for family = "{family}"; name one of them'
            )
        folder = save(family, home.resolve() / "bases", **STAND_INS.get(family, {}))
        values["generator"]["base"] = str(folder)
    for table, field, value in (
        ("training", "learning_rate", system.learning_rate),
        ("privacy", "learning_rate", system.private_learning_rate),
        ("privacy", "clip", system.clip),
    ):
        if value is not None:
            values[table] = {**values.get(table, {}), field: value}
    values["name"] = f"{str(shared.get('name', ''))[:8]}-{name}{IMAGES}"
    values["title"] = f"{shared.get('title') or shared.get('name')}: {name}{AT_IMAGES}"
    return parse_study(values, label)
