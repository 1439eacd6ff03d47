"""The preflight's page in a real browser: quiet, self-contained, narrow and wide, light and dark."""

from pathlib import Path
from typing import Any

import pytest

from polyclinic.client.check.preflight import preflight
from polyclinic.client.check.report import page
from polyclinic.common.generator_settings import GeneratorSettings
from polyclinic.common.settings import DataSettings
from tests.browser import Browser
from tests.common.made_sets import draw

HOSTILE = "<img src=x onerror=alert(1)>.png"


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    """A folder with a little of everything, fixed."""
    root = tmp_path_factory.mktemp("page")
    folder = root / ("a-folder-with-a-name-that-is-longer-than-any-telephone-is-wide-" * 2)
    folder.mkdir()
    rows = ["image,caption,patient,finding"]
    for number in range(14):
        draw(number, (40, 40)).save(folder / f"{number}.png")
        rows.append(f"{number}.png,a picture of {number},p{number // 2},{'word ' * number}")
    for number in range(7):
        (folder / f"bad{number}.png").write_bytes(b"")
        rows.append(f"bad{number}.png,x,q,")
    draw(20).save(folder / HOSTILE)
    rows.append(f"{HOSTILE},Dr. Schmidt saw it,r,")
    draw(3, (40, 40)).save(folder / "copy.png")
    rows.append("copy.png,x,s,")
    (folder / "images.csv").write_text("\n".join(rows) + "\n")
    facts = preflight(root / "home", folder, DataSettings(image_size=64), GeneratorSettings(), fix=True)
    (root / "page.html").write_text(page(facts))
    return facts, root / "page.html"


@pytest.mark.parametrize(("width", "dark"), [(360, False), (360, True), (1400, False), (1400, True)])
def test_quiet_and_no_wider_than_the_window(
    browser: Browser, shown: tuple[dict[str, Any], Path], width: int, dark: bool
) -> None:
    facts, path = shown
    seen = browser.open(path, width=width, height=800, dark=dark)
    assert seen.console_errors == []
    assert seen.outside_requests == []
    assert seen.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth")
    ground = "getComputedStyle(document.body).backgroundColor.match(/\\d+/g).every(v => v < 64)"
    assert seen.evaluate(ground) is dark
    text = seen.evaluate("document.body.innerText")
    # The answer comes first, then numbers, then findings by severity; the folder's path is not in each line.
    order = [
        "are accepted",
        "polyclinic-client snapshot",
        "images a patient",
        "Put aside by --fix",
        "deserves a look",
    ]
    assert [text.index(words) for words in order] == sorted(text.index(words) for words in order)
    assert HOSTILE in text
    assert "and 2 more" in text
    assert "Schmidt" not in text
    assert text.count(facts["folder"]) <= 4


def test_a_folder_that_waits_for_a_person_says_so_first(tmp_path: Path) -> None:
    folder = tmp_path / "d"
    folder.mkdir()
    draw(1).save(folder / "a.png")
    (folder / "images.csv").write_text("image,caption,patient\na.png,x,p\na.png,x,q\n")
    facts = preflight(tmp_path / "home", folder, DataSettings(image_size=32), GeneratorSettings(), fix=True)
    assert "A person must decide about 1 findings before anything can be used." in page(facts)
    assert "polyclinic-client snapshot" not in page(facts)
