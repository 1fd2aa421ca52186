"""Parquet and Arrow files as batches of named columns.

An Arrow file is an IPC stream or file, as `datasets` saves a dataset on disk.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from shards.errors import InputError

Columns = Mapping[str, Any]  # name -> pyarrow array

_BATCH_ROWS = 1024


def read_columns(path: Path, keys: Sequence[str]) -> Iterator[Columns]:
    """These columns, batch by batch; InputError for a file that has not all of them."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        if path.name.endswith(".arrow"):
            with pa.memory_map(str(path)) as source:
                for batch in _open_arrow(source):
                    _check_names(path, batch.schema.names, keys)
                    for start in range(0, batch.num_rows, _BATCH_ROWS):
                        part = batch.slice(start, _BATCH_ROWS)
                        yield {key: part.column(key) for key in keys}
            return
        with pq.ParquetFile(path) as file:
            _check_names(path, file.schema_arrow.names, keys)
            for batch in file.iter_batches(batch_size=_BATCH_ROWS, columns=list(keys)):
                yield {key: batch.column(key) for key in keys}
    except pa.ArrowException as error:
        kind = "an Arrow" if path.name.endswith(".arrow") else "a Parquet"
        raise InputError(f"{path}: not {kind} file that can be read ({error})") from error


def num_rows(path: Path) -> int:
    """Rows of a file that `read_columns` reads."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    if path.name.endswith(".arrow"):
        with pa.memory_map(str(path)) as source:
            return sum(batch.num_rows for batch in _open_arrow(source))
    return int(pq.read_metadata(path).num_rows)


def _open_arrow(source: Any) -> Iterator[Any]:
    import pyarrow as pa

    try:
        stream = pa.ipc.open_stream(source)
    except pa.ArrowInvalid:
        source.seek(0)
        file = pa.ipc.open_file(source)
        for number in range(file.num_record_batches):
            yield file.get_batch(number)
    else:
        yield from stream


def _check_names(path: Path, found: Sequence[str], keys: Sequence[str]) -> None:
    for key in keys:
        if key not in found:
            names = ", ".join(map(repr, found[:8]))
            raise InputError(
                f"{path}: no column {key!r}, found {names} (--text-key, --token-key and --mask-key"
                " name the columns)"
            )
