"""A page that renews itself while a run goes on, over a real socket; who may see it."""

from __future__ import annotations

import dataclasses
import http.client
import threading
from collections.abc import Iterator
from http.server import ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import torch

from polyclinic.common.files import write_json_atomic
from polyclinic.common.refusals import BadInput
from polyclinic.server import cli
from polyclinic.server.checkpoints import Checkpoint, RoundRecord, save_checkpoint
from polyclinic.server.watch import LivePage, serve
from tests.browser import Browser
from tests.conftest import MakeStudy
from tests.server.report_fakes import begun_run
from tests.server.rounds_home import FACTS

STATE = {"w": torch.zeros(3)}


def add_round(run_dir: Path, number: int) -> None:
    facts = {**dataclasses.asdict(FACTS), "round": number, "epsilon": 0.5 * number, "divisor": 6.0}
    replied = {site: facts for site in ("a", "b")} if number else {}
    record = RoundRecord(round=number, state_hash=f"{number:064d}", replied=replied, seconds=2.0)
    save_checkpoint(run_dir, Checkpoint(record, STATE, STATE))


@pytest.fixture
def run_dir(tmp_path: Path, make_study: MakeStudy) -> Path:
    """A real run of three rounds that has not begun its first."""
    folder = begun_run(tmp_path, make_study(privacy={"enabled": False}))
    write_json_atomic(folder / "sites.json", ["a", "b"])
    add_round(folder, 0)
    return folder


class Served:
    """A server in a thread, and one request at a time to it."""

    def __init__(self, run_dir: Path, host: str = "127.0.0.1") -> None:
        self.server: ThreadingHTTPServer
        self.server, self.address = serve(LivePage(run_dir), host, 0)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def ask(self, path: str = "/", method: str = "GET", **headers: str) -> tuple[int, dict[str, str], str]:
        connection = http.client.HTTPConnection("127.0.0.1", self.server.server_port, timeout=60)
        connection.request(method, path, headers={k.replace("_", "-"): v for k, v in headers.items()})
        answer = connection.getresponse()
        found = answer.status, dict(answer.getheaders()), answer.read().decode()
        connection.close()
        return found


@pytest.fixture
def served(run_dir: Path) -> Iterator[Served]:
    there = Served(run_dir)
    yield there
    there.server.shutdown()
    there.server.server_close()


def test_the_page_follows_the_run_to_its_end(served: Served, run_dir: Path) -> None:
    before = sorted(path.name for path in run_dir.iterdir())
    status, headers, text = served.ask()
    assert (status, headers["Content-Type"]) == (200, "text/html; charset=utf-8")
    assert "running: round 0 of 3" in text
    assert served.ask(If_None_Match=headers["ETag"])[::2] == (304, "")
    add_round(run_dir, 1)
    status, newer, text = served.ask(If_None_Match=headers["ETag"])
    assert status == 200
    assert newer["ETag"] != headers["ETag"]
    assert "running: round 1 of 3" in text
    assert "setInterval" in text
    for number in (2, 3):
        add_round(run_dir, number)
    text = served.ask()[2]
    # A finished run renews nothing, so its page is the report itself, without a script.
    assert "running" not in text
    assert "<script" not in text
    # It only read.
    assert sorted(path.name for path in run_dir.iterdir()) == before


def test_there_is_one_page_and_it_cannot_be_written_to(served: Served) -> None:
    for path in ("/report.html", "/metrics.json", "/../study.json", "/%2e%2e/study.json", "//etc/passwd"):
        assert served.ask(path)[0] == 404, path
    for method in ("POST", "PUT", "DELETE", "OPTIONS"):
        assert served.ask("/", method)[0] == 501
    status, headers, text = served.ask("/", "HEAD")
    assert (status, text) == (200, "")
    assert int(headers["Content-Length"]) > 10_000


def test_a_local_page_answers_to_this_machines_names_alone(served: Served) -> None:
    """A foreign name that was made to point here is a foreign site that wants to read the page."""
    port = served.server.server_port
    for host in (f"localhost:{port}", f"127.0.0.1:{port}", "127.0.0.1"):
        assert served.ask(Host=host)[0] == 200, host
    for host in (f"evil.example:{port}", "localhost.evil.example", "10.0.0.1", ""):
        status, _, text = served.ask(Host=host)
        assert (status, "tiny" in text) == (403, False), host


def test_any_other_address_needs_the_token_that_was_printed(run_dir: Path) -> None:
    there = Served(run_dir, "0.0.0.0")
    try:
        address = urlsplit(there.address)
        assert len(address.query.removeprefix("token=")) >= 43  # 256 bits
        assert there.ask(f"/?{address.query}", Host="hospital.example")[0] == 200
        for wrong in ("/", "/?token=", f"/?{address.query}x", f"/?{address.query[:-1]}", "/?token=%ff"):
            status, _, text = there.ask(wrong)
            assert (status, "tiny" in text) == (403, False), wrong
        assert Served(run_dir, "0.0.0.0").address.split("token=")[1] != address.query
    finally:
        there.server.shutdown()


def test_an_address_that_cannot_be_opened_is_a_sentence(
    served: Served, run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(BadInput, match=r"--host 127\.0\.0\.1 --port \d+: cannot be opened"):
        serve(LivePage(run_dir), "127.0.0.1", served.server.server_port)
    assert cli.main(["report", str(run_dir), "--watch", "--port", str(served.server.server_port)]) == 2
    assert "cannot be opened" in capsys.readouterr().err


def test_a_browser_shows_the_next_round_by_itself(served: Served, run_dir: Path) -> None:
    with Browser() as browser:
        page = browser.open(served.address)
        assert "running: round 0 of 3" in str(page.evaluate("document.body.innerText"))
        loads = page._loads
        add_round(run_dir, 1)
        while page._loads == loads:
            browser.next_message("the page renews itself")
        assert "running: round 1 of 3" in str(page.evaluate("document.body.innerText"))
        assert page.console_errors == []
        assert page.outside_requests == []


def test_report_of_an_unfinished_run_takes_prices_from_the_command_line(
    run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    add_round(run_dir, 1)
    home = str(run_dir.parent.parent)
    given = ["--cost", "grid_gco2_per_kwh=380", "--cost", "grid_source=made up", "--cost", "price_gb=2"]
    assert cli.main(["report", "tiny", "--home", home, *given]) == 0
    text = (run_dir / "report.html").read_text(encoding="utf-8")
    assert "running: round 1 of 3" in text
    assert "nominal" in text
    assert cli.main(["report", "tiny", "--home", home, "--cost", "grid_gco2_per_kwh=380"]) == 2
    assert "needs grid_source" in capsys.readouterr().err
    assert cli.main(["report", "tiny", "--home", home, "--cost", "price=3"]) == 2
    assert "unknown field `price`" in capsys.readouterr().err
