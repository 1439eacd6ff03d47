"""Images inside parquet and arrow files: the Hugging Face layouts, read a row at a time.

pyarrow is the format's reference implementation and what the Hugging Face library writes with; that
library itself would bring pandas and a downloader. Only `polyclinic[parquet]` installs it.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

from polyclinic.common.refusals import BadInput

# One row group's images are in memory at a time; the Hugging Face library writes about 100 rows a group.
MAX_GROUP_BYTES = 1 << 30
MISSING = (
    "{path}: reading parquet and arrow files needs pyarrow; install it with `pip install polyclinic[parquet]`"
)


def _arrow(path: Path) -> Any:
    try:
        import pyarrow
        import pyarrow.ipc  # noqa: F401
        import pyarrow.parquet  # noqa: F401
    except ImportError as error:
        raise BadInput(MISSING.format(path=path)) from error
    return pyarrow


def table_files(folder: Path) -> list[Path]:
    """Find the parquet and arrow files of a data set, in name order; none of a hub's own cache."""
    return sorted(
        path
        for suffix in ("parquet", "arrow")
        for path in folder.rglob(f"*.{suffix}")
        if not path.name.startswith("cache-")
        and not any(p.startswith(".") for p in path.parts[len(folder.parts) :])
    )


def read_columns(path: Path, *names: str) -> Iterator[dict[str, Any]]:
    """Yield the rows of some columns, without the images.

    Raises:
        BadInput: Not such a file, or a column is missing.
    """
    pa = _arrow(path)
    try:
        if path.suffix == ".parquet":
            with pa.parquet.ParquetFile(path) as file:
                _need(path, file.schema_arrow.names, names)
                for batch in file.iter_batches(batch_size=1024, columns=list(names)):
                    yield from batch.to_pylist()
            return
        reader = _stream(pa, path)
        _need(path, reader.schema.names, names)
        for batch in reader:
            yield from batch.select(list(names)).to_pylist()
    except (pa.ArrowInvalid, pa.ArrowException, OSError) as error:
        raise _broken(path, error) from error


def columns_of(path: Path) -> list[str]:
    """Name the columns of a file.

    Raises:
        BadInput: Not such a file.
    """
    pa = _arrow(path)
    try:
        if path.suffix == ".parquet":
            return list(pa.parquet.read_schema(path).names)
        return list(_stream(pa, path).schema.names)
    except (pa.ArrowInvalid, pa.ArrowException, OSError) as error:
        raise _broken(path, error) from error


def row_bytes(path: Path, row: int) -> bytes:
    """Read the encoded image of one row, from the column `image`: bytes, or a struct with `bytes`.

    Raises:
        UnusableImage: The row holds no image.
        BadInput: The file cannot be read.
    """
    from polyclinic.common.data.images import UnusableImage

    stat = path.stat()
    group, first = _locate(path, stat.st_mtime_ns, row)
    value = _group(path, stat.st_mtime_ns, group)[row - first].as_py()
    if isinstance(value, dict):
        value = value.get("bytes")
    if not isinstance(value, bytes) or not value:
        raise UnusableImage(f"{path} [{row}]", "unreadable", "the row holds no image", "remove the row")
    return value


@lru_cache(maxsize=64)
def _starts(path: Path, time_ns: int) -> list[int]:
    """First row of each row group (parquet) or batch (arrow)."""
    pa = _arrow(path)
    if path.suffix == ".parquet":
        with pa.parquet.ParquetFile(path) as file:
            sizes = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
    else:
        sizes = [batch.num_rows for batch in _stream(pa, path)]
    starts = [0]
    for size in sizes[:-1]:
        starts.append(starts[-1] + size)
    return starts


def _locate(path: Path, time_ns: int, row: int) -> tuple[int, int]:
    starts = _starts(path, time_ns)
    group = bisect_right(starts, row) - 1
    return group, starts[group]


@lru_cache(maxsize=1)
def _group(path: Path, time_ns: int, group: int) -> Any:
    pa = _arrow(path)
    try:
        if path.suffix == ".parquet":
            with pa.parquet.ParquetFile(path) as file:
                size = file.metadata.row_group(group).total_byte_size
                if size > MAX_GROUP_BYTES:
                    raise BadInput(
                        f"{path}: row group {group} holds {size / 2**30:.1f} GiB, which must be in memory at "
                        "once; write the file again with row groups of 100 rows"
                    )
                return file.read_row_group(group, columns=["image"]).column("image")
        for number, batch in enumerate(_stream(pa, path)):
            if number == group:
                return batch.column("image")
    except (pa.ArrowInvalid, pa.ArrowException, OSError, KeyError) as error:
        raise _broken(path, error) from error
    raise BadInput(f"{path}: has no batch {group}; fetch it again")


def _stream(pa: Any, path: Path) -> Any:
    return pa.ipc.open_stream(pa.memory_map(str(path)))


def _need(path: Path, there: list[str], names: tuple[str, ...]) -> None:
    for name in names:
        if name not in there:
            raise BadInput(f"{path}: column `{name}` is missing; it has {', '.join(there)}")


def _broken(path: Path, error: Exception) -> BadInput:
    text = " ".join(str(error).split())[:200]
    return BadInput(f"{path}: not a whole {path.suffix[1:]} file ({text}); fetch it again")
