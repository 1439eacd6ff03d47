"""A federation of real processes: coordinator, gateway, two hospitals with homes, keys and data of their own.

Everything is done through the commands that people type. Chest X-rays come from the folder beside the
project; a VAE with random weights stands in for a real base, so that a round takes seconds.
"""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from polyclinic.client.journal_view import read_journal
from polyclinic.common.processes import free_port, processes

T = TypeVar("T")

DATA = Path(__file__).parents[3] / "shared" / "data" / "nih-chest-xray"
SITES = ("clinic-a", "clinic-b")
PATIENTS, REFERENCE_PATIENTS = 24, 40

STUDY = """
name = "{name}"
[data]
image_size = 32
[generator]
size = "msdm-tiny"
max_tokens = 16
vae = "{vae}"
[privacy]
enabled = {private}
epsilon = {epsilon}
delta = 1e-3
sampling_rate = 0.3
views = 2
canaries = {canaries}
[training]
rounds = {rounds}
steps_per_round = {steps}
device = "cpu"
threads = 1
{key}
[federation]
min_sites = {min_sites}
deadline_s = {deadline}
grace_s = {grace}
{federation}
[evaluation]
steps = 2
draws = 1
every = {rounds}
prompts = [{{text = "PA chest X-ray of a woman."}}, {{text = "AP chest X-ray of a man."}}]
"""


def wait_for(condition: Callable[[], Any], what: str, seconds: float = 120.0) -> Any:
    """Poll until a condition is true and return what it gave."""
    end = time.monotonic() + seconds
    while True:
        value = condition()
        if value:
            return value
        assert time.monotonic() < end, f"{what}: not within {seconds:.0f} s"
        time.sleep(0.2)


def at_once(work: Callable[[str], T], sites: tuple[str, ...]) -> list[T]:
    """Do the same at every site at the same time, as their people would."""
    with ThreadPoolExecutor(len(sites)) as pool:
        return list(pool.map(work, sites))


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def command(room: str, *arguments: object) -> list[str]:
    return [sys.executable, "-W", "ignore", "-m", f"polyclinic.{room}.cli", *map(str, arguments)]


def call(
    room: str, *arguments: object, code: int = 0, typed: str = "", seconds: float = 300, **more: str
) -> subprocess.CompletedProcess[str]:
    """Run one of our commands to its end, with more in its environment, and check its exit code."""
    done = subprocess.run(
        command(room, *arguments),
        capture_output=True,
        text=True,
        timeout=seconds,
        env=environment() | more,
        input=typed,
        check=False,
    )
    assert done.returncode == code, f"{arguments}: {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


