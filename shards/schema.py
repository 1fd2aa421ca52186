"""The columns of a shard: names, Arrow types, Parquet encodings. The one place for each of them.

Everything is an ordinary column of numbers that any Parquet reader understands; `docs/format.md`
says what each one means. Letters: n tokens of a sequence, T = n - 1 labelled positions.

Encodings are per leaf, chosen by measuring on SmolLM2-135M over documentation text at L = 512 with
top-0.95-100 (59.3 entries per token, bytes per token): BYTE_STREAM_SPLIT puts the nearly constant
high bytes of small integers and of rounded floats side by side, where zstd finds them. `ids` 102.5
and `logprobs` 25.8 (2.17 per entry), all other columns together 4.4 (tokens 1.4, labels 1.2,
entropies 1.0, tail 0.8, segments 0.01). DELTA_BINARY_PACKED or PLAIN tokens and version 2 pages
(whose levels are not compressed: 6 more) are larger, dictionaries are slower to read. zstd 9 gains
10 % on `logprobs` and nothing on `ids`. Sampled shards (no `tail_logmass`) are small, and higher
levels gain on both columns: at 9.5 entries per token 21.6 with level 3, 20.9 with level 12, which
one core still writes at 400,000 tokens/s; 20.1 with level 19, at 74,000.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import pyarrow as pa

FORMAT_VERSION: Final = 1

# The key of the Parquet footer under which a shard says what it is, as JSON.
METADATA_KEY: Final = b"logitshards"

SEQUENCE: Final = "sequence"
TOKENS: Final = "tokens"
IDS: Final = "ids"
LOGPROBS: Final = "logprobs"
TAIL_LOGMASS: Final = "tail_logmass"
LABEL_LOGPROBS: Final = "label_logprobs"
ENTROPIES: Final = "entropies"
SEGMENTS: Final = "segments"
LOSS_MASK: Final = "loss_mask"
POSITIONS: Final = "positions"
TEACHER_NLL: Final = "teacher_nll"
TEACHER_ENTROPY: Final = "teacher_entropy"

# The ragged entries: all but a few percent of a shard. A reader pays for them only if it asks for
# them.
ENTRY_COLUMNS: Final = (IDS, LOGPROBS)

# 1 MiB pages read 15 % slower; beyond 4 MiB nothing is gained.
_DATA_PAGE_BYTES = 4 << 20


def _required(name: str, data_type: pa.DataType) -> pa.Field:
    return pa.field(name, data_type, nullable=False)


def _list_of(data_type: pa.DataType) -> pa.DataType:
    return pa.list_(_required("element", data_type))


def _types() -> dict[str, pa.DataType]:
    int32, float32 = pa.int32(), pa.float32()
    return {
        SEQUENCE: pa.int64(),
        TOKENS: _list_of(int32),
        IDS: _list_of(_list_of(int32)),
        LOGPROBS: _list_of(_list_of(float32)),
        TAIL_LOGMASS: _list_of(float32),
        LABEL_LOGPROBS: _list_of(float32),
        ENTROPIES: _list_of(float32),
        SEGMENTS: _list_of(int32),
        LOSS_MASK: _list_of(pa.bool_()),
        POSITIONS: int32,
        TEACHER_NLL: float32,
        TEACHER_ENTROPY: float32,
    }


_TYPES: Final = _types()
# All columns, in the order in which a shard has those that it has.
ALL_COLUMNS: Final = tuple(_TYPES)


def schema(columns: Sequence[str]) -> pa.Schema:
    """The Arrow schema of a shard with these columns (`DatasetSpec.columns`); none is nullable."""
    return pa.schema([_required(name, _TYPES[name]) for name in columns])


def _leaf(field: pa.Field) -> tuple[str, pa.DataType]:
    """The Parquet path of a column's values, such as `ids.list.element.list.element`, and type."""
    path, data_type = field.name, field.type
    while pa.types.is_list(data_type):
        path, data_type = f"{path}.list.element", data_type.value_type
    return path, data_type


def writer_options(columns: pa.Schema) -> dict[str, Any]:
    """The arguments of `pyarrow.parquet.ParquetWriter` for a shard with these columns."""
    sampled = TAIL_LOGMASS not in columns.names
    encodings: dict[str, str] = {}
    levels: dict[str, int] = {}
    for field in columns:
        path, data_type = _leaf(field)
        plain = data_type in (pa.bool_(), pa.int64())
        encodings[path] = "PLAIN" if plain else "BYTE_STREAM_SPLIT"
        levels[path] = 3 if field.name == IDS else 9
        if sampled and field.name in ENTRY_COLUMNS:
            levels[path] = 12
    return {
        "version": "2.6",
        "data_page_version": "1.0",
        "data_page_size": _DATA_PAGE_BYTES,
        "use_dictionary": False,
        "column_encoding": encodings,
        "compression": dict.fromkeys(encodings, "zstd"),
        "compression_level": levels,
        "write_statistics": [SEQUENCE],
        "write_page_checksum": True,
    }
