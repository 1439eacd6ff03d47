"""A site approves a *resolved* study: code, configuration, base, data snapshot and policy together.

What is bound is hashed; a round refuses to start when any of it has drifted and says which
(DESIGN.md, "Approval").
"""

from __future__ import annotations

import hashlib
import json
import secrets
from importlib import resources
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from polyclinic.client.ledger import open_ledger
from polyclinic.client.policy import Policy, check_noise, check_study, load_policy
from polyclinic.common.data.cache import build_cache, snapshot_hash
from polyclinic.common.data.table import Record
from polyclinic.common.files import sha256_file, write_atomic
from polyclinic.common.generators.base import BaseFiles, load_family
from polyclinic.common.privacy.accounting import calibrate, claim
from polyclinic.common.privacy.tap import toss_coins
from polyclinic.common.refusals import BadInput, Refusal
from polyclinic.common.study import Resolved


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
        epsilon: Of the whole schedule; None where not private.
        noise: Where the noise comes from, in words.
        coins: The audit tap's tosses, one a coordinate; they stay here until the last round's reply.
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
    noise: str = ""
    coins: str = ""


def code_hash() -> str:
    """Hash every installed Python file of the rooms that run at a site."""
    digest = hashlib.sha256()
    for room in ("common", "client"):
        root = Path(str(resources.files(f"polyclinic.{room}")))
        for path in sorted(root.rglob("*.py")):
            digest.update(f"{room}/{path.relative_to(root)} {sha256_file(path)}\n".encode())
    return digest.hexdigest()


def prepare_and_approve(
    home: Path, site: str, resolved: Resolved, records: list[Record], files: BaseFiles
) -> Approval:
    """Cache a site's images, check the policy, earmark the budget and write the approval.

    Args:
        home: The site's home; holds policy.toml and ledger.jsonl.
        site: Name of the site.
        resolved: The study to approve.
        records: The accepted table.
        files: Where the frozen parts lie here; their hash must be the study's.

    Raises:
        Refusal: The policy forbids it, or the base is another one.
        BadInput: Too few patients, or an image that cannot be read.
    """
    study = resolved.study
    policy = load_policy(home)
    known = find_approval(home, resolved.hash)
    if known:
        return known
    check_study(policy, study)
    patients = {record.patient for record in records}
    if len(patients) < policy.min_patients:
        raise BadInput(
            f"site {site}: fewer patients than min_patients = {policy.min_patients} in its policy; "
            "bring more data or lower that limit"
        )
    sigma, epsilon = noise_of(policy, resolved)
    check_noise(policy, study, sigma)
    family = load_family(study.generator, study.data.image_size, files.vae, frozen=files.frozen)
    if family.base_hash != resolved.base_hash:
        raise Refusal("approval-drift", "the base here is not the study's")
    index = build_cache(records, family, study.data, home / "cache")
    approval = Approval(
        id=secrets.token_hex(8),
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
        noise=study.privacy.noise_words,
        coins=toss_coins(study.privacy.canaries) if study.privacy.enabled else "",
    )
    with open_ledger(home) as ledger:
        # A crash between earmark and approval leaves an earmark that nothing can draw on: give it back.
        for line in [x for x in ledger.lines if x["kind"] == "earmark" and x["study"] == resolved.hash]:
            ledger.close(line["approval"])
        ledger.earmark(
            approval=approval.id,
            study=resolved.hash,
            sigma=sigma,
            rate=study.privacy.sampling_rate,
            steps=study.total_steps,
            delta=study.privacy.delta,
            epsilon=float("inf") if epsilon is None else epsilon,
            cap=policy.epsilon_total,
            delta_cap=policy.delta_cap,
        )
        if approval.coins:
            ledger.tap(approval.id, approval.coins)
        folder = home / "approvals"
        folder.mkdir(mode=0o700, exist_ok=True)
        write_atomic(
            folder / f"{resolved.hash}.json", approval.model_dump_json(indent=1).encode(), mode=0o600
        )
    return approval


def noise_of(policy: Policy, resolved: Resolved) -> tuple[float, float | None]:
    """Smallest sigma within min(study's epsilon, the site's cap), and what it claims (rule 5)."""
    privacy, steps = resolved.study.privacy, resolved.study.total_steps
    if not privacy.enabled:
        return 0.0, None
    target = min(privacy.epsilon, policy.epsilon_per_study)
    sigma = calibrate(target, privacy.delta, privacy.sampling_rate, steps)
    return sigma, claim(((sigma, privacy.sampling_rate, steps),), privacy.delta)


def find_approval(home: Path, study_hash: str) -> Approval | None:
    """Read the approval of a study, if the site gave one."""
    path = home / "approvals" / f"{study_hash}.json"
    return Approval.model_validate(json.loads(path.read_text())) if path.exists() else None


def require_approval(home: Path, study_hash: str) -> tuple[Approval, Policy]:
    """Find the approval of a study and refuse if anything it binds has drifted.

    Raises:
        Refusal: `not-approved`, or `approval-drift` naming what drifted.
    """
    # The hash comes from a message and names a file: nothing but a hash may pass.
    if len(study_hash) != 64 or set(study_hash) - set("0123456789abcdef"):
        raise Refusal("bad-message", "study hash")
    approval = find_approval(home, study_hash)
    if approval is None:
        raise Refusal("not-approved", study_hash[:8])
    if approval.resolved.hash != study_hash:
        raise Refusal("approval-drift", "the study")
    if approval.code_hash != code_hash():
        raise Refusal("approval-drift", "the installed code")
    if approval.policy_hash != sha256_file(home / "policy.toml"):
        raise Refusal("approval-drift", "policy.toml")
    policy = load_policy(home)
    check_study(policy, approval.resolved.study)
    return approval, policy
