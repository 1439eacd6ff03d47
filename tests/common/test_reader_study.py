"""A study hides what it must: order, ids, treatment of the images, and the key."""

import base64
import io
import json
import random
import re
import stat
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from polyclinic.common.files import sha256_file
from polyclinic.common.reader_study.answers import read_answers
from polyclinic.common.reader_study.images import Candidate, Treatment, choose_size, read_candidates
from polyclinic.common.reader_study.key import order_with_repeats, read_key
from polyclinic.common.reader_study.make import Plan, make_study
from polyclinic.common.reader_study.score import counts, score
from polyclinic.common.refusals import BadInput
from polyclinic.common.study import Resolved
from tests.conftest import MakeStudy
from tests.reader_answers import CAPTIONS, Made, draw_folder, small_study

SURE = {"real": 1, "nearby": 3, "faraway": 6}


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return small_study(tmp_path_factory.mktemp("study"), prompts=True, ask=("prompt", "It looks sick."))


def form_facts(path: Path) -> dict[str, object]:
    found = re.search(r'<script type="application/json" id="study">(.*?)</script>', path.read_text(), re.S)
    assert found
    facts: dict[str, object] = json.loads(found[1])
    return facts


@pytest.mark.parametrize("images", [20, 33, 60])
def test_a_repeat_is_never_within_five_of_its_first_showing(images: int) -> None:
    rng = random.Random(4)
    firsts: Counter[int] = Counter()
    for _round in range(300):
        repeats = rng.randint(0, images // 2)
        order = order_with_repeats(images, repeats, rng)
        assert len(order) == images + repeats
        seen: dict[int, int] = {}
        for place, image in enumerate(order):
            assert place - seen.setdefault(image, place) not in range(1, 6)
        assert max(Counter(order).values()) <= 2
        assert set(order) == set(range(images))
        firsts[order[0]] += 1
    # Any image may come first: 300 draws from `images` make more than 30 of one a chance below 1e-3.
    assert max(firsts.values()) < 31 + 300 // images


def test_each_rater_has_an_order_and_ids_of_their_own(study: Made) -> None:
    one, two = study.key.raters.values()
    assert [s.image for s in one] != [s.image for s in two]
    ids = [showing.id for showing in (*one, *two)]
    assert len(set(ids)) == len(ids) == 2 * 33  # 30 images and a tenth of them again
    assert all(re.fullmatch("[bcdfghjkmnpqrstvwxz]{7}", name) for name in ids)
    assert sum(showing.repeat for showing in one) == 3


def test_the_form_holds_nothing_that_tells_the_groups_apart(study: Made) -> None:
    facts = form_facts(study.out / "rater-1.html")
    images = facts["images"]
    assert isinstance(images, list)
    assert all(image.keys() == {"id", "data", "prompt"} for image in images)
    text = (study.out / "rater-1.html").read_text()
    text = re.sub(r'"data":"[^"]*"', "", text)
    assert not re.search(r"nearby|faraway|images\.csv|\.png|\bp\d+\b", text)
    pictures = [Image.open(io.BytesIO(base64.b64decode(image["data"]))) for image in images]
    kinds = {(p.size, p.mode, p.format, str(p.quantization), str(p.layer)) for p in pictures}  # type: ignore[attr-defined]
    assert len(kinds) == 1
    assert pictures[0].size == (96, 96)  # the smallest side of all: nothing is enlarged
    assert all(
        not p.getexif() and p.info.keys() <= {"jfif", "jfif_version", "jfif_unit", "jfif_density"}
        for p in pictures
    )


def test_metadata_and_orientation_are_gone(tmp_path: Path) -> None:
    image = Image.new("RGB", (64, 40), (10, 10, 10))
    image.paste((250, 250, 250), (0, 0, 64, 20))  # the upper half is white
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = 3, "camera of Hospital A"  # turned upside down
    image.save(tmp_path / "a.jpg", exif=exif, comment=b"Jane Doe", icc_profile=b"profile")
    data = Treatment(40, "crop", False).apply(Candidate(tmp_path / "a.jpg")).showings[0]
    assert b"Hospital" not in data
    assert b"Jane" not in data
    assert b"profile" not in data
    shown = Image.open(io.BytesIO(data))
    assert shown.getpixel((20, 5)) < (60, 60, 60)  # type: ignore[operator]
    assert shown.getpixel((20, 35)) > (200, 200, 200)  # type: ignore[operator]


def test_files_are_for_this_user_and_the_key_is_apart(study: Made) -> None:
    for folder in (study.out, study.sealed):
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        assert all(stat.S_IMODE(path.stat().st_mode) == 0o600 for path in folder.iterdir())
    assert sorted(path.name for path in study.out.iterdir()) == ["README.txt", "rater-1.html", "rater-2.html"]
    assert "KEEP AT THE SITE" in (study.out / "README.txt").read_text()
    assert study.commitment == sha256_file(study.sealed / "key.json") == study.facts["key_sha256"]
    assert form_facts(study.out / "rater-1.html")["key"] == study.commitment


def test_the_committed_key_holds_nothing_of_the_images(study: Made) -> None:
    # Its hash may leave with the counts, so it must be no digest over private content (rule 12).
    text = (study.sealed / "key.json").read_text()
    assert not re.search(r"\.png|polyp on|\bp\d+\b|/", text)
    sources = (study.sealed / "sources.csv").read_text()
    assert "real/" in sources
    files = re.findall(r"[^,/]+\.png", sources)
    assert files
    assert not any(file in text for file in files)
    assert (
        len(set(re.findall(r",(p\d+),", "\n".join(x for x in sources.splitlines() if ",real," in x)))) == 10
    )


def test_answers_by_the_key_score_as_they_must(study: Made, tmp_path: Path) -> None:
    files = [
        study.answer("rater-1", tmp_path / "1.csv", lambda group, _showing: SURE[group], questions=4),
        study.answer(
            "rater-2", tmp_path / "2.csv", lambda group, s: 6 if s.repeat or group == "faraway" else 1
        ),
    ]
    facts = score(study.key, study.commitment, [read_answers(f, study.key, study.commitment) for f in files])
    near, far = facts["generators"]
    assert (near["name"], near["accuracy"]["value"], near["verdict"]) == ("nearby", 0.5, "not shown")
    assert (far["name"], far["accuracy"]["value"], far["verdict"]) == ("faraway", 1.0, "told apart")
    assert near["d_prime"]["value"] == pytest.approx(0)
    assert near["accuracy_any_reader"] is None  # two readers
    assert facts["comparisons"][0]["difference"]["value"] == -1
    assert facts["comparisons"][0]["harder_to_recognise"] == "nearby"
    assert facts["agreement"]["all"]["choice"]["value"] == 1
    first, second = facts["readers"]
    assert first["repeats"]["same_choice"]["value"] == 1
    said_twice = [s for s in study.key.raters["rater-2"] if s.repeat]
    changed = sum(study.key.images[s.image] != "faraway" for s in said_twice)
    assert second["repeats"]["same_choice"]["value"] == pytest.approx(1 - changed / len(said_twice))
    assert first["answers"] == {
        "real": [10, 0, 0, 0, 0, 0],
        "nearby": [0, 0, 10, 0, 0, 0],
        "faraway": [0] * 5 + [10],
    }
    assert [q["name"] for q in facts["questions"]] == ["prompt", "own2"]
    assert facts["questions"][1]["text"] == "It looks sick."
    assert facts["questions"][0]["groups"][0]["mean"]["value"] == 3.5
    handed_on = json.dumps(counts(facts))
    assert "no privacy mechanism covers them" in handed_on
    assert not any(showing.id in handed_on for shown in study.key.raters.values() for showing in shown)


def test_spreadsheets_that_saved_the_answers_again_are_read(study: Made, tmp_path: Path) -> None:
    path = study.answer("rater-1", tmp_path / "1.csv", lambda group, _showing: SURE[group])
    expected = read_answers(path, study.key, study.commitment)
    text = path.read_text()
    rows = text.splitlines()
    for data in (
        b"\xef\xbb\xbf" + text.replace(",", ";").encode(),  # Excel with a comma as decimal point
        text.replace(",", "\t").encode("utf-16"),  # its "Unicode text"
        "\n".join([rows[0], *reversed(rows[1:]), ""]).encode(),  # sorted
        "\r\n".join(",".join(f'"{cell}"' for cell in row.split(",")) for row in rows).encode(),
    ):
        path.write_bytes(data)
        again = read_answers(path, study.key, study.commitment)
        assert dict(sorted(again.given.items())) == dict(sorted(expected.given.items()))


def spoil(text: str, how: str) -> str:
    head, first, second, *rest = text.splitlines()
    cells = first.split(",")
    if how == "edited":
        cells[5] = "2" if cells[5] != "2" else "3"
    if how == "level":
        cells[5] = "7"
    changed = ",".join(cells)
    return "\r\n".join(
        {
            "edited": [head, changed, second, *rest],
            "level": [head, changed, second, *rest],
            "missing": [head, *rest],
            "twice": [head, first, first, second, *rest],
            "cut": [head, first.rpartition(",")[0], second, *rest],
            "columns": [head.replace("own2,", ""), first, second, *rest],
            "empty": [head],
            "nothing": [],
            "study": [head, first.replace(cells[0], "bcdfghjk"), second, *rest],
            "key": [head, first.replace(cells[1], "0" * 64), second, *rest],
            "rater": [head, first.replace("rater-1", "rater-9"), second, *rest],
            "mixed": [head, first, second.replace("rater-1", "rater-2"), *rest],
        }[how]
    )


@pytest.mark.parametrize(
    ("how", "sentence"),
    [
        ("edited", "row 2: was changed after the form wrote it"),
        ("level", "row 2: was changed"),
        ("missing", "2 of the 33 images have no answer; let rater-1 finish"),
        ("twice", "row 3: a second answer to"),
        ("cut", "row 2: has 8 cells, not 9"),
        ("columns", "the columns should be study, key"),
        ("empty", "holds no answers"),
        ("nothing", "the columns should be"),
        ("study", "row 2: answers to study bcdfghjk, but the key is of"),
        ("key", "made with the key 000000000000..., but this key is"),
        ("rater", "knows no rater rater-9"),
        ("mixed", "row 3: answers of rater-2 among those of rater-1"),
    ],
)
def test_spoilt_answers_end_in_a_sentence(study: Made, tmp_path: Path, how: str, sentence: str) -> None:
    path = study.answer("rater-1", tmp_path / "1.csv", lambda group, _showing: SURE[group])
    path.write_text(spoil(path.read_text(), how), newline="")
    with pytest.raises(BadInput, match=re.escape(sentence)) as caught:
        read_answers(path, study.key, study.commitment)
    assert str(path) in str(caught.value)


def test_files_that_are_no_tables_end_in_a_sentence(study: Made, tmp_path: Path) -> None:
    for data, sentence in ((b"PK\x03\x04", "is a workbook"), (b"\xff\x00\x81", "not a text file")):
        (tmp_path / "x.csv").write_bytes(data)
        with pytest.raises(BadInput, match=sentence):
            read_answers(tmp_path / "x.csv", study.key, study.commitment)
    with pytest.raises(BadInput, match="cannot be read"):
        read_answers(tmp_path / "absent.csv", study.key, study.commitment)


def test_a_key_that_was_touched_fits_no_answers(study: Made, tmp_path: Path) -> None:
    path = study.answer("rater-1", tmp_path / "1.csv", lambda group, _showing: SURE[group])
    text = (study.sealed / "key.json").read_text()
    swapped = text.replace('"nearby"', '"x"').replace('"real"', '"nearby"').replace('"x"', '"real"')
    (tmp_path / "key.json").write_text(swapped)
    key, commitment = read_key(tmp_path)
    with pytest.raises(BadInput, match="it was changed after the forms were made"):
        read_answers(path, key, commitment)
    (tmp_path / "key.json").write_text("{}")
    with pytest.raises(BadInput, match="not a reader study's key: field `study` is missing"):
        read_key(tmp_path)


def test_raters_who_stop_early_count_where_all_answered(study: Made, tmp_path: Path) -> None:
    one = study.answer("rater-1", tmp_path / "1.csv", lambda group, _showing: SURE[group])
    two = study.answer("rater-2", tmp_path / "2.csv", lambda group, _showing: SURE[group])
    two.write_text("\n".join(two.read_text().splitlines()[:25]))
    files = [read_answers(f, study.key, study.commitment, incomplete=True) for f in (one, two)]
    facts = score(study.key, study.commitment, files)
    far = facts["generators"][1]
    assert far["accuracy"]["value"] == 1
    assert far["accuracy"]["n"] < 20
    assert any("answers are missing" in note for note in facts["notes"])
    with pytest.raises(BadInput, match="one file of each rater"):
        score(study.key, study.commitment, [files[0], files[0]])
    two.write_text("\n".join(two.read_text().splitlines()[:3]))
    files[1] = read_answers(two, study.key, study.commitment, incomplete=True)
    with pytest.raises(BadInput, match="rater-2 answered fewer than two images of"):
        score(study.key, study.commitment, files)


def test_a_runs_sample_sheet_is_cut_into_its_images(tmp_path: Path, make_study: MakeStudy) -> None:
    prompts = [{"text": "a polyp"}, {"text": "no polyp"}]
    study = make_study(evaluation={"prompts": prompts, "draws": 3})
    resolved = Resolved(study=study, base_hash="0" * 64, start_hash="0" * 64, reference_hash="0" * 64)
    (tmp_path / "study.json").write_text(resolved.model_dump_json())
    with pytest.raises(BadInput, match="no sample sheet yet"):
        read_candidates(tmp_path)
    (tmp_path / "samples").mkdir()
    sheet = Image.new("RGB", (96, 64))
    sheet.paste((250, 0, 0), (64, 32, 96, 64))
    for number in (1, 3):
        sheet.save(tmp_path / "samples" / f"round-{number:04d}.png")
    found = read_candidates(tmp_path)
    assert [c.prompt for c in found] == ["a polyp"] * 3 + ["no polyp"] * 3
    assert {c.path.name for c in found} == {"round-0003.png"}
    last = Image.open(io.BytesIO(Treatment(32, "crop", False).apply(found[-1]).showings[0]))
    assert last.getpixel((16, 16)) > (240, 0, 0)  # type: ignore[operator]
    assert choose_size(found, "crop", None) == 32


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"per_group": 13}, "real: .* has 12 patients .* lower --per-group to 12"),
        ({"per_group": 5}, "--per-group 5: fewer than 10"),
        ({"size": 100}, "--size 100: .* has only 96 px"),
        ({"size": 8}, "too small to be read"),
        ({"raters": 0}, "--raters 0"),
        ({"repeats": 0.9}, "--repeats 0.9"),
        ({"size": 0}, "0 px a side is too small to be read"),
        ({"ask": ("prompt",)}, "add --prompts"),
        ({"ask": ("quality", " ")}, "--ask: an empty question"),
        ({"synthetic": {}}, "--synthetic is missing"),
        ({"real": Path("/nowhere")}, "/nowhere: no such folder"),
    ],
)
def test_bad_plans_end_in_a_sentence(tmp_path: Path, changes: dict[str, object], sentence: str) -> None:
    with pytest.raises(BadInput, match=sentence):
        small_study(tmp_path, **changes)
    assert not (tmp_path / "forms").exists()


