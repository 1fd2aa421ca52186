"""Which files of shards are in a folder: one pass over its names, two bytes of memory per shard.

A split may have a million shards. Names are read some thousands at a time and compared as one
array, since a loop in Python over all of them takes twice as long as the listing itself.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from shards.rows import BoolArray
from shards.sidecar import sidecar_path
from shards.writer import shard_name

_NAMES_AT_ONCE = 8192


def list_shards(folder: Path, num_shards: int) -> tuple[BoolArray, BoolArray]:
    """Whether each shard's Parquet file and its sidecar are in a split's folder, both [num_shards].

    Other names count for nothing; without the folder no file is there.
    """
    parquet, sidecars = np.zeros((2, num_shards), np.bool_)
    examples = [
        (there, name.encode(), first)
        for first in _first_numbers(num_shards)
        for there, name in (
            (parquet, shard_name(first)),
            (sidecars, sidecar_path(Path(shard_name(first))).name),
        )
    ]
    for names in _names(folder):
        for there, example, first in examples:
            numbers = _numbers(names, example)
            there[numbers[(numbers >= first) & (numbers < num_shards)]] = True
    return parquet, sidecars


def has_shards(folder: Path) -> bool:
    """Whether a split's folder has any Parquet file."""
    if not folder.is_dir():
        return False
    with os.scandir(folder) as entries:
        return any(entry.name.endswith(".parquet") for entry in entries)


def _first_numbers(num_shards: int) -> list[int]:
    """The smallest number with each number of digits that the name of a shard can have."""
    digits = len(str(max(0, num_shards - 1)))
    return [0, *(10**n for n in range(6, digits))]


def _names(folder: Path) -> Iterator[npt.NDArray[np.bytes_]]:
    """The names in a folder, some at a time; none without the folder."""
    if not folder.is_dir():
        return
    with os.scandir(os.fsencode(folder)) as entries:
        while names := [entry.name for entry in islice(entries, _NAMES_AT_ONCE)]:
            yield np.array(names)


def _numbers(names: npt.NDArray[np.bytes_], example: bytes) -> npt.NDArray[np.int64]:
    """The numbers in the names that differ from an example in nothing but its digits."""
    length = len(example)
    if names.itemsize < length:
        return np.zeros(0, np.int64)
    # One row of bytes per name; short names end in zeros.
    characters: npt.NDArray[Any] = names.view(np.uint8).reshape(len(names), -1)
    characters = characters[~characters[:, length:].any(1)][:, :length]
    expected = np.frombuffer(example, np.uint8)
    is_digit = (expected >= ord("0")) & (expected <= ord("9"))
    digits = characters[:, is_digit] - np.uint8(ord("0"))  # anything below "0" becomes large
    equal = (characters[:, ~is_digit] == expected[~is_digit]).all(1) & (digits < 10).all(1)
    places = 10 ** np.arange(digits.shape[1], dtype=np.int64)[::-1]
    numbers: npt.NDArray[np.int64] = digits[equal] @ places
    return numbers
