"""Kits that are no kits: whatever else is in one, nothing of it is unpacked."""

import json
import stat
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from polyclinic.client.binding import site_base
from polyclinic.common.files import sha256_folder
from polyclinic.common.refusals import BadInput
from polyclinic.common.study import Resolved
from tests.server.joining import Joining


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def add(name: str, content: bytes = b"x", kind: int = stat.S_IFREG) -> Callable[[zipfile.ZipFile], None]:
    def change(archive: zipfile.ZipFile) -> None:
        info = zipfile.ZipInfo(name)
        info.external_attr = (kind | 0o644) << 16
        archive.writestr(info, content)

    return change


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (add("../evil.json"), "does not belong in a kit"),
        (add("/tmp/evil.json"), "does not belong in a kit"),
        (add("base/../../evil.json"), "does not belong in a kit"),
        (add("base/vae-000000000000/../x.json"), "does not belong in a kit"),
        (add("base/vae-000000000000/x.py"), "does not belong in a kit"),
        (add("base\\evil.json"), "does not belong in a kit"),
        (add("polyclinic/__init__.py"), "does not belong in a kit"),
        (add("sitecustomize.py"), "does not belong in a kit"),
        (add("base/frozen-000000000000.safetensors", b"/etc/passwd", stat.S_IFLNK), "a link or special file"),
        (add("base/frozen-000000000000.safetensors"), "is damaged"),
        (add("kit.json"), "twice"),
        (add("INSTRUCTIONS.txt", b" " * (2 << 20)), "twice|too large"),
    ],
)
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_a_zip_with_anything_else_in_it_is_not_unpacked(
    made: Joining, change: Callable[[zipfile.ZipFile], None], words: str
) -> None:
    path = Path(f"{made.kit('a')}.zip")
    with zipfile.ZipFile(path, "a") as archive:
        change(archive)
    with pytest.raises(BadInput, match=words):
        made.init("a", path)
    assert not made.request("a").exists()
    assert not (made.root / "evil.json").exists()
    assert not (made.root.parent / "evil.json").exists()


def test_a_bomb_is_refused_by_its_size_before_it_is_read(made: Joining) -> None:
    path = made.root / "bomb.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("INSTRUCTIONS.txt", b"\0" * (64 << 20))
    assert path.stat().st_size < 100_000
    with pytest.raises(BadInput, match=r"INSTRUCTIONS\.txt is too large"):
        made.init("a", path)


def test_a_folder_with_a_link_or_a_stranger_in_it_is_not_copied(made: Joining) -> None:
    (made.kit("a") / "torch.py").write_text("raise SystemExit")
    with pytest.raises(BadInput, match=r"'torch\.py' does not belong in a kit"):
        made.init("a")
    (made.kit("a") / "torch.py").unlink()
    page = made.kit("a") / "INSTRUCTIONS.txt"
    page.unlink()
    page.symlink_to("/etc/passwd")
    with pytest.raises(BadInput, match="a link or special file"):
        made.init("a")


@pytest.mark.parametrize("name", ["kit.json", "ca.crt", "study.json", "base/base.json"])
def test_a_kit_with_a_part_missing_or_broken_is_named(made: Joining, name: str) -> None:
    path = made.kit("a") / name
    for content in (b"", b"\xff", b"{}", None):
        if content is None:
            path.unlink()
        else:
            path.write_bytes(content)
        if name == "base/base.json" and content == b"{}":
            continue  # a kit that carries no part
        with pytest.raises(BadInput, match=path.name):
            made.init("a")
    assert not made.request("a").exists()


def test_a_kit_put_together_from_two_is_refused(made: Joining) -> None:
    other = Joining(made.root / "elsewhere", made.vae)
    other.root.mkdir()
    other.provision("a", reference=made.root / "reference")
    (made.kit("a") / "ca.crt").write_bytes((other.home / "pki" / "ca.crt").read_bytes())
    with pytest.raises(BadInput, match=r"ca\.crt is not the CA that kit\.json names"):
        made.init("a")
    edit(made.kit("b") / "kit.json", study="other")
    with pytest.raises(BadInput, match=r"study\.json is not the study that kit\.json names"):
        made.init("b")


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 broken", b"hello"])
def test_a_file_that_is_no_kit_is_named(made: Joining, content: bytes) -> None:
    path = made.root / "kit.zip"
    path.write_bytes(content)
    with pytest.raises(BadInput, match=r"kit\.zip: not a kit"):
        made.init("a", path)
    with pytest.raises(BadInput, match="no such kit"):
        made.init("a", made.root / "gone.zip")


def test_damage_inside_a_zip_is_named(made: Joining) -> None:
    path = Path(f"{made.kit('a')}.zip")
    data = bytearray(path.read_bytes())
    start = data.index(b"diffusion_pytorch_model.safetensors")
    data[start + 2000] ^= 0xFF
    path.write_bytes(data)
    with pytest.raises(BadInput, match="damaged"):
        made.init("a", path)


def test_the_base_that_came_with_the_kit_is_used(made: Joining) -> None:
    """The study names a folder on the coordinator's machine, which a hospital does not have."""
    made.init("a")
    values = json.loads((made.site("a") / "kit" / "study.json").read_text())
    resolved = Resolved.model_validate(values)
    files = site_base(made.site("a"), resolved)
    assert files.vae is not None
    assert made.site("a").resolve() in files.vae.parents
    assert sha256_folder(files.vae) == sha256_folder(made.vae)
    generator = values["study"]["generator"] | {"vae": "reference"}
    strange = Resolved.model_validate(
        values | {"base_hash": "0" * 64, "study": values["study"] | {"generator": generator}}
    )
    with pytest.raises(BadInput, match="does not carry it"):
        site_base(made.site("a"), strange)
