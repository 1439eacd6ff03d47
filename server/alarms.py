"""What a site's mechanism is held to, and an alarm in the round where its noise is not what it says."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict

from polyclinic.common.generators.base import Tensors
from polyclinic.common.privacy.tap import SUM
from polyclinic.common.study import Resolved
from polyclinic.common.wire import ReplyFacts
from polyclinic.server.evaluation.audit import Claim, round_alarm, round_level


def claim_of(resolved: Resolved, facts: Mapping[str, float | int | str]) -> Claim:
    """What a site's mechanism is held to: the study's own settings, and what only the site knows."""
    privacy = resolved.study.privacy
    return Claim(
        sigma=float(facts["sigma"]),
        clip=privacy.clip,
        divisor=float(facts["divisor"]),
        rate=privacy.sampling_rate,
        steps=resolved.study.training.steps_per_round,
        tau=float(facts["tau"]),
        epsilon=float(facts["epsilon"]),
        delta=privacy.delta,
    )


def round_alarms(
    resolved: Resolved, number: int, facts: dict[str, ReplyFacts], taps: dict[str, Tensors]
) -> Iterator[str]:
    """Test each site's noise while the run goes on; the report tests it again, and more at the end."""
    level = round_level(resolved.study.training.rounds, max(1, len(taps)))
    for site, tap in sorted(taps.items()):
        alarm = round_alarm(tap[SUM], claim_of(resolved, asdict(facts[site])), level) if tap else None
        if alarm:
            yield f"{site}: {alarm}"


def misfit(facts: ReplyFacts, resolved: Resolved, number: int) -> str:
    """Name a fact that is not this round's or this study's; empty where all are, as far as these fix them."""
    study = resolved.study
    expected: dict[str, object] = {
        "round": number,
        "study_hash": resolved.hash,
        "base_hash": resolved.base_hash,
        "code_version": resolved.code_version,
        "steps": study.training.steps_per_round,
        "sampling_rate": study.privacy.sampling_rate,
        "delta": study.privacy.delta,
        "clip": study.privacy.clip if study.privacy.enabled else math.inf,
    }
    return next((name for name, value in expected.items() if getattr(facts, name) != value), "")


def is_possible(facts: ReplyFacts) -> bool:
    """Tell whether a private mechanism can have these parameters, so that it can be audited."""
    return 0 < facts.sigma < math.inf and 0 < facts.divisor < math.inf and facts.tau >= 0 <= facts.epsilon
