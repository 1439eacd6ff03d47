"""A frozen part that a study names by its Hugging Face id, brought into the site's home.

It lies in `hub/hub/` under the home, in the layout of Hugging Face's own cache, so that whatever loads a part
by its id finds it there without a network.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from polyclinic.common.files import naming_full_disk, sha256_folder
from polyclinic.common.generator_settings import GeneratorSettings
from polyclinic.common.refusals import BadInput, Refusal
from polyclinic.common.study import Resolved

HUB = "hub/hub"  # as HF_HOME=HOME/hub has it, which deploy/ sets
MAIN = "main"
FIELDS = ("vae", "text_encoder", "warm_start", "base", "prior")
LARGE = ("generator.base", "generator.prior")
_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class Named:
    """A part that a study names by its id.

    Attributes:
        field: Of the study file.
        source: The id.
        revision: Branch, tag or commit.
    """

    field: str
    source: str
    revision: str


def use_hub(home: Path) -> None:
    """Have parts looked for in the home, where any were added."""
    if (home / HUB).is_dir():
        os.environ["HF_HUB_CACHE"] = str((home / HUB).resolve())
        if library := sys.modules.get("huggingface_hub.constants"):
            vars(library)["HF_HUB_CACHE"] = os.environ["HF_HUB_CACHE"]


def named_parts(generator: GeneratorSettings) -> list[Named]:
    """The parts that a study names by a Hugging Face id."""
    found = []
    for field in FIELDS:
        source = str(getattr(generator, field, None) or "")
        if _ID.fullmatch(source) and not Path(source).exists():
            revision = getattr(generator, f"{field}_revision", None)
            found.append(Named(f"generator.{field}", source, revision or MAIN))
    return found


def add_base(home: Path, resolved: Resolved, source: str, revision: str | None, part: str | None) -> str:
    """Bring a part into the home and compare the base with the study's.

    Args:
        home: The site's home.
        resolved: The study.
        source: A folder that was carried here, or the id, which is downloaded.
        revision: Of the id; the study's where none is given.
        part: Id of the part that a folder is, where the study names several.

    Returns:
        In words, what is here now and what is still missing.

    Raises:
        BadInput: It is not what the study names, cannot be had, or its hash is another one.
    """
    folder = Path(source)
    wanted = _wanted(resolved, (part if folder.is_dir() else source), revision, source)
    place = home / HUB / f"models--{wanted.source.replace('/', '--')}"
    (home / HUB).mkdir(mode=0o700, parents=True, exist_ok=True)
    use_hub(home)
    added = _copy(folder, place, wanted.revision) if folder.is_dir() else _download(home, wanted)
    try:
        missing = _compare(home, resolved)
    except Refusal as refusal:
        shutil.rmtree(added)
        raise BadInput(
            f"{source}: with it the base is not that of {resolved.run_name} ({resolved.base_hash[:8]}); it "
            "was taken out again; ask the coordinator for the very files, or the right revision"
        ) from refusal
    if missing:
        return f"{wanted.source} is here; the base is compared with the study's when the rest is: {missing}"
    return f"{wanted.source} is here, and the base is the study's: {resolved.base_hash[:8]}"


def _wanted(resolved: Resolved, part: str | None, revision: str | None, source: str) -> Named:
    named = named_parts(resolved.study.generator)
    if not named:
        raise BadInput(f"{resolved.run_name} names no part by a Hugging Face id; nothing is to be added")
    ids = ", ".join(f'{x.field} = "{x.source}"' for x in named)
    fits = [x for x in named if part in (None, x.source)]
    if not fits:
        raise BadInput(
            f"{source}: neither a folder here nor a part of {resolved.run_name}, which names {ids}"
        )
    if len({x.source for x in fits}) > 1:
        raise BadInput(f"{source}: say with --as ID which part it is; the study names {ids}")
    if revision not in (None, fits[0].revision):
        raise BadInput(
            f"--revision {revision}: {resolved.run_name} names {fits[0].source} at {fits[0].revision}; leave "
            "it out, or give that one"
        )
    return fits[0]


def _copy(folder: Path, place: Path, revision: str) -> Path:
    """Lay a folder out as the hub's cache would, and say where; one that is there already is replaced."""
    from polyclinic.common.generators.checkpoint import INDEX, files_read
    from polyclinic.common.generators.public import HUB_FILES

    if (folder / INDEX).is_file():
        files = files_read(folder)  # a clone of a large model has it several times over
    else:
        files = sorted({path for pattern in HUB_FILES for path in folder.rglob(pattern) if path.is_file()})
    if not files:
        raise BadInput(f"{folder}: holds no safetensors and no configuration; name the folder of the model")
    commit = revision if _COMMIT.fullmatch(revision) else sha256_folder(folder)[:40]
    target, part = place / "snapshots" / commit, place / f".adding-{commit}"
    with naming_full_disk(place), _emptied(part):
        for path in files:
            (part / path.relative_to(folder)).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, part / path.relative_to(folder))
        shutil.rmtree(target, ignore_errors=True)
        target.parent.mkdir(exist_ok=True)
        part.rename(target)
        if commit != revision:
            (place / "refs").mkdir(exist_ok=True)
            (place / "refs" / revision).parent.mkdir(parents=True, exist_ok=True)
            (place / "refs" / revision).write_text(commit)
    return target


@contextmanager
def _emptied(folder: Path) -> Iterator[None]:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        yield
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _download(home: Path, wanted: Named) -> Path:
    """Fetch a part: the person has named it, and nothing else is fetched."""
    import httpx
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    from polyclinic.common.generators.checkpoint import fetch
    from polyclinic.common.generators.public import HUB_FILES

    try:
        constants.HF_HUB_OFFLINE = False
        if wanted.field in LARGE:
            return fetch(wanted.source, wanted.revision, wanted.field)
        folder = snapshot_download(
            wanted.source,
            revision=wanted.revision,
            cache_dir=home / HUB,
            allow_patterns=list(HUB_FILES),
        )
        return Path(folder)
    except (HfHubHTTPError, httpx.HTTPError, OSError, ValueError) as error:
        raise BadInput(
            f"{wanted.source} at {wanted.revision} cannot be downloaded here ({type(error).__name__}); "
            "download it where there is a network, and run `polyclinic-client base add FOLDER`"
        ) from error
    finally:
        constants.HF_HUB_OFFLINE = True  # whatever is compared below is not fetched for it


def _compare(home: Path, resolved: Resolved) -> str:
    """Compare the base with the study's; returns what is missing where it cannot be compared yet.

    Raises:
        Refusal: It is another one.
    """
    from polyclinic.client.approval import check_base
    from polyclinic.client.binding import site_base

    try:
        check_base(resolved, site_base(home, resolved))
    except BadInput as error:
        return str(error)
    return ""
