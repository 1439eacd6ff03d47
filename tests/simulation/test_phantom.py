"""The phantoms show what their labels and captions say, and are a function of (seed, patient)."""

import csv
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from polyclinic.common.refusals import BadInput
from polyclinic.simulation.phantom import (
    CLINICS,
    COLUMNS,
    Attributes,
    attributes,
    captions,
    draw,
    patient_style,
    write_phantoms,
)

Array = NDArray[np.float64]
BARE = Attributes(polyp=False, polyp_size="", polyp_quadrant="", instrument=False, overlay=False)


def picture(seed: int, shown: Attributes, site: str = "north", size: int = 64) -> Array:
    """Draw with one bowel a seed, so that two calls differ by what is shown only."""
    rng = np.random.default_rng(seed)
    return np.asarray(draw(rng, patient_style(rng, site), shown, size), dtype=np.float64) / 255


def changed(seed: int, shown: Attributes, site: str) -> NDArray[np.bool_]:
    """Find the pixels that an attribute changes, (64, 64)."""
    difference = np.abs(picture(seed, shown, site) - picture(seed, BARE, site))
    return np.asarray(difference.max(2) > 0.08)


def balanced_accuracy(
    train: Array, held_out: Array, said: NDArray[np.bool_], truth: NDArray[np.bool_]
) -> float:
    """Fit a ridge classifier on standardised features and judge it on the held-out ones."""
    mean, spread = train.mean(0), train.std(0) + 1e-6
    a, b = (train - mean) / spread, (held_out - mean) / spread
    sign = np.where(said, 1.0, -1.0)
    kernel = a @ a.T
    ridge = 0.1 * np.trace(kernel) / len(kernel) * np.eye(len(kernel))
    guess = b @ (a.T @ np.linalg.solve(kernel + ridge, sign - sign.mean())) + sign.mean() > 0
    return float((guess[truth].mean() + (~guess[~truth]).mean()) / 2)


def says(caption: str) -> dict[str, str]:
    """Read a caption back: what it affirms or denies, independently of how it was written."""
    found = {}
    for label, noun in (
        ("polyp", "polyp"),
        ("instrument", "instrument"),
        ("overlay", "green/black box artefact"),
    ):
        match = re.search(rf"(not containing an?|\bno|\ban?) {noun}", caption)
        if match:
            found[label] = "yes" if match[1] in ("a", "an") else "no"
    size = re.search(r"of size (\S+?)(?: in|\.)", caption)
    place = re.search(r"in the (\S+)\.", caption)
    if size:
        found["polyp_size"] = size[1]
    if place:
        found["polyp_quadrant"] = place[1]
    return found


def read(folder: Path) -> list[dict[str, str]]:
    with (folder / "images.csv").open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("site", CLINICS)
def test_polyp_lies_in_its_quadrant_and_grows_with_its_size(site: str) -> None:
    halves = {"upper": slice(0, 32), "lower": slice(32, 64), "left": slice(0, 32), "right": slice(32, 64)}
    areas: dict[str, list[int]] = {"<5mm": [], "5-10mm": [], ">10mm": []}
    for quadrant in ("upper-left", "upper-right", "lower-left", "lower-right"):
        vertical, horizontal = quadrant.split("-")
        for size in areas:
            for seed in range(4):
                shown = replace(BARE, polyp=True, polyp_size=size, polyp_quadrant=quadrant)
                where = changed(seed, shown, site)
                areas[size].append(int(where.sum()))
                assert where[halves[vertical], halves[horizontal]].sum() > 0.6 * where.sum()
    small, middle, large = areas.values()
    assert min(small) > np.pi * 6**2  # at least a disc 12 pixels across
    assert np.mean(small) * 1.6 < np.mean(middle)
    assert np.mean(middle) * 1.4 < np.mean(large)


@pytest.mark.parametrize("site", CLINICS)
def test_box_fills_the_lower_left_corner_only(site: str) -> None:
    for seed in range(8):
        with_box = picture(seed, replace(BARE, overlay=True), site)
        where = changed(seed, replace(BARE, overlay=True), site)
        assert not where[:42].any()
        assert not where[:, 24:].any()
        corner = with_box[46:61, 3:20]
        ground = np.median(corner.reshape(-1, 3), axis=0)
        green = ground[1] > ground[0] + 0.2 and ground[1] > ground[2] + 0.1
        assert green or ground.max() < 0.2
        assert (corner.min(2) > 0.4).mean() > 0.04  # light strokes


def test_instrument_is_a_bluish_tube_from_an_edge() -> None:
    for seed in range(12):
        shown = replace(BARE, instrument=True)
        where = changed(seed, shown, "north")
        view = picture(seed, shown)
        bluish = (view[..., 2] > view[..., 0] + 0.08) & where
        assert bluish.sum() > 70
        rows, columns = np.nonzero(where)
        # It starts at the border of the field of view and ends well inside.
        reach = np.hypot(rows - 31.5, columns - 31.5)
        assert reach.max() > 26
        assert reach.min() < 16


def test_linear_probe_on_coarse_pixels_reads_every_attribute() -> None:
    features, shown, patients = [], [], []
    for site in CLINICS:
        for number in range(45):
            rng = np.random.default_rng([3, number, *site.encode()])
            style = patient_style(rng, site)
            for _ in range(3):
                seen = attributes(rng, site)
                small = draw(rng, style, seen).resize((16, 16), Image.Resampling.BOX)
                features.append(np.asarray(small, dtype=np.float64).ravel() / 255)
                shown.append(seen)
                patients.append(number)
    x, train = np.stack(features), np.array(patients) < 33
    for name in ("polyp", "instrument", "overlay"):
        truth = np.array([getattr(seen, name) for seen in shown])
        accuracy = balanced_accuracy(x[train], x[~train], truth[train], truth[~train])
        assert accuracy >= 0.85, name


