"""Decide from a file's name how to read it, or why the listing of a folder skips it.

Upper and lower case are the same. A file that the user names on the command line only needs a kind:
the user can name a hidden file or a dataset card that a listing would skip.
"""

from __future__ import annotations

import re
from enum import StrEnum


class Kind(StrEnum):
    """How a file is read; the value names it for a person."""

    JSON_LINES = "JSON lines"
    PARQUET = "Parquet"
    ARROW = "Arrow"
    TEXT = "plain text"
    NUMPY = "NumPy"
    FLAT = "flat tokens"


TABLES = (Kind.PARQUET, Kind.ARROW)

_KINDS = {
    ".jsonl": Kind.JSON_LINES,
    ".json": Kind.JSON_LINES,
    ".ndjson": Kind.JSON_LINES,
    ".parquet": Kind.PARQUET,
    ".arrow": Kind.ARROW,
    ".txt": Kind.TEXT,
    ".md": Kind.TEXT,
    ".npy": Kind.NUMPY,
    ".bin": Kind.FLAT,
}
_COMPRESSIONS = {".gz": "gz", ".zst": "zst", ".zstd": "zst", ".bz2": "bz2", ".xz": "xz"}

EXPECTED = ".jsonl, .json, .ndjson (also .gz, .zst, .bz2, .xz), " + ", ".join(
    suffix for suffix, kind in _KINDS.items() if kind is not Kind.JSON_LINES
)

INDEX_SUFFIX = ".idx"

# Why a run skips a file, in the words and the order of its report.
LOOKS_LIKE_DATA = "looks like data that this command does not read"
OTHER = "another kind of file"
DOCUMENTATION = "dataset card or licence"
METADATA = "metadata"
TEMPORARY = "temporary"
HIDDEN = "hidden"
COMPUTED = "computed from the dataset"
LOOP = "link to a folder above it"
REASONS = (LOOKS_LIKE_DATA, OTHER, DOCUMENTATION, METADATA, TEMPORARY, HIDDEN, COMPUTED, LOOP)


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


_UNREAD_DATA = _words(
    ".csv .tsv .zip .tar .tgz .tbz2 .txz .7z .rar .lz4 .lz .lzma .br .sz .snappy .msgpack"
    " .mds .h5 .hdf5 .npz .pkl .pickle .pt .pth .safetensors .feather .ipc .pq .orc .avro .tfrecord"
    " .tfrecords .sqlite .sqlite3 .db .duckdb .mdb .lmdb .jsonlines .jl .ldjson .yaml .yml .xml"
    " .html .htm .warc .wet .wat .pdf .epub .doc .docx .odt .rtf .rst .tex .text .markdown .idx"
    " .tok .u16 .ds"
)
_TEMPORARY_SUFFIXES = _words(
    ".tmp .temp .part .partial .crdownload .download .incomplete .lock .swp .aria2 .bak"
)
_TEMPORARY_NAMES = frozenset(
    ("_temporary", "__pycache__", "__macosx", "lost+found", "$recycle.bin")
)
# Folders beside the Parquet files of a table, which say which of them it consists of.
TABLE_LOGS = {"_delta_log": "Delta", ".hoodie": "Hudi"}
_METADATA_NAMES = _words(
    "dataset_info.json dataset_infos.json state.json dataset_dict.json dataset-metadata.json"
    " config.json croissant.json index.json manifest.json metadata.json tokenizer.json vocab.json"
    " tokenizer_config.json special_tokens_map.json added_tokens.json generation_config.json"
    " preprocessor_config.json package.json"
)
_DOCUMENTATION = re.compile(
    r"(readme|licen[cs]e|copying|notice|contributing|contributors|authors|changelog|citation"
    r"|code_of_conduct|security|dataset_?card|data_?card|datasheet)([._-][\w.-]{1,20})?"
)


def kind_of(name: str) -> Kind | None:
    """How a file of this name is read; None for one that is not."""
    stem, compression = _without_compression(name.lower())
    kind = next((kind for suffix, kind in _KINDS.items() if stem.endswith(suffix)), None)
    return None if compression and kind is not Kind.JSON_LINES else kind


def compression_of(name: str) -> str | None:
    """`gz`, `zst`, `bz2` or `xz`; None for a file that is not compressed."""
    return _without_compression(name.lower())[1]


def uncompressed(name: str) -> str:
    """The name of a file in lower case, without the suffix of a compression."""
    return _without_compression(name.lower())[0]


def is_index(name: str) -> bool:
    """Whether a name is that of a Megatron-LM index."""
    return name.lower().endswith(INDEX_SUFFIX)


def is_documentation(name: str) -> bool:
    """Whether a name is that of a dataset card, a licence and the like, whatever its suffix."""
    return _DOCUMENTATION.fullmatch(name.lower()) is not None


def why_skipped(name: str) -> str | None:
    """Why a listing skips a file or folder of this name without looking at it, or None."""
    lower = name.lower()
    if lower.startswith("."):
        return HIDDEN
    is_temporary = lower in _TEMPORARY_NAMES or lower.endswith("~")
    return TEMPORARY if is_temporary or _suffix(lower) in _TEMPORARY_SUFFIXES else None


def why_left_out(name: str) -> str | None:
    """Why a listing skips an existing file of this name, or None."""
    stem, compression = _without_compression(name.lower())
    if stem in _METADATA_NAMES:
        return METADATA
    if kind_of(name) is not None:
        return None
    if compression or _suffix(stem) in _UNREAD_DATA:
        return LOOKS_LIKE_DATA
    return DOCUMENTATION if is_documentation(name) else OTHER


def _suffix(lower: str) -> str:
    return lower[lower.rfind(".") :] if "." in lower else ""


def _without_compression(lower: str) -> tuple[str, str | None]:
    suffix = _suffix(lower)
    if suffix in _COMPRESSIONS:
        return lower.removesuffix(suffix), _COMPRESSIONS[suffix]
    return lower, None
