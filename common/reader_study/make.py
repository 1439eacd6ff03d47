"""Make a reader study: a folder of forms for the raters, and apart from it a sealed folder with the key."""

from __future__ import annotations

import csv
import io
import math
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from polyclinic.common.files import write_atomic
from polyclinic.common.progress import track
from polyclinic.common.reader_study import images as pictures
from polyclinic.common.reader_study.form import form_html
from polyclinic.common.reader_study.images import REAL, Candidate, Treatment
from polyclinic.common.reader_study.key import ASKED, Key, Question, make_key, write_key
from polyclinic.common.reader_study.size import POWER, detectable
from polyclinic.common.refusals import BadInput

FEWEST = 10  # images a group
SOURCES = "sources.csv"
KEEP = """KEEP AT THE SITE. The forms in this folder hold images of patients.

Give each rater one form, on a machine of this hospital. Do not mail, upload or copy them elsewhere.
Delete this folder when the answers are scored. The key lies in the sealed folder beside it, not here:
no rater may see that folder before all have handed in their answers. Nothing here leaves the hospital;
docs/reader-study.md says what a person may decide to hand on afterwards.
"""
PUBLIC = """Give each rater one form. The key lies in the sealed folder beside this one, not here: no rater
may see that folder before all have handed in their answers. Whoever made this study said that its real
images are public.
"""


@dataclass(frozen=True)
class Plan:
    """What a person asks for.

    Attributes:
        real: Folder of real images.
        synthetic: Generator's name to its folder of images or its run folder.
        per_group: Images of each group; real images are one group.
        raters: Forms.
        repeats: Share of the images that each rater sees a second time.
        size: Pixels a side; None takes the largest that enlarges nothing.
        fit: `crop` or `pad`.
        gray: Take colour from all images; done anyway where a group has none.
        prompts: Show prompts; every image must have one.
        ask: `quality`, `prompt` or sentences of one's own, rated from 1 to 5.
        real_is_public: The real images are public, so nothing here is private.
        title: Printed on the forms.
        table: Name of the CSV in data folders.
    """

    real: Path
    synthetic: Mapping[str, Path]
    per_group: int
    raters: int
    repeats: float = 0.1
    size: int | None = None
    fit: str = "crop"
    gray: bool = False
    prompts: bool = False
    ask: Sequence[str] = ()
    real_is_public: bool = False
    title: str = "Reader study"
    table: str = "images.csv"


def make_study(plan: Plan, out: Path, sealed: Path) -> dict[str, Any]:
    """Draw the images, treat them alike, and write forms and key.

    Args:
        plan: What is asked for.
        out: Folder for the forms; not there yet, or empty.
        sealed: Folder for the key and the table of sources, outside `out`; likewise.

    Returns:
        Facts for the person, with what could still give the groups away.

    Raises:
        BadInput: Something asked for cannot be; names it and the fix. Nothing is written then.
    """
    questions = _check(plan, out, sealed)
    rng = secrets.SystemRandom()
    groups: dict[str, list[Candidate]] = {}
    for group, source in {REAL: plan.real, **plan.synthetic}.items():
        candidates = pictures.read_candidates(source, plan.table)
        groups[group] = pictures.draw(candidates, plan.per_group, group, source, rng)
    chosen = [candidate for group in groups.values() for candidate in group]
    if plan.prompts:
        without = next((c.name for c in chosen if not c.prompt), None)
        if without:
            raise BadInput(
                f"--prompts: {without} has no prompt, and prompts are shown only if every image has one; "
                "add an images.csv with a caption for it, or leave --prompts away"
            )
    treatment = Treatment(pictures.choose_size(chosen, plan.fit, plan.size), plan.fit, plan.gray)
    made = pictures.treat_all(groups, treatment)
    gray = pictures.gray_groups(made)
    if gray:  # a film is exactly gray, a generator of colours never quite: a script would tell them apart
        treatment = replace(treatment, gray=True)
        made = pictures.treat_all(groups, treatment)
    repeats = math.ceil(plan.repeats * len(chosen))
    names = [group for group, members in groups.items() for _ in members]
    key = make_key(plan.title, names, plan.raters, repeats, questions, plan.real_is_public)
    for folder in (out, sealed):
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        folder.chmod(0o700)
    commitment = write_key(sealed, key)
    write_atomic(sealed / SOURCES, _sources(chosen, names), mode=0o600)
    write_atomic(out / "README.txt", (PUBLIC if plan.real_is_public else KEEP).encode(), mode=0o600)
    data = [image.showings for group in made.values() for image in group]
    prompts = [candidate.prompt for candidate in chosen] if plan.prompts else []
    with track("write forms", plan.raters) as advance:
        for rater in key.raters:
            form = form_html(key, commitment, rater, data, prompts)
            write_atomic(out / f"{rater}.html", form.encode(), mode=0o600)
            advance()
    facts = _facts(plan, key, commitment, treatment, repeats, pictures.giveaways(groups, made, plan.prompts))
    return {**facts, "without_colour": gray}