def test_captions_are_true_and_one_of_three_says_everything() -> None:
    rng = np.random.default_rng(5)
    wordings = set()
    for number in range(600):
        shown = attributes(rng, list(CLINICS)[number % 3])
        said = captions(shown, rng)
        labels = shown.labels()
        assert len(set(said)) == 3
        read_back = [says(caption) for caption in said]
        for caption, found in zip(said, read_back, strict=True):
            assert found, caption
            assert found.items() <= labels.items(), (caption, labels)
            wordings.add(caption)
        assert any({"polyp", "instrument", "overlay"} <= set(found) for found in read_back)
    assert "Generate an image with a polyp of size 5-10mm in the upper-left." in wordings
    assert "Generate an image not containing a green/black box artefact." in wordings
    assert "Generate an image with a polyp, no instrument and a green/black box artefact." in wordings
    assert len(wordings) <= 64  # each is embedded once and shipped to nobody


def test_sites_differ_in_camera_colour_and_case_mix() -> None:
    black, warmth, boxes = {}, {}, {}
    for site in CLINICS:
        views = np.stack([picture(seed, BARE, site) for seed in range(25)])
        black[site] = (views.max(3) < 0.1).mean(0)
        middle = views[:, 16:48, 16:48].mean((1, 2))
        warmth[site] = (middle[:, 0] / middle[:, 2]).mean()
        rng = np.random.default_rng(1)
        boxes[site] = np.mean([attributes(rng, site).overlay for _ in range(500)])
    assert (black["valley"] > 0.5).mean() < 0.08  # its circle is larger than the frame
    assert ((black["north"] > 0.5) & (black["coast"] < 0.5)).mean() > 0.03  # circle against octagon
    assert warmth["coast"] > warmth["valley"] > warmth["north"]
    assert boxes["coast"] > boxes["north"] + 0.15


def test_images_of_a_patient_share_their_style() -> None:
    means = []
    for number in range(20):
        style = patient_style(np.random.default_rng(number), "north")
        views = [np.asarray(draw(np.random.default_rng([number, k]), style, BARE)) for k in range(4)]
        means.append([view[4:-4, 4:-4].reshape(-1, 3).mean(0) for view in views])
    colour = np.array(means)
    assert (colour.mean(1).std(0) > 2 * colour.std(1).mean(0)).all()


def test_size_is_a_parameter() -> None:
    shown = replace(BARE, polyp=True, polyp_size=">10mm", polyp_quadrant="upper-right")
    large, small = picture(0, shown, size=128), picture(0, shown, size=64)
    assert large.shape == (128, 128, 3)
    assert np.abs(large.reshape(64, 2, 64, 2, 3).mean((1, 3)) - small).mean() < 0.03


def test_folder_is_whole_and_a_function_of_seed_and_patient(tmp_path: Path) -> None:
    steps: list[tuple[int, int]] = []
    write_phantoms(
        tmp_path / "two", patients_per_site=2, seed=1, on_progress=lambda *step: steps.append(step)
    )
    write_phantoms(tmp_path / "three", patients_per_site=3, seed=1)
    write_phantoms(tmp_path / "other", patients_per_site=2, seed=2)
    assert steps == [(n, 6) for n in range(1, 7)]

    two, three = read(tmp_path / "two"), read(tmp_path / "three")
    assert tuple(two[0]) == COLUMNS
    assert two == [row for row in three if not row["patient"].endswith("-0003")]
    names = {row["image"] for row in two}
    assert names == {f"images/{path.name}" for path in (tmp_path / "two" / "images").iterdir()}
    for name in names:
        assert (tmp_path / "two" / name).read_bytes() == (tmp_path / "three" / name).read_bytes()
    assert two != read(tmp_path / "other")
    pictures = [path.read_bytes() for path in (tmp_path / "three" / "images").iterdir()]
    assert len(set(pictures)) == len(pictures)

    per_patient: dict[str, set[str]] = {}
    for row in three:
        assert row["patient"].startswith(row["site"] + "-")
        assert (row["polyp"] == "yes") == bool(row["polyp_size"]) == bool(row["polyp_quadrant"])
        assert says(row["caption"]).items() <= row.items()
        per_patient.setdefault(row["patient"], set()).add(row["image"])
    assert len(per_patient) == 9
    assert all(1 <= len(images) <= 6 for images in per_patient.values())


def test_existing_folder_is_left_alone_or_refused(tmp_path: Path) -> None:
    folder = tmp_path / "phantoms"
    write_phantoms(folder, patients_per_site=1, seed=1)
    before = folder.stat().st_mtime_ns, (folder / "images.csv").stat().st_mtime_ns
    write_phantoms(folder, patients_per_site=1, seed=1)
    assert before == (folder.stat().st_mtime_ns, (folder / "images.csv").stat().st_mtime_ns)
    with pytest.raises(BadInput, match="phantoms holds something other"):
        write_phantoms(folder, patients_per_site=1, seed=2)
    assert before == (folder.stat().st_mtime_ns, (folder / "images.csv").stat().st_mtime_ns)


def test_interrupted_writing_leaves_nothing(tmp_path: Path) -> None:
    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_phantoms(tmp_path / "phantoms", patients_per_site=2, seed=1, on_progress=stop)
    assert list(tmp_path.iterdir()) == []
