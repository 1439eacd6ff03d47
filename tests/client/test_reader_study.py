"""A study from end to end: made by the command, read in a browser by keyboard, scored by the command."""

import io
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from polyclinic.client.cli import main
from polyclinic.common.reader_study.key import Key, Showing, read_key
from tests.browser import Browser, Page
from tests.reader_answers import CAPTIONS, PATIENTS, Made, draw_folder, small_study


def make(folder: Path, *more: str) -> list[str]:
    draw_folder(folder / "real", 24, (180, 100, 80), columns=PATIENTS)
    draw_folder(folder / "msdm", 12, (190, 100, 80), columns=CAPTIONS)
    command = [
        "reader-study",
        "make",
        "--real",
        str(folder / "real"),
        "--synthetic",
        f"msdm={folder / 'msdm'}",
    ]
    return [*command, "--per-group", "10", "--out", str(folder / "forms"), *more]


def choose(group: str, showing: Showing) -> int:
    return (2 if showing.image % 5 else 5) if group == "real" else (6 if showing.image % 3 else 3)


def read(
    page: Page, key: Key, rater: str, start: int = 0, stop: int | None = None, start_key: str = "Enter"
) -> None:
    """Answer the form by keyboard, from the start page to an image."""
    page.press(start_key)
    shown = key.raters[rater]
    for place, showing in list(enumerate(shown, 1))[start:stop]:
        page.wait(f"document.getElementById('place').textContent === '{rater}: {place} of {len(shown)}'")
        page.press(str(choose(key.images[showing.image], showing)))
        for _question in key.questions:
            page.press("4")
        page.press("ArrowRight")


def assert_clean(page: Page) -> None:
    assert page.console_errors == []
    assert page.outside_requests == []
    assert page.evaluate("document.documentElement.scrollWidth") <= page.evaluate("innerWidth")


@pytest.mark.parametrize(("width", "dark"), [(1400, False), (360, True)])
def test_a_rater_reads_by_keyboard_and_is_scored(
    browser: Browser, tmp_path: Path, capsys: pytest.CaptureFixture[str], width: int, dark: bool
) -> None:
    assert main(make(tmp_path, "--raters", "1", "--prompts", "--ask", "quality", "--json")) == 0
    facts = json.loads(capsys.readouterr().out)
    key, commitment = read_key(Path(facts["sealed"]))
    assert facts["key_sha256"] == commitment
    page = browser.open(tmp_path / "forms" / "rater-1.html", width=width, height=800, dark=dark)
    assert commitment in page.evaluate("document.body.innerText")
    assert "Keep this file at your hospital." in page.evaluate("document.body.innerText")
    read(page, key, "rater-1")
    page.wait("!document.getElementById('end').hidden")
    assert page.evaluate("document.getElementById('progress').value") == 22
    page.press("Enter")  # the focus is on "Save answers"
    answers = browser.wait_download()
    assert answers.name == f"answers-{key.study}-rater-1.csv"
    assert_clean(page)

    expected = Made(tmp_path / "forms", Path(facts["sealed"]), facts, key, commitment).answer(
        "rater-1", tmp_path / "expected.csv", choose, questions=4
    )
    assert answers.read_bytes() == expected.read_bytes()
    assert main(["reader-study", "score", str(answers), "--sealed", facts["sealed"], "--json"]) == 0
    results = json.loads(capsys.readouterr().out)
    groups = {"real": key.images.index("real"), "msdm": key.images.index("msdm")}
    right = sum(
        (choose(group, Showing(id="x", image=image, repeat=False)) > 3) == (group != "real")
        for group, first in groups.items()
        for image in range(first, first + 10)
    )
    assert results["generators"][0]["accuracy"]["value"] == pytest.approx(right / 20)
    assert results["repeats"]["same_choice"] == pytest.approx(
        {"value": 1, "low": 0.342, "high": 1, "n": 2}, abs=1e-3
    )
    assert results["questions"][0]["groups"][0]["counts"] == [0, 0, 0, 10, 0]
    assert json.loads((Path(facts["sealed"]) / "results.json").read_text()) == results

    page = browser.open(Path(facts["sealed"]) / "results.html", width=width, height=800, dark=dark)
    text = page.evaluate("document.body.innerText")
    assert f"right in {100 * right / 20:.0f} %" in text
    assert "Nothing here leaves this site by itself" in text
    assert_clean(page)
    assert page.print_pdf().startswith(b"%PDF")


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return small_study(tmp_path_factory.mktemp("study"), raters=2)