@dataclass
class Federation:
    """Homes and processes of one coordinator and its sites.

    Attributes:
        root: Everything lies below it.
        vae: Folder of the random-weight VAE.
        port: What the sites call: the gateway's, or of what stands in front of it.
        gateway: The gateway's, where that is another one.
        started: Supervisors that run, by `server` or the site's name.
    """

    root: Path
    vae: Path
    port: int = field(default_factory=free_port)
    started: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)
    gateway: int = 0

    @property
    def server(self) -> Path:
        return self.root / "coordinator"

    @property
    def reference(self) -> Path:
        return self.root / "reference"

    def home(self, site: str) -> Path:
        return self.root / site

    def data(self, site: str) -> Path:
        return self.root / f"{site}-data"

    # -- set-up ----------------------------------------------------------------------------------

    def write_data(self) -> None:
        """Give every site, and the reference, some patients of its own."""
        with (DATA / "images.csv").open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        patients = list(dict.fromkeys(row["patient"] for row in rows))
        shares = [(self.data(site), PATIENTS) for site in SITES] + [(self.reference, REFERENCE_PATIENTS)]
        for folder, count in shares:
            chosen, patients = set(patients[:count]), patients[count:]
            (folder / "images").mkdir(parents=True)
            mine = [row for row in rows if row["patient"] in chosen]
            for row in mine:
                shutil.copy(DATA / row["image"], folder / row["image"])
            with (folder / "images.csv").open("w", newline="", encoding="utf-8") as file:
                table = csv.DictWriter(file, list(rows[0]))
                table.writeheader()
                table.writerows(mine)

    def write_study(self, name: str, **changes: object) -> Path:
        """Write a study file; non-private ones are given a test key."""
        values: dict[str, object] = {
            "private": True,
            "rounds": 3,
            "steps": 2,
            "epsilon": 8.0,
            "canaries": 100,
            "min_sites": 2,
            "deadline": 240,
            "grace": 60,
            "federation": "",
            **changes,
        }
        private = bool(values["private"])
        values |= {"private": str(private).lower(), "key": "" if private else 'test_key = "e2e"'}
        path = self.root / f"{name}.toml"
        path.write_text(STUDY.format(name=name, vae=self.vae, **values), encoding="utf-8")
        return path

    def provision(self, study: Path, sites: tuple[str, ...] = SITES) -> dict[str, Path]:
        """Provision a study; returns each site's kit."""
        call(
            *("server", "provision", study, "--sites", ",".join(sites), "--host", "localhost,127.0.0.1"),
            *("--port", self.port, "--reference", self.reference, "--home", self.server),
        )
        return {site: self.server / "kits" / site for site in sites}

    def enrol(self, site: str, kit: Path, policy: str = "") -> None:
        """From a kit to an enrolled site, as two people would do it by mail."""
        call("client", "init", kit, "--home", self.home(site))
        (self.home(site) / "policy.toml").write_text(
            f"declared_patients = {PATIENTS}\nmin_patients = 5\nepsilon_per_study = 8.0\n"
            f"epsilon_total = 100.0\ndelta_total = 0.05\n{policy}",
            encoding="utf-8",
        )
        answer = self.root / f"certificate-{site}.json"
        request = self.home(site) / f"request-{site}.json"
        shutil.copy(request, self.root)  # the letter; the site's own goes when the certificate comes
        call("server", "enroll", request, "--out", answer, "--home", self.server)
        call("client", "certificate", answer, "--home", self.home(site))

    def approve(
        self, site: str, resolved: Path, *more: object, code: int = 0
    ) -> subprocess.CompletedProcess[str]:
        """Approve a resolved study at a site."""
        return call(
            *("client", "approve", resolved, "--data", self.data(site), "--yes", "--home", self.home(site)),
            *more,
            code=code,
        )

    def resolved(self, study: Path) -> Path:
        """Resolve a study as the coordinator, and return the file that a kit would carry."""
        kits = self.provision(study, SITES)
        return kits[SITES[0]] / "study.json"

    # -- processes -------------------------------------------------------------------------------

    def start(self, who: str, *, wait: bool = True, **more: str) -> None:
        """Start the coordinator (`server`) or a site, with more in its environment, until it is up."""
        if who == "server":
            port = self.gateway or self.port
            line = command("server", "start", "--host", "127.0.0.1", "--port", port, "--home", self.server)
        else:
            line = command("client", "start", "--home", self.home(who))
        log = (self.root / f"{who}.start.log").open("ab")
        self.started[who] = subprocess.Popen(line, stderr=log, stdout=log, env=environment() | more)
        if wait:
            wait_for(lambda: len(self.parts(who)) == 3, f"{who} is up")

    def stop(self, who: str, number: int = signal.SIGTERM) -> None:
        """Stop a supervisor, politely unless told otherwise."""
        process = self.started.pop(who)
        process.send_signal(number)
        process.wait(timeout=60)

    def stop_all(self) -> None:
        for who in list(self.started):
            self.stop(who)

    def parts(self, who: str) -> dict[str, dict[str, Any]]:
        home = self.server if who == "server" else self.home(who)
        return {name: fact for name, fact in processes(home / "node").items() if fact["alive"]}

    def kill(self, who: str, part: str) -> None:
        """`kill -9` of one part; its supervisor starts it again."""
        os.kill(self.parts(who)[part]["pid"], signal.SIGKILL)

    def task(self, site: str) -> int:
        """Process number of a site's ClientApp (or, for `server`, the ServerApp), 0 where none runs."""
        home = str((self.server if site == "server" else self.home(site)).resolve())
        program = f"polyclinic.{'server' if site == 'server' else 'client'}.launcher".encode()
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                line = (folder / "cmdline").read_bytes()
                if (
                    program in line
                    and f"POLYCLINIC_HOME={home}\0".encode() in (folder / "environ").read_bytes()
                ):
                    return int(folder.name)
            except OSError:
                continue
        return 0

    # -- runs ------------------------------------------------------------------------------------

    def run(self, study: Path, *more: object, code: int = 0) -> subprocess.CompletedProcess[str]:
        """Run a study to its report, in the foreground."""
        return call(
            "server",
            *("run", study, "--reference", self.reference, "--home", self.server, *more),
            code=code,
            seconds=900,
        )

    def run_in_background(self, study: Path, *more: object) -> subprocess.Popen[bytes]:
        """Run a study while the test does something to it."""
        line = command("server", "run", study, "--reference", self.reference, "--home", self.server, *more)
        log = (self.root / f"{study.stem}.run.log").open("ab")
        return subprocess.Popen(line, stderr=log, stdout=log, env=environment())

    def run_dir(self, study: Path) -> Path:
        (found,) = (self.server / "runs").glob(f"{study.stem}-????????")
        return found

    def server_log(self, study: Path) -> str:
        """What the ServerApp has said; nothing before it runs."""
        paths = (self.server / "runs").glob(f"{study.stem}-????????/server.log")
        return "".join(path.read_text() for path in paths)

    def record(self, study: Path, number: int) -> dict[str, Any]:
        path = self.run_dir(study) / "checkpoints" / f"round-{number:04d}" / "record.json"
        record: dict[str, Any] = json.loads(path.read_text())
        return record

    def ledger(self, site: str, kind: str) -> list[dict[str, Any]]:
        """Lines of one kind in a site's ledger."""
        lines = (self.home(site) / "ledger.jsonl").read_text().splitlines()
        return [line for line in map(json.loads, lines) if line["kind"] == kind]

    def lines(self, site: str, study: Path, kind: str) -> list[dict[str, Any]]:
        """Lines of one kind that belong to a site's approval of a study."""
        (path,) = (self.home(site) / "approvals").glob(f"{self.run_dir(study).name.rpartition('-')[2]}*.json")
        approval = json.loads(path.read_text())["id"]
        return [line for line in self.ledger(site, kind) if line["approval"] == approval]

    def journal(self, site: str, kind: str) -> list[dict[str, Any]]:
        """Lines of one kind in a site's journal."""
        return [line for line in read_journal(self.home(site))[0] if line["kind"] == kind]

    def progress(self, study: Path) -> dict[str, Any]:
        """Where a run stands; empty before its ServerApp said anything."""
        path = self.run_dir(study) / "progress.json"
        try:
            progress: dict[str, Any] = json.loads(path.read_text())
        except FileNotFoundError:
            return {}
        return progress

    def released(self, study: Path) -> int:
        """The last round that has a checkpoint."""
        folder = self.run_dir(study) / "checkpoints"
        return max((int(path.name[-4:]) for path in folder.glob("round-*")), default=-1)
