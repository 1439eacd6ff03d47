"""Every way to say no: one table of code, cause and remedy.

Two kinds of "no" exist. `BadInput` is a mistake in what a person gave us (exit code 2). `Refusal`
is a site or server that may not do what it was asked (exit code 3); it has a code that travels to
the coordinator, so its text is fixed here and never carries anything private.
"""

from __future__ import annotations

from dataclasses import dataclass


class BadInput(Exception):
    """A mistake in a file or argument; the message names the file, the field and the fix."""

    exit_code = 2


@dataclass(frozen=True)
class Reason:
    """One row of the table: the code that travels, the cause and the remedy in plain words."""

    code: int
    name: str
    cause: str
    remedy: str


REASONS: dict[str, Reason] = {
    reason.name: reason
    for reason in (
        Reason(1001, "not-approved", "the site has not approved this study",
               "run `polyclinic-client approve STUDY` at the site"),
        Reason(1002, "approval-drift", "something the approval binds has changed since",
               "look at `polyclinic-client status` at the site and approve again"),
        Reason(1003, "budget-exhausted", "the site's privacy budget for this study is used up",
               "nothing: the site has given what it may give"),
        Reason(1004, "not-private-forbidden", "the study trains without privacy",
               "set `allow_not_private = true` in the site's own policy.toml, if that is meant"),
        Reason(1005, "test-randomness-forbidden", "the study asks for fixed randomness",
               "set `allow_test_randomness = true` in the site's own policy.toml; private runs never may"),
        Reason(1006, "policy-forbids", "the site's policy does not allow this study",
               "compare the study with the site's policy.toml"),
        Reason(1007, "round-already-answered", "the site has answered this round for another state",
               "resume the run from the checkpoint whose reply was released"),
        Reason(1008, "ledger-missing", "the site's privacy ledger is missing",
               "restore ledger.jsonl from the site's backup; a fresh start would forget what was spent"),
        Reason(1009, "ledger-broken", "the site's privacy ledger is not whole",
               "run `polyclinic-client ledger verify` at the site"),
        Reason(1010, "round-too-late", "the round's deadline has passed",
               "raise federation.deadline_s if the site is slow"),
        Reason(1011, "bad-message", "the message is not one this site understands",
               "use the same Polyclinic release on server and site"),
        Reason(1012, "bad-state", "the state sent has other names, shapes or types than the generator",
               "check that server and site run the same study and code version"),
        Reason(1013, "site-not-ready", "the site's cache or snapshot is not there",
               "run `polyclinic-client cache` at the site"),
        Reason(1014, "site-fault", "the site had a fault of its own while it trained",
               "ask the site's engineer to read its local journal"),
        Reason(1015, "accountant-disagrees", "two privacy accountants disagree about this study",
               "choose a larger sampling rate or fewer steps, and report it to Polyclinic"),
        Reason(1016, "self-test-failed", "the site's start-up self-test of clipping failed",
               "do not train; report it to Polyclinic with the code version"),
        Reason(1017, "another-process", "another process holds this site's ledger",
               "wait for it to end, or stop it"),
        Reason(1018, "too-few-replies", "fewer sites answered than a release needs",
               "start the missing sites, or lower federation.min_sites before approval"),
        Reason(1019, "reply-broken", "the site's stored reply to this round is gone or was changed",
               "restore it from the site's backup; training again would release the round twice"),
        Reason(1030, "request-not-proven", "neither kit nor keys vouch for this enrolment request",
               "ask for the file once more; if it stays so, telephone the site and reissue its kit"),
        Reason(1031, "secret-used", "the kit's one-time secret was used or withdrawn before",
               "telephone the site, and send it a new kit from `polyclinic-server reissue SITE`"),
        Reason(1032, "kit-expired", "the time for using this kit is over",
               "the coordinator writes a new one with `polyclinic-server reissue SITE`"),
        Reason(1033, "key-known", "a key in this request belongs, or once belonged, to an enrolled site",
               "make new ones at the site from a kit of `polyclinic-server reissue SITE`"),
        Reason(1034, "certificate-refused", "the certificate is not the answer to this site's request",
               "ask the coordinator for the file that `polyclinic-server enroll` wrote for this request"),
        Reason(1040, "gate-undecided", "nobody at the site has decided about the final generator yet",
               "run `polyclinic-client leakage RUN` at the site, then again with --release or --veto"),
        Reason(1041, "final-already-given", "the site holds another final generator of this study",
               "look at the site's `final` folder, and at who sent two; a gate judges one generator"),
        Reason(1042, "final-missing", "the site has not been given the final generator",
               "`polyclinic-server run STUDY --resume` sends it after the last round"),
        Reason(1043, "gate-decided", "a person at the site has decided about this study already",
               "nothing: what was said once may have been sent"),
        Reason(1020, "run-unfinished", "the run ended before its last round",
               "see `polyclinic-server logs RUN`, mend what it names, and go on with "
               "`polyclinic-server run STUDY --resume`"),
        Reason(1021, "not-healthy", "something that should run does not",
               "look into the named log, or start again"),
        Reason(1044, "charged-elsewhere", "another ledger of this hospital charges patients of this data",
               "approve from the home that holds that ledger; or take those patients out of one of the two"),
        Reason(1050, "implausible-norm", "the difference is longer than the study's steps can make it",
               "look at the site's code and data; whatever it sent was thrown away"),
        Reason(1051, "hash-mismatch", "a tensor did not arrive as it was sent",
               "look for what changes messages on the way, and run again"),
        Reason(1060, "bundle-forbidden", "the run's bundle holds more than Polyclinic's configuration",
               "start the run with `polyclinic-server run`; a site runs only the code installed there"),
        Reason(1061, "clock-off", "the message was made in the site's future: the two clocks disagree",
               "set both clocks by a time server (NTP)"),
        Reason(1062, "outside-hours", "the site does not begin rounds at this hour",
               "ask again within the hours that the site agreed to, or raise federation.deadline_s"),
        Reason(1063, "noise-below-floor", "the study would add less noise than the site's floor",
               "lower privacy.epsilon, or take fewer steps"),
        Reason(1064, "journal-broken", "the site's journal is not whole",
               "run `polyclinic-client journal verify` at the site, find out why, and move journal.jsonl and "
               "journal.head aside"),
        Reason(1065, "journal-unwritable", "the site cannot write its journal",
               "free disk space at the site and see its site.log"),
        Reason(1066, "disk-full", "the site has no room on its disk for a reply",
               "free disk space at the site; nothing was spent"),
        Reason(1067, "gpu-memory-short", "the site's GPU has less free memory than its policy sets aside",
               "wait until the GPU is free, or lower max_gpu_memory_gb in the site's own policy.toml"),
        Reason(1068, "gpu-too-small", "the study's training does not fit the GPU that is declared for a site",
               "change the study, or correct cost.gpu_memory_gb or the site's gpu_memory_gb"),
    )
}  # fmt: skip


class Refusal(Exception):
    """A site or the server may not do what it was asked.

    Args:
        name: Key of `REASONS`.
        detail: For the local reader only; it never travels.
    """

    exit_code = 3

    def __init__(self, name: str, detail: str = "") -> None:
        self.reason = REASONS[name]
        self.detail = detail
        super().__init__(self.sentence())

    def sentence(self) -> str:
        """Return cause, detail and remedy as one sentence."""
        detail = f" ({self.detail})" if self.detail else ""
        reason = self.reason
        return f"refused [{reason.code} {reason.name}]: {reason.cause}{detail}; {reason.remedy}"


def reason_of(code: int) -> Reason | None:
    """Find the row with this code."""
    return next((reason for reason in REASONS.values() if reason.code == code), None)
