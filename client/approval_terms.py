"""What a person at a site is shown before approving a study: what happens, what leaves, what it costs."""

from __future__ import annotations

import textwrap
from bisect import bisect_left
from dataclasses import fields
from pathlib import Path
from typing import Any

from polyclinic.client.approval import check_base, list_approvals, noise_of, open_approval, set_apart
from polyclinic.client.ledger_books import Books
from polyclinic.client.ledger_chain import inspect
from polyclinic.client.membership import idle_words
from polyclinic.client.policy import Policy, check_noise, check_study, load_policy
from polyclinic.common.adapters import trained
from polyclinic.common.cost import view_flops
from polyclinic.common.data.table import Record, patients_of
from polyclinic.common.device import pick_device
from polyclinic.common.features.copies import fewest_alarming
from polyclinic.common.features.fourier import BOUND
from polyclinic.common.generators.base import BaseFiles, Tensors, load_family, trainable
from polyclinic.common.generators.checkpoint import licence
from polyclinic.common.privacy.accounting import claim
from polyclinic.common.refusals import Refusal
from polyclinic.common.rounding import SCALE
from polyclinic.common.study import Resolved, Study, differences
from polyclinic.common.wire import DIFFERENCE, FACTS, HASHES, SUM, TAP, ReleaseFacts, ReplyFacts

WIDTH = 100
_BYTES = {"fp32": 4, "bf16": 2, "int8": 1}

# Every part of a reply in plain words; a test compares with wire.py.
PARTS = {
    DIFFERENCE: "how the round moved the weights: clipped patient by patient, summed, noised here",
    SCALE: "int8 only: by how much each row of that difference was scaled",
    TAP: "the audit tap: sums of noise and made-up canaries that no patient touches; last, their coins",
    FACTS: "the numbers below",
    HASHES: "a SHA-256 of each tensor above, to notice damage on the way",
}
FIELDS = {field.name: str(field.metadata["words"]) for field in fields(ReplyFacts)}
# Of an extra release; its sum is a part of its own.
RELEASE_FIELDS = {
    SUM: "the noisy sum, where one is set aside below",
    **{field.name: str(field.metadata["words"]) for field in fields(ReleaseFacts)},
}


