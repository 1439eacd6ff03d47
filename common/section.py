"""What every table of a study file is."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """A table of the study file: unknown fields are refused, values never change after loading."""

    # Infinity and NaN are floats to TOML, but no setting means anything with them.
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
