"""One study in a real federation, from the coordinator's terminal: launch, follow, judge, report."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from polyclinic.common.files import write_json_atomic
from polyclinic.common.progress import duration, say, track
from polyclinic.common.refusals import BadInput, Refusal
from polyclinic.common.study import Resolved, Study, differences
from polyclinic.server import node
from polyclinic.server.base import prepare_base
from polyclinic.server.checkpoints import load_record, rounds_done
from polyclinic.server.collect import missing
from polyclinic.server.evaluation.judge import Judge
from polyclinic.server.kits import read_run
from polyclinic.server.progress_file import Progress, read_progress
from polyclinic.server.provisioning import enrolled
from polyclinic.server.reference import Reference
from polyclinic.server.report.html import write_report
from polyclinic.server.report.metrics import Metrics
from polyclinic.server.run_folder import open_run_folder
from polyclinic.server.summary import summarise

POLL_S = 1.0
ASK_S = 15.0  # Flower's command line costs a second of a core: the run's own progress file is read instead
AWAY = 4  # so often in a row the SuperLink may not answer


def run_study(home: Path, study: Study, reference: Reference, *, resume: bool, detach: bool) -> Path:
    """Run a study with the sites that are enrolled.

    Args:
        home: The coordinator's home; `polyclinic-server start` runs there.
        study: The study.
        reference: Public images it is judged by.
        resume: Go on after the last released round.
        detach: Return when it is launched.

    Returns:
        The run's folder.

    Raises:
        BadInput: It was run already, or the coordinator is not started.
        Refusal: The run ended before its last round.
    """
    base = prepare_base(home, study, reference)
    run_dir = home / "runs" / base.resolved.run_name
    expected = sorted(enrolled(home, run_dir.name))
    if not expected:
        raise BadInput(_not_provisioned(home, base.resolved))
    if len(expected) < study.federation.min_sites:
        raise BadInput(
            f"{len(expected)} sites are enrolled for {run_dir.name} ({', '.join(expected)}), and "
            f"federation.min_sites = {study.federation.min_sites}: provision and enroll more"
        )
    done = rounds_done(run_dir)
    if done and not resume:
        raise BadInput(
            f"{run_dir} is there already; go on with --resume, or remove that folder to start anew"
        )
    running = running_attempt(home, run_dir)
    if running:
        say(f"{run_dir.name} is running already; following it")
    elif not done or done[-1] < study.training.rounds or missing(base.resolved, run_dir, expected):
        open_run_folder(run_dir, base)
        write_json_atomic(run_dir / "sites.json", sorted(expected))
        (run_dir / "progress.json").unlink(missing_ok=True)
        node.sync_sites(home)
        running = node.launch(home, run_dir.name)
        write_json_atomic(run_dir / "attempts.json", [*attempts(run_dir), running])
    say(f"run {run_dir}" + ("" if study.privacy.enabled else "  [NOT PRIVATE]"))
    if detach:
        return run_dir
    judge = Judge(run_dir, base.resolved, reference, base.files, home / "features")
    judge.judge_missing()
    if running:
        follow(home, run_dir, running, judge)
    done = rounds_done(run_dir)
    if done[-1] < study.training.rounds:
        progress = read_progress(run_dir)
        raise Refusal(
            "run-unfinished",
            f"{done[-1]} of {study.training.rounds} rounds are released"
            + (f"; {progress.phase}" if progress else ""),
        )
    return run_dir


def _not_provisioned(home: Path, resolved: Resolved) -> str:
    """Say why no site takes part: most often the study was edited after the sites were given it."""
    earlier = [
        read_run(home, path.parent.name)[0]
        for path in (home / "runs").glob(f"{resolved.study.name}-*/study.json")
        if path.parent.name != resolved.run_name and enrolled(home, path.parent.name)
    ]
    changed = "; ".join(
        f"against {old.run_name}, which sites were given: {', '.join(differences(old, resolved))}"
        for old in earlier
    )
    return (
        f"no site was given a kit for {resolved.run_name}{' (' + changed + ')' if changed else ''}; "
        "run `polyclinic-server provision` for this study and have every site approve it, or undo the change"
    )


def follow(home: Path, run_dir: Path, attempt: int, judge: Judge) -> None:
    """Show an attempt until it ends, and judge its checkpoints as they come."""
    total = judge.study.training.rounds
    shown, asked, away = "", time.monotonic(), 0
    with track(run_dir.name, total) as advance:
        advance(rounds_done(run_dir)[-1])
        done = rounds_done(run_dir)[-1]
        while True:
            progress = read_progress(run_dir)
            line = sites_line(progress) if progress else "waiting for the ServerApp"
            if line != shown:
                say(line)
                shown = line
            now = rounds_done(run_dir)[-1]
            if now > done:
                say(round_line(run_dir, now))
                advance(now - done)
                done = now
            judge.judge_missing()
            over = progress is not None and progress.phase.startswith(("finished", "failed"))
            if not over and time.monotonic() - asked > ASK_S:
                asked = time.monotonic()
                try:
                    over, away = str(node.attempt(home, attempt)["status"]).startswith("finished"), 0
                except BadInput as error:  # the SuperLink is being started again: the run outlives that
                    away += 1
                    if away > AWAY:
                        raise
                    say(str(error))
            if over:
                return
            time.sleep(POLL_S)


def report(run_dir: Path) -> Metrics:
    """Write a run's report; of a real run, nothing in it was measured at a site."""
    metrics = summarise(run_dir)
    write_report(run_dir, metrics)
    return metrics


def attempts(run_dir: Path) -> list[int]:
    """Flower's ids of all attempts at a run, oldest first."""
    path = run_dir / "attempts.json"
    return [int(number) for number in json.loads(path.read_text())] if path.exists() else []


def running_attempt(home: Path, run_dir: Path) -> int | None:
    """The attempt that is running now, if there is one."""
    before = attempts(run_dir)
    if before and not str(node.attempt(home, before[-1])["status"]).startswith("finished"):
        return before[-1]
    return None


def sites_line(progress: Progress) -> str:
    """Where a run stands, in one line."""
    states = ", ".join(f"{site} {state}" for site, state in sorted(progress.sites.items()))
    return f"round {progress.round} of {progress.rounds}, {progress.phase}: {states or 'no site yet'}"


def round_line(run_dir: Path, number: int) -> str:
    """What a released round brought, in one line."""
    record = load_record(run_dir, number)
    spent = ", ".join(
        f"{site} {float(facts['epsilon']):.3f}" for site, facts in sorted(record.replied.items())
    )
    return (
        f"round {number} released: {len(record.replied)} sites in {duration(record.seconds)}; "
        f"epsilon so far as reported: {spent}; {record.bytes_down / 1e6:.1f} MB down, "
        f"{record.bytes_up / 1e6:.1f} MB up"
    )


def status(run_dir: Path) -> dict[str, Any]:
    """Facts of a run for people and machines."""
    progress = read_progress(run_dir)
    records = [load_record(run_dir, number) for number in rounds_done(run_dir)]
    return {
        "run": run_dir.name,
        "attempts": attempts(run_dir),
        "progress": json.loads(progress.model_dump_json()) if progress else None,
        "rounds": [json.loads(record.model_dump_json()) for record in records],
    }
