"""Documents too long to encode at once, in pieces cut at ends of lines.

A tokenizer takes about 150 bytes of memory for each character that it encodes at once. Pieces begin
and end at the same places on every machine, so that a text always becomes the same tokens; these
may differ from those of the whole text where one would reach over a cut.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from shards.process.progress import count
from teacher_dump.tokens.encoder import Encoder

logger = logging.getLogger(__name__)

LONG_CHARACTERS = 16_000_000
PIECE_CHARACTERS = 500_000


def is_long(text: str) -> bool:
    """Whether a text is encoded in pieces."""
    return len(text) > LONG_CHARACTERS


def log_long_texts(path: Path, documents: Iterable[object]) -> None:
    """Log each text that is encoded in pieces."""
    for document in documents:
        if isinstance(document, str) and is_long(document):
            logger.info(
                "%s: encoding a document of %s characters in pieces, cut at line ends",
                path,
                count(len(document)),
            )


def cut_at_line_ends(text: str) -> Iterator[str]:
    """Pieces that together are the text; one ends within a line that is longer than a piece."""
    start = 0
    while start < len(text):
        stop = start + PIECE_CHARACTERS
        if stop < len(text):
            stop = text.rfind("\n", start, stop) + 1 or stop
        yield text[start:stop]
        start = stop


def encode_texts(
    texts: list[str], encoder: Encoder, dtype: np.dtype[Any]
) -> list[npt.NDArray[Any]]:
    """Tokens [n] of each text."""
    short = iter(_encode([text for text in texts if not is_long(text)], encoder, dtype))
    return [
        np.concatenate([_encode([piece], encoder, dtype)[0] for piece in cut_at_line_ends(text)])
        if is_long(text)
        else next(short)
        for text in texts
    ]


def _encode(texts: list[str], encoder: Encoder, dtype: np.dtype[Any]) -> list[npt.NDArray[Any]]:
    encodings = encoder.encode_batch_fast(texts, add_special_tokens=False)
    return [np.array(encoding.ids, dtype) for encoding in encodings]
