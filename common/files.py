"""Files that are whole when they exist, and their hashes.

A file is written to a temporary name in its own folder, fsync'd and renamed, and the folder is
fsync'd: after a crash there is the old file or the new one, never a half.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import secrets
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from polyclinic.common.refusals import BadInput

_NO_SPACE = (errno.ENOSPC, errno.EDQUOT)


@contextmanager
def naming_full_disk(path: Path) -> Iterator[None]:
    """Turn "no space left" inside the block into a `BadInput` that names the path and the fix.

    Args:
        path: The file that was being written.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in _NO_SPACE:
            raise
        raise BadInput(
            f"cannot write {path}: the disk is full or its quota is used up; free space there and run again"
        ) from error


def write_atomic(path: Path, data: bytes | Iterable[bytes], mode: int = 0o644) -> None:
    """Write a file so that it is either absent, as before, or whole.

    Args:
        path: Where the file will stand; its folder exists.
        data: The whole content, or its pieces in order, which are not held together.
        mode: Permission bits; the process's umask may take more away, never give more.

    Raises:
        BadInput: The disk is full. Nothing is left behind and an older file stands untouched.
    """
    # The temporary name does not contain the file's: a long name plus a suffix could exceed NAME_MAX.
    temporary = path.parent / f".tmp-{secrets.token_hex(8)}"
    with naming_full_disk(path):
        try:
            handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
            try:
                for piece in [data] if isinstance(data, bytes) else data:
                    write_fully(handle, piece)
                os.fsync(handle)
            finally:
                os.close(handle)
            temporary.replace(path)
        finally:
            # After the rename there is nothing to remove; an error here must not hide the first one.
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
        sync_folder(path.parent)


def write_json_atomic(path: Path, obj: object, mode: int = 0o644) -> None:
    """Write JSON for people and machines: sorted keys, indent 1, a final newline.

    Args:
        path: Where the file will stand.
        obj: Anything strict JSON can hold; NaN and infinity are refused with ValueError.
        mode: Permission bits, as in `write_atomic`.
    """
    text = json.dumps(obj, sort_keys=True, indent=1, ensure_ascii=False, allow_nan=False)
    write_atomic(path, f"{text}\n".encode(), mode)


def canonical_json(obj: object) -> bytes:
    """Encode an object so that equal objects give equal bytes: the form that is hashed.

    Args:
        obj: Anything strict JSON can hold; NaN and infinity are refused with ValueError.

    Returns:
        ASCII bytes with sorted keys and no spaces.
    """
    return json.dumps(obj, sort_keys=True, separators=(",", ":"), allow_nan=False).encode("ascii")


def write_fully(handle: int, data: bytes) -> None:
    """Write every byte to a file descriptor; one call of os.write may take only a part."""
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(handle, rest) :]


def sync_folder(path: Path) -> None:
    """Force a folder's entries to disk, so that a rename in it survives a power cut."""
    handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sha256_file(path: Path) -> str:
    """Hash a file's content.

    Returns:
        64 hexadecimal digits.
    """
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def sha256_folder(path: Path) -> str:
    """Hash a folder: the relative names and contents of every file in it, at any depth.

    Times, permissions and empty folders do not count. A link to a file counts as the file.

    Args:
        path: The folder.

    Returns:
        64 hexadecimal digits, equal for equal trees wherever they stand.

    Raises:
        BadInput: It is no folder, or holds a linked folder or a special file, whose content a
            hash could not vouch for.
    """
    if not path.is_dir():
        raise BadInput(f"{path} is not a folder; name the folder whose files are to be hashed")
    total = hashlib.sha256()
    for name, file in sorted((os.fsencode(file.relative_to(path)), file) for file in _files_under(path)):
        # A file name holds no NUL, so no two trees give the same stream.
        total.update(sha256_file(file).encode() + name + b"\0")
    return total.hexdigest()


def _files_under(path: Path) -> Iterator[Path]:
    """Yield every regular file below a folder, in no particular order."""
    for entry in path.iterdir():
        if entry.is_file():
            yield entry
        elif entry.is_dir() and not entry.is_symlink():
            yield from _files_under(entry)
        else:
            raise BadInput(
                f"{entry} is a linked folder, a broken link or a special file; replace it by plain files"
            )
