"""A comparison of systems: what its file becomes, what it refuses before anything runs, and its page."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from urllib.parse import unquote

import pytest

from polyclinic.common.study import Resolved, Study, read_values
from polyclinic.server.report import wording
from polyclinic.server.report.costs import LEARNING, total
from polyclinic.server.report.html import read_metrics
from polyclinic.server.report.metrics import Metrics, bytes_moved
from polyclinic.simulation.cli import main
from polyclinic.simulation.comparison_study import NEAR, NOTICE, scaled
from tests.server.report_page import Page, assert_self_contained

STUDIES = Path(__file__).parents[2] / "studies"
WHOLE = 0.1  # steps of the small comparison are few: whole numbers are that near to equal operations
SMALL = """
name = "pair"
title = "Two systems"
[compare.systems.flux]
generator = {family = "flux", base = "random-weights", lora = {rank = 2}, max_tokens = 8}
[compare.systems.sd]
generator = {family = "stable-diffusion", base = "random-weights", lora = {rank = 2}}
learning_rate = 2e-3
[data]
source = "phantoms"
image_size = 32
phantoms = {patients_per_site = 16, seed = 3}
[privacy]
delta = 1e-3
sampling_rate = 0.25
views = 2
micro_batch = 2
[training]
rounds = 1
steps_per_round = 4
threads = 1
[federation]
min_sites = 2
[reference]
fraction = 0.4
pretrain = 0.0
probe = 0.5
evaluate = 0.5
concepts = ["polyp"]
[cost]
gpu_flops_per_s = 1e12
gpu_utilisation = 0.5
[evaluation]
steps = 2
draws = 1
every = 1000
prompts = [
  {text = "Generate an image with a polyp.", labels = {polyp = "yes"}},
  {text = "Generate an image with no polyp.", labels = {polyp = "no"}},
]
[simulation]
split = "site"
[simulation.sites]
north = {declared_patients = 10, min_patients = 2}
coast = {declared_patients = 10, min_patients = 2}
valley = {declared_patients = 10, min_patients = 2}
"""


def written(folder: Path, *changes: tuple[str, str]) -> Path:
    text = SMALL
    for old, new in changes:
        assert old in text
        text = text.replace(old, new, 1)
    path = folder / "pair.toml"
    path.write_text(text, encoding="utf-8")
    return path


@dataclass(frozen=True)
class Line:
    """A line of the table: under which heading, its cells' texts, and the run that it links to."""

    budget: str
    name: str
    cells: list[str]
    folder: Path
    metrics: Metrics
    study: Study

    @property
    def mode(self) -> str:
        return self.name.split(", ")[1]


def lines(page: Path) -> list[Line]:
    found, budget = [], ""
    table = re.search(r"<tbody>(.*?)</tbody>", page.read_text(encoding="utf-8"), re.DOTALL)
    assert table is not None
    for row in re.findall(r"<tr.*?</tr>", table.group(1), re.DOTALL):
        if 'class="group"' in row:
            budget = Page(row).text
            continue
        link = re.search(r'href="([^"]+)"', row)
        assert link is not None
        folder = (page.parent / unquote(link.group(1))).parent
        head, *cells = [Page(cell).text for cell in re.findall(r"<t[hd].*?</t[hd]>", row, re.DOTALL)]
        metrics = read_metrics(folder / "metrics.json")
        found.append(Line(budget, head, cells, folder, metrics, study_of(folder)))
    return found


def study_of(folder: Path) -> Study:
    values = json.loads((folder / "study.json").read_text(encoding="utf-8"))
    return Resolved.model_validate(values).study


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pair")
    study = written(folder)
    assert main(["compare", str(study), "--home", str(folder / "home")]) == 0
    return folder / "home" / "runs" / "pair-compare.html"


@pytest.mark.long
def test_every_system_has_every_arm_at_both_budgets(page: Path) -> None:
    arms = [(line.budget, line.name) for line in lines(page)]
    budgets = ("At equal images seen", "At equal GPU-hours")
    names = [f"{s}, {m}" for s, m in product(("flux", "sd"), ("pooled", "federated", "private"))]
    assert sorted(arms) == sorted(product(budgets, names))


def spaced(text: str) -> str:
    """Write a page's words with plain spaces, as `lines` reads them."""
    return " ".join(text.split())


@pytest.mark.long
def test_the_table_says_what_the_runs_metrics_say(page: Path) -> None:
    for line in lines(page):
        metrics = line.metrics
        epsilon, *_, peak, energy, moved = line.cells
        assert (epsilon == "not private") == (line.mode != "private") == (not metrics.private)
        assert energy == spaced(wording.energy(total(metrics.cost, "energy_j", LEARNING) or 0.0))
        training = [e.figures for e in metrics.cost if e.phase == "train"]
        peaks = [figures["peak_bytes"].value for figures in training if "peak_bytes" in figures]
        assert peak.startswith(spaced(wording.scaled(max(peaks), "B")))
        assert moved == spaced(wording.scaled(sum(bytes_moved(metrics)), "B"))


def operations(line: Line) -> float:
    return total(line.metrics.cost, "flops", ("train",)) or 0.0


def images(study: Study) -> float:
    assert study.simulation is not None
    patients = sum(site.declared_patients for site in study.simulation.sites.values())
    return patients * study.privacy.sampling_rate * study.privacy.views * study.total_steps


