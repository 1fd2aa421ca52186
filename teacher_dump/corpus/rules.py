"""How documents become tokens: one frozen object, part of a token store's record."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from shards.files.json_text import Json


@dataclass(frozen=True, kw_only=True)
class TokenisingRules:
    """What determines the tokens of a corpus, together with its files.

    `token_key` names a column of token lists, `mask_key` the one that says which of them count as
    labels; without them the column `text_key` is text. `token_dtype` is that of flat `.bin` files,
    None: the narrowest that holds every id. `bos_token_id` is put before every document that does
    not begin with it already, None: nothing is. `close_documents`: the end-of-document token ends
    every document that does not end with it already. `teacher_vocab_size` is given where the
    teacher knows fewer ids than the tokenizer.
    """

    tokenizer_sha256: str
    vocab_size: int
    eos_token_id: int
    text_key: str
    held_out: float
    seed: int
    token_key: str | None = None
    mask_key: str | None = None
    token_dtype: str | None = None
    bos_token_id: int | None = None
    close_documents: bool = True
    teacher_vocab_size: int | None = None

    @property
    def has_mask(self) -> bool:
        """Whether some tokens do not count as labels: by the corpus, or because BOS was put in."""
        return self.mask_key is not None or self.bos_token_id is not None

    @property
    def num_ids(self) -> int:
        """Ids that a corpus may hold are below it."""
        return self.vocab_size if self.teacher_vocab_size is None else self.teacher_vocab_size

    @property
    def dtype(self) -> np.dtype[Any]:
        """The narrowest unsigned type that holds every id."""
        return np.dtype(np.uint16 if self.vocab_size <= 1 << 16 else np.uint32)

    @property
    def flat_dtype(self) -> np.dtype[Any]:
        """The type of tokens in flat files."""
        return self.dtype if self.token_dtype is None else np.dtype(self.token_dtype)

    def is_held_out(self, content: bytes) -> bool:
        """Whether a document belongs to the validation split, by its content."""
        return self._chance(content, str(self.seed)) < self.held_out

    def num_copies(self, content: bytes, weight: float) -> int:
        """How often a document of a corpus with this weight is taken, by its content."""
        whole = int(weight)
        return whole + (self._chance(content, f"{self.seed} weight") < weight - whole)

    def to_json(self) -> dict[str, Json]:
        """The fields that are not at their default, so that a new one changes no old store."""
        return {
            field.name: getattr(self, field.name)
            for field in fields(self)
            if getattr(self, field.name) != field.default
        }

    @staticmethod
    def _chance(content: bytes, key: str) -> float:
        """A number in [0, 1) that belongs to a content."""
        digest = hashlib.blake2b(content, digest_size=8, key=key.encode()).digest()
        return int.from_bytes(digest, "big") / 2.0**64
