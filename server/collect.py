"""What the coordinator asks of sites after the last round: their extra releases (PRIVACY.md, rules 15, 16).

Each site is asked until it answers, refuses, or the time is over. What it sent is kept in the run's folder;
asked again, a site sends the stored bytes, so that a run that was killed here goes on without harm.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid
from pydantic import BaseModel, ConfigDict
from safetensors.torch import load_file, save
from torch import Tensor

from polyclinic.common.files import write_atomic, write_json_atomic
from polyclinic.common.generators.public import hash_state
from polyclinic.common.progress import say
from polyclinic.common.refusals import REASONS, Refusal, reason_of
from polyclinic.common.study import Resolved
from polyclinic.common.wire import ReleaseFacts
from polyclinic.common.wire_reading import (
    ReleaseOrder,
    RoundOrder,
    order_records,
    read_release,
    release_order,
)
from polyclinic.server.checkpoints import load_checkpoint
from polyclinic.server.evaluation.estimate import Estimate
from polyclinic.server.evaluation.results import SiteGate
from polyclinic.server.link import Link, Names, registered_names
from polyclinic.server.open_round import ASK_AGAIN_S
from polyclinic.server.progress_file import ABSENT, ASKED, NOT_HERE, REPLIED, Board
from polyclinic.server.replies import as_sent, payload_bytes
from polyclinic.server.rounds import ASK_AGAIN, NAMES_S, POLL_S

FIDELITY, GATE, FINAL = "fidelity", "gate", "final"
# From a site's answer to what is kept of it; raises `Refusal` for what is no answer.
Take = Callable[[str, RecordDict], None]


class Collected(BaseModel):
    """What came of one extra release. Infinite epsilon (not private) is written as the string "Infinity".

    Attributes:
        replied: Site to the facts of its release.
        refused: Site to its refusal, or to why what it sent was thrown away.
        absent: Sites that did not answer in time.
    """

    model_config = ConfigDict(extra="forbid", ser_json_inf_nan="strings")

    replied: dict[str, ReleaseFacts] = {}
    refused: dict[str, str] = {}
    absent: list[str] = []


def collect(
    grid: Grid,
    resolved: Resolved,
    run_dir: Path,
    board: Board,
    *,
    names: Names = registered_names,
    expected: Sequence[str] = (),
) -> None:
    """Ask every site for what the study wants of it after the last round.

    Args:
        grid: Where sites are reached.
        resolved: The study.
        run_dir: Keeps what comes.
        board: Says where the run stands.
        names: How the sites that are online are named.
        expected: Sites that should answer.

    Raises:
        BadInput: The disk is full.
    """
    link = Link(grid)
    if FIDELITY in resolved.study.releases.epsilons:
        length = resolved.study.releases.fourier_features + 1
        _collect(link, resolved, run_dir, board, names, expected, FIDELITY, length)
    if resolved.study.releases.leakage_gate:
        _hand_out(link, resolved, run_dir, board, names, expected)
        _collect(link, resolved, run_dir, board, names, expected, GATE, 1)


def missing(resolved: Resolved, run_dir: Path, expected: Sequence[str]) -> list[str]:
    """Releases that some site has not answered yet."""
    wanted = [FIDELITY] if FIDELITY in resolved.study.releases.epsilons else []
    wanted += [GATE] if resolved.study.releases.leakage_gate else []
    return [name for name in wanted if set(expected) - read_collected(run_dir, name).replied.keys()]


def read_collected(run_dir: Path, release: str) -> Collected:
    """Read what came of a release so far."""
    path = run_dir / "releases" / f"{release}.json"
    return Collected.model_validate_json(path.read_bytes()) if path.exists() else Collected()


def told(run_dir: Path) -> tuple[dict[str, float], dict[str, list[str]]]:
    """Site to the largest epsilon it told with an extra release, and to why it did not answer one."""
    spent: dict[str, float] = {}
    refused: dict[str, list[str]] = {}
    for release in (FIDELITY, FINAL, GATE):
        found = read_collected(run_dir, release)
        for site, facts in found.replied.items():
            spent[site] = max(spent.get(site, 0.0), facts.epsilon)
        for site, why in found.refused.items():
            refused.setdefault(site, []).append(f"{release}: {why}")
    return spent, refused


def read_sums(run_dir: Path, release: str) -> dict[str, tuple[Tensor, ReleaseFacts]]:
    """Read the noisy sums that came with a release: site to sum and facts."""
    path = run_dir / "releases" / f"{release}.safetensors"
    sums = load_file(str(path)) if path.exists() else {}
    facts = read_collected(run_dir, release).replied
    return {site: (sums[site], facts[site]) for site in sorted(sums) if site in facts}


def read_gates(resolved: Resolved, run_dir: Path, expected: Sequence[str]) -> list[SiteGate]:
    """Say what each site said after its leakage gate; a site that said nothing yet is `not asked`."""
    if not resolved.study.releases.leakage_gate:
        return []
    said, counts = read_collected(run_dir, GATE).replied, read_sums(run_dir, GATE)
    gates = []
    for site in sorted({*expected, *said}):
        facts, count = said.get(site), None
        if site in counts:
            scale = 1 + counts[site][1].tau
            value, reach = scale * float(counts[site][0][0]), 1.96 * scale * counts[site][1].sigma
            count = Estimate(
                value=value,
                low=value - reach if reach else None,
                high=value + reach if reach else None,
                interval="95 %, of the noise alone",
                n=resolved.study.evaluation.images,
                groups=len(resolved.study.evaluation.prompts),
                floor=None,
                ratio=None,
                note=f"noisy number of {resolved.study.data.unit}s; n images were drawn at the site",
            )
        charged = count is not None and resolved.study.privacy.enabled
        gates.append(
            SiteGate(
                site=site,
                verdict=facts.verdict if facts else "not asked",  # type: ignore[arg-type]
                near_copies=count,
                epsilon=resolved.study.releases.copies_epsilon if charged else None,
                delta=resolved.study.privacy.delta if charged else None,
            )
        )
    return gates


def _hand_out(
    link: Link, resolved: Resolved, run_dir: Path, board: Board, names: Names, expected: Sequence[str]
) -> None:
    """Give every site the final generator: what is judged and exported, as any round's state travels."""
    done = set(read_collected(run_dir, FINAL).replied)
    if expected and done >= set(expected):
        return
    last = resolved.study.training.rounds
    transport = resolved.study.federation.transport
    average = load_checkpoint(run_dir, last).average
    model = hash_state(as_sent(average, transport))
    replied = read_collected(run_dir, FINAL).replied

    def take(site: str, content: RecordDict) -> None:
        _, facts = read_release(content, 0)
        if (facts.study_hash, facts.model) != (resolved.hash, model):
            raise Refusal("bad-message", "it holds another generator")
        replied[site] = facts

    content = order_records(RoundOrder(round=last, study_hash=resolved.hash), average, transport)
    asking = Asking(FINAL, content, done, kind="query.final")
    ask_sites(link, resolved, board, names, expected, asking, take)
    _keep(run_dir, FINAL, replied, asking)