def _check(plan: Plan, out: Path, sealed: Path) -> list[Question]:
    for folder, option in ((out, "--out"), (sealed, "--sealed")):
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise BadInput(f"{option} {folder}: is there already; name a new folder")
    if sealed.resolve().is_relative_to(out.resolve()):
        raise BadInput(f"--sealed {sealed}: lies where the forms are; the key must be kept apart from them")
    for source in (plan.real, *plan.synthetic.values()):
        for folder, option in ((out, "--out"), (sealed, "--sealed")):
            if folder.resolve().is_relative_to(source.resolve()):
                raise BadInput(
                    f"{option} {folder}: lies among the images of {source}; name a folder elsewhere"
                )
    if not plan.synthetic:
        raise BadInput("--synthetic is missing; name at least one generator and its folder, as NAME=DIR")
    if plan.raters < 1:
        raise BadInput(f"--raters {plan.raters}: at least one is needed")
    if plan.per_group < FEWEST:
        raise BadInput(
            f"--per-group {plan.per_group}: fewer than {FEWEST} images of a group show nothing; "
            "`polyclinic-client reader-study size` tells how many are needed"
        )
    if not 0 <= plan.repeats <= 0.5:  # at least 20 images and at most 10 repeats: each finds its gap
        raise BadInput(f"--repeats {plan.repeats}: write a share from 0 to 0.5")
    if "prompt" in plan.ask and not plan.prompts:
        raise BadInput("--ask prompt: raters can judge this only if they see prompts; add --prompts")
    if not all(text.strip() for text in plan.ask):
        raise BadInput("--ask: an empty question; write a statement that raters can agree with")
    own = (text for text in plan.ask if text not in ASKED)
    return [
        Question(name=text, text=ASKED[text]) if text in ASKED else Question(name=f"own{number}", text=text)
        for number, text in enumerate((*[t for t in plan.ask if t in ASKED], *own), 1)
    ]


def _sources(chosen: Sequence[Candidate], groups: Sequence[str]) -> bytes:
    """Write which file each image number is; it stays in the sealed folder."""
    text = io.StringIO()
    table = csv.writer(text)
    table.writerow(("image", "group", "source", "patient", "prompt"))
    for number, (candidate, group) in enumerate(zip(chosen, groups, strict=True)):
        table.writerow((number, group, candidate.name, candidate.patient or "", candidate.prompt or ""))
    return text.getvalue().encode()


def _facts(
    plan: Plan, key: Key, commitment: str, treatment: Treatment, repeats: int, giveaways: list[str]
) -> dict[str, Any]:
    pair = 2 * plan.per_group
    return {
        "study": key.study,
        "key_sha256": commitment,
        "raters": list(key.raters),
        "groups": {group: plan.per_group for group in (REAL, *key.generators)},
        "images_a_rater": len(key.images) + repeats,
        "hidden_repeats": repeats,
        "size": treatment.size,
        "real_is_public": plan.real_is_public,
        "giveaways": giveaways,
        "detectable_by_one_reader": round(detectable(pair, power=POWER), 3),
        "power": POWER,
    }
