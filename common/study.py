"""The study file: one TOML file that says what is trained, how privately, and how it is judged.

Every field has a unit and a default here; unknown fields are refused; a mistake is reported with
file, field and fix. A *resolved* study adds the hashes of everything public it stands on, and its
own hash names the run.
"""

from __future__ import annotations

import hashlib
import json
import math
import tomllib
from importlib import resources
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError, model_validator

from polyclinic.common.cost_settings import CostSettings
from polyclinic.common.evaluation_settings import EvaluationSettings
from polyclinic.common.files import canonical_json
from polyclinic.common.generator_settings import GeneratorSettings
from polyclinic.common.refusals import BadInput
from polyclinic.common.release_settings import ReleaseSettings
from polyclinic.common.section import Section
from polyclinic.common.settings import (
    DataSettings,
    FederationSettings,
    PrivacySettings,
    ReferenceSettings,
    SimulationSettings,
    TrainingSettings,
)

CODE_VERSION = "0.1.0"


class Study(Section):
    """A whole study."""

    name: str = Field(pattern=r"^[a-z][a-z0-9-]{0,39}$")
    title: str = Field("", description="what the report is headed with")
    departures: tuple[str, ...] = Field((), description="where and why it departs from the released MSDM")
    notice: str = Field("", description="a sentence that every page about the study opens with")
    data: DataSettings = DataSettings()
    generator: GeneratorSettings = GeneratorSettings()
    privacy: PrivacySettings = PrivacySettings()
    training: TrainingSettings = TrainingSettings()
    federation: FederationSettings = FederationSettings()
    reference: ReferenceSettings = ReferenceSettings()
    evaluation: EvaluationSettings
    cost: CostSettings = CostSettings()
    releases: ReleaseSettings = ReleaseSettings()
    simulation: SimulationSettings | None = None

    @model_validator(mode="after")
    def _coherent(self) -> Study:
        if self.training.test_key is not None and self.privacy.enabled:
            raise ValueError(
                "training.test_key fixes the randomness: allowed only with privacy.enabled = false"
            )
        if self.generator.train != "all" and self.generator.warm_start == "none":
            raise ValueError(
                f'generator.train = "{self.generator.train}" needs a generator.warm_start: '
                "what is frozen would stay untrained"
            )
        if self.generator.large and self.privacy.enabled:
            lowered = self.generator.precision == "bf16"
            if lowered and self.privacy.engine not in ("bookkeeping", "loop"):
                raise ValueError(
                    f'privacy.engine = "{self.privacy.engine}" has no proven error bound in bf16: write '
                    '"bookkeeping", or generator.precision = "fp32"'
                )
        if self.federation.quorum and self.federation.quorum < self.federation.min_sites:
            raise ValueError("federation.quorum must be at least federation.min_sites")
        if self.simulation:
            names = set(self.simulation.sites)
            if self.federation.min_sites > len(names):
                raise ValueError(
                    f"federation.min_sites is larger than the {len(names)} sites of the simulation"
                )
            if isinstance(self.federation.weights, dict) and set(self.federation.weights) != names:
                raise ValueError("federation.weights must name exactly the sites of the simulation")
            for name, site in self.simulation.sites.items():
                try:
                    site.data(self.data)
                except ValidationError as error:
                    raise ValueError(f"site {name}: {explain(error)}") from error
                if self.privacy.enabled and self.privacy.delta > 1 / (10 * site.declared_patients):
                    raise ValueError(
                        f"privacy.delta must be at most 1/(10 x {site.declared_patients}) for site {name}: "
                        f"write {1 / (10 * site.declared_patients):.1e} or less"
                    )
            if self.simulation.split == "pooled" and len(names) != 1:
                raise ValueError('simulation.split = "pooled" needs exactly one site')
            if self.simulation.split == "dirichlet" and not self.simulation.dirichlet_label:
                raise ValueError("simulation.dirichlet_label is needed for a Dirichlet split")
        asked = {name for prompt in self.evaluation.prompts for name in prompt.labels}
        if asked - set(self.reference.concepts):
            raise ValueError(f"evaluation.prompts use labels not in reference.concepts: {sorted(asked)}")
        return self

    @property
    def total_steps(self) -> int:
        """Steps a site takes over the whole study."""
        return self.training.rounds * self.training.steps_per_round

    def learning_rate(self, step: int) -> float:
        """Learning rate at a global step in [0, total_steps)."""
        peak = self.training.learning_rate
        if self.privacy.enabled and self.privacy.learning_rate is not None:
            peak = self.privacy.learning_rate
        if self.training.schedule == "constant":
            return peak
        return peak * 0.5 * (1 + math.cos(math.pi * step / self.total_steps))


