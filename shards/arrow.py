"""Row groups as Arrow tables: `to_table` for the writer, `from_table`, its mirror, for the reader.

Both ways share buffers instead of copying. Only a writer's offsets become Arrow's int32, and the
bits of `loss_mask` are unpacked.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa

from shards.row_group import Int64Array, Offsets, RowGroup
from shards.rows import Int32Array
from shards.schema import (
    ENTRY_COLUMNS,
    LOSS_MASK,
    POSITIONS,
    SEGMENTS,
    SEQUENCE,
    TEACHER_ENTROPY,
    TEACHER_NLL,
    TOKENS,
)

_SCALARS = (POSITIONS, TEACHER_NLL, TEACHER_ENTROPY)
_PER_TOKEN = (TOKENS, SEGMENTS)


def to_table(group: RowGroup, columns: pa.Schema) -> pa.Table:
    """A group that has every column of the schema as a table of R rows."""
    arrays = [_to_array(group, field) for field in columns]
    return pa.Table.from_arrays(arrays, schema=columns)


def _to_array(group: RowGroup, field: pa.Field) -> pa.Array:
    if field.name == SEQUENCE:
        return pa.array(group.sequences)
    values = pa.array(getattr(group, field.name))
    if field.name in _SCALARS:
        return values
    if field.name in _PER_TOKEN:
        return _to_lists(group.token_offsets, values, field.type)
    if field.name in ENTRY_COLUMNS:
        values = _to_lists(group.entry_offsets, values, field.type.value_type)
    return _to_lists(group.position_offsets, values, field.type)


def _to_lists(offsets: Offsets | None, values: pa.Array, data_type: pa.DataType) -> pa.Array:
    assert offsets is not None
    if offsets[-1] > np.iinfo(np.int32).max:
        raise ValueError(
            f"{offsets[-1]} values in a row group; a list column holds fewer than 2^31"
        )
    return pa.ListArray.from_arrays(pa.array(offsets.astype(np.int32)), values, type=data_type)


def from_table(table: pa.Table, sequences: Int64Array) -> RowGroup:
    """Columns of a shard's row group as views, with the sequence numbers [R] it must hold.

    ValueError if the columns do not fit together or hold other sequences.
    """
    outer: dict[str, Offsets] = {}
    inner: dict[str, Offsets] = {}
    values: dict[str, Any] = {}
    for name in table.column_names:
        array = _single_array(table.column(name))
        if pa.types.is_list(array.type):
            outer[name], array = _from_lists(array)
        if pa.types.is_list(array.type):
            inner[name], array = _from_lists(array)
        values[name] = array.to_numpy(zero_copy_only=name != LOSS_MASK)
    if not np.array_equal(values.pop(SEQUENCE, sequences), sequences):
        raise ValueError(f"the sequences are not {sequences[0]} to {sequences[-1]}")
    token_offsets, position_offsets = _row_offsets(outer)
    if POSITIONS in values and position_offsets is not None:
        _check_numbers(values[POSITIONS], position_offsets)
    return RowGroup(
        sequences=sequences,
        token_offsets=token_offsets,
        position_offsets=position_offsets,
        entry_offsets=_agreed(inner),
        **values,
    )


def _single_array(column: pa.ChunkedArray) -> pa.Array:
    """A column as one array: without a copy as long as Arrow made one chunk of it."""
    return column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()


def _from_lists(array: pa.ListArray) -> tuple[Offsets, pa.Array]:
    """Offsets from 0, [N + 1], and the flat values, of N lists, none null."""
    offsets = array.offsets.to_numpy()
    return offsets - offsets[0] if offsets[0] else offsets, array.flatten()


def _row_offsets(outer: dict[str, Offsets]) -> tuple[Offsets | None, Offsets | None]:
    """Token and position offsets [R + 1]: a row has one position less than it has tokens."""
    tokens = _agreed({name: value for name, value in outer.items() if name in _PER_TOKEN})
    positions = {name: value for name, value in outer.items() if name not in _PER_TOKEN}
    if tokens is not None:
        positions[TOKENS] = tokens - np.arange(len(tokens), dtype=tokens.dtype)
    return tokens, _agreed(positions)


def _check_numbers(positions: Int32Array, position_offsets: Offsets) -> None:
    """ValueError unless these are the numbers of positions that the lists have."""
    if not np.array_equal(positions, np.diff(position_offsets)):
        raise ValueError(f"the lists are not as long as {POSITIONS} says")


def _agreed(offsets: dict[str, Offsets]) -> Offsets | None:
    """The offsets that all these columns have in common, None for no columns."""
    if not offsets:
        return None
    (first_name, first), *others = offsets.items()
    for name, other in others:
        if not np.array_equal(first, other):
            raise ValueError(f"the lists of {first_name} and {name} differ in length")
    return first
