"""The table `cost` of a study file."""

from __future__ import annotations

from pydantic import Field, model_validator

from polyclinic.common.section import Section


class CostSettings(Section):
    """What turns seconds, joules and bytes into money and CO2: public figures; without one, none is shown."""

    target_kid: float | None = Field(
        None,
        gt=0,
        description="the report says what it took to a KID of this or less; default: twice the floor, "
        "where the floor is clearly above zero",
    )
    grid_gco2_per_kwh: float | None = Field(None, ge=0, description="grams of CO2 equivalent a kWh")
    grid_source: str = Field("", description="where that intensity stands, e.g. its publisher and year")
    currency: str = Field("EUR", min_length=1, max_length=8)
    price_gpu_hour: float | None = Field(None, ge=0, description="of one GPU held for an hour")
    price_cpu_hour: float | None = Field(None, ge=0, description="of one CPU core busy for an hour")
    price_kwh: float | None = Field(None, ge=0, description="leave out where the hours include power")
    price_gb: float | None = Field(None, ge=0, description="of 10^9 bytes moved, either way")
    site_flops_per_s: float | None = Field(
        None,
        gt=0,
        description="public guess at a site's speed, which gives nominal seconds of a real site",
    )
    gpu_flops_per_s: float | None = Field(
        None, gt=0, description="published peak of one GPU in the study's precision: gives GPU-hours of FLOPs"
    )
    gpu_utilisation: float = Field(0.4, gt=0, le=1, description="share of that peak that training reaches")
    gpu_memory_gb: float | None = Field(
        None, gt=0, description="memory of each site's GPU, 10^9 bytes; `plan` refuses what does not fit"
    )
    site_watts: float | None = Field(None, gt=0, description="public guess at a site's power while it trains")

    @model_validator(mode="after")
    def _intensity_has_a_source(self) -> CostSettings:
        if self.grid_gco2_per_kwh is not None and not self.grid_source:
            raise ValueError("grid_gco2_per_kwh needs grid_source: say where the figure stands")
        return self

    def gpu_seconds(self, flops: float) -> float | None:
        """Seconds that one GPU takes for so many operations; None where its peak is unknown."""
        if self.gpu_flops_per_s is None:
            return None
        return flops / (self.gpu_flops_per_s * self.gpu_utilisation)
