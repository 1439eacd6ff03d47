"""nginx in the gateway's place, run by the script that compose and systemd run."""

import http.client
import os
import signal
import ssl
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from polyclinic.common.files import write_atomic
from polyclinic.server.gateway_nginx import render
from tests.deploy.shipped import DEPLOY, tool
from tests.server.pki import Coordinator, coordinator, free_port, superlink, wait_for

SCRIPT = DEPLOY / "nginx" / "serve.sh"
HEADER = "flwr-public-key"


class Door:
    """The script with its nginx."""

    def __init__(self, made: Coordinator, upstream: int, folder: Path, **variables: str) -> None:
        nginx = Path(tool("nginx", "apt install nginx-light")).parent
        self.made, self.folder, self.port = made, folder, free_port()
        (made.home / "node").mkdir(exist_ok=True)
        write_atomic(made.home / "node" / "link.port", str(upstream).encode())
        path = f"{Path(sys.executable).parent}:{nginx}:/usr/bin:/bin"
        self.process = subprocess.Popen(
            ["/bin/sh", str(SCRIPT), str(made.home), str(self.port), str(folder)],
            env={**os.environ, "PATH": path, **variables},
            cwd=folder.parent,
        )
        wait_for(lambda: self.alive() and self.knocks(), "nginx listens", 20)

    def alive(self) -> bool:
        assert self.process.poll() is None, "the script ended"
        return True

    def knocks(self) -> bool:
        return self.says("clinic-a", None)

    def says(self, site: str, status: int | None) -> bool:
        """Tell whether this is the answer, or any; nginx resets a connection now and then as it reloads."""
        try:
            return self.ask(site) == status or status is None
        except OSError:
            return False

    def ask(self, site: str) -> int:
        """Status of a call that only an admitted site may make."""
        keys = self.made.sites[site]
        context = ssl.create_default_context(cafile=str(self.made.home / "pki" / "ca.crt"))
        context.load_cert_chain(keys.crt, keys.key)
        call = http.client.HTTPSConnection("localhost", self.port, context=context, timeout=10)
        try:
            call.request("POST", "/v1/fleet/register-node", b"x", {HEADER: keys.header})
            return call.getresponse().status
        finally:
            call.close()

    def gone(self) -> bool:
        try:
            self.ask("clinic-a")
        except OSError:
            return True
        return False


@pytest.fixture
def made(tmp_path: Path) -> Coordinator:
    return coordinator(tmp_path, "clinic-a", "clinic-b")


@pytest.fixture
def door(made: Coordinator, tmp_path: Path) -> Iterator[Door]:
    with superlink(made.home) as link:
        door = Door(made, link.port, tmp_path / "nginx")
        try:
            yield door
        finally:
            door.process.terminate()
            door.process.wait(10)


def test_the_example_is_what_the_renderer_writes(tmp_path: Path) -> None:
    (tmp_path / "gateway").mkdir()
    (tmp_path / "gateway" / "sites.json").write_text('{"sites": {}}')
    text = render(tmp_path, tmp_path / "out", ("127.0.0.1", 9080))
    text = text.replace(f"{tmp_path}/out", "/tmp/polyclinic-nginx")
    text = text.replace(str(tmp_path), "/var/lib/polyclinic")
    assert (DEPLOY / "nginx" / "nginx.example.conf").read_text() == text


def test_sites_come_and_go_without_a_restart_and_a_stop_is_a_stop(door: Door) -> None:
    assert (door.ask("clinic-a"), door.ask("clinic-b")) == (200, 200)
    door.made.admit("clinic-a")
    wait_for(lambda: door.says("clinic-b", 403), "the revoked site is refused")
    wait_for(lambda: door.says("clinic-a", 200), "the other site is not")
    door.made.admit("clinic-a", "clinic-b")
    wait_for(lambda: door.says("clinic-b", 200), "the site is back")
    assert (door.folder / "nginx.conf").stat().st_mode & 0o077 == 0
    door.process.send_signal(signal.SIGTERM)
    assert door.process.wait(10) == 0
    assert door.gone()


def test_better_closed_than_open_to_a_revoked_site(door: Door) -> None:
    (renderer,) = [pid for pid, command in children(door.process.pid) if "gateway_nginx" in command]
    os.kill(renderer, signal.SIGKILL)
    assert door.process.wait(10) == 1
    wait_for(door.gone, "nginx is gone")


def test_nginx_does_not_outlive_its_superlink(made: Coordinator, tmp_path: Path) -> None:
    with superlink(made.home) as link:
        door = Door(made, link.port, tmp_path / "nginx", POLYCLINIC_AWAY_S="2")
    assert door.process.wait(10) == 1
    wait_for(door.gone, "nginx is gone")


def children(parent: int) -> list[tuple[int, str]]:
    found = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            pid, rest = status.read_text().split(" ", 1)
            command = (status.parent / "cmdline").read_text().replace("\0", " ")
        except OSError:
            continue  # ended meanwhile
        if int(rest.rpartition(")")[2].split()[1]) == parent:
            found.append((int(pid), command))
    return found
