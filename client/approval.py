"""A site approves a *resolved* study: code, configuration, base, data snapshot and policy together.

What is bound is hashed; a round refuses to start when any of it has drifted and says which
(DESIGN.md, "Approval").
"""

from __future__ import annotations

import json
import secrets
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from polyclinic.client.binding import (
    base_hash_of,
    changed_dependencies,
    code_hash,
    data_drifted,
    dependencies,
    watch_data,
)
from polyclinic.client.ledger import Ledger
from polyclinic.client.ledger_books import Books, open_books
from polyclinic.client.ledger_chain import inspect
from polyclinic.client.policy import Policy, check_noise, check_study, load_policy
from polyclinic.client.population import hold_apart
from polyclinic.common.calibration import release_noise, study_noise
from polyclinic.common.data.cache import build_cache
from polyclinic.common.data.holdout import position
from polyclinic.common.data.pixels import snapshot_hash
from polyclinic.common.data.table import Record
from polyclinic.common.device import pick_device
from polyclinic.common.features.efficientnet import efficientnet
from polyclinic.common.features.extractor import Extractor
from polyclinic.common.files import sha256_file, write_atomic
from polyclinic.common.generators.base import BaseFiles, load_family
from polyclinic.common.generators.quantized import check_quantized
from polyclinic.common.privacy.accounting import claim
from polyclinic.common.privacy.tap import toss_coins
from polyclinic.common.refusals import BadInput, Refusal
from polyclinic.common.study import CODE_VERSION, Resolved, Study, differences


