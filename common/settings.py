"""The tables of a study file: every field with its unit and default; `study.py` puts them together."""

from __future__ import annotations

import json
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from polyclinic.common.data.units import check_source
from polyclinic.common.section import Section


class PhantomSettings(Section):
    """How many procedural phantoms are drawn when `data.source = "phantoms"`."""

    patients_per_site: int = Field(400, ge=2, description="patients drawn for each of the three sites")
    seed: int = Field(1, ge=0, description="seed of the drawings; phantoms are public")


class DataSettings(Section):
    """Where the images come from and how they are made the same size."""

    source: Literal[
        "folder", "phantoms", "dicom", "medvqa-gi-2024", "kvasir-vqa", "rocov2", "nih-chest-xray14"
    ] = Field("folder", description="form of the data folder (docs/data.md), or drawings")
    table: str = Field(
        "images.csv",
        pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]*$",
        description="folder: CSV, TSV or JSON Lines with image, caption, patient[, site, labels]; "
        "dicom: CSV with SOPInstanceUID, caption",
    )
    caption: str = Field(
        "", description="dicom: a caption made of tags, such as {Modality} of the {BodyPartExamined}"
    )
    unit: Literal["patient", "image"] = Field(
        "patient", description="privacy unit; `image` only where the data has no patient ids"
    )
    image_size: int = Field(64, ge=16, le=2048, description="pixels a side after preprocessing")
    fit: Literal["crop", "pad"] = Field(
        "crop", description="centre crop to a square, or pad to one with black"
    )
    phantoms: PhantomSettings = PhantomSettings()

    @model_validator(mode="after")
    def _suits_the_source(self) -> DataSettings:
        check_source(self.source, self.unit, self.caption)
        return self


Decay = Annotated[float, Field(ge=0, lt=1)]


class PrivacySettings(Section):
    """Patient-level differential privacy of each site, whatever the others do."""

    enabled: bool = Field(
        True, description="false stamps NOT PRIVATE on everything and needs the site's leave"
    )
    epsilon: float = Field(8.0, gt=0, description="budget of the whole study at each site")
    delta: float = Field(1e-5, gt=0, lt=1, description="at most 1 / (10 x declared patients)")
    clip: float = Field(1.0, gt=0, description="bound C on a patient's gradient norm")
    sampling_rate: float = Field(0.1, gt=0, le=1, description="chance q of a patient to be in a step")
    views: int = Field(4, ge=1, le=64, description="draws K of (image, caption, noise, timestep) a patient")
    learning_rate: float | None = Field(
        None, gt=0, description="AdamW's peak rate in private steps; default: training.learning_rate"
    )
    engine: Literal["bookkeeping", "vmap", "loop", "hooks", "ghost"] = Field(
        "bookkeeping",
        description="how per-patient gradients are clipped; all but the first are there to compare with",
    )
    micro_batch: int = Field(8, ge=1, description="patients whose gradients are held at once")
    noise: Literal["aes-ctr", "device"] = Field(
        "aes-ctr",
        description="where noise comes from: a cryptographic keystream, or a GPU's own generator, which is "
        "faster and not cryptographic (a CPU always takes the keystream)",
    )
    canaries: int = Field(
        2000,
        ge=0,
        le=100_000,
        description="coordinates of the audit tap, by which the coordinator checks noise, scale and clip "
        "threshold; 0: no tap",
    )

    @field_validator("canaries")
    @classmethod
    def _enough_canaries(cls, canaries: int) -> int:
        if 0 < canaries < 100:
            raise ValueError("must be 0 (no audit tap) or at least 100")
        return canaries

    @property
    def noise_words(self) -> str:
        """Where the noise comes from, for an approval, a plan and a report."""
        if not self.enabled:
            return "no noise"
        if self.noise == "device":
            return "a GPU's generator, keyed anew by the operating system every step: NOT cryptographic"
        return "an AES-256-CTR keystream under a fresh key from the operating system: cryptographic"