def _keep(run_dir: Path, release: str, replied: dict[str, ReleaseFacts], asking: Asking) -> None:
    folder = run_dir / "releases"
    folder.mkdir(exist_ok=True)
    found = Collected(replied=replied, refused=asking.refused, absent=asking.absent)
    write_json_atomic(folder / f"{release}.json", json.loads(found.model_dump_json()))


def _collect(
    link: Link,
    resolved: Resolved,
    run_dir: Path,
    board: Board,
    names: Names,
    expected: Sequence[str],
    release: str,
    length: int,
) -> None:
    """Ask every site for a release, of whose sum `length` is the length; keep what comes."""
    given = read_collected(run_dir, FINAL).replied
    replied = read_collected(run_dir, release).replied
    sums = {site: total for site, (total, _) in read_sums(run_dir, release).items()}

    def take(site: str, content: RecordDict) -> None:
        total, facts = read_release(content, length)
        if (facts.study_hash, facts.release) != (resolved.hash, release):
            raise Refusal("bad-message", "it answers another question")
        if release == GATE and facts.verdict not in ("released", "not released"):
            raise Refusal("bad-message", "it is no verdict")
        if release == GATE and (site not in given or given[site].model != facts.model):
            raise Refusal("bad-message", "its verdict is on another generator")
        if total is None if release == FIDELITY else total is not None and facts.verdict != "released":
            raise Refusal("bad-message", "a sum is missing, or one too many")
        replied[site] = facts
        if total is not None:
            sums[site] = total

    asking = Asking(release, release_order(ReleaseOrder(release, resolved.hash)), set(replied))
    ask_sites(link, resolved, board, names, expected, asking, take)
    (run_dir / "releases").mkdir(exist_ok=True)
    write_atomic(run_dir / "releases" / f"{release}.safetensors", save(sums))
    _keep(run_dir, release, replied, asking)