class Approval(BaseModel):
    """What a person at the site agreed to, and what it is bound to.

    Attributes:
        id: Random; it leaves the site, the hashes of private things below do not.
        site: Name of the site.
        resolved: The whole study.
        code_hash: SHA-256 over the installed Polyclinic files.
        policy_hash: SHA-256 of policy.toml.
        snapshot_hash: Content of the accepted table.
        cache_index: Name of the latent cache's index, itself a hash.
        files: Where the frozen parts lie at this site.
        declared_patients: Public size of the site, from its policy.
        sigma: Noise of the whole schedule; 0 where not private.
        divisor: Public constant a sum is divided by: q x declared patients.
        epsilon: Of the rounds this site takes part in; None where not private.
        rounds: How many of the study's rounds, from the first, were set aside; None: all of them.
        dependencies: Distribution to its version and the hash of its RECORD.
        data: The data folder; None in a simulation, whose sites have no folder of their own.
        noise: Where the noise comes from, in words.
        coins: The audit tap's tosses, one a coordinate; they stay here until the last round's reply.
        releases: Name of each charged extra release to its noise, in units of what one patient adds.
        held_out_index: As `cache_index`, of the patients kept out of training; empty where nobody is.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    id: str
    site: str
    resolved: Resolved
    code_hash: str
    policy_hash: str
    snapshot_hash: str
    cache_index: str
    files: BaseFiles
    declared_patients: int
    sigma: float
    divisor: float
    epsilon: float | None
    rounds: int | None = None
    dependencies: dict[str, str] = {}
    data: Path | None = None
    noise: str = ""
    coins: str = ""
    releases: dict[str, float] = {}
    held_out_index: str = ""


def prepare_and_approve(
    home: Path,
    site: str,
    resolved: Resolved,
    records: list[Record],
    files: BaseFiles,
    *,
    data: Path | None = None,
    rounds: int | None = None,
    renew: bool = False,
) -> Approval:
    """Cache a site's images, check the policy, earmark the budget and write the approval.

    Args:
        home: The site's home; holds policy.toml and ledger.jsonl.
        site: Name of the site.
        resolved: The study to approve.
        records: The accepted table.
        files: Where the frozen parts lie here; their hash must be the study's.
        data: The folder the table came from; remembered, and watched from now on.
        rounds: Take part in the first so many rounds only, since the budget has no room for more; later
            ones are refused. None: in all.
        renew: A person saw what drifted since this study was approved and approves it as it is now;
            id, budget, rounds, noise and declared size stay what they were.

    Raises:
        Refusal: The policy forbids it, the base is another one, or another ledger charges a patient of it.
        BadInput: Too few patients, an image that cannot be read, another release, or a renewal that would
            need other noise.
    """
    study = resolved.study
    policy = load_policy(home)
    known = open_approval(home, resolved.hash)
    if known and not (renew and drift(home, known)):
        return known
    if resolved.code_version != CODE_VERSION:
        raise BadInput(
            f"the study was made with Polyclinic {resolved.code_version}, here is {CODE_VERSION}; install "
            "the coordinator's release, or ask for the study made anew"
        )
    check_study(policy, study, resolved.base_hash)
    patients = {record.patient for record in records}
    if len(patients) < policy.min_patients:
        raise BadInput(
            f"site {site}: fewer patients than min_patients = {policy.min_patients} in its policy; "
            "bring more data or lower that limit"
        )
    sigma, releases, epsilon = noise_of(policy, resolved, rounds)
    if known:
        _check_renewal(known, policy, sigma)
        sigma, releases, epsilon, rounds = known.sigma, known.releases, known.epsilon, known.rounds
    check_noise(policy, study, sigma)
    check_base(resolved, files)
    if data is not None:
        hold_apart(home, study.data, data, records)
    extractor = site_extractor(resolved)
    family = load_family(study, files, device=pick_device(study.training.device), network=False)
    trained, held_out = set_apart(records, resolved)
    index = build_cache(trained, family, study.data, home / "cache", extractor)
    held_out_index = build_cache(held_out, family, study.data, home / "cache", extractor) if held_out else ""
    approval = Approval(
        id=known.id if known else secrets.token_hex(8),
        site=site,
        resolved=resolved,
        code_hash=code_hash(),
        policy_hash=sha256_file(home / "policy.toml"),
        snapshot_hash=snapshot_hash(records),
        cache_index=index,
        files=files,
        declared_patients=policy.declared_patients,
        sigma=sigma,
        divisor=study.privacy.sampling_rate * policy.declared_patients,
        epsilon=epsilon,
        rounds=rounds,
        dependencies=dependencies(),
        data=data and data.resolve(),
        noise=study.privacy.noise_words,
        releases=releases,
        held_out_index=held_out_index,
        coins=known.coins if known else toss_coins(study.privacy.canaries) if study.privacy.enabled else "",
    )
    with open_books(home) as ledger:
        if not known:
            _set_aside(ledger, approval, policy)
        _write(home, approval, records)
    return approval


def check_base(resolved: Resolved, files: BaseFiles) -> None:
    """Refuse a base that is not the study's, before any library is let near its files.

    Raises:
        Refusal: `approval-drift`.
        BadInput: It cannot be loaded here as the study wants it.
    """
    check_quantized(resolved.study.generator, pick_device(resolved.study.training.device))
    found, wanted = base_hash_of(files, resolved.study), resolved.base_hash
    if found != wanted:
        place, study = files.vae or files.pipeline, resolved.study.generator
        named = f", which is {study.base} at revision {study.base_revision}" if study.large else ""
        raise Refusal(
            "approval-drift",
            f"the base here is not the study's{named}: {place} hashes to {found[:12]}, not {wanted[:12]}",
        )


def site_extractor(resolved: Resolved) -> Extractor | None:
    """Find the study's public image features here; None where it asks for none.

    Raises:
        Refusal: `approval-drift` where the extractor here is not the study's.
        BadInput: It is not installed.
    """
    if resolved.public is None:
        return None
    extractor = efficientnet()
    if extractor.weights != resolved.public.extractor:
        raise Refusal("approval-drift", f"{extractor.name} here is not the study's feature extractor")
    return extractor


def set_apart(records: list[Record], resolved: Resolved) -> tuple[list[Record], list[Record]]:
    """Keep some patients out of training where a leakage gate asks for it: by a keyed hash of their ids.

    Whether a patient is kept out depends on nobody else (PRIVACY.md, rule 7).
    """
    asked = resolved.study.releases
    share = asked.held_out if asked.leakage_gate else 0.0
    key = f"{resolved.study.name}|held-out"
    parts: tuple[list[Record], list[Record]] = ([], [])
    for record in records:
        parts[position(record.patient, key) < share].append(record)
    return parts


def _check_renewal(known: Approval, policy: Policy, sigma: float) -> None:
    for what, same in (
        ("declared_patients", policy.declared_patients == known.declared_patients),
        ("epsilon_per_study", sigma <= known.sigma),
    ):
        if not same:
            raise BadInput(
                f"policy.toml: `{what}` was fixed when this study was approved; put it back, or end the "
                "study with `polyclinic-client close` and approve it anew"
            )


def _set_aside(ledger: Books, approval: Approval, policy: Policy) -> None:
    """Earmark the schedule of the approved rounds, and commit to the tap's coins."""
    study, epsilon = approval.resolved.study, approval.epsilon
    # A crash between earmark and approval leaves an earmark that nothing can draw on: give it back.
    for line in [x for x in ledger.lines if x["kind"] == "earmark" and x["study"] == approval.resolved.hash]:
        ledger.close(line["approval"])
    ledger.earmark(
        approval=approval.id,
        study=approval.resolved.hash,
        sigma=approval.sigma,
        rate=study.privacy.sampling_rate,
        steps=_steps(study, approval.rounds),
        delta=study.privacy.delta,
        epsilon=float("inf") if epsilon is None else epsilon,
        cap=policy.epsilon_total,
        delta_cap=policy.delta_cap,
        releases=approval.releases,
    )
    if approval.coins:
        ledger.tap(approval.id, approval.coins)


