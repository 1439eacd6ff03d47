"""The `[releases]` table of a study file: what sites say once, beside their rounds."""

from __future__ import annotations

from pydantic import Field, model_validator

from polyclinic.common.section import Section


class ReleaseSettings(Section):
    """What sites say once, after the last round, beside their rounds (PRIVACY.md, rules 15 and 16).

    Each release has its own charge, and the noise of the rounds is chosen so that all of it together stays
    within `privacy.epsilon`.
    """

    fidelity_epsilon: float | None = Field(
        None,
        gt=0,
        description="privacy that DP-CMMD takes alone: one noisy sum of image features a site, one image a "
        "patient, against which the final images are compared; default: none is asked for",
    )
    fourier_features: int = Field(
        2048, ge=64, le=65536, multiple_of=2, description="D, length of that sum, its constant apart"
    )
    leakage_gate: bool = Field(
        False,
        description="each site draws from the final generator, compares with its own images, and a person "
        "there says `released` or `not released`",
    )
    copies_epsilon: float | None = Field(
        None,
        gt=0,
        description="privacy that a noisy count of patients with a near copy takes alone, sent only with "
        "`released`; default: no count leaves",
    )
    held_out: float = Field(
        0.1,
        ge=0,
        lt=0.5,
        description="leakage_gate: share of a site's patients that are not trained on, by a keyed hash of "
        "their ids, for its own membership test",
    )

    @model_validator(mode="after")
    def _count_needs_gate(self) -> ReleaseSettings:
        if self.copies_epsilon is not None and not self.leakage_gate:
            raise ValueError("copies_epsilon belongs to leakage_gate = true: set that, or remove it")
        return self

    @property
    def epsilons(self) -> dict[str, float]:
        """Name of each charged release to what it takes alone."""
        asked = {"fidelity": self.fidelity_epsilon, "copies": self.copies_epsilon}
        return {name: epsilon for name, epsilon in asked.items() if epsilon is not None}
