"""The tests' browser sees what it is there to see: errors, requests, keys, sizes, downloads; and it ends."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.browser import WAIT_S, Browser, chromium

PAGE = """<!doctype html><meta charset="utf-8"><title>a page</title>
<style>body{margin:0} @media (prefers-color-scheme: dark) {body{background:#000}}</style>
<img src="data:image/gif;base64,R0lGODlhAQABAIAAAAAAAP///yH5BAEAAAAALAAAAAABAAEAAAIBRAA7">
<input id="text"><button id="button">go</button><input type="file" id="file">
<script>
const keys = [];
document.addEventListener("keydown", event => keys.push(event.key));
button.addEventListener("click", () => {
  const a = document.createElement("a");
  a.href = URL.createObjectURL(new Blob(["got " + text.value]));
  a.download = "answer.txt";
  a.click();
});
file.addEventListener("change", async () => { document.title = await file.files[0].text(); });
</script>"""
FAULTY = """<!doctype html><title>faulty</title><img src="http://outside.example/tracker.png">
<script>console.error("said so"); setTimeout(() => { throw new Error("broke") });</script>"""

KILLED = """
from tests.browser import Browser

for _ in range(3):  # on a loaded machine Chromium has been seen to end as it starts
    browser = Browser()
    try:
        browser.open("about:blank")
        break
    except AssertionError:
        continue
print(browser.process.pid, flush=True)
input()
"""


@pytest.fixture
def page_file(tmp_path: Path) -> Path:
    path = tmp_path / "a page.html"
    path.write_text(PAGE)
    return path


def test_a_clean_page_is_clean(browser: Browser, page_file: Path) -> None:
    page = browser.open(page_file)
    assert page.console_errors == []
    assert page.outside_requests == []
    assert page.requests[0] == page_file.as_uri()
    assert page.requests[1].startswith("data:image/gif")


def test_errors_and_requests_of_a_faulty_page_are_seen(browser: Browser, tmp_path: Path) -> None:
    path = tmp_path / "faulty.html"
    path.write_text(FAULTY)
    page = browser.open(path)
    page.wait("document.images[0].complete")
    assert page.outside_requests == ["http://outside.example/tracker.png"]
    errors = page.console_errors
    assert "said so" in errors
    assert any("Error: broke" in error for error in errors)
    assert any("ERR_NAME_NOT_RESOLVED" in error and "tracker.png" in error for error in errors)
    with pytest.raises(AssertionError, match="no such thing"):
        page.evaluate("(() => { throw new Error('no such thing') })()")


def test_keys_text_clicks_files_and_downloads(browser: Browser, page_file: Path, tmp_path: Path) -> None:
    page = browser.open(page_file)
    page.press("Tab")
    assert page.evaluate("document.activeElement.id") == "text"
    page.press("7")
    page.type(" and ä")
    page.press("Backspace")
    page.press("ArrowLeft", "Shift")
    assert page.evaluate("keys") == ["Tab", "7", "Backspace", "ArrowLeft"]
    page.click("#button")
    download = browser.wait_download()
    assert (download.name, download.read_text()) == ("answer.txt", "got 7 and ")
    page.choose_file("#file", download)
    page.wait("document.title == 'got 7 and'")


@pytest.mark.parametrize(
    ("width", "dark", "color"), [(360, True, "rgb(0, 0, 0)"), (1400, False, "rgba(0, 0, 0, 0)")]
)
def test_width_and_color_scheme(
    browser: Browser, page_file: Path, tmp_path: Path, width: int, dark: bool, color: str
) -> None:
    page = browser.open(page_file, width=width, height=500, dark=dark)
    assert page.evaluate("[innerWidth, innerHeight]") == [width, 500]
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == color
    shot = page.screenshot(tmp_path / "shot.png").read_bytes()
    assert int.from_bytes(shot[16:20]) == width
    assert page.print_pdf().startswith(b"%PDF")


def test_storage_is_shared_only_where_asked(browser: Browser, page_file: Path) -> None:
    first = browser.open(page_file)
    first.evaluate("localStorage.setItem('a', '1')")
    first.close()
    assert browser.open(page_file, sharing=first).evaluate("localStorage.getItem('a')") == "1"
    assert browser.open(page_file).evaluate("localStorage.getItem('a')") is None


def test_a_browser_ends_with_its_test() -> None:
    with Browser() as browser:
        group, profile = browser.process.pid, browser.profile
        assert profile.is_dir()
    assert not members(group)
    assert not profile.exists()


def test_a_browser_ends_when_its_test_is_killed(tmp_path: Path) -> None:
    chromium()
    with subprocess.Popen(
        [sys.executable, "-c", KILLED],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=Path(__file__).parents[1],
        env={**os.environ, "TMPDIR": str(tmp_path)},
    ) as test:
        assert test.stdout is not None
        group = int(test.stdout.readline())
        assert members(group)
        os.kill(test.pid, signal.SIGKILL)
    end = time.monotonic() + WAIT_S
    while members(group):
        assert time.monotonic() < end, f"still there: {members(group)}"
        time.sleep(0.05)


def members(group: int) -> list[int]:
    """Find the processes of a group that are not yet dead."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _parent, its_group = stat.read_text().rpartition(")")[2].split()[:3]
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(its_group) == group and state != "Z":
            found.append(int(stat.parent.name))
    return found
