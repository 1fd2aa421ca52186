"""Documents -> the tokens that a store keeps; an error begins with the corpus file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from shards.errors import InputError
from shards.rows import BoolArray
from teacher_dump.corpus.documents import Document
from teacher_dump.corpus.rules import TokenisingRules
from teacher_dump.tokenizer import TeacherTokenizer
from teacher_dump.tokens.encoder import Encoder
from teacher_dump.tokens.long_documents import encode_texts


def make_encoder(tokenizer: TeacherTokenizer) -> Encoder:
    """What encodes text for a corpus."""
    return Encoder(tokenizer.backend, tokenizer.folder)


@dataclass(frozen=True)
class Encoded:
    """A document as the store keeps it: identifying content, tokens [n], label mask [n]."""

    content: bytes
    tokens: npt.NDArray[Any]
    mask: BoolArray | None


def encode_of_file(
    path: Path, documents: Sequence[Document], encoder: Encoder, rules: TokenisingRules
) -> list[Encoded | None]:
    """Documents of a file as the rules want them, begun and closed; None for one that is empty.

    InputError, beginning with the file, for a token beyond the tokenizer's length and for text
    that the tokenizer cannot encode.
    """
    try:
        return encode(documents, encoder, rules)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error


def encode(
    documents: Sequence[Document], encoder: Encoder, rules: TokenisingRules
) -> list[Encoded | None]:
    """As `encode_of_file`, for documents that are known to encode."""
    texts = [document for document in documents if isinstance(document, str)]
    of_texts = iter(encode_texts(texts, encoder, rules.dtype))
    encoded: list[Encoded | None] = []
    for document in documents:
        if isinstance(document, str):
            tokens, mask = next(of_texts), None
            content = document.encode()
        else:
            tokens, mask = document.tokens, document.mask
            content = tokens.astype("<u4").tobytes()
        tokens = _checked(tokens, rules)
        if not len(tokens):
            encoded.append(None)
            continue
        if rules.has_mask and mask is None:
            mask = np.ones(len(tokens), np.bool_)
        encoded.append(_complete(Encoded(content, tokens, mask), rules))
    return encoded


def _checked(tokens: npt.NDArray[Any], rules: TokenisingRules) -> npt.NDArray[Any]:
    if len(tokens) and not 0 <= int(tokens.min()) <= int(tokens.max()) < rules.num_ids:
        wrong = int(tokens[(tokens < 0) | (tokens >= rules.num_ids)][0])
        if 0 <= wrong < rules.vocab_size:
            raise InputError(f"token id {wrong}, but the teacher has only {rules.num_ids} ids")
        raise InputError(
            f"token id {wrong}, but the tokenizer has {rules.vocab_size} ids; check --token-dtype,"
            " and that the tokens come from this tokenizer"
        )
    return tokens.astype(rules.dtype, copy=False)


def _complete(document: Encoded, rules: TokenisingRules) -> Encoded:
    """Begin and close a document. A mask counts the end as it counts what stands before it."""
    tokens, mask = document.tokens, document.mask
    begin = rules.bos_token_id
    if begin is not None and tokens[0] != begin:
        tokens = np.concatenate([np.array([begin], rules.dtype), tokens])
        mask = None if mask is None else np.concatenate([[False], mask])
    if rules.close_documents and tokens[-1] != rules.eos_token_id:
        tokens = np.concatenate([tokens, np.array([rules.eos_token_id], rules.dtype)])
        mask = None if mask is None else np.concatenate([mask, mask[-1:]])
    return Encoded(document.content, tokens, mask)
