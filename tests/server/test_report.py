"""The report: one self-contained page, whole or not at all, and honest about bad news."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from PIL import Image

from polyclinic.common.cost_settings import CostSettings
from polyclinic.common.refusals import BadInput
from polyclinic.server.report import html, wording
from polyclinic.server.report.comparison import arm_row, common_level, write_comparison
from polyclinic.server.report.contest import comparison_verdict
from polyclinic.server.report.costs import total
from polyclinic.server.report.html import read_metrics, write_report
from polyclinic.server.report.metrics import Metrics, SampleSheet
from polyclinic.server.report.pictures import cut, spread
from polyclinic.server.report.verdict import verdict
from polyclinic.server.report.wording import number
from tests.server.report_fakes import PROMPTS, estimate, faithfulness, fake_run, fidelity
from tests.server.report_page import Page, assert_self_contained

HOSTILE = """<script>alert('x')</script>"><img src=https://example.org/x.png> | `a` $\\frac$ {{ 7*7 }}"""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Metrics]:
    folder = tmp_path_factory.mktemp("run")
    metrics = fake_run(folder, last=4)
    write_report(folder, metrics)
    return folder, metrics


@pytest.fixture(scope="module")
def comparison(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Metrics]]:
    root = tmp_path_factory.mktemp("runs")
    arms, folders = [], []
    for name, private, kid in (("pooled", False, 0.021), ("federated", False, 0.029), ("dp", True, 0.049)):
        folder = root / name
        folder.mkdir()
        title = f"Phantoms: {name}"
        arms.append(
            fake_run(folder, private=private, last=4, final_kid=kid, name=f"demo-{name}", title=title)
        )
        folders.append(folder)
    write_report(folders[0], arms[0])
    return write_comparison(root / "compare.html", arms, folders), arms


def test_page_is_self_contained_and_complete(run: tuple[Path, Metrics]) -> None:
    folder, metrics = run
    text = (folder / "report.html").read_text()
    assert_self_contained(text)
    page = Page(text)
    for sentence in verdict(metrics):
        assert " ".join(sentence.split()) in page.text
    for wanted in ("simulated", "measured", "sampled", "counted", "estimated", "site-not-ready", *PROMPTS):
        assert wanted in page.text, wanted
    assert "NOT PRIVATE" not in page.text
    pictures = [a for t, a in page.tags if t == "img"]
    # Two draws at three rounds, and the strip of the first screen.
    assert len(pictures) == 2 * 3 * len(PROMPTS) + len(PROMPTS)
    assert all(a.get("alt") for a in pictures)
    ids = [a["id"] for _, a in page.tags if "id" in a]
    anchors = {(a["href"] or "")[1:] for t, a in page.tags if t == "a"}
    assert anchors <= set(ids)
    card = (folder / "MODEL_CARD.md").read_text()
    assert "differential-privacy" in card
    assert "7.8" in card


def test_drawings_are_coloured_by_the_page(run: tuple[Path, Metrics]) -> None:
    text = (run[0] / "report.html").read_text()
    drawings = re.findall(r"<svg role=.*?</svg>", text, re.S)
    assert drawings
    for drawing in drawings:
        colours = set(re.findall(r"(?:fill|stroke): *(#[0-9a-f]{6})", drawing))
        assert not colours, "a fixed colour would vanish in dark mode"


def test_numbers_survive_the_round_trip(run: tuple[Path, Metrics], tmp_path: Path) -> None:
    folder, metrics = run
    expected = html.concluded(metrics)
    assert read_metrics(folder / "metrics.json") == expected
    bare = fake_run(tmp_path, private=False, last=2)
    write_report(tmp_path, bare)
    text = (tmp_path / "metrics.json").read_text()
    # Strict JSON: Python's own reader must not meet a bare Infinity.
    json.loads(text, parse_constant=lambda word: pytest.fail(word))
    again = read_metrics(tmp_path / "metrics.json")
    assert again.sites[0].epsilon == math.inf
    assert again.rounds[2].epsilon == bare.rounds[2].epsilon


def test_a_real_sites_measured_cost_cannot_enter_a_report(run: tuple[Path, Metrics]) -> None:
    """PRIVACY.md, rule 12: only a simulation may show it."""
    values = json.loads(run[1].model_dump_json()) | {"simulated": False}
    with pytest.raises(ValueError, match=r"north: \w+_s was measured at a site"):
        Metrics.model_validate(values)
    values["cost"] = [row for row in values["cost"] if row["where"] == "server"]
    assert Metrics.model_validate(values).cost


def test_unknown_field_is_refused(run: tuple[Path, Metrics]) -> None:
    values = json.loads((run[0] / "metrics.json").read_text())
    values["sites"][0]["measured_patients"] = 397
    with pytest.raises(ValueError, match="measured_patients"):
        Metrics.model_validate(values)


