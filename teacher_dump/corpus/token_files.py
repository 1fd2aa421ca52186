"""Token files -> documents: corpora that are tokenised already.

    .npy        integers; one row is one document, or, flat, documents end with the end token
    .bin        flat integers, documents end with the end token (`flat_tokens` tells their width)
    .bin + .idx the format of Megatron-LM, whose index says where documents are
    .parquet, .arrow   a column of lists of integers, one row is one document, and perhaps a column
                of lists of booleans, or of 0 and 1, beside it: which tokens count as labels

Files are mapped or streamed, so that memory does not grow with them. Ids beyond the tokenizer, and
flat files in which no document ends, raise InputError: they usually mean the wrong width of tokens,
or another tokenizer.
"""

from __future__ import annotations

import struct
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from shards.errors import InputError
from shards.rows import BoolArray
from teacher_dump.corpus.flat_tokens import check_flat
from teacher_dump.corpus.rules import TokenisingRules
from teacher_dump.corpus.tables import flat_lists, flat_masks, read_columns

LONGEST_DOCUMENT = 1 << 24  # tokens; a flat file without document ends must not fill memory
_CHUNK = 1 << 20

MEGATRON_HEADER = b"MMIDIDX\x00\x00"
_MEGATRON_TYPES = {1: "uint8", 2: "int8", 3: "int16", 4: "int32", 5: "int64", 8: "uint16"}

# What numpy raises for a file of another format: it reads the header as a Python literal.
_NOT_NPY = (ValueError, TypeError, EOFError, SyntaxError, OverflowError, tokenize.TokenError)

Tokens = npt.NDArray[Any]


@dataclass(frozen=True, kw_only=True)
class TokenDocument:
    """tokens [n] of any integer type, and which of them count as labels [n], None: all."""

    tokens: Tokens
    mask: BoolArray | None = None


def index_of(path: Path) -> Path | None:
    """The Megatron-LM index beside a `.bin`, if there is one."""
    candidates = (path.with_suffix(suffix) for suffix in (".idx", ".IDX"))
    return next((index for index in candidates if index.exists() or index.is_symlink()), None)


def read_flat(path: Path, rules: TokenisingRules) -> Iterator[TokenDocument]:
    """The documents of a `.bin`, whether or not it has an index beside it."""
    index = index_of(path)
    if index is not None:
        yield from _read_megatron(path, index)
        return
    dtype, size = rules.flat_dtype, path.stat().st_size
    if size % dtype.itemsize:
        raise InputError(
            f"{path}: has {size} bytes, not a multiple of the size of {dtype.name} tokens;"
            " --token-dtype sets their type"
        )
    tokens = _map(path, dtype, 0, size // dtype.itemsize)
    check_flat(path, tokens, rules.num_ids)
    yield from _split_at_ends(path, tokens, rules.eos_token_id)


def read_npy(path: Path, end_token: int) -> Iterator[TokenDocument]:
    """The documents of a `.npy`."""
    try:
        open_memmap: Any = np.lib.format.open_memmap
        tokens: Tokens = open_memmap(path, mode="r")
    except _NOT_NPY as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"{path}: not a .npy file that can be mapped ({reason})") from error
    if tokens.dtype.kind not in "iu" or tokens.ndim not in (1, 2):
        raise InputError(
            f"{path}: has dtype {tokens.dtype} and {tokens.ndim} dimensions, expected integers and"
            " 1 or 2 dimensions"
        )
    if tokens.ndim == 1:
        yield from _split_at_ends(path, tokens, end_token)
        return
    for row in tokens:
        yield TokenDocument(tokens=np.array(row))


def read_lists(path: Path, token_key: str, mask_key: str | None) -> Iterator[TokenDocument]:
    """The documents of a Parquet or Arrow file with a column of token lists."""
    keys = (token_key,) if mask_key is None else (token_key, mask_key)
    row = 0
    for columns in read_columns(path, keys):
        starts, tokens = flat_lists(path, columns, token_key, row)
        mask = None
        if mask_key is not None:
            mask_starts, mask = flat_masks(path, columns, mask_key, row)
            different = np.flatnonzero(np.diff(starts) != np.diff(mask_starts))
            if len(different):
                raise InputError(
                    f"{path}: row {row + different[0]}: {mask_key!r} and {token_key!r} differ in"
                    " length"
                )
        for start, stop in zip(starts[:-1].tolist(), starts[1:].tolist(), strict=True):
            yield TokenDocument(
                tokens=tokens[start:stop], mask=None if mask is None else mask[start:stop]
            )
        row += len(starts) - 1


def _split_at_ends(path: Path, tokens: Tokens, end_token: int) -> Iterator[TokenDocument]:
    """Documents with their end tokens; what follows the last one is a document too."""
    start = 0
    for first in range(0, len(tokens), _CHUNK):
        chunk = tokens[first : first + _CHUNK]
        for end in (np.flatnonzero(chunk == end_token) + first + 1).tolist():
            yield TokenDocument(tokens=np.array(tokens[start:end]))
            start = end
        if first + len(chunk) - start > LONGEST_DOCUMENT:
            raise InputError(
                f"{path}: no end-of-document token {end_token} in {LONGEST_DOCUMENT:,} tokens after"
                f" token {start:,}; check that the tokens are {tokens.dtype.name} (--token-dtype)"
                " and that they come from this tokenizer"
            )
    if start < len(tokens):
        yield TokenDocument(tokens=np.array(tokens[start:]))


def _read_megatron(path: Path, index: Path) -> Iterator[TokenDocument]:
    with index.open("rb") as stream:
        header = stream.read(len(MEGATRON_HEADER) + 25)
    if len(header) < 34 or not header.startswith(MEGATRON_HEADER):
        raise InputError(f"{index}: not an index of Megatron-LM")
    version, code, num_pieces, num_borders = struct.unpack("<QBQQ", header[9:])
    expected = 34 + 12 * num_pieces + 8 * num_borders
    if version != 1 or code not in _MEGATRON_TYPES or index.stat().st_size < expected:
        raise InputError(f"{index}: damaged, or not version 1 of the index")
    lengths = _map(index, np.int32, 34, num_pieces)
    pointers = _map(index, np.int64, 34 + 4 * num_pieces, num_pieces)
    borders = _map(index, np.int64, 34 + 12 * num_pieces, num_borders)
    if np.any(borders < 0) or np.any(borders > num_pieces) or np.any(np.diff(borders) < 0):
        raise InputError(f"{index}: damaged: its documents are not in order")
    if num_pieces and (not num_borders or borders[0] != 0 or borders[-1] != num_pieces):
        raise InputError(f"{index}: damaged: some of its pieces belong to no document")
    dtype = np.dtype(_MEGATRON_TYPES[code])
    tokens = _map(path, dtype, 0, path.stat().st_size // dtype.itemsize)
    for number in range(num_borders - 1):
        pieces = slice(int(borders[number]), int(borders[number + 1]))
        if pieces.start == pieces.stop:
            continue
        start = int(pointers[pieces.start]) // dtype.itemsize
        stop = start + int(lengths[pieces].sum(dtype=np.int64))
        if not 0 <= start <= stop <= len(tokens):
            raise InputError(f"{path}: shorter than its index says, at document {number}")
        yield TokenDocument(tokens=np.array(tokens[start:stop]))


def _map(path: Path, dtype: Any, offset: int, count: int) -> npt.NDArray[Any]:
    if not count:
        return np.empty(0, dtype)
    return np.memmap(path, dtype=dtype, mode="r", offset=offset, shape=(count,))
