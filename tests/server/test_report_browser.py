"""Report and comparison in a real browser: quiet, self-contained, narrow and wide, by keyboard, on paper."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from polyclinic.common.study import parse_study
from polyclinic.server.report.comparison import write_comparison
from polyclinic.server.report.html import write_report
from polyclinic.server.report.metrics import Metrics
from polyclinic.server.report.systems import Entry, write_systems
from tests.browser import Browser
from tests.server.report_fakes import fake_run, wider


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with Browser() as found:
        yield found


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("pages")
    metrics = wider(fake_run(root, last=4))
    return {
        "report": write_report(root, metrics),
        "compare": write_comparison(root / "compare.html", [metrics, metrics], [root, root]),
        "systems": write_systems(root / "systems.html", "Three systems", entries(metrics, root)),
    }


def entries(metrics: Metrics, root: Path) -> list[Entry]:
    """Three systems by three arms at both budgets."""
    values = {
        "name": "wide",
        "cost": {"gpu_flops_per_s": 1e12},
        "evaluation": {"prompts": [{"text": "a polyp"}]},
        "simulation": {"sites": {name: {"declared_patients": 400} for name in ("north", "coast", "valley")}},
    }
    study = parse_study(values, "wide")
    return [
        Entry(system, mode, (budget,), study, 10**10, metrics, root)
        for system in ("msdm", "kandinsky-2-2", "stable-diffusion")
        for mode in ("pooled", "federated", "private")
        for budget in ("images", "hours")
    ]


@pytest.mark.parametrize("page", ["report", "compare", "systems"])
@pytest.mark.parametrize(("width", "dark"), [(360, False), (360, True), (1400, False), (1400, True)])
def test_quiet_self_contained_and_no_wider_than_the_window(
    browser: Browser, pages: dict[str, Path], page: str, width: int, dark: bool
) -> None:
    shown = browser.open(pages[page], width=width, height=800, dark=dark)
    assert shown.console_errors == []
    assert shown.outside_requests == []
    room = "document.documentElement.scrollWidth <= document.documentElement.clientWidth"
    assert shown.evaluate(room) is True
    ground = shown.evaluate("getComputedStyle(document.body).backgroundColor")
    light = sum(int(part) for part in str(ground)[4:-1].split(",")[:3]) > 3 * 128
    assert light != dark
    shown.close()


def test_first_screen_has_verdict_numbers_and_pictures(browser: Browser, pages: dict[str, Path]) -> None:
    for width, height in ((360, 800), (1400, 900)):
        shown = browser.open(pages["report"], width=width, height=height)
        for part in (".headline", ".card:nth-child(3) .figure", ".strip img"):
            top = shown.evaluate(f"document.querySelector({part!r}).getBoundingClientRect().top")
            assert top < height, (part, width)
        # innerText leaves out what is not shown: the KID has its interval, floor and size at every width.
        said = str(shown.evaluate("document.querySelector('.card').innerText"))
        for part in ("95 % interval", "floor", "320 images, 96 patients"):
            assert part in said, (part, width)
        shown.close()


def test_tab_reaches_everything_and_a_fold_opens_by_keyboard(
    browser: Browser, pages: dict[str, Path]
) -> None:
    shown = browser.open(pages["report"])
    count = int(str(shown.evaluate("document.querySelectorAll('a, summary, [tabindex=\"0\"]').length")))
    shown.evaluate("window.reached = new Set(); window.bare = []; 0")
    for _ in range(count + 1):
        shown.press("Tab")
        shown.evaluate(
            "(e => { if (e === document.body) return; reached.add(e);"
            "const s = getComputedStyle(e); if (s.outlineStyle === 'none') bare.push(e.outerHTML) })"
            "(document.activeElement); 0"
        )
    # What lies in a closed fold is reached once the fold is open.
    missed = (
        "[...document.querySelectorAll('a, summary, [tabindex=\"0\"]')].filter(e => !reached.has(e)"
        " && !e.closest('details:not([open]) > :not(summary)')).length"
    )
    assert shown.evaluate(missed) == 0
    assert shown.evaluate("bare") == []
    shown.evaluate("document.querySelector('summary').focus(); 0")
    shown.press("Enter")
    assert shown.evaluate("document.querySelector('summary').parentElement.open") is True


def test_it_prints(browser: Browser, pages: dict[str, Path]) -> None:
    # A4 between Chromium's margins is 718 px wide.
    for name, page in pages.items():
        shown = browser.open(page, width=718)
        shown.call("Emulation.setEmulatedMedia", media="print")
        cut = (
            "[document.documentElement, ...document.querySelectorAll('.wide')]"
            ".filter(e => e.scrollWidth > e.clientWidth).map(e => e.getAttribute('aria-label') || e.tagName)"
        )
        assert shown.evaluate(cut) == [], name
        pdf = shown.print_pdf()
        assert pdf.startswith(b"%PDF-")
        assert len(pdf) > 50_000
        shown.close()
