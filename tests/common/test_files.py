import errno
import json
import os
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from polyclinic.common.files import (
    canonical_json,
    sha256_file,
    sha256_folder,
    write_atomic,
    write_json_atomic,
)
from polyclinic.common.refusals import BadInput


def test_written_file_has_the_bytes_and_mode_and_no_company(tmp_path: Path) -> None:
    data = os.urandom(100_000)
    write_atomic(tmp_path / "state.bin", data, mode=0o600)
    assert (tmp_path / "state.bin").read_bytes() == data
    assert (tmp_path / "state.bin").stat().st_mode & 0o777 == 0o600
    write_atomic(tmp_path / "state.bin", b"")
    assert (tmp_path / "state.bin").read_bytes() == b""
    assert [entry.name for entry in tmp_path.iterdir()] == ["state.bin"]


def test_longest_possible_name_can_be_written(tmp_path: Path) -> None:
    path = tmp_path / ("x" * 255)
    write_atomic(path, b"1")
    assert path.read_bytes() == b"1"


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_full_disk_halfway_names_the_fix_and_keeps_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    path = tmp_path / "state.bin"
    write_atomic(path, b"old")
    real_write, calls = os.write, []

    def write(handle: int, data: bytes) -> int:
        calls.append(len(data))
        if len(calls) > 1:
            raise OSError(code, os.strerror(code))
        return real_write(handle, bytes(data)[:10])

    monkeypatch.setattr(os, "write", write)
    with pytest.raises(BadInput, match=r"state\.bin.*free space"):
        write_atomic(path, b"new content, longer than ten bytes")
    assert calls == [34, 24]
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_really_full_disk(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if (
        os.geteuid() != 0
        or subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=64k", "none", disk], capture_output=True, check=False
        ).returncode
    ):
        pytest.skip("mounting a small disk needs root with the right to mount")
    try:
        write_atomic(disk / "a", b"small")
        with pytest.raises(BadInput, match=r"disk/a.*free space"):
            write_atomic(disk / "a", bytes(1 << 20))
        assert (disk / "a").read_bytes() == b"small"
        assert [entry.name for entry in disk.iterdir()] == ["a"]
    finally:
        subprocess.run(["umount", disk], check=True)


def test_other_errors_are_not_called_a_full_disk(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        write_atomic(tmp_path / "nowhere" / "a", b"")
    (tmp_path / "folder").mkdir()
    with pytest.raises(IsADirectoryError):
        write_atomic(tmp_path / "folder", b"")
    assert [entry.name for entry in tmp_path.iterdir()] == ["folder"]


def test_an_interruption_leaves_no_temporary_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(handle: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_atomic(tmp_path / "a", b"1")
    assert list(tmp_path.iterdir()) == []


def test_content_is_synced_before_the_rename_and_the_folder_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, synced = os.fsync, []

    def fsync(handle: int) -> None:
        synced.append((Path(f"/proc/self/fd/{handle}").readlink() == tmp_path, (tmp_path / "a").exists()))
        real(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    write_atomic(tmp_path / "a", b"1")
    assert synced == [(False, False), (True, True)]


def test_json_file_is_sorted_indented_and_strict(tmp_path: Path) -> None:
    write_json_atomic(tmp_path / "a.json", {"b": [1], "a": "é"})
    assert (tmp_path / "a.json").read_text() == '{\n "a": "é",\n "b": [\n  1\n ]\n}\n'
    with pytest.raises(ValueError, match="Out of range"):
        write_json_atomic(tmp_path / "a.json", float("nan"))
    assert json.loads((tmp_path / "a.json").read_text()) == {"a": "é", "b": [1]}


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=10,
)


@given(st.dictionaries(st.text(), json_values, max_size=4))
def test_canonical_json_ignores_order_and_loses_nothing(obj: dict[str, object]) -> None:
    data = canonical_json(obj)
    assert canonical_json(dict(reversed(obj.items()))) == data
    assert json.loads(data) == obj


def test_canonical_json_is_this_exact_form_forever() -> None:
    assert canonical_json({"b": [1, 2.5, None, True], "a": "é"}) == b'{"a":"\\u00e9","b":[1,2.5,null,true]}'


def test_file_hash_is_sha256(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    assert sha256_file(tmp_path / "a") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def _tree(root: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return root


def test_folder_hash_depends_on_names_and_contents_only(tmp_path: Path) -> None:
    base = {"a": b"1", "d/b": b"2", "d/e/c": b""}
    want = sha256_folder(_tree(tmp_path / "0", base))
    twin = _tree(tmp_path / "1", dict(reversed(base.items())))
    (twin / "empty").mkdir()
    (twin / "a").chmod(0o600)
    os.utime(twin / "a", (0, 0))
    assert sha256_folder(twin) == want
    linked = _tree(tmp_path / "2", {name: data for name, data in base.items() if name != "a"})
    (linked / "a").symlink_to(tmp_path / "0" / "a")
    assert sha256_folder(linked) == want

    others = [
        base | {"a": b"2"},
        base | {"f": b""},
        {"a": b"2", "d/b": b"1", "d/e/c": b""},
        {"a": b"1", "b": b"2", "d/e/c": b""},
        {"a": b"1", "d/b": b"2"},
    ]
    hashes = {sha256_folder(_tree(tmp_path / f"other{i}", files)) for i, files in enumerate(others)}
    assert len(hashes | {want}) == len(others) + 1


def test_folder_hash_refuses_what_it_cannot_vouch_for(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="not a folder"):
        sha256_folder(tmp_path / "absent")
    root = _tree(tmp_path / "root", {"a": b"1"})
    (root / "link").symlink_to(tmp_path)
    with pytest.raises(BadInput, match="root/link"):
        sha256_folder(root)
    (root / "link").unlink()
    os.mkfifo(root / "pipe")
    with pytest.raises(BadInput, match="root/pipe"):
        sha256_folder(root)
