"""Check that flat tokens have the width that they are read with.

If tokens of 4 bytes are read as 2 bytes, every second id is a high half, 0 for a small vocabulary;
for tokens of 8 bytes, three of four are. Such ids are valid, but the text is nonsense. So the check
looks at the front, the middle and the end of a file: are all ids at the places of high halves as
small as high halves must be, and the ids between them not? One-token documents that all end with
an end token 0 look the same; nobody trains on these.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from shards.errors import InputError

_STRETCH = 1 << 15  # tokens of each of the three parts; a multiple of 4
_FEWEST = 16  # below it, nothing can be told

# The header that llm.c puts before the tokens: 256 int32, the first of them this, then a version.
_LLM_C = {20240520: "uint16", 20240801: "uint32"}
_LLM_C_HEADER_BYTES = 1024


def check_flat(path: Path, tokens: npt.NDArray[Any], num_ids: int) -> None:
    """InputError for tokens [N] that are parts of wider ones, or begin with a foreign header.

    Ids of the corpus are below `num_ids`.
    """
    _refuse_header(path, tokens)
    wider = _wider(_sample(tokens), tokens.dtype.itemsize, num_ids)
    if wider is not None:
        is_double = wider == 2 * tokens.dtype.itemsize
        part = "every second token is" if is_double else "three of four tokens are"
        dtype = "uint32" if wider == 4 else "int64"
        raise InputError(
            f"{path}: read as {tokens.dtype.name}, {part} the high part of a wider one; if the"
            f" tokens are {dtype}, give --token-dtype {dtype}"
        )


def _sample(tokens: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Front, middle and end, each beginning at a multiple of 4 tokens, [n, 4]."""
    whole = len(tokens) // 4 * 4
    starts = {0, max(0, whole // 8 * 4 - _STRETCH // 2), max(0, whole - _STRETCH)}
    parts = [tokens[start : min(start + _STRETCH, whole)] for start in sorted(starts)]
    sample: npt.NDArray[Any] = np.concatenate(parts).reshape(-1, 4)
    return sample


def _wider(sample: npt.NDArray[Any], width: int, num_ids: int) -> int | None:
    """The width that tokens read with `width` bytes really have, None: this one."""
    if sample.size < _FEWEST or width >= 8:
        return None
    largest_high = (num_ids - 1) >> (8 * width)
    is_high = [bool((column <= largest_high).all()) for column in sample.T]
    beyond = bool((sample[:, 0] > largest_high).any())
    if width == 2 and beyond and is_high[1:] == [True] * 3 and not sample[:, 2:].any():
        return 8
    even = beyond or bool((sample[:, 2] > largest_high).any())
    return 2 * width if even and is_high[1] and is_high[3] else None


def _refuse_header(path: Path, tokens: npt.NDArray[Any]) -> None:
    start = np.frombuffer(tokens[: 16 // tokens.dtype.itemsize].tobytes()[:8], "<i4")
    if len(start) == 2 and int(start[0]) in _LLM_C and int(start[1]) == 1:
        dtype = _LLM_C[int(start[0])]
        raise InputError(
            f"{path}: begins with the header of llm.c, expected tokens alone; cut it off with"
            f" `tail -c +{_LLM_C_HEADER_BYTES + 1}` and give --token-dtype {dtype}"
        )