@dataclass
class Asking:
    """One question to all sites.

    Attributes:
        release: Its name; messages have the type `query.release`.
        content: What every site is sent.
        done: Sites that need not be asked any more.
        refused: Site to its refusal.
        absent: Sites that did not answer in time.
    """

    release: str
    content: RecordDict
    done: set[str]
    kind: str = "query.release"
    refused: dict[str, str] = field(default_factory=dict)
    absent: list[str] = field(default_factory=list)
    pending: dict[str, str] = field(default_factory=dict)
    again: dict[str, float] = field(default_factory=dict)


def ask_sites(
    link: Link,
    resolved: Resolved,
    board: Board,
    names: Names,
    expected: Sequence[str],
    asking: Asking,
    take: Take,
) -> None:
    """Ask sites as they appear, and again when the way to them broke, until all answered or time is over.

    Sites that are not there get the grace period from when all others have answered.
    """
    settings = resolved.study.federation
    end = time.monotonic() + settings.deadline_s
    board.phase(f"collecting {asking.release}", settings.deadline_s)
    everyone, online, looked, grace = set(expected), link.online(names, resolved), time.monotonic(), False
    while (now := time.monotonic()) < end:
        if now - looked >= NAMES_S:
            online, looked = link.online(names, resolved), now
        everyone |= online.keys()
        waiting = everyone - asking.done - asking.refused.keys()
        if not waiting:
            break
        if not grace and not asking.pending and not waiting & online.keys():
            grace, end = True, min(end, now + settings.grace_s)
        for site in sorted(waiting & online.keys() - set(asking.pending.values())):
            if asking.again.get(site, 0.0) <= now:
                _ask(link, asking, site, online[site], end - now, board)
        heard = [
            reply for i in list(asking.pending) for reply in link.call(link.grid.pull_messages, [i]) or ()
        ]
        for reply in heard:
            _take(asking, reply, take, board)
        if not heard:
            time.sleep(max(0.0, min(POLL_S, end - time.monotonic())))
    asking.absent = sorted(everyone - asking.done - asking.refused.keys())
    for site in asking.absent:
        board.site(site, ABSENT)
    told = {"refused": asking.refused, "absent": asking.absent}
    say(
        f"{asking.release}: {len(asking.done)} of {len(everyone)} sites answered"
        + "".join(f", {what}: {sites}" for what, sites in told.items() if sites)
    )


def _ask(link: Link, asking: Asking, site: str, node: int, ttl: float, board: Board) -> None:
    message = Message(
        asking.content,
        dst_node_id=node,
        message_type=asking.kind,
        ttl=max(1e-3, ttl),
        group_id=asking.release,
    )
    ids = list(link.call(link.grid.push_messages, [message]) or ())
    asking.again[site] = time.monotonic() + ASK_AGAIN_S
    if ids and ids[0]:
        asking.pending[ids[0]] = site
        board.site(site, ASKED, down=payload_bytes(asking.content))


def _take(asking: Asking, reply: Message, take: Take, board: Board) -> None:
    site = asking.pending.pop(reply.metadata.reply_to_message_id, None)
    if site is None:
        return
    if reply.has_error():
        code = reply.error.code
        if code in ASK_AGAIN:
            board.site(site, NOT_HERE)
            return
        reason = reason_of(code) or REASONS["site-fault"]
        asking.refused[site] = f"{reason.code} {reason.name}"
        board.site(site, f"refused: {asking.refused[site]}")
        return
    try:
        take(site, reply.content)
    except Refusal as refusal:
        words = ascii(refusal.detail)[1:-1][:200]  # it may quote what the site sent
        asking.refused[site] = f"thrown away: {refusal.reason.code} {refusal.reason.name}: {words}"
        board.site(site, asking.refused[site])
        return
    asking.done.add(site)
    board.site(site, REPLIED, up=payload_bytes(reply.content))
