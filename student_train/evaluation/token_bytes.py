"""How many bytes of text a token stands for, for bits per byte.

Two kinds of tokenizers tell it for each token alone: byte-level ones (GPT-2, Llama 3, Qwen,
SmolLM), whose tokens have one character per byte, and SentencePiece ones with byte fallback (Llama
2, Gemma), where U+2581 is a space and <0x0A> a byte. Special tokens stand for no text. For other
tokenizers, which drop or add spaces around words, it is not known.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shards.dataset import Dataset

_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
_SPACE = "\u2581"


def token_bytes(dataset: Dataset) -> Tensor | None:
    """[V] int64: bytes of every token of a dataset's tokenizer; None where that is not known."""
    return bytes_by_id(
        dataset.path / "tokenizer" / "tokenizer.json", dataset.spec.tokenizer.vocab_size
    )


def bytes_by_id(tokenizer_file: Path, vocab_size: int) -> Tensor | None:
    """The same of a tokenizer.json with V ids."""
    try:
        content = json.loads(tokenizer_file.read_text(encoding="utf-8"))
        kinds = set(_types(content.get("decoder")))
        vocab = content["model"]["vocab"]
    except (OSError, ValueError, KeyError, AttributeError, RecursionError):
        return None
    pairs = vocab.items() if isinstance(vocab, dict) else [(t[0], i) for i, t in enumerate(vocab)]
    if "ByteLevel" in kinds:
        sizes = {index: len(token) for token, index in pairs}
    elif "ByteFallback" in kinds:
        sizes = {index: _size_of_piece(token) for token, index in pairs}
    else:
        return None
    for added in content.get("added_tokens") or []:
        text = added["content"]
        # Those of Gemma stand for runs of spaces; a decoder treats them as pieces like others.
        size = len(text.encode()) if "ByteLevel" in kinds else _size_of_piece(text)
        sizes[added["id"]] = 0 if added["special"] else size
    table = torch.zeros(vocab_size, dtype=torch.int64)
    for index, size in sizes.items():
        if index < vocab_size:
            table[index] = size
    return table


def _size_of_piece(piece: str) -> int:
    return 1 if _BYTE.fullmatch(piece) else len(piece.replace(_SPACE, " ").encode())


def _types(decoder: Any) -> Iterator[str]:
    """The kinds of a decoder and of those it is made of."""
    if decoder:
        yield decoder["type"]
        for part in decoder.get("decoders", ()):
            yield from _types(part)
