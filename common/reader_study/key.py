"""The sealed key of a reader study: which id shows an image of which group, and its commitment.

The commitment is the SHA-256 of the file's bytes. It is printed on every form and stands in every row of
answers, so nobody can change afterwards which images were real. The file holds 256 random bits, so the
commitment tells nothing about it; and it holds nothing that comes from an image, a name or a caption, so
the commitment is no digest over private content (rule 12 of the privacy contract).
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Literal

from pydantic import Field, ValidationError, model_validator

from polyclinic.common.files import sha256_file, write_json_atomic
from polyclinic.common.reader_study.images import REAL
from polyclinic.common.refusals import BadInput
from polyclinic.common.section import Section
from polyclinic.common.study import explain

NAME = "key.json"
# Letters alone, and no vowels: a spreadsheet makes no number, date or word of an id.
LETTERS = "bcdfghjkmnpqrstvwxz"
MIN_GAP = 6  # positions between the two showings of an image: never within 5 of each other
CERTAINTY = ("sure", "likely", "guess")
LEVELS = tuple([f"real, {word}" for word in CERTAINTY] + [f"synthetic, {word}" for word in CERTAINTY[::-1]])
POINTS = 5  # of a question's scale
# Questions that need no words from whoever makes a study.
ASKED = {
    "quality": "The image quality is good enough to read it.",
    "prompt": "The image shows what its description says.",
}


class Question(Section):
    """A statement that a rater agrees with on a scale from 1 (not at all) to 5 (fully)."""

    name: str = Field(pattern=r"^[a-z][a-z0-9]*$")
    text: str = Field(min_length=1)


class Showing(Section):
    """One position in a rater's form: its id, the number of the image, and whether it was shown before."""

    id: str
    image: int = Field(ge=0)
    repeat: bool


class Key(Section):
    """What the forms hide.

    Attributes:
        secret: 256 random bits, hexadecimal.
        real_is_public: Whether the person who made the study says that its real images are public.
        images: Group of each image: `real`, or a generator's name.
        raters: Rater to what is shown, in order.
    """

    format: Literal["polyclinic-reader-study 1"] = "polyclinic-reader-study 1"
    study: str
    title: str
    secret: str = Field(min_length=64)
    real_is_public: bool
    questions: tuple[Question, ...] = ()
    images: tuple[str, ...]
    raters: dict[str, tuple[Showing, ...]]

    @model_validator(mode="after")
    def _whole(self) -> Key:
        for rater, shown in self.raters.items():
            if sorted(s.image for s in shown if not s.repeat) != list(range(len(self.images))):
                raise ValueError(f"{rater} is not shown every image once")
        ids = [showing.id for shown in self.raters.values() for showing in shown]
        if len(set(ids)) != len(ids):
            raise ValueError("an id stands for two showings")
        return self

    @property
    def generators(self) -> list[str]:
        """Names of the generators, in the order in which they were given."""
        return [group for group in dict.fromkeys(self.images) if group != REAL]


def random_id(length: int = 7) -> str:
    """Draw an id from the operating system's randomness."""
    return "".join(secrets.choice(LETTERS) for _ in range(length))


def make_key(
    title: str,
    images: Sequence[str],
    raters: int,
    repeats: int,
    questions: Sequence[Question],
    real_is_public: bool,
) -> Key:
    """Draw ids, orders and hidden repeats, each rater's own.

    Args:
        title: For people.
        images: Group of each image.
        raters: How many forms.
        repeats: How many images each rater is shown a second time.
        questions: Asked about each image.
        real_is_public: As in `Key`.
    """
    rng = secrets.SystemRandom()
    used: set[str] = set()

    def fresh() -> str:
        while (made := random_id()) in used:
            pass
        used.add(made)
        return made

    shown = {}
    for rater in range(1, raters + 1):
        order = order_with_repeats(len(images), repeats, rng)
        shown[f"rater-{rater}"] = tuple(
            Showing(id=fresh(), image=image, repeat=image in order[:position])
            for position, image in enumerate(order)
        )
    return Key(
        study=random_id(8),
        title=title,
        secret=secrets.token_hex(32),
        real_is_public=real_is_public,
        questions=tuple(questions),
        images=tuple(images),
        raters=shown,
    )


def order_with_repeats(images: int, repeats: int, rng: Random) -> list[int]:
    """Shuffle images and show some a second time, never within 5 positions of the first.

    A repeat is put in at a random place at least 6 after its first showing. Whatever is put in later
    moves a pair together or further apart, never closer.

    Args:
        images: Number of images.
        repeats: How many are shown twice; at most `images` - 5.
        rng: Source of randomness.

    Returns:
        Image numbers, [images + repeats].
    """
    order = list(range(images))
    rng.shuffle(order)
    for image in rng.sample(order[: images - MIN_GAP + 1], repeats):
        order.insert(rng.randint(order.index(image) + MIN_GAP, len(order)), image)
    return order


def write_key(folder: Path, key: Key) -> str:
    """Write the key for this user alone; returns its commitment."""
    write_json_atomic(folder / NAME, key.model_dump(mode="json"), mode=0o600)
    return sha256_file(folder / NAME)


def read_key(path: Path) -> tuple[Key, str]:
    """Read a key, or the sealed folder that holds it; returns it with its commitment.

    Raises:
        BadInput: It is missing or is no key; names the file and the fix.
    """
    path = path / NAME if path.is_dir() else path
    if not path.is_file():
        raise BadInput(f"{path}: no such file; name the sealed folder that `reader-study make` wrote")
    data = path.read_bytes()
    try:
        return Key.model_validate_json(data), hashlib.sha256(data).hexdigest()
    except ValidationError as error:
        raise BadInput(f"{path}: not a reader study's key: {explain(error)}") from error