def _write(home: Path, approval: Approval, records: list[Record]) -> None:
    folder = home / "approvals"
    folder.mkdir(mode=0o700, exist_ok=True)
    if approval.data is not None:  # before the approval, which says that it is there
        watch_data(_watched(home, approval), home, approval.data, approval.resolved.study.data, records)
    if approval.resolved.study.releases.leakage_gate:  # the gate looks at images again, months later
        rows = [[r.patient, str(r.image.resolve()), r.part] for r in records]
        # In ASCII: a name need be no UTF-8.
        write_atomic(images_path(home, approval), json.dumps(rows).encode(), mode=0o600)
    path = folder / f"{approval.resolved.hash}.json"
    write_atomic(path, approval.model_dump_json(indent=1).encode(), mode=0o600)


def images_path(home: Path, approval: Approval) -> Path:
    """Where the approved table's patients and images are listed; it never leaves."""
    return home / "approvals" / f"{approval.resolved.hash}.images"


def _watched(home: Path, approval: Approval) -> Path:
    return home / "approvals" / f"{approval.resolved.hash}.data"


def noise_of(
    policy: Policy, resolved: Resolved, rounds: int | None = None
) -> tuple[float, dict[str, float], float | None]:
    """Noise of the rounds and of each extra release, and what all of it together claims (rule 5).

    The noise is the whole schedule's, whose claim stays within min(study's epsilon, the site's cap): a site
    that takes part in fewer rounds claims less, it does not add less noise.

    Raises:
        BadInput: `rounds` is no number of rounds of this study.
    """
    study = resolved.study
    if rounds is not None and not 1 <= rounds <= study.training.rounds:
        raise BadInput(f"--rounds {rounds}: {study.name} has {study.training.rounds}; give 1 to that many")
    if not study.privacy.enabled:
        return 0.0, release_noise(study.privacy, study.releases), None
    target = min(study.privacy.epsilon, policy.epsilon_per_study)
    sigma, releases, (*beside, (_, rate, _)) = study_noise(study, target)
    return sigma, releases, claim((*beside, (sigma, rate, _steps(study, rounds))), study.privacy.delta)