def terms(
    home: Path,
    site: str,
    resolved: Resolved,
    records: list[Record],
    files: BaseFiles,
    rounds: int | None = None,
) -> dict[str, Any]:
    """Gather what approving a study would mean; nothing is written.

    Args:
        home: The site's home.
        site: Name of the site.
        resolved: The study.
        records: The site's table.
        files: Where the frozen parts lie here.
        rounds: Take part in the first so many only; None: in all.

    Returns:
        JSON-safe facts; an infinite epsilon is the string "inf".

    Raises:
        Refusal: The policy forbids it, the ledger is not whole, or the budget has no room; then it says how
            many rounds would fit.
        BadInput: The policy or the study cannot be met.
    """
    study, policy = resolved.study, load_policy(home)
    check_study(policy, study, resolved.base_hash)
    known = open_approval(home, resolved.hash)
    rounds = known.rounds if known else rounds
    sigma, releases, epsilon = noise_of(policy, resolved, rounds)
    taken = rounds or study.training.rounds
    steps = taken * study.training.steps_per_round
    check_noise(policy, study, sigma)
    check_base(resolved, files)
    family = load_family(study, files, device="meta", encoders=False, rank=policy.lora_rank)  # to count
    whole: Tensors = {name: parameter.detach() for name, parameter in trainable(family.module).items()}
    moved = trained(whole, study.federation.lora_aggregation, 1)
    numbers, up = (sum(tensor.numel() for tensor in state.values()) for state in (whole, moved))
    narrower = study.generator.lora.rank / (policy.lora_rank or study.generator.lora.rank)
    batch = study.privacy.sampling_rate * policy.declared_patients
    books = Books(home, inspect(home)[0])
    spent = books.committed()
    if not known and epsilon is not None and spent[0] + epsilon > policy.epsilon_total:
        raise Refusal("budget-exhausted", _room(policy, resolved, spent[0], epsilon, taken))
    more = (0.0, 0.0) if known else (float("inf") if epsilon is None else epsilon, study.privacy.delta)
    earlier = [a.resolved for a in list_approvals(home) if a.resolved.study.name == study.name]
    transport = study.federation.transport
    down = "bf16" if transport == "int8" else transport
    return {
        "site": site,
        "study": study.name,
        "title": study.title,
        "hash": resolved.hash,
        "approved_already": known is not None,
        "private": study.privacy.enabled,
        "test_randomness": study.training.test_key is not None,
        "rounds": taken,
        "rounds_of_study": study.training.rounds,
        "steps_per_round": study.training.steps_per_round,
        "steps": steps,
        "generator": study.generator.words,
        "trained_numbers": numbers,
        "base_hash": resolved.base_hash,
        "licence": licence(study.generator, files.pipeline),
        "unit": study.data.unit,
        "table": study.data.table,
        "patients": len({record.patient for record in records}),
        "images": len(records),
        "declared_patients": policy.declared_patients,
        "sampling_rate": study.privacy.sampling_rate,
        "clip": study.privacy.clip,
        "sigma": sigma,
        "epsilon": "inf" if epsilon is None else epsilon,
        "delta": study.privacy.delta,
        "noise": study.privacy.noise_words,
        "releases": {name: _release(study, name, z) for name, z in releases.items()},
        "leakage_gate": study.releases.leakage_gate,
        "held_out": study.releases.held_out if study.releases.leakage_gate else 0.0,
        "gate": _gate(records, resolved),
        "canaries": study.privacy.canaries if study.privacy.enabled else 0,
        "epsilon_before": _finite(spent[0]),
        "epsilon_after": _finite(spent[0] + more[0]),
        "epsilon_cap": policy.epsilon_total,
        "delta_before": spent[1],
        "delta_after": spent[1] + more[1],
        "delta_cap": policy.delta_cap,
        "allowed_hours": policy.allowed_hours,
        "max_gpu_memory_gb": policy.max_gpu_memory_gb,
        "device": pick_device(study.training.device),
        "lora_rank": policy.lora_rank,
        "transport": transport,
        "bytes_up": up * _BYTES[transport],
        "bytes_down": round(numbers * narrower) * _BYTES[down],
        "flops": float(view_flops(family) * study.privacy.views * batch * steps),
        "leaves": {**PARTS, **FIELDS},
        "leaves_once": RELEASE_FIELDS if releases or study.releases.leakage_gate else {},
        "differs_from_approved": differences(earlier[-1], resolved) if earlier else [],
    }


def _room(policy: Policy, resolved: Resolved, spent: float, epsilon: float, rounds: int) -> str:
    """Say that the cap leaves no room for so many rounds, and for how many it does."""
    said = f"epsilon: committed {spent:.2f}; asked {epsilon:.2f}; cap {policy.epsilon_total:.2f}"

    def too_many(number: int) -> bool:
        return spent + (noise_of(policy, resolved, number)[2] or 0.0) > policy.epsilon_total

    fit = bisect_left(range(1, rounds), True, key=too_many)
    return said + (f"; there is room for the first {fit} rounds: approve with --rounds {fit}" if fit else "")


def _release(study: Study, name: str, noise: float) -> dict[str, float | str]:
    """Gather what an extra release costs alone; its share of the whole is part of the study's epsilon."""
    private = study.privacy.enabled
    alone = claim(((noise, 1.0, 1),), study.privacy.delta) if private else "inf"
    bound = BOUND if name == "fidelity" else 1.0
    return {"noise": noise, "epsilon": alone, "bound": bound, "length": study.releases.fourier_features + 1}