def test_hostile_words_stay_words(tmp_path: Path) -> None:
    metrics = fake_run(tmp_path, last=2, title=HOSTILE)
    site = metrics.sites[0].model_copy(update={"name": HOSTILE, "refusals": [HOSTILE]})
    rounds = [
        r.model_copy(update={"epsilon": {HOSTILE: 1.0 + r.round}, "refused": {HOSTILE: HOSTILE}})
        for r in metrics.rounds
    ]
    metrics = metrics.model_copy(
        update={
            "sites": [site],
            "rounds": rounds,
            "prompts": [HOSTILE] * len(PROMPTS),
            "study_json": {"a": HOSTILE},
        }
    )
    text = write_report(tmp_path, metrics).read_text()
    assert_self_contained(text)
    assert text.count("&lt;script&gt;") > 5
    assert " ".join(HOSTILE.split()) in Page(text).text
    card = (tmp_path / "MODEL_CARD.md").read_text()
    assert "<script" not in card
    assert "<img" not in card
    table = next(line for line in card.splitlines() if line.startswith("| &lt;script"))
    assert table.count("|") == 6, "a pipe in a site's name must not add a column"


def test_older_report_survives_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    metrics = fake_run(tmp_path, last=2)
    write_report(tmp_path, metrics)
    names = ("report.html", "metrics.json", "MODEL_CARD.md")
    before = {name: (tmp_path / name).read_bytes() for name in names}
    later = metrics.model_copy(update={"created": "2031-01-01"})

    sheet = tmp_path / "samples" / "round-002.png"
    whole = sheet.read_bytes()
    sheet.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(BadInput, match="round-002"):
        write_report(tmp_path, later)
    sheet.unlink()
    with pytest.raises(BadInput, match="missing"):
        write_report(tmp_path, later)
    sheet.write_bytes(whole)

    # The disk fills up while writing: what stands is still the old report, whole, and nothing is left over.
    real = os.fsync
    calls = []

    def failing(handle: int) -> None:
        calls.append(handle)
        if len(calls) == 1:
            raise OSError(28, "No space left on device")
        real(handle)

    monkeypatch.setattr(os, "fsync", failing)
    with pytest.raises(BadInput, match="space"):
        write_report(tmp_path, later)
    monkeypatch.undo()
    assert {name: (tmp_path / name).read_bytes() for name in names} == before
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([*names, "samples"])


def with_ends(metrics: Metrics, kid: float, half: float, accuracy: float) -> Metrics:
    last = metrics.rounds[-1].model_copy(
        update={"fidelity": fidelity(kid, half), "faithfulness": faithfulness(accuracy, accuracy, accuracy)}
    )
    return metrics.model_copy(update={"rounds": [*metrics.rounds[:-1], last]})


def test_verdict_says_worse_when_worse(run: tuple[Path, Metrics]) -> None:
    metrics = run[1]
    better = verdict(metrics)
    assert better[0].startswith("Fidelity got better")
    assert any("more often than chance" in s for s in better)

    worse = " ".join(verdict(with_ends(metrics, 0.31, 0.01, 0.5)))
    assert "Fidelity got worse" in worse
    assert "better" not in worse.replace("Round 2 was clearly better than the last one", "")
    assert "Round 2 was clearly better than the last one" in worse
    assert "cannot be told from chance" in worse

    same = " ".join(verdict(with_ends(metrics, 0.15, 0.01, 0.3)))
    assert "did not change clearly" in same
    assert "less often than chance" in same
    assert "Faithfulness got worse" in same


def test_verdict_at_the_floor_and_without_intervals(run: tuple[Path, Metrics]) -> None:
    metrics = run[1]
    assert any(
        "cannot be told apart from real ones" in s for s in verdict(with_ends(metrics, 0.006, 0.002, 0.8))
    )
    last = metrics.rounds[-1]
    assert last.fidelity is not None
    bare = last.fidelity.kid.model_copy(update={"low": None, "high": None, "floor": None, "ratio": None})
    silent = last.model_copy(update={"fidelity": last.fidelity.model_copy(update={"kid": bare})})
    said = " ".join(verdict(metrics.model_copy(update={"rounds": [*metrics.rounds[:-1], silent]})))
    assert "is not known, for want of intervals" in said
    assert "No floor was measured" in said