class TrainingSettings(Section):
    """How long and how fast. A site is stateless between rounds."""

    rounds: int = Field(10, ge=1)
    steps_per_round: int = Field(20, ge=1, description="DP-SGD steps a site takes in a round")
    learning_rate: float = Field(1e-4, gt=0, description="AdamW; a function of the global step")
    schedule: Literal["constant", "cosine"] = "constant"
    betas: tuple[Decay, Decay] = Field((0.9, 0.999), description="decays a step of AdamW's two averages")
    weight_decay: float = Field(0.0, ge=0)
    fedprox: float = Field(
        0.0, ge=0, description="FedProx's mu: pulls a site back to the state it was sent; 0: not at all"
    )
    max_grad_norm: float = Field(1.0, gt=0, description="gradient clipping of non-private steps")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto: a GPU where there is one")
    threads: int = Field(0, ge=0, description="CPU threads a client; 0: all cores")
    test_key: str | None = Field(
        None, description="fixed randomness for tests; only with privacy off and the site's leave"
    )


# How sites' adapters are trained and combined; common/adapters.py has the sources.
LoraRule = Literal["freeze-a", "factors", "stack", "alternate"]

# How tensors are written for the way: bf16 halves fp32, int8 quarters it on the way up.
Transport = Literal["bf16", "fp32", "int8"]


class FederationSettings(Section):
    """How sites' replies become one generator."""

    min_sites: int = Field(2, ge=1, description="fewer replies are never released")
    quorum: int = Field(0, ge=0, description="replies after which the grace period starts; 0: all sites")
    deadline_s: float = Field(86400.0, gt=0, description="seconds until a round ends without the absent")
    grace_s: float = Field(60.0, ge=0, description="seconds the others get once the quorum has answered")
    weights: dict[str, float] | Literal["equal"] = Field("equal", description="public weights by site name")
    server_optimizer: Literal["mean", "fedavgm", "fedadam"] = Field(
        "mean", description="what becomes of the combined difference; the others remember earlier rounds"
    )
    server_learning_rate: float = Field(
        1.0, gt=0, description="factor on the server's step; about 0.001 to 0.1 for fedadam"
    )
    server_betas: tuple[Decay, Decay] = Field(
        (0.9, 0.99), description="decays a round: fedavgm's momentum is the first; fedadam has both"
    )
    server_tau: float = Field(1e-3, gt=0, description="fedadam: added to the root of the second moment")
    ema: float = Field(0.0, ge=0, lt=1, description="decay a round of the averaged weights that are judged")
    transport: Transport = Field(
        "bf16",
        description="how weights travel: bf16, fp32, or int8, which sends differences as 8-bit steps with a "
        "scale a row and adds what rounding lost to the site's next difference (states go down as bf16)",
    )
    aggregation: Literal["mean", "clipped-mean", "trimmed-mean", "median"] = Field(
        "mean", description="how differences are combined; the others bound what one bad site can do"
    )
    clip_norm: float | None = Field(
        None, gt=0, description="clipped-mean: longest difference; default: the median length of the round"
    )
    trim: float = Field(
        0.2, gt=0, lt=0.5, description="trimmed-mean: share of the sites cut off at both ends, by coordinate"
    )

    lora_aggregation: LoraRule = Field(
        "freeze-a",
        description="of adapters B A: freeze-a trains B alone, whose mean is exact, with half the noise and "
        "bytes; factors averages A and B apart, for comparison; stack averages the products exactly and cuts "
        "them back to the rank; alternate trains B in odd rounds and A in even ones",
    )

    @model_validator(mode="after")
    def _stacking_changes_the_basis(self) -> FederationSettings:
        if self.lora_aggregation == "stack":
            for name, plain in (("aggregation", "mean"), ("server_optimizer", "mean"), ("ema", 0.0)):
                if getattr(self, name) != plain:
                    raise ValueError(
                        f'{name} works coordinate by coordinate, and lora_aggregation = "stack" gives the '
                        f"adapters new coordinates every round: set {name} = {json.dumps(plain)}"
                    )
        return self

    @model_validator(mode="after")
    def _weights_above_zero(self) -> FederationSettings:
        if isinstance(self.weights, dict):
            for site, weight in self.weights.items():
                if weight <= 0:
                    raise ValueError(f"weights.{site} = {weight:g} must be above 0")
        return self

    @model_validator(mode="after")
    def _rule_knows_its_settings(self) -> FederationSettings:
        if isinstance(self.weights, dict) and self.aggregation in ("trimmed-mean", "median"):
            raise ValueError(
                f'weights mean nothing to aggregation = "{self.aggregation}", which ranks sites: '
                'remove them, or choose "mean" or "clipped-mean"'
            )
        if self.clip_norm is not None and self.aggregation != "clipped-mean":
            raise ValueError('clip_norm belongs to aggregation = "clipped-mean": remove it, or choose that')
        return self