class NearScale(Section):
    """What a site's leakage gate calls a near copy, and how often it is wrong.

    Attributes:
        features: A smaller feature distance is a near copy.
        pixels: A smaller distance of aligned pixels is a near copy.
        chance: That an image which nobody trained on is found near by one of these distances.
        patients: Public patients on whom that was calibrated.
        more: Images a site searches, in units of those searched for that, where more; `chance` includes it.
    """

    features: float = Field(gt=0, allow_inf_nan=False)
    pixels: float = Field(gt=0, allow_inf_nan=False)
    chance: float = Field(gt=0, le=1)
    patients: int = Field(gt=0)
    more: float = Field(ge=1, allow_inf_nan=False)

    @property
    def alpha(self) -> float:
        """Chance that an image which nobody trained on is found near, by either distance."""
        return min(1.0, 2 * self.chance)


class PublicScale(Section):
    """What the sites' extra releases measure with; computed from the public reference and from nothing else.

    Attributes:
        extractor: SHA-256 of the frozen image feature extractor.
        bandwidth: Of DP-CMMD's Gaussian kernel: median distance between features of different patients.
        near: Of the leakage gate; None where the study asks for none.
    """

    extractor: str
    bandwidth: float
    near: NearScale | None = None


class Resolved(Section):
    """A study with the hashes of everything public it stands on. Its own hash names the run.

    Attributes:
        base_hash: Hash of VAE and text encoder (weights and configuration).
        start_hash: Hash of the trainable state of round 0.
        reference_hash: Hash of the coordinator's reference table.
        public: Scales of the extra releases; None where the study asks for none.
    """

    study: Study
    code_version: str = CODE_VERSION
    base_hash: str
    start_hash: str
    reference_hash: str
    public: PublicScale | None = None

    @property
    def hash(self) -> str:
        """SHA-256 of the canonical JSON, hexadecimal."""
        return hashlib.sha256(canonical_json(self.model_dump(mode="json"))).hexdigest()

    @property
    def run_name(self) -> str:
        """Folder name of the run under `runs/`."""
        return f"{self.study.name}-{self.hash[:8]}"


def differences(old: Resolved, new: Resolved) -> list[str]:
    """Name every field in which two resolved studies differ, with both values."""
    before, after = _fields(old.model_dump(mode="json")), _fields(new.model_dump(mode="json"))
    return [
        f"{name.removeprefix('study.')}: {before.get(name, 'absent')} -> {after.get(name, 'absent')}"
        for name in sorted(before.keys() | after.keys())
        if before.get(name) != after.get(name)
    ]


def _fields(value: object, name: str = "") -> dict[str, str]:
    if isinstance(value, dict):
        return {k: v for key, part in value.items() for k, v in _fields(part, f"{name}.{key}").items()}
    return {name.removeprefix("."): json.dumps(value)}


def load_study(source: str | Path) -> Study:
    """Read a study from a TOML file, or from the package's own studies by name.

    Raises:
        BadInput: The file is missing, is not TOML, or a field is wrong; names file, field and fix.
    """
    return parse_study(*read_values(source))


def read_values(source: str | Path) -> tuple[dict[str, Any], str]:
    """Read a study's values as they stand in its file, and the name to call it by.

    Raises:
        BadInput: The file is missing or is not TOML.
    """
    path = Path(source)
    if path.is_file():
        try:
            text, name = path.read_text(encoding="utf-8-sig"), str(path)
        except UnicodeDecodeError as error:
            raise BadInput(f"{path}: not UTF-8 text ({error.reason}); save the file as UTF-8") from error
    else:
        # Package data of another room, if that room is installed: read as a file, never imported.
        rooms = Path(str(resources.files("polyclinic.common"))).parent
        packaged = rooms / "simulation" / "studies" / f"{source}.toml"
        if path.suffix or not packaged.is_file():
            raise BadInput(
                f"{source}: no such study file; give the path of a TOML file, or a packaged study's name"
            )
        text, name = packaged.read_text(encoding="utf-8"), f"{source} (packaged)"
    try:
        values = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise BadInput(f"{name}: not a TOML file: {error}; fix that line") from error
    return values, name


def parse_study(values: dict[str, Any], name: str) -> Study:
    """Validate a study's values.

    Raises:
        BadInput: A sentence for the first mistake, with file, field and fix.
    """
    try:
        return Study.model_validate(values)
    except ValidationError as error:
        raise BadInput(f"{name}: {explain(error)}") from error


def explain(error: ValidationError) -> str:
    """Turn pydantic's first error into one sentence that names the field and the fix."""
    first = error.errors()[0]
    field = ".".join(str(part) for part in first["loc"])
    more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    if first["type"] == "extra_forbidden":
        return f"unknown field `{field}`; remove it or correct its spelling{more}"
    if first["type"] == "missing":
        return f"field `{field}` is missing; add it{more}"
    message = first["msg"].removeprefix("Value error, ")
    given = "" if isinstance(first["input"], dict) else f", not {first['input']!r}"
    if not field:
        return f"{message}{more}"  # a rule between fields: its message names them
    return f"field `{field}`: {message[0].lower()}{message[1:]}{given}{more}"