def test_not_private_and_overspent_are_said_first_hand(tmp_path: Path) -> None:
    bare = fake_run(tmp_path, private=False, last=2)
    page = Page(write_report(tmp_path, bare).read_text())
    assert page.text.count("NOT PRIVATE") >= 3
    assert "no bound" in page.text
    assert "NOT PRIVATE" in (tmp_path / "MODEL_CARD.md").read_text()
    private = fake_run(tmp_path, last=2)
    over = private.sites[0].model_copy(update={"epsilon": 8.31})
    said = " ".join(verdict(private.model_copy(update={"sites": [over, *private.sites[1:]]})))
    assert "Above the site's own cap: north" in said


def test_run_without_any_judgement_still_reports(run: tuple[Path, Metrics], tmp_path: Path) -> None:
    nothing = {"fidelity": None, "faithfulness": None, "samples": None, "evaluated": False}
    rounds = [r.model_copy(update=nothing) for r in run[1].rounds]
    metrics = run[1].model_copy(update={"rounds": rounds, "cost": [], "forecast": []})
    page = Page(write_report(tmp_path, metrics).read_text())
    assert "nothing is known about the images" in page.text
    assert "Fidelity was not measured." in page.text


def test_comparison_names_the_winners(comparison: tuple[Path, list[Metrics]]) -> None:
    path, arms = comparison
    text = path.read_text()
    assert_self_contained(text)
    page = Page(text)
    said = comparison_verdict(arms)
    assert all(" ".join(s.split()) in page.text for s in said)
    assert "pooled has the best value" in said[0]
    assert "not clearly ahead of federated." in said[0]
    assert any(s.startswith("Privacy: only dp (epsilon 7.8)") for s in said)
    assert any("price of privacy" in s and "2.3 times" in s for s in said)
    # What the public start had before any site trained stands in the table and in the verdict.
    start = next(r.fidelity.kid for r in arms[0].rounds if r.round == 0 and r.fidelity)
    begun = next(s for s in said if s.startswith("The public start"))
    assert f"KID {wording.number(start.value)}" in begun
    assert "closer in KID: pooled, federated and dp" in begun
    assert "public data alone" in page.text
    other = arms[2].model_copy(update={"rounds": arms[2].rounds[1:]})
    assert not any("public start" in s for s in comparison_verdict([*arms[:2], other]))
    assert "no DP" in page.text
    # Federated has the price and privacy of pooled, and a higher KID; the private arm is best at epsilon.
    assert "by value: pooled and dp; federated is beaten by pooled." in page.text
    # The level that every arm reached prices them all; with a study's own, an arm may miss it.
    level = max(min(r.fidelity.kid.value for r in arm.rounds if r.fidelity) for arm in arms)
    assert f"price of KID ≤ {number(level)}" in page.text
    assert "not reached" not in page.text
    assert "CO2 is unknown" in page.text
    settings = CostSettings(target_kid=0.03, grid_gco2_per_kwh=400, grid_source="made up")
    strict = [arm.model_copy(update={"cost_settings": settings}) for arm in arms]
    wanted = common_level(strict)
    assert wanted == (0.03, "set by the study")
    found = [arm_row("", "", arm, "", wanted[0]) for arm in strict]
    assert [row.price == "not reached" for row in found] == [False, False, True]
    joules = total(strict[0].cost, "energy_j") or 0.0
    assert found[0].co2 == wording.scaled(joules / 3.6e6 * 400, "g")
    # Only the arm whose report exists is linked.
    assert [a["href"] for t, a in page.tags if t == "a" and a.get("class") != "skip"] == [
        "pooled/report.html"
    ]
    assert len([t for t, _ in page.tags if t == "img"]) == 2 * 3 * len(PROMPTS)


def test_comparison_warns_of_unlike_arms(comparison: tuple[Path, list[Metrics]]) -> None:
    arms = comparison[1]
    other = arms[1].model_copy(update={"prompts": PROMPTS[::-1]})
    assert any("different prompts" in s for s in comparison_verdict([arms[0], other]))


def test_pictures_are_cut_where_they_lie(tmp_path: Path) -> None:
    sheet = Image.new("RGB", (3 * 8, 2 * 8))
    for row in range(2):
        for column in range(3):
            sheet.paste((100 * row, 50 * column, 9), (8 * column, 8 * row, 8 * column + 8, 8 * row + 8))
    sheet.save(tmp_path / "s.png")
    found = cut(tmp_path, SampleSheet(path="s.png", rows=2, columns=3, image_size=8), 2)
    assert [len(row) for row in found] == [2, 2]
    assert len({uri for row in found for uri in row}) == 4
    with pytest.raises(BadInput, match="24 x 16 px, not 3 x 3"):
        cut(tmp_path, SampleSheet(path="s.png", rows=3, columns=3, image_size=8), 2)
    (tmp_path / "inside").mkdir()
    with pytest.raises(BadInput, match="inside"):
        cut(tmp_path / "inside", SampleSheet(path="../s.png", rows=2, columns=3, image_size=8), 1)