def _gate(records: list[Record], resolved: Resolved) -> dict[str, Any] | None:
    """Gather what the leakage gate can find among this site's patients; None without one."""
    scale = resolved.public.near if resolved.public else None
    if not resolved.study.releases.leakage_gate or scale is None:
        return None
    trained, held_out = (patients_of(part) for part in set_apart(records, resolved))
    sizes = [len(images) for images in trained.values()]
    return {
        "trained": len(trained),
        "held_out": len(held_out),
        "fewest_copied": fewest_alarming(sizes, len(held_out), scale),
        "membership_idle": idle_words(len(trained), len(held_out)),
    }


def _gate_words(gate: dict[str, Any], unit: str) -> str:
    fewest, idle = gate["fewest_copied"], gate["membership_idle"]
    alarm = (
        f"its count raises the alarm from near copies of {fewest} of them on"
        if fewest
        else "its count can raise no alarm, even where all of them are copied: look at the pairs yourself"
    )
    test = f"The membership test {idle}." if idle else "The membership test can be made."
    return (
        f"what the gate can find here: {gate['trained']} {unit}s are trained on and {gate['held_out']} are "
        f"not; {alarm}, and from one almost exact copy on. {test}"
    )


def _finite(value: float) -> float | str:
    return "inf" if value == float("inf") else value


def words(facts: dict[str, Any]) -> str:
    """Say the terms in plain words."""
    part = [_head(facts), _happens(facts), _leaves(facts), *_once(facts), _costs(facts)]
    if facts["differs_from_approved"]:
        rows = "\n".join(f"  {row}" for row in facts["differs_from_approved"])
        part.insert(1, f"NOT the study approved before under this name; it differs in\n{rows}")
    return "\n\n".join(part)


def _head(facts: dict[str, Any]) -> str:
    lines = [
        f"study {facts['study']} ({facts['hash'][:8]}) at site {facts['site']}: {facts['title']}".rstrip(": ")
    ]
    if not facts["private"]:
        lines.append("*** NOT PRIVATE *** no noise is added: what leaves can show single patients' images.")
    if facts["test_randomness"]:
        lines.append("*** FIXED RANDOMNESS *** for tests only: anybody can repeat every draw of this study.")
    if facts["licence"]:
        lines.append(f"Terms of the base: {facts['licence']}")
    return "\n".join(lines)


def _happens(facts: dict[str, Any]) -> str:
    gpu = facts["max_gpu_memory_gb"]
    limit = f", at most {gpu:g} GB of it" if gpu and facts["device"] != "cpu" else ""
    rounds = f"{facts['rounds']} rounds"
    if facts["rounds"] < facts["rounds_of_study"]:
        rounds = f"The first {facts['rounds']} of {facts['rounds_of_study']} rounds, and no later one,"
    ignored = " (max_gpu_memory_gb has no effect: no GPU is used)" if gpu and facts["device"] == "cpu" else ""
    rank = f" (of rank {facts['lora_rank']} here)" if facts["lora_rank"] else ""
    return _paragraphs(
        "What happens",
        f"{rounds} of {facts['steps_per_round']} steps train {facts['trained_numbers']:,} "
        f"numbers of the generator {facts['generator']}{rank} on {facts['images']} images of "
        f"{facts['patients']} {facts['unit']}s, on {facts['device']}{limit}{ignored}, begun "
        f"{facts['allowed_hours'] or 'at any hour'}. "
        f"About {facts['flops'] / 1e15:.3g} PFLOP in all: {_hours(facts['flops'] / 1e12)} at 1 TFLOP/s, "
        f"{_hours(facts['flops'] / 2e13)} at 20 TFLOP/s.",
        f"It is bound to this installation's code and packages, to base {facts['base_hash'][:8]}, to these "
        "images and captions, and to policy.toml as they are now; a change in any of them stops the rounds.",
    )


def _leaves(facts: dict[str, Any]) -> str:
    up, down = _size(facts["bytes_up"]), _size(facts["bytes_down"])
    tap = f"; the tap has {facts['canaries']} coordinates" if facts["canaries"] else "; there is no tap"
    rows = [f"  {name:15} {text}" for name, text in facts["leaves"].items()]
    return "\n".join(
        (
            f"What leaves this site, and nothing else: {up} up and {down} down a round "
            f"({facts['transport']}){tap}",
            *rows,
            "No image, caption, loss, count, measured time or error text leaves.",
        )
    )