def test_bad_folders_end_in_a_sentence(tmp_path: Path) -> None:
    real = draw_folder(tmp_path / "real", 12, (200, 90, 90))
    other = draw_folder(tmp_path / "other", 12, (90, 90, 90), columns=CAPTIONS)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    (tmp_path / "none").mkdir()
    out, sealed = tmp_path / "out", tmp_path / "sealed"

    def plan(synthetic: Path, prompts: bool = False) -> Plan:
        return Plan(real, {"g": synthetic}, per_group=10, raters=1, prompts=prompts)

    with pytest.raises(BadInput, match="is there already"):
        make_study(plan(other), tmp_path / "full", sealed)
    with pytest.raises(BadInput, match="must be kept apart"):
        make_study(plan(other), out, out / "sealed")
    with pytest.raises(BadInput, match=r"--sealed .* lies among the images of"):
        make_study(plan(other), out, real / "sealed")
    with pytest.raises(BadInput, match="are the same image"):
        make_study(plan(real), out, sealed)
    with pytest.raises(BadInput, match="has no prompt, and prompts are shown only if every image has one"):
        make_study(plan(other, prompts=True), out, sealed)
    with pytest.raises(BadInput, match="holds no images"):
        make_study(plan(tmp_path / "none"), out, sealed)
    (other / "00.png").write_bytes(b"no image")
    with pytest.raises(BadInput, match="unreadable image"):
        make_study(Plan(real, {"g": other}, per_group=12, raters=1), out, sealed)