def test_wording() -> None:
    assert [wording.number(v) for v in (0.04567, 7.8, 12345.6, 1e-5, -0.002, math.inf, None)] == [
        "0.0457", "7.8", "12,300", "1e-5", "−0.002", "∞", "–",
    ]  # fmt: skip
    # An upper bound is never rounded down, and a round one stays.
    assert [wording.bound(v) for v in (7.801, 7.8, 8.0, 1e-5)] == ["7.81", "7.8", "8", "1e-5"]
    assert wording.seconds(7.43 * 60) == "7.43\u00a0min"
    assert wording.scaled(3 * 17_400_000, "B") == "52.2\u00a0MB"
    assert spread(list(range(100)), 4) == [0, 33, 66, 99]


def test_wall_time_is_never_added_up(run: tuple[Path, Metrics]) -> None:
    with pytest.raises(ValueError, match="wall time"):
        total(run[1].cost, "wall_s")
    assert total(run[1].cost, "up_bytes") == 12 * 17_400_000


def test_hundreds_of_sites_and_rounds_stay_readable(tmp_path: Path) -> None:
    metrics = fake_run(tmp_path, last=2)
    sites = [
        metrics.sites[0].model_copy(update={"name": f"s{i}", "epsilon_cap": 8.0 + i % 3}) for i in range(200)
    ]
    rounds = [
        r.model_copy(
            update={"epsilon": {s.name: 1.0 + r.round for s in sites}, "absent": ["s1"], "round": r.round}
        )
        for r in metrics.rounds
    ]
    more = [
        rounds[1].model_copy(update={"round": n, "fidelity": None, "faithfulness": None, "samples": None})
        for n in range(3, 300)
    ]
    big = metrics.model_copy(update={"sites": sites, "rounds": [*rounds, *more]})
    page = Page(write_report(tmp_path, big).read_text())
    assert "range over 200 sites" in page.text
    assert "more rounds" in page.text


@pytest.fixture(scope="module")
def chromium() -> str:
    found = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if found is None:
        if os.environ.get("CI") == "true":
            pytest.fail("chromium is absent, and CI must have it")
        pytest.skip("chromium is not installed")
    return found


MEASURE = """<!doctype html><body style="margin:0"><pre id=out></pre>{frames}<script>
addEventListener("load", () => {{ out.textContent = [...document.querySelectorAll("iframe")].map(f => {{
  const d = f.contentDocument, e = d.documentElement;
  const shown = q => [...d.querySelectorAll(q)].filter(x => x.getClientRects().length);
  return [f.width, e.scrollWidth, e.clientWidth, shown(".slim").length, shown(".broad").length,
    [...d.images].every(i => i.complete && i.naturalWidth > 0)].join(",");
}}).join(";") }});
</script>"""


@pytest.mark.parametrize("page", ["report", "compare"])
def test_no_horizontal_overflow(
    page: str,
    run: tuple[Path, Metrics],
    comparison: tuple[Path, list[Metrics]],
    chromium: str,
    tmp_path: Path,
) -> None:
    # Chromium's window cannot be as narrow as a telephone, but a frame can.
    path = run[0] / "report.html" if page == "report" else comparison[0]
    frames = "".join(f'<iframe width={w} height=800 src="{path.as_uri()}"></iframe>' for w in (360, 1400))
    (tmp_path / "measure.html").write_text(MEASURE.format(frames=frames))
    switches = (
        "--headless --no-sandbox --disable-gpu --no-first-run --disable-component-update --disable-sync "
        "--disable-background-networking --allow-file-access-from-files --virtual-time-budget=8000 --dump-dom"
    )
    command = [chromium, *switches.split(), f"--user-data-dir={tmp_path / 'profile'}"]
    done = subprocess.run(
        [*command, (tmp_path / "measure.html").as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    found = re.search(r'<pre id="out">(.*?)</pre>', done.stdout, re.S)
    assert found, done.stderr[-2000:]
    measured = [line.split(",") for line in found.group(1).split(";")]
    assert [m[0] for m in measured] == ["360", "1400"]
    for width, content, room, slim, broad, loaded in measured:
        assert int(content) <= int(room), f"{page} is {content} px wide at {width} px"
        assert loaded == "true"
        assert (int(slim) > 0) == (width == "360")
        assert (int(broad) > 0) == (width == "1400")


def test_templates_travel_with_the_package() -> None:
    made = html.environment()
    for name in ("report.html.j2", "compare.html.j2", "MODEL_CARD.md.j2"):
        assert made.get_template(name)
    assert estimate(1.0, 0.1, 0.5).ratio == 2.0