def _once(facts: dict[str, Any]) -> list[str]:
    """Say what leaves once, after the last round: a line for each release (PRIVACY.md, rules 15 and 16)."""
    said, unit, sums = [], facts["unit"], facts["releases"]
    if "fidelity" in sums:
        one = sums["fidelity"]
        said.append(
            f"fidelity (DP-CMMD): one sum of {one['length']} numbers made from public image features, one "
            f"image a {unit}, by which the coordinator tells how near the final images are to yours; a "
            f"{unit} moves it by at most {one['bound']:.3f}, and noise of {_alone(one, facts)} is added "
            f"here. It tells the number of {unit}s, as noisily."
        )
    if facts["leakage_gate"]:
        said.append(
            "gate: you draw images from the final generator, compare them with your own on this machine, and "
            "say `released` or `not released`. That word leaves, never why, and no membership score ever. "
            f"{facts['held_out']:.0%} of your {unit}s, by a keyed hash of their ids, are not trained on, so "
            "that there is somebody to compare with."
        )
        if facts["gate"]:
            said.append(_gate_words(facts["gate"], unit))
    if "copies" in sums:
        said.append(
            f"copies: with `released`, and only then, the number of {unit}s of whom a near copy was drawn; a "
            f"{unit} counts at most once, and noise of {_alone(sums['copies'], facts)} is added here."
        )
    elif facts["leakage_gate"]:
        said.append("copies: no number of near copies leaves.")
    if not said:
        return []
    rows = [f"  {name:15} {text}" for name, text in facts["leaves_once"].items()]
    return ["\n".join([_paragraphs("What leaves once, after the last round", *said), *rows])]


def _alone(one: dict[str, Any], facts: dict[str, Any]) -> str:
    if not facts["private"]:
        return "none (NOT PRIVATE)"
    return f"{one['noise']:g} times that (epsilon {one['epsilon']:.3f} alone; it is in the sum below)"


def _costs(facts: dict[str, Any]) -> str:
    if not facts["private"]:
        return _paragraphs(
            "What it costs",
            "Epsilon is infinite. No private study can ever follow on this site's ledger.",
        )
    before, after, cap = facts["epsilon_before"], facts["epsilon_after"], facts["epsilon_cap"]
    share = (
        "" if isinstance(before, str) else f" ({before / cap:.0%} -> {after / cap:.0%} of the cap {cap:g})"
    )
    first = before if isinstance(before, str) else f"{before:.3f}"
    last = after if isinstance(after, str) else f"{after:.3f}"
    cut = facts["rounds"] < facts["rounds_of_study"]
    whole = f"its first {facts['rounds']} rounds" if cut else "the whole study"
    once = ", with what leaves once" if facts["releases"] else ""
    return _paragraphs(
        "What it costs",
        f"Each {facts['unit']}: epsilon {facts['epsilon']:.3f} at delta {facts['delta']:.2g} for {whole}"
        f"{once}, by noise of sigma {facts['sigma']:g} on contributions of at most {facts['clip']:g}, a "
        f"{facts['unit']} being in a step with chance {facts['sampling_rate']:g}; for the declared size of "
        f"{facts['declared_patients']}.",
        f"Whose noise: this site's own, {facts['noise']}. The promise rests on it alone: not on the "
        "coordinator, not on other sites.",
        f"All studies here: epsilon {first} -> {last}{share}; delta {facts['delta_before']:.2g} -> "
        f"{facts['delta_after']:.2g} of {facts['delta_cap']:.2g}. `polyclinic-client close` returns what "
        "is unused.",
    )


def _paragraphs(title: str, *texts: str) -> str:
    fill = [textwrap.fill(text, WIDTH, initial_indent="  ", subsequent_indent="  ") for text in texts]
    return "\n".join([title, *fill])


def _hours(seconds: float) -> str:
    return f"{seconds / 3600:.2g} hours"


def _size(count: float) -> str:
    return f"{count / 1e6:.1f} MB"