class ReferenceSettings(Section):
    """The coordinator's public images, split by patient."""

    fraction: float = Field(0.2, gt=0, lt=1, description="share of patients a simulation holds out as public")
    key: str = Field("polyclinic-reference", description="name of the keyed hash that holds patients out")
    pretrain: float = Field(0.4, ge=0, le=1)
    probe: float = Field(0.2, ge=0, le=1)
    evaluate: float = Field(0.4, gt=0, le=1)
    concepts: tuple[str, ...] = Field((), description="label columns that faithfulness is measured on")

    @model_validator(mode="after")
    def _shares(self) -> ReferenceSettings:
        if abs(self.pretrain + self.probe + self.evaluate - 1) > 1e-9:
            raise ValueError("pretrain + probe + evaluate must add up to 1")
        return self

    @property
    def parts(self) -> dict[str, float]:
        """Name and share of each part."""
        return {"pretrain": self.pretrain, "probe": self.probe, "evaluate": self.evaluate}


class SimulatedSite(Section):
    """What the people of one simulated hospital would have typed into their policy."""

    declared_patients: int = Field(ge=1, description="public size of the site; never computed from its data")
    epsilon_cap: float = Field(10.0, gt=0, description="the site's own cap a study")
    min_patients: int = Field(20, ge=1, description="checked at approval")
    gpu_memory_gb: float | None = Field(
        None, gt=0, description="memory of its GPU, 10^9 bytes; default: cost.gpu_memory_gb"
    )
    lora_rank: int | None = Field(
        None,
        ge=1,
        description="rank of the adapters trained there; default: the study's, which is the limit",
    )
    folder: str = Field(
        "",
        pattern=r"^([A-Za-z0-9_][A-Za-z0-9_. -]*)?$",
        description="the site's own folder under --data; default: one table for all, divided by `split`",
    )
    source: str | None = Field(None, description="form of that folder; default: data.source")
    table: str | None = Field(None, description="its table; default: data.table")
    caption: str | None = Field(None, description="its caption template; default: data.caption")

    def data(self, common: DataSettings) -> DataSettings:
        """How this site's own folder is read.

        Args:
            common: The study's data table; unit, size and fit are the same at every site.
        """
        own = {"source": self.source, "table": self.table, "caption": self.caption}
        return DataSettings.model_validate(
            common.model_dump() | {name: value for name, value in own.items() if value is not None}
        )


class SimulationSettings(Section):
    """How one machine plays a federation."""

    split: Literal["site", "dirichlet", "pooled"] = Field(
        "site", description="by the table's site column, by skewed labels, or all patients at one site"
    )
    dirichlet_alpha: float = Field(1.0, gt=0)
    dirichlet_label: str | None = Field(None, description="label column the Dirichlet split skews")
    sites: dict[str, SimulatedSite] = Field(min_length=1)

    @model_validator(mode="after")
    def _folders_for_all_or_none(self) -> SimulationSettings:
        folders = [site.folder for site in self.sites.values()]
        if any(folders) and (not all(folders) or self.split != "site"):
            raise ValueError('`folder` is for every site or for none, and needs split = "site"')
        return self
