"""Parquet and Arrow files as batches of named columns, and the types that columns may have.

An Arrow file is an IPC stream or file, as `datasets` saves a dataset on disk. Text may have any of
Arrow's string types (Polars writes string views, pandas dictionaries), and lists any list type.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from shards.errors import InputError
from shards.rows import BoolArray
from teacher_dump.corpus.kinds import Kind, kind_of

Columns = Mapping[str, Any]  # name -> pyarrow array

_BATCH_ROWS = 1024


def read_columns(path: Path, keys: Sequence[str]) -> Iterator[Columns]:
    """These columns, batch by batch; InputError for a file that does not have each exactly once."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        if _is_arrow(path):
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
        kind = "an Arrow" if _is_arrow(path) else "a Parquet"
        raise InputError(f"{path}: not {kind} file that can be read ({error})") from error


def num_rows(path: Path) -> int:
    """Rows of a file that `read_columns` reads."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    if _is_arrow(path):
        with pa.memory_map(str(path)) as source:
            return sum(batch.num_rows for batch in _open_arrow(source))
    return int(pq.read_metadata(path).num_rows)


def read_table_texts(path: Path, text_key: str) -> Iterator[str]:
    """The texts of a column; InputError for a null, or a column of another type."""
    row = 0
    for columns in read_columns(path, (text_key,)):
        for text in _as_strings(path, columns[text_key], text_key).to_pylist():
            if text is None:
                raise InputError(f"{path}: row {row}: {text_key!r} is null")
            yield text
            row += 1


def flat_lists(
    path: Path, columns: Columns, key: str, first_row: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[Any]]:
    """Where a column's lists of integers start [rows + 1], and all their values.

    `first_row` is the place of the batch in the file, for errors.
    """
    starts, values = _flat_values(path, columns, key, first_row)
    if values.dtype.kind not in "iu":
        arrow_type = columns[key].type
        raise InputError(f"{path}: column {key!r} is {arrow_type}, expected lists of integers")
    return starts, values


def flat_masks(
    path: Path, columns: Columns, key: str, first_row: int
) -> tuple[npt.NDArray[np.int64], BoolArray]:
    """Where a column's masks start [rows + 1], and all their values: booleans, or 0 and 1."""
    starts, values = _flat_values(path, columns, key, first_row)
    if values.dtype.kind not in "biu":
        arrow_type = columns[key].type
        raise InputError(
            f"{path}: column {key!r} is {arrow_type}, expected lists of booleans or 0 and 1"
        )
    wrong = np.flatnonzero((values != 0) & (values != 1))
    if len(wrong):
        row = first_row + int(np.searchsorted(starts, wrong[0], side="right")) - 1
        raise InputError(f"{path}: row {row}: {key!r} has {values[wrong[0]]}, expected 0 or 1")
    return starts, values.astype(np.bool_, copy=False)


def _is_arrow(path: Path) -> bool:
    return kind_of(path.name) is Kind.ARROW


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


def _check_names(path: Path, columns: Sequence[str], keys: Sequence[str]) -> None:
    for key in keys:
        if list(columns).count(key) > 1:
            raise InputError(f"{path}: column {key!r} appears twice")
        if key not in columns:
            names = ", ".join(map(repr, columns[:8]))
            raise InputError(
                f"{path}: no column {key!r}, found {names} (--text-key, --token-key and --mask-key"
                " name the columns)"
            )


def _as_strings(path: Path, column: Any, key: str) -> Any:
    """A column of any string type as one of large strings."""
    import pyarrow as pa

    types = pa.types
    values = column.dictionary if types.is_dictionary(column.type) else column
    if not (
        types.is_string(values.type)
        or types.is_large_string(values.type)
        or types.is_string_view(values.type)
    ):
        raise InputError(
            f"{path}: column {key!r} is {column.type}, expected string (--token-key names a column"
            " of tokens)"
        )
    strings = values.cast(pa.large_string())
    return strings if values is column else strings.take(column.indices)


def _flat_values(
    path: Path, columns: Columns, key: str, first_row: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[Any]]:
    import pyarrow as pa
    import pyarrow.compute as pc

    column, types = columns[key], pa.types
    is_list = (
        types.is_list(column.type)
        or types.is_large_list(column.type)
        or types.is_fixed_size_list(column.type)
        or types.is_list_view(column.type)
        or types.is_large_list_view(column.type)
    )
    if not is_list or column.null_count:
        prefix = f"row {first_row + _first_null(column)}: " if is_list else ""
        raise InputError(
            f"{path}: {prefix}column {key!r} is {column.type}, expected lists without nulls"
        )
    lengths = pc.list_value_length(column).to_numpy(zero_copy_only=False)
    starts = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]).astype(np.int64)
    values = column.flatten()
    if values.null_count:
        row = first_row + int(np.searchsorted(starts, _first_null(values), side="right")) - 1
        raise InputError(
            f"{path}: row {row}: column {key!r} has a null, expected lists of integers"
            " (of a mask: booleans)"
        )
    return starts, values.to_numpy(zero_copy_only=False)


def _first_null(column: Any) -> int:
    return int(np.flatnonzero(column.is_null().to_numpy(zero_copy_only=False))[0])