def test_a_rater_goes_on_where_they_stopped(browser: Browser, study: Made) -> None:
    form = study.out / "rater-1.html"
    first = browser.open(form)
    read(first, study.key, "rater-1", stop=5)
    first.press("2")  # given, but not yet left
    first.close()
    again = browser.open(form, sharing=first)
    assert "Welcome back: 6 of 33 images are answered." in again.evaluate("document.body.innerText")
    read(again, study.key, "rater-1", start=5)
    again.click("#save")
    saved = browser.wait_download()
    by_key = study.answer("rater-1", saved.with_name("by-key.csv"), choose)
    assert saved.read_bytes() == by_key.read_bytes()
    assert_clean(again)


def test_a_rater_takes_saved_answers_to_another_browser(browser: Browser, study: Made) -> None:
    form = study.out / "rater-2.html"
    first = browser.open(form)
    read(first, study.key, "rater-2", stop=7)
    first.click("#pause")
    part = browser.wait_download()
    assert part.name.endswith("rater-2-part.csv")
    assert len(part.read_text().splitlines()) == 1 + 7
    other = browser.open(form)  # a storage of its own
    assert other.evaluate("document.getElementById('resumed').hidden")
    result = "document.getElementById('upload-result').textContent"
    edited = part.read_text().split(",")
    edited[-2] = str(7 - int(edited[-2]))  # the last answer
    for name, text, sentence in (
        ("edited.csv", ",".join(edited), "was changed"),
        ("others.csv", part.read_text().replace("rater-2", "rater-1"), "this form is for rater-2"),
        ("what.csv", "a,b,c", "not a file of answers"),
    ):
        wrong = part.with_name(name)
        wrong.write_text(text)
        other.choose_file("#upload", wrong)
        other.wait(f"{result}.includes({json.dumps(sentence)})")
    part.write_text("\ufeff" + part.read_text().replace(",", ";"))  # a spreadsheet saved it
    other.choose_file("#upload", part)
    other.wait(f"{result} === 'Read: 7 of 33 images are answered.'")
    read(other, study.key, "rater-2", start=7)
    other.press("Enter")
    saved = browser.wait_download()
    assert saved.read_bytes() == study.answer("rater-2", saved.with_name("k.csv"), choose).read_bytes()
    assert_clean(other)


def test_the_form_lets_a_rater_back_one_image_and_no_further(browser: Browser, study: Made) -> None:
    page = browser.open(study.out / "rater-1.html")
    page.press("Enter")
    page.press("ArrowRight")  # without an answer
    assert "Answer first" in page.evaluate("document.getElementById('hint').textContent")
    for place in (1, 2, 3):
        page.wait(f"document.getElementById('place').textContent.includes(': {place} of')")
        page.press("1")
        page.press("7")  # no answer has this number
        page.press("ArrowRight")
    for _try in range(3):
        page.press("ArrowLeft")
    page.wait("document.getElementById('place').textContent.includes(': 3 of')")
    assert page.evaluate("document.querySelector('input:checked').value") == "1"
    # Everything can be reached by Tab, too: the levels, then Next.
    page.press("Tab")
    assert page.evaluate("document.activeElement.name") == "answer"
    page.press("ArrowDown")
    assert page.evaluate("document.querySelector('input:checked').value") == "2"
    page.press("Tab")
    assert page.evaluate("document.activeElement.id") == "next"
    page.press("Enter")
    page.wait("document.getElementById('place').textContent.includes(': 4 of')")
    assert_clean(page)