def _steps(study: Study, rounds: int | None) -> int:
    return study.total_steps if rounds is None else rounds * study.training.steps_per_round


def find_approval(home: Path, study_hash: str) -> Approval | None:
    """Read the approval of a study, if the site gave one."""
    path = home / "approvals" / f"{study_hash}.json"
    return Approval.model_validate(json.loads(path.read_text())) if path.exists() else None


def list_approvals(home: Path) -> list[Approval]:
    """Read every approval of a site, by study name, the oldest first."""
    paths = sorted((home / "approvals").glob("*.json"), key=lambda path: path.stat().st_mtime_ns)
    found = [Approval.model_validate(json.loads(path.read_text())) for path in paths]
    return sorted(found, key=lambda approval: approval.resolved.study.name)


def open_approval(home: Path, study_hash: str) -> Approval | None:
    """Find the approval of a study that is not closed."""
    approval = find_approval(home, study_hash)
    if approval is None:
        return None
    closed = Ledger(home, inspect(home)[0]).of(approval.id, "close")
    return None if closed else approval


def require_approval(home: Path, study_hash: str) -> tuple[Approval, Policy]:
    """Find the approval of a study and refuse if anything it binds has drifted.

    Raises:
        Refusal: `not-approved`, or `approval-drift`; what drifted, or which fields of the study differ from
            one that is approved, is for the local reader.
    """
    # The hash comes from a message and names a file: nothing but a hash may pass.
    if len(study_hash) != 64 or set(study_hash) - set("0123456789abcdef"):
        raise Refusal("bad-message", "study hash")
    approval = find_approval(home, study_hash)
    if approval is None:
        raise Refusal("not-approved", _stranger(home, study_hash))
    found = drift(home, approval, study_hash)
    if found:
        raise Refusal("approval-drift", "; ".join(found))
    policy = load_policy(home)
    check_study(policy, approval.resolved.study, approval.resolved.base_hash)
    return approval, policy


def drift(home: Path, approval: Approval, study_hash: str | None = None) -> list[str]:
    """Name everything an approval binds that is no longer what was approved; cheap but for a base's hash.

    Args:
        home: The site's home.
        approval: As it was read.
        study_hash: The study it was found by.
    """
    found = []
    if study_hash is not None and approval.resolved.hash != study_hash:
        found.append("the study")
    if approval.code_hash != code_hash():
        found.append("the installed code")
    found += changed_dependencies(approval.dependencies)
    policy = home / "policy.toml"
    if not policy.exists() or approval.policy_hash != sha256_file(policy):
        found.append("policy.toml")
    try:
        base = base_hash_of(approval.files, approval.resolved.study)
    except BadInput:
        base = ""
    if base != approval.resolved.base_hash:
        found.append("the base's files")
    if approval.data is not None:
        data = approval.resolved.study.data
        if data_drifted(_watched(home, approval), home, approval.data, data, approval.snapshot_hash):
            found.append("the data")
    return found


def _stranger(home: Path, study_hash: str) -> str:
    """Say what is known of a study that nobody approved: a coordinator may have edited one that was."""
    approved = list_approvals(home)
    path = home / "kit" / "study.json"
    if path.exists():
        resolved = Resolved.model_validate(json.loads(path.read_text(encoding="utf-8")))
        same = [x for x in approved if x.resolved.study.name == resolved.study.name]
        if resolved.hash == study_hash and same:
            changes = "; ".join(differences(same[-1].resolved, resolved))
            return f"{resolved.run_name}; against the approved {same[-1].resolved.run_name}: {changes}"
    names = ", ".join(approval.resolved.run_name for approval in approved) or "nothing"
    return (
        f"{study_hash[:8]}; approved here: {names}; `polyclinic-client approve NEWSTUDY` says field by field "
        "what differs"
    )
