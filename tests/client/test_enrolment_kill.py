"""Real processes killed at every instant of joining: the command that was killed is simply run again."""

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from polyclinic.client.enrolment import expiry_warning
from polyclinic.client.ledger_chain import read_lines
from polyclinic.common.data.table import Record
from polyclinic.server.provisioning import reissue
from tests.client.ledger_home import in_child, kill_at_flush, wait_for
from tests.server.joining import Joining, check_keys, copied, prepare


@pytest.fixture(scope="module")
def provisioned(tmp_path_factory: pytest.TempPathFactory, tiny_vae: Path, drawn: list[Record]) -> Joining:
    return prepare(tmp_path_factory.mktemp("joining"), tiny_vae, drawn, "a", "b")


@pytest.fixture
def made(provisioned: Joining, tmp_path: Path) -> Joining:
    """Kits for a and b, and nobody enrolled."""
    return copied(provisioned, tmp_path / "j")


def kill_at_rename(instant: int) -> None:
    """Make this process kill itself before its `instant`-th rename, from 0."""
    left, rename = [instant], Path.replace

    def replace(self: Path, target: Path) -> Path:
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        left[0] -= 1
        return rename(self, target)

    setattr(Path, "replace", replace)  # noqa: B010


def killed_at_every_instant(
    made: Joining, kill: Callable[[int], None], work: Callable[[Joining], object]
) -> int:
    """Kill some work at every instant, run it again, and see the site enrolled; returns the kills."""
    for instant in range(60):
        here = copied(made, made.root.parent / f"{kill.__name__}-{instant}")

        def attempt(here: Joining = here, instant: int = instant) -> None:
            kill(instant)
            work(here)

        killed = wait_for(in_child(attempt)) != 0
        work(here)
        if not here.answer("a").exists():
            here.enroll("a")
        here.install("a")
        check_keys(here)
        assert json.loads((here.site("a") / "kit" / "kit.json").read_text())["secret"] is None
        assert [line["kind"] for line in read_lines(here.site("a"))] == ["open"]
        if not killed:
            return instant
    raise AssertionError("the work never ended")


def test_a_killed_init_is_simply_run_again(made: Joining) -> None:
    assert killed_at_every_instant(made, kill_at_flush, lambda here: here.init("a")) >= 10


@pytest.mark.parametrize("kill", [kill_at_flush, kill_at_rename])
def test_a_killed_installation_goes_on_where_it_was(made: Joining, kill: Callable[[int], None]) -> None:
    made.join("a")
    made.answer("a").unlink()
    reissue(made.home, "a")
    made.init("a")
    made.enroll("a")
    assert killed_at_every_instant(made, kill, lambda here: here.install("a")) >= 4


def test_a_killed_installation_goes_on_when_the_node_starts(made: Joining) -> None:
    """Between two renames the keys do not fit; asking for the expiry, as `start` does, mends it."""
    made.init("a")
    made.enroll("a")

    def attempt() -> None:
        kill_at_rename(3)
        made.install("a")

    assert wait_for(in_child(attempt)) != 0
    assert not (made.site("a") / "keys" / "tls.crt").exists()
    assert expiry_warning(made.site("a")) is None
    check_keys(made)
