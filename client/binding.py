"""What an approval binds beside its numbers: dependencies, base files and data (PRIVACY.md, rule 18).

A round asks all of it again. What is dear to hash is asked cheaply first: data by names, sizes and times,
the base once a process.
"""

from __future__ import annotations

import hashlib
import json
import sys
import sysconfig
from functools import lru_cache
from importlib import metadata, resources
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from polyclinic.client.intake import site_records, watched_tables
from polyclinic.common.data.pixels import snapshot_hash
from polyclinic.common.data.table import Record
from polyclinic.common.files import sha256_file, write_json_atomic
from polyclinic.common.generator_settings import GeneratorSettings
from polyclinic.common.generators.base import BaseFiles
from polyclinic.common.generators.checkpoint import hash_files, large_files
from polyclinic.common.generators.families import freezes_a
from polyclinic.common.generators.public import resolve
from polyclinic.common.kit import BASE_INDEX, BaseIndex, read_exchanged
from polyclinic.common.refusals import BadInput
from polyclinic.common.settings import DataSettings
from polyclinic.common.study import Resolved, Study

ROOT = "polyclinic"
Watched = dict[str, list[int]]

_HASHES: dict[tuple[BaseFiles, GeneratorSettings, bool], str] = {}


def code_hash() -> str:
    """Hash every installed Python file of the rooms that run at a site."""
    digest = hashlib.sha256()
    for room in ("common", "client"):
        root = Path(str(resources.files(f"polyclinic.{room}")))
        for path in sorted(root.rglob("*.py")):
            digest.update(f"{room}/{path.relative_to(root)} {sha256_file(path)}\n".encode())
    return digest.hexdigest()


@lru_cache(maxsize=1)
def dependencies() -> dict[str, str]:
    """Name every installed distribution that Polyclinic needs, directly or not.

    RECORD lists the hash of every file as it was installed; the files themselves are not read again.

    Returns:
        Normalised name to `VERSION sha256:HASH of its RECORD`; Polyclinic itself is bound by its code.
    """
    found: dict[str, str] = {}
    extras: dict[str, set[str]] = {}
    # Ray puts copies of its own, which lie inside its package, in front of what is installed.
    installed = {Path(sysconfig.get_path(kind)) for kind in ("purelib", "platlib")}
    path = [entry for entry in sys.path if installed.isdisjoint(Path(entry).parents)]
    # What a site may have installed beside: decoders stand between its images and what is trained.
    todo = [(ROOT, frozenset({"", "client", "dicom", "parquet", "quantized"}))]
    while todo:
        name, wanted = todo.pop()
        new = set(wanted) - extras.setdefault(name, set())
        if not new:
            continue
        extras[name] |= new
        distribution = next(iter(metadata.Distribution.discover(name=name, path=path)), None)
        if distribution is None:
            continue  # for another platform or Python
        record = (distribution.read_text("RECORD") or "").encode()
        if name != ROOT:
            found[name] = f"{distribution.version} sha256:{hashlib.sha256(record).hexdigest()}"
        for line in distribution.requires or []:
            asked = Requirement(line)
            # Not what only another platform needs: a search path may hold a stray copy of it.
            if asked.marker is None or any(asked.marker.evaluate({"extra": extra}) for extra in extras[name]):
                todo.append((canonicalize_name(asked.name), frozenset({"", *asked.extras})))
    return dict(sorted(found.items()))


def changed_dependencies(bound: dict[str, str]) -> list[str]:
    """Say which distributions are not what was bound, each with its versions."""
    now = dependencies()
    return [
        f"package {name} ({_version(bound.get(name))} -> {_version(now.get(name))})"
        for name in sorted(bound.keys() | now.keys())
        if bound.get(name) != now.get(name)
    ]


def _version(entry: str | None) -> str:
    return entry.split()[0] if entry else "none"


def site_base(home: Path, resolved: Resolved) -> BaseFiles:
    """Find a study's frozen parts at a site: in its kit, or by the name that the study has for them.

    Raises:
        BadInput: A part is not here; names it and the fix.
    """
    index = home / "kit" / BASE_INDEX
    named = read_exchanged(index, BaseIndex).bases.get(resolved.base_hash, {}) if index.exists() else {}
    carried = {part: index.parent / name for part, name in named.items()}
    generator = resolved.study.generator
    if generator.large:
        return large_files(generator)
    vae = carried.get("vae") or _named(generator.vae, generator.vae_revision, "generator.vae")
    frozen = None
    if generator.train != "all":
        frozen = carried.get("frozen") or _named(generator.warm_start, None, "generator.warm_start")
    return BaseFiles(vae=vae.resolve(), frozen=frozen and frozen.resolve())


def _named(source: str, revision: str | None, field: str) -> Path:
    if source in ("reference", "none"):
        raise BadInput(
            f'`{field} = "{source}"`: the kit of this site does not carry it; ask the coordinator for a kit '
            "of this very study and run `polyclinic-client init KIT`"
        )
    return resolve(source, revision, field)


def base_hash_of(files: BaseFiles, study: Study) -> str:
    """Hash a study's frozen parts as they lie here, once a process.

    Raises:
        BadInput: A part is gone.
    """
    for path in files.paths:
        if not path.exists():
            raise BadInput(f"the base in {path} is not there; restore it from the kit")
    key = (files, study.generator, freezes_a(study))
    if key not in _HASHES:
        _HASHES[key] = hash_files(files, study)
    return _HASHES[key]


def watch_data(path: Path, home: Path, folder: Path, data: DataSettings, records: list[Record]) -> None:
    """Remember names, sizes and times of the approved data, so that a round need not read it all."""
    files = [*watched_tables(home, data, folder), *(record.image for record in records)]
    write_json_atomic(path, _seen(sorted(set(files))), mode=0o600)


def data_drifted(path: Path, home: Path, folder: Path, data: DataSettings, snapshot: str) -> bool:
    """Tell whether the data is another than was approved; hash it only where something looks changed.

    Args:
        path: What `watch_data` wrote.
        home: The site's home.
        folder: The data folder.
        data: The study's data table.
        snapshot: Approved snapshot hash.
    """
    try:
        bound: Watched = json.loads(path.read_text(encoding="utf-8"))
        if _seen([Path(name) for name in bound]) == bound:
            return False
        records = site_records(home, data, folder)
        if snapshot_hash(records) != snapshot:
            return True
    except (OSError, ValueError, BadInput):
        return True  # something is gone, or cannot be read
    watch_data(path, home, folder, data, records)  # touched, copied back from a backup: the same content
    return False


def _seen(paths: list[Path]) -> Watched:
    stats = ((path, path.stat()) for path in paths)
    return {str(path): [stat.st_size, stat.st_mtime_ns] for path, stat in stats}
