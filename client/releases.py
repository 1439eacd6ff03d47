"""What a site says beside its rounds, once a study: a noisy sum of image features, and a person's word.

In the order of any round (`ledger.py`). Asked again: the stored bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from polyclinic.client.approval import Approval, require_approval
from polyclinic.client.ledger import Ledger, open_ledger
from polyclinic.common.data.cache import load_features
from polyclinic.common.features.fourier import BOUND, fourier, frequencies
from polyclinic.common.files import write_atomic
from polyclinic.common.privacy.random import KeyedRandom
from polyclinic.common.privacy.sums import TAU, noisy_sum
from polyclinic.common.refusals import Refusal
from polyclinic.common.study import CODE_VERSION
from polyclinic.common.wire import ReleaseFacts, pack_release
from polyclinic.common.wire_reading import ReleaseOrder

FIDELITY, GATE, COPIES = "fidelity", "gate", "copies"
RELEASED, NOT_RELEASED = "released", "not released"


def answer_release(home: Path, order: ReleaseOrder, *, in_time: Callable[[], bool]) -> bytes:
    """Answer a question for an extra release.

    Args:
        home: The site's home.
        order: Which release, of which study.
        in_time: As in `answer_round`.

    Returns:
        The stored release: these bytes, and no others, may be sent.

    Raises:
        Refusal: With its code; nothing was spent unless the code is `site-fault`.
    """
    approval, _ = require_approval(home, order.study_hash)
    gate = order.release == GATE and approval.resolved.study.releases.leakage_gate
    if not gate and (order.release != FIDELITY or FIDELITY not in approval.releases):
        raise Refusal("bad-message", f"release {order.release[:40]}")
    with open_ledger(home) as ledger:
        if gate:
            said = decision(ledger, approval)
            if said is None:
                raise Refusal("gate-undecided")
            return said
        facts = release_facts(approval, FIDELITY, BOUND)
        stored = ledger.answered(approval.id, FIDELITY, facts.study_hash)
        if stored is not None:
            return stored
        if not in_time():
            raise Refusal("round-too-late")
        features = load_features(home / "cache", approval.cache_index)  # refuses before anything is spent
        length = approval.resolved.study.releases.fourier_features + 1
        vectors = partial(one_image_each, features, approval)
        return release_sum(ledger, approval, FIDELITY, facts, vectors, length)


def one_image_each(features: dict[str, Tensor], approval: Approval, random: KeyedRandom) -> Iterator[Tensor]:
    """Map one image of each patient to random Fourier features and the constant.

    Which image is a function of (key, patient): nobody's choice depends on who else is there.
    """
    resolved = approval.resolved
    assert resolved.public is not None
    length, width = resolved.study.releases.fourier_features, next(iter(features.values())).shape[1]
    drawn = frequencies(resolved.hash, width, length, resolved.public.bandwidth)
    for patient, rows in features.items():
        row = random.stream("image", patient).below(len(rows))
        yield fourier(rows[row : row + 1], drawn)[0]


def release_sum(
    ledger: Ledger,
    approval: Approval,
    release: str,
    facts: ReleaseFacts,
    vectors: Callable[[KeyedRandom], Iterable[Tensor]],
    length: int,
) -> bytes:
    """Charge, compute, store and settle a noisy sum of one vector a patient, `[length]`.

    What is said beside it, `facts`, gets the ledger's part here. Returns the stored bytes.
    """
    random = KeyedRandom.for_attempt(approval.resolved.study.training.test_key, approval.site, 0)
    line = ledger.reserve(
        approval=approval.id,
        item=release,
        state=facts.model or facts.study_hash,
        sigma=facts.sigma,
        rate=1.0,
        steps=1,
        tau=facts.tau,
    )

    def make() -> bytes:
        stream = random.stream("noise", release)
        total = noisy_sum(vectors(random), length, bound=facts.bound, noise=facts.sigma, stream=stream)
        spent = ledger.epsilon(approval.id)
        said = replace(facts, epsilon=spent, ledger_sequence=line["sequence"], ledger_hash=line["hash"])
        return pack_release(total, said)

    return ledger.answer(approval.id, release, make)


def decide(home: Path, approval: Approval, verdict: str, copied: dict[str, bool], model: str) -> None:
    """Store a person's word about the final generator, once; nobody's reasons are in it.

    Args:
        home: The site's home.
        approval: With `released`, and only where it sets the noise of a count aside, that leaves, too.
        verdict: `released` or `not released`.
        copied: Patient to whether a near copy of any image of theirs was drawn: at most 1 each.
        model: Hash of the final generator that was looked at.

    Raises:
        Refusal: `gate-decided`, or as `Ledger.reserve`.
    """
    charged = verdict == RELEASED and COPIES in approval.releases
    facts = release_facts(approval, COPIES if charged else GATE, 1.0, verdict=verdict, model=model)
    with open_ledger(home) as ledger:
        if decision(ledger, approval) is not None:
            raise Refusal("gate-decided")
        if charged:
            vectors = [torch.tensor([float(flag)]) for flag in copied.values()]
            release_sum(ledger, approval, COPIES, facts, lambda _: vectors, 1)
        else:
            word = pack_release(None, replace(facts, epsilon=ledger.epsilon(approval.id)))
            write_atomic(_word_path(ledger, approval), word, mode=0o600)


def decision(ledger: Ledger, approval: Approval) -> bytes | None:
    """Read what was decided; None where nothing was."""
    path = _word_path(ledger, approval)
    if path.exists():
        return path.read_bytes()
    reserved = [line for line in ledger.of(approval.id, "reserve") if line["round"] == COPIES]
    return ledger.answered(approval.id, COPIES, reserved[0]["state"]) if reserved else None


def _word_path(ledger: Ledger, approval: Approval) -> Path:
    return ledger.folder / "approvals" / f"{approval.resolved.hash}.verdict"


def release_facts(
    approval: Approval, release: str, bound: float, *, verdict: str = "", model: str = ""
) -> ReleaseFacts:
    """Say what leaves with an extra release; without a sum, `release` is not one of the approval's."""
    resolved, charged = approval.resolved, release in approval.releases
    return ReleaseFacts(
        release=GATE if verdict else release,
        verdict=verdict,
        model=model,
        sigma=approval.releases.get(release, 0.0),
        bound=bound if charged else 0.0,
        tau=TAU if charged and resolved.study.privacy.enabled else 0.0,
        epsilon=0.0,
        delta=resolved.study.privacy.delta,
        code_version=CODE_VERSION,
        study_hash=resolved.hash,
        approval=approval.id,
        ledger_sequence=0,
        ledger_hash="",
    )
