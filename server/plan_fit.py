"""Whether a study fits the sites' GPUs, and which settings would make it fit: each is planned again."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from polyclinic.common.generators.base import BaseFiles
from polyclinic.common.refusals import BadInput, Refusal
from polyclinic.common.study import Study, parse_study
from polyclinic.server.plan_memory import Memory, training_memory
from polyclinic.server.report.wording import GAP, listed, scaled

Change = tuple[str, dict[str, dict[str, Any]]]
SMALLEST_IMAGE = 64


def declared_bytes(study: Study) -> dict[str, float]:
    """GPU memory that the study knows of: by site, or under "each site"."""
    each = study.cost.gpu_memory_gb
    sites = study.simulation.sites if study.simulation else {}
    own = {name: site.gpu_memory_gb or each for name, site in sorted(sites.items())}
    found = own or {"each site": each}
    return {name: 1e9 * size for name, size in found.items() if size is not None}


def check_fit(study: Study, files: BaseFiles, memory: Memory) -> None:
    """Refuse a study whose training does not fit a GPU that is declared for a site.

    Args:
        study: The study.
        files: Its base.
        memory: What it takes.

    Raises:
        Refusal: `gpu-too-small`, with the settings that would make it fit.
    """
    short = {name: size for name, size in declared_bytes(study).items() if size < memory.total}
    if not short:
        return
    needs, smallest = scaled(memory.total, "B"), min(short.values())
    have = listed([f"{name} has {scaled(size, 'B')}" for name, size in short.items()])
    words = f"{needs} where {have}; {remedy(study, files, smallest)}"
    raise Refusal("gpu-too-small", words.replace(GAP, " "))  # read in a terminal


def remedy(study: Study, files: BaseFiles, limit: float) -> str:
    """Say which setting makes a study fit: one alone where one is enough, else as many as it takes."""
    none = "no setting that is known makes it fit: choose a smaller model"
    least: Study | None = study
    for steps in filter(None, changes(study)):
        least = least and _with(least, steps[-1][1])
    smallest = _total(least, files)
    # A trace of a large model takes seconds: where all settings together are not enough, none is tried alone.
    if smallest is not None and smallest > limit:
        return none
    alone = []
    for steps in changes(study):
        for words, tables in steps:
            total = _total(_with(study, tables), files)
            if total is not None and total <= limit:
                alone.append(f"{words} ({scaled(total, 'B')})")
                break
    if alone:
        return f"it would fit with {' or '.join(alone)}"
    current, said = study, {}
    for number, steps in enumerate(changes(study)):
        for words, tables in steps:
            changed = _with(current, tables)
            total = _total(changed, files)
            if changed is None or total is None:
                continue
            current, said[number] = changed, words
            if total <= limit:
                return f"it would fit with {listed(list(said.values()), 8)} together ({scaled(total, 'B')})"
    return none


def changes(study: Study) -> Iterator[list[Change]]:
    """Settings that lower memory, each from its gentlest value on; what changes learning least is first."""
    generator, privacy = study.generator, study.privacy
    if not generator.gradient_checkpointing:
        yield [("generator.gradient_checkpointing = true", {"generator": {"gradient_checkpointing": True}})]
    yield [
        (f"privacy.micro_batch = {n}", {"privacy": {"micro_batch": n}}) for n in halves(privacy.micro_batch)
    ]
    if not generator.large:
        return
    if generator.precision == "fp32":
        yield [('generator.precision = "bf16"', {"generator": {"precision": "bf16"}})]
    if generator.quantize != "nf4":
        fewer = ["nf4"] if generator.quantize == "int8" else ["int8", "nf4"]
        yield [(f'generator.quantize = "{kind}"', {"generator": {"quantize": kind}}) for kind in fewer]
    lora = generator.lora.model_dump(mode="json")
    yield [
        (f"generator.lora.rank = {n}", {"generator": {"lora": {**lora, "rank": n}}})
        for n in halves(generator.lora.rank)
    ]
    yield [
        (f"data.image_size = {n}", {"data": {"image_size": n}})
        for n in halves(study.data.image_size)
        if n >= SMALLEST_IMAGE and n % SMALLEST_IMAGE == 0
    ]


def halves(value: int) -> list[int]:
    """A half, a quarter and so on, down to 1."""
    return [value >> n for n in range(1, value.bit_length())]


def _with(study: Study, tables: dict[str, dict[str, Any]]) -> Study | None:
    values = study.model_dump(mode="json")
    for name, fields in tables.items():
        values[name] |= fields
    try:
        return parse_study(values, study.name)
    except BadInput:
        return None  # another field forbids it


def _total(study: Study | None, files: BaseFiles) -> int | None:
    try:
        return None if study is None else training_memory(study, files).total
    except BadInput:
        return None