def test_a_forms_policy_stops_what_a_prompt_could_carry(browser: Browser, tmp_path: Path) -> None:
    evil = "</script><img src=http://outside.example/x onerror=alert(1)><script>fetch('http://outside.example')</script>"
    title = '<b onclick="x">Study</b>'
    for name, hue in (("real", (180, 100, 80)), ("g", (90, 140, 80))):
        folder = draw_folder(tmp_path / name, 12, hue, columns=CAPTIONS)
        table = folder / "images.csv"
        table.write_text(table.read_text().replace("a polyp on the wall", f'"{evil}"'))
    made = small_study(
        tmp_path / "made",
        real=tmp_path / "real",
        synthetic={"g": tmp_path / "g"},
        prompts=True,
        title=title,
        raters=1,
    )
    page = browser.open(made.out / "rater-1.html")
    page.press("Enter")
    assert page.evaluate("document.getElementById('prompt').textContent") == evil
    assert page.evaluate("document.querySelector('.title').textContent") == title
    assert_clean(page)
    # And were there a hole, the policy would still let nothing out.
    page.evaluate("fetch('http://outside.example/').catch(() => {})")
    page.evaluate("document.body.append(Object.assign(new Image(), {src: 'http://outside.example/x'}))")
    assert any("Content Security Policy" in error for error in page.console_errors)


def test_counts_leave_by_a_persons_act_alone(
    study: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    files = [str(study.answer(r, tmp_path / f"{r}.csv", choose)) for r in study.key.raters]
    command = ["reader-study", "score", *files, "--sealed", str(study.sealed), "--out", str(tmp_path / "r")]
    handed_on = tmp_path / "counts.json"
    monkeypatch.setattr(sys, "stdin", io.StringIO("no\n"))
    assert main([*command, "--counts", str(handed_on)]) == 2
    said = capsys.readouterr()
    assert "a person's act, outside the guarantee" in said.out
    assert f"no counts were written: type {study.key.study} when asked" in said.err
    assert not handed_on.exists()
    assert main([*command, "--counts", str(handed_on), "--yes"]) == 0
    counts = json.loads(handed_on.read_text())
    assert counts.keys() == {
        "format", "study", "key_sha256", "images", "levels", "answers", "questions", "statement"
    }  # fmt: skip
    assert sum(counts["answers"]["rater-1"]["real"]) == 10
    assert not re.search(r"p\d+\b|png", handed_on.read_text())


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (["--synthetic", "msdm"], "--synthetic msdm: write NAME=DIR"),
        (["--synthetic", "real=x"], "write NAME=DIR, with a name of its own that is not `real`"),
        (["--per-group", "50"], "lower --per-group to 12"),
    ],
)
def test_make_ends_in_a_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str], sentence: str
) -> None:
    assert main(make(tmp_path, *more)) == 2
    assert sentence in capsys.readouterr().err


def test_size_says_which_number_is_which(capsys: pytest.CaptureFixture[str]) -> None:
    def run(*options: str) -> Any:
        assert main(["reader-study", "size", *options]) == 0
        return capsys.readouterr().out

    said = run("--accuracy", "0.65")
    assert "85 images by the normal approximation" in said
    assert re.search(r"by the exact binomial test: \d+ images", said)
    assert "design effect 1.40" in run("--accuracy", "0.65", "--readers", "3", "--icc-images", "0.2")
    assert "65.0 % or more" in run("--images", "85")
    assert json.loads(run("--images", "85", "--json"))["detectable"] == pytest.approx(0.65, abs=1e-3)
    assert main(["reader-study", "size"]) == 2
    assert "give either --accuracy" in capsys.readouterr().err