def channels(path: Path) -> list[np.ndarray]:
    """Pixels of every image of a form, as whoever looks into it has them."""
    images = form_facts(path)["images"]
    assert isinstance(images, list)
    files = [io.BytesIO(base64.b64decode(image["data"])) for image in images]
    return [np.asarray(Image.open(file).convert("RGB")).astype(int) for file in files]


def test_what_gives_the_groups_away_is_named(tmp_path: Path) -> None:
    mixed = draw_folder(tmp_path / "mixed", 12, (90, 90, 90), columns=CAPTIONS)
    for path in sorted(mixed.glob("*.png"))[:6]:
        Image.open(path).convert("L").save(path)
    table = mixed / "images.csv"
    table.write_text(table.read_text().replace("polyp", "polypoid lesion"))
    made = small_study(tmp_path / "a", prompts=True, synthetic={"mixed": mixed})
    colour, *wording = made.facts["giveaways"]
    assert re.search(r"without any colour \(mixed: [4-6] of 10\); --gray", colour)
    assert "10 of 10 prompts of mixed have words that no prompt of another group has" in wording[-1]
    plain = small_study(tmp_path / "b", synthetic={"mixed": mixed}, gray=True)
    assert plain.facts["giveaways"] == []


def test_films_are_not_told_from_drawings_that_are_nearly_gray(tmp_path: Path) -> None:
    """A generator of colours draws a film with a tint that no eye sees and any script does."""
    films, drawn = (
        draw_folder(tmp_path / name, 12, hue) for name, hue in (("f", (90,) * 3), ("d", (70,) * 3))
    )
    for path in films.glob("*.png"):
        Image.open(path).convert("L").save(path)
    for path in drawn.glob("*.png"):
        gray = np.asarray(Image.open(path).convert("L")).astype(int)
        Image.fromarray(np.stack([gray + 2, gray, gray - 2], -1).clip(0, 255).astype(np.uint8)).save(path)
    made = small_study(tmp_path / "a", real=films, synthetic={"drawn": drawn})
    assert made.facts["without_colour"] == ["real"]
    assert made.facts["giveaways"] == []
    assert all(bool((p == p[..., :1]).all()) for p in channels(made.out / "rater-1.html"))


def test_a_repeat_is_not_found_by_its_file(study: Made) -> None:
    shown, pixels = study.key.raters["rater-1"], channels(study.out / "rater-1.html")
    assert len({p.tobytes() for p in pixels}) == len(pixels)
    for showing, again in zip(shown, pixels, strict=True):
        first = next(p for s, p in zip(shown, pixels, strict=True) if s.image == showing.image)
        assert abs(again - first).mean() < 2  # nobody sees it