@pytest.mark.long
def test_budgets_are_equal_across_systems_and_arms(page: Path) -> None:
    found = lines(page)
    seen = [line for line in found if line.budget == "At equal images seen"]
    hours = [line for line in found if line.budget == "At equal GPU-hours"]
    assert {images(line.study) for line in seen} == {30 * 0.25 * 2 * 4}
    assert max(map(operations, seen)) > (1 + WHOLE) * min(map(operations, seen))
    assert max(map(operations, hours)) < (1 + WHOLE) * min(map(operations, hours))
    assert max(images(line.study) for line in hours) > min(images(line.study) for line in hours)
    # What the page calls GPU time is these operations on the stated GPU.
    for line in found:
        assert line.cells[6].startswith(spaced(wording.gpu_time(operations(line) / (1e12 * 0.5))))


@pytest.mark.long
def test_every_page_opens_with_what_the_numbers_are_not(page: Path) -> None:
    for path in [page, *(line.folder / "report.html" for line in lines(page))]:
        text = path.read_text(encoding="utf-8")
        assert_self_contained(text)
        words = Page(text).text
        assert words.index(NOTICE) < words.index("Polyclinic ·")
    for line in lines(page):
        assert NOTICE in (line.folder / "MODEL_CARD.md").read_text(encoding="utf-8")
        assert "random-weights" in line.metrics.study.base


@pytest.mark.parametrize(
    ("old", "new", "names"),
    [
        ("[data]\n", '[generator]\nsize = "msdm-tiny"\n[data]\n', ["[generator]", "remove"]),
        ("learning_rate = 2e-3", "learningrate = 2e-3", ["compare", "systems.sd.learningrate", "spelling"]),
        ('family = "stable-diffusion"', 'family = "dall-e"', ["random-weights", "dall-e", "flux"]),
        (
            'family = "stable-diffusion", base = "random-weights"',
            'family = "dall-e", base = "/nowhere"',
            ["compare.systems.sd", "generator.family", "dall-e"],
        ),
        ('"random-weights"', '"/nowhere/base"', ["compare.systems.flux", "/nowhere/base"]),
        (
            '"random-weights"',
            '"clinic/base", base_revision = "main"',
            ["compare.systems.flux", "clinic/base", "network"],
        ),
        ("lora = {rank = 2}", "lora = {rank = 2, targets = ['to_z']}", ["compare.systems.flux", "to_z"]),
        ("gpu_flops_per_s = 1e12", "", ["cost.gpu_flops_per_s", "add it"]),
        ('name = "pair"', "", ["pair.toml", "name", "missing"]),
        ("[compare.systems.sd]", "[compare.systems.SD]", ["compare", "systems.SD"]),
        ("image_size = 32", "image_size = 33", ["compare.systems.flux", "data.image_size"]),
        ("delta = 1e-3", "delta = 1e-1", ["compare.systems.flux", "privacy.delta"]),
    ],
)
def test_a_mistake_ends_in_one_sentence_before_anything_runs(
    old: str, new: str, names: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    study = written(tmp_path, (old, new))
    code = main(["compare", str(study), "--home", str(tmp_path / "home")])
    sentence = capfd.readouterr().err.strip().splitlines()[-1]
    assert code == 2
    for name in names:
        assert name in sentence
    assert not (tmp_path / "home" / "runs").exists()
    assert not (tmp_path / "home" / "data").exists()


@pytest.mark.parametrize("table", ["", "[compare.systems]\n", "[compare]\nsystems = 3\n"])
def test_a_comparison_without_systems_is_refused(
    table: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    study = tmp_path / "none.toml"
    head, _, tail = SMALL.partition("[compare.systems.flux]")
    study.write_text(head + "[compare]\n" * (not table) + table + "[data]" + tail.partition("[data]")[2])
    assert main(["compare", str(study), "--home", str(tmp_path / "home")]) == 2
    assert "none.toml: compare: field `systems`" in capfd.readouterr().err
    assert not (tmp_path / "home").exists()


def test_systems_are_compared_at_one_epsilon(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    home = tmp_path / "home"
    assert main(["compare", str(written(tmp_path)), "--epsilon", "1", "--home", str(home)]) == 2
    assert "privacy.epsilon" in capfd.readouterr().err
    assert not home.exists()


@pytest.mark.parametrize(
    ("rounds", "steps", "ratio"), [(2, 6, 1.347), (2, 6, 2.114), (3, 5, 0.2), (1, 1, 0.1)]
)
def test_steps_are_scaled_as_near_as_whole_numbers_come(rounds: int, steps: int, ratio: float) -> None:
    found = scaled(rounds, steps, ratio)
    wanted = max(1.0, rounds * steps * ratio)
    pairs = product(range(1, 4 * rounds + 1), range(1, 4 * rounds * steps))
    best = min(abs(r * s / wanted - 1) for r, s in pairs)
    assert abs(found[0] * found[1] / wanted - 1) <= max(NEAR, best)


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_the_papers_comparison_runs_whole(tmp_path: Path) -> None:
    study = STUDIES / "paper-comparison.toml"
    assert main(["compare", str(study), "--home", str(tmp_path)]) == 0
    found = lines(tmp_path / "runs" / "paper-compare.html")
    systems = read_values(study)[0]["compare"]["systems"]
    assert {line.name.split(",")[0] for line in found} == set(systems)
    assert len(found) == 2 * 3 * len(systems)
    seen = [line for line in found if line.budget == "At equal images seen"]
    hours = [line for line in found if line.budget == "At equal GPU-hours"]
    assert len({images(line.study) for line in seen}) == 1
    costliest = max(map(operations, seen))
    assert all(abs(operations(line) / costliest - 1) <= NEAR for line in hours)
    assert all(line.cells[2] != wording.DASH for line in found)
    assert all(line.cells[3] != wording.DASH for line in found)
