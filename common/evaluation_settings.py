"""The study file's table on what is drawn and measured at the coordinator."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator, model_validator

from polyclinic.common.section import Section


class Prompt(Section):
    """One fixed prompt of the evaluation, written from public sources, with what it asks for."""

    text: str = Field(min_length=1)
    labels: dict[str, str] = Field({}, description="concept to the value this prompt asks for")


class MedvqaSettings(Section):
    """The official scores of MedVQA-GI 2025: which model, and which prompts belong together."""

    model: str = Field(
        "ikim-uk-essen/BiomedCLIP_ViT_patch16_224",
        min_length=1,
        description="vision model whose first token is taken: a folder, or a Hugging Face id",
    )
    revision: str | None = Field(None, description="revision of a Hugging Face id")
    pairs: tuple[tuple[str, str], ...] = Field(
        min_length=1, description="pairs of evaluation prompts: two phrasings of one objective each"
    )

    @field_validator("pairs")
    @classmethod
    def _each_prompt_once(cls, pairs: tuple[tuple[str, str], ...]) -> tuple[tuple[str, str], ...]:
        texts = [text for pair in pairs for text in pair]
        twice = sorted({text for text in texts if texts.count(text) > 1})
        if twice:
            raise ValueError(f'"{twice[0]}" stands in two places: each prompt has one partner')
        return pairs


EFFICIENTNET, RADIOMIC, INCEPTION = "package:efficientnet-lite0", "radiomic", "inception"


class ExtractorSettings(Section):
    """What turns an image into features. A plain string stands for its source."""

    source: str = Field(
        min_length=1,
        description="`package:efficientnet-lite0`, `radiomic` (no weights), `inception`, or a vision model: "
        "a folder, or a Hugging Face id",
    )
    revision: str | None = Field(None, description="revision of a Hugging Face id")
    pooling: Literal["cls", "mean"] = Field(
        "cls", description="of a vision model's last state: its first token, or the mean over its patches"
    )
    file: str | None = Field(None, description="inception: local file of the weights")
    sha256: str | None = Field(
        None, pattern=r"^[0-9a-f]{64}$", description="refuse any other weights (of a folder: all its files)"
    )

    @model_validator(mode="before")
    @classmethod
    def _plain_string(cls, value: object) -> object:
        return {"source": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _fields_fit_the_source(self) -> ExtractorSettings:
        if (self.source == INCEPTION) != (self.file is not None):
            raise ValueError(
                f'source = "{INCEPTION}" and file go together: write '
                f'{{source = "{INCEPTION}", file = "pt_inception-2015-12-05-6726825d.pth"}}'
            )
        if self.source.startswith("package:") and self.source != EFFICIENTNET:
            raise ValueError(f'source = "{self.source}": the one packaged extractor is "{EFFICIENTNET}"')
        return self


class EvaluationSettings(Section):
    """What is drawn and measured at the coordinator."""

    prompts: tuple[Prompt, ...] = Field(min_length=1)
    draws: int = Field(8, ge=1, description="images a prompt")
    every: int = Field(1, ge=1, description="rounds between evaluations; the last round always is")
    steps: int = Field(150, ge=1, description="DDIM sampling steps")
    guidance: float = Field(4.5, ge=1, description="classifier-free guidance scale")
    eta: float = Field(1.0, ge=0, le=1, description="DDIM's share of fresh noise")
    seed: int = Field(0, ge=0)
    batch_size: int = Field(64, ge=1, description="images sampled at once")
    extractors: tuple[ExtractorSettings, ...] = Field(
        (ExtractorSettings(source=EFFICIENTNET), ExtractorSettings(source=RADIOMIC)),
        min_length=1,
        description="what images are compared by; the first gives the headline and the probes' features",
    )
    clip_model: str | None = Field(
        None,
        min_length=1,
        description="CLIP-type model for the cosine of images with prompts: a folder, or a Hugging Face id",
    )
    clip_revision: str | None = Field(None, description="revision of a Hugging Face id")
    medvqa: MedvqaSettings | None = Field(None, description="the official MedVQA-GI 2025 scores, if given")

    @model_validator(mode="after")
    def _pairs_are_prompts(self) -> EvaluationSettings:
        texts = {prompt.text for prompt in self.prompts}
        if self.clip_model and len(texts) < 2:
            raise ValueError("clip_model needs two different prompts, to compare with the other's images")
        if self.medvqa:
            strange = [text for pair in self.medvqa.pairs for text in pair if text not in texts]
            if strange:
                raise ValueError(
                    f'medvqa.pairs names "{strange[0]}", which is not in prompts: write it as it stands there'
                )
            if self.draws < 2:
                raise ValueError("medvqa needs draws of at least 2, and the official setting has 10")
        return self

    @field_validator("extractors")
    @classmethod
    def _each_once(cls, given: tuple[ExtractorSettings, ...]) -> tuple[ExtractorSettings, ...]:
        if len(set(given)) < len(given):
            raise ValueError("names an extractor twice: write each once")
        return given

    @property
    def images(self) -> int:
        """Images drawn in one evaluation."""
        return self.draws * len(self.prompts)
