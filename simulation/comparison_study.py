"""A comparison of systems as a file: a study without a generator, and a `[compare]` table of generators.

Everything outside that table is every system's alike: data, sites, privacy, rounds and evaluation. Each arm
that comes of it is an ordinary study.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, StringConstraints, ValidationError, model_validator

from polyclinic.common.progress import track
from polyclinic.common.refusals import BadInput
from polyclinic.common.section import Section
from polyclinic.common.study import Study, explain, parse_study
from polyclinic.server.plan import local_files, plan
from polyclinic.server.plan_memory import training_memory
from polyclinic.simulation.random_checkpoints import MAKERS, RANDOM_WEIGHTS, STAND_INS, prior_of, save

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
        memory: Private or not, to the bytes that training takes on a GPU, as `plan` forecasts them.
        at_images: Its private study at as many images seen as every other.
        at_hours: The same with its steps scaled to as many operations as every other; the same study where
            that changes nothing.
    """

    name: str
    flops: int
    memory: dict[bool, int]
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
    first = next(iter(studies.values()))
    if first.cost.gpu_flops_per_s is None:
        raise BadInput(
            f"{source}: field `cost.gpu_flops_per_s` is missing: GPU-hours need a GPU's peak; add it"
        )
    if first.simulation is None:
        raise BadInput(f"{source}: has no [simulation] table to compare on; add one")
    files, plans = {}, {}
    for name, study in studies.items():
        with _naming(source, name):
            files[name] = local_files(study, source, weights=True)
    with track("plan every system at both budgets", 2 * len(studies)) as advance:
        for name, study in studies.items():
            with _naming(source, name):
                plans[name] = plan(study, source, memory=True)
            advance()
        flops = {name: planned.view_flops for name, planned in plans.items()}
        most = flops[settings.hours_of] if settings.hours_of else max(flops.values())
        systems = []
        for name, study in studies.items():
            more = at_equal_hours(study, most / flops[name])
            if more is not study:
                with _naming(source, name):
                    plan(more, source)  # its noise must be found, too
            private = plans[name].memory
            assert private is not None
            alone = study.model_copy(update={"privacy": study.privacy.model_copy(update={"enabled": False})})
            memory = {True: private.total, False: training_memory(alone, files[name]).total}
            systems.append(System(name, flops[name], memory, study, more))
            advance()
    return systems


@contextmanager
def _naming(source: str, name: str) -> Iterator[None]:
    """Name the system in what is said to be wrong with it."""
    try:
        yield
    except BadInput as error:
        words = str(error).removeprefix(f"{source}: ")
        raise BadInput(f"{source}: compare.systems.{name}: {words}") from error


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
        if family == "kandinsky-2-2":
            values["generator"]["prior"] = str(prior_of(folder))
    for table, field, value in (
        ("training", "learning_rate", system.learning_rate),
        ("privacy", "learning_rate", system.private_learning_rate),
        ("privacy", "clip", system.clip),
    ):
        if value is not None:
            values[table] = {**values.get(table, {}), field: value}
    values["privacy"] = {**values.get("privacy", {}), "enabled": True}
    if isinstance(whole := shared.get("name"), str):
        values["name"] = f"{whole[:8]}-{name}{IMAGES}"
        values["title"] = f"{shared.get('title') or whole}: {name}{AT_IMAGES}"
    return parse_study(values, label)
