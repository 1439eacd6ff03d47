"""What this site allows: a local file that the coordinator never sees or sets (PRIVACY.md, rule 14)."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from polyclinic.common.refusals import BadInput, Refusal
from polyclinic.common.study import Study, explain


class Policy(BaseModel):
    """`policy.toml` in the site's home. Every limit is the site's own."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    declared_patients: int = Field(ge=1, description="public size of the site, typed by a person")
    epsilon_per_study: float = Field(10.0, gt=0, description="cap on one study")
    epsilon_total: float = Field(10.0, gt=0, description="cap on the sum over all studies")
    delta_total: float | None = Field(
        None, gt=0, lt=1, description="cap on the sum of deltas; default: 1 / (10 x declared_patients)"
    )
    min_patients: int = Field(20, ge=1, description="fewer patients are never approved")
    min_sigma: float = Field(0.3, ge=0, description="private studies with less noise are refused")
    max_rounds: int = Field(1000, ge=1)
    max_steps: int = Field(100_000, ge=1, description="steps of one study")
    families: tuple[str, ...] = ("msdm",)
    allowed_bases: tuple[Annotated[str, Field(pattern="^[0-9a-f]{64}$")], ...] = Field(
        (), description="hashes of the frozen bases that may be trained on; empty: any"
    )
    lora_rank: int | None = Field(
        None, ge=1, description="rank of adapters trained here, at most the study's; default: the study's"
    )
    allowed_hours: str | None = Field(
        None,
        pattern=r"^([01]\d|2[0-3]):[0-5]\d-([01]\d|2[0-3]):[0-5]\d$",
        description='a round is begun only then, local time: "22:00-06:00"; default: always',
    )
    max_gpu_memory_gb: float | None = Field(
        None, gt=0, description="GPU memory that training may take, 10^9 bytes; no effect without a GPU"
    )
    allow_not_private: bool = Field(False, description="may train without privacy")
    allow_test_randomness: bool = Field(False, description="may train with fixed randomness")

    @field_validator("allowed_hours")
    @classmethod
    def _an_interval(cls, hours: str | None) -> str | None:
        if hours and hours[:5] == hours[6:]:
            raise ValueError("names the same time twice; leave it out to allow every hour")
        return hours

    @property
    def delta_cap(self) -> float:
        """Cap on the sum of all studies' deltas: what one study may have, unless a person typed another."""
        return self.delta_total if self.delta_total is not None else 1 / (10 * self.declared_patients)


def load_policy(home: Path) -> Policy:
    """Read the site's policy.

    Raises:
        BadInput: Missing or wrong; names the file, the field and the fix.
    """
    path = home / "policy.toml"
    if not path.is_file():
        raise BadInput(f"{path}: no such file; write one with at least declared_patients = N")
    try:
        return Policy.model_validate(tomllib.loads(path.read_text(encoding="utf-8")))
    except ValidationError as error:
        raise BadInput(f"{path}: {explain(error)}") from error
    except ValueError as error:  # TOML, or the UTF-8 under it
        raise BadInput(f"{path}: not a TOML file: {error}; fix that line") from error


def check_study(policy: Policy, study: Study, base_hash: str = "") -> None:
    """Refuse a study that the policy does not allow.

    Args:
        policy: The site's own limits.
        study: What is asked.
        base_hash: Of its frozen base; checked where the policy names bases.

    Raises:
        Refusal: With the code of the first rule it breaks.
    """
    if not study.privacy.enabled and not policy.allow_not_private:
        raise Refusal("not-private-forbidden")
    if study.training.test_key is not None and not policy.allow_test_randomness:
        raise Refusal("test-randomness-forbidden")
    if study.generator.family not in policy.families:
        raise Refusal("policy-forbids", f"family {study.generator.family} is not one of families")
    if policy.allowed_bases and base_hash not in policy.allowed_bases:
        raise Refusal("policy-forbids", f"base {base_hash[:8]} is not one of allowed_bases")
    most = study.generator.lora.rank
    if study.generator.large and (policy.lora_rank or 1) > most:
        raise Refusal("policy-forbids", f"lora_rank {policy.lora_rank} is over the study's {most}; lower it")
    if study.training.rounds > policy.max_rounds or study.total_steps > policy.max_steps:
        raise Refusal("policy-forbids", f"{study.training.rounds} rounds, {study.total_steps} steps")
    if study.privacy.enabled and study.privacy.delta > 1 / (10 * policy.declared_patients):
        raise Refusal("policy-forbids", "delta is above 1 / (10 x declared patients)")


def check_noise(policy: Policy, study: Study, sigma: float) -> None:
    """Refuse a private study with less noise than the site's floor.

    Raises:
        Refusal: `noise-below-floor`.
    """
    if study.privacy.enabled and sigma < policy.min_sigma:
        raise Refusal("noise-below-floor", f"sigma {sigma}; min_sigma = {policy.min_sigma} in policy.toml")
