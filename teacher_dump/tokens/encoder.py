"""Text -> ids with a `tokenizers` tokenizer, whose errors name the folder that it came from."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from shards.errors import InputError, one_line


class Encoder:
    """Encodes text of any length; a text that spells a special token is encoded as text.

    InputError where the tokenizer cannot: it has, say, no token for what is unknown.
    """

    def __init__(self, backend: Any, folder: Path) -> None:
        # A copy: the caller's tokenizer keeps its own treatment of special tokens
        self._backend = type(backend).from_str(backend.to_str())
        self._backend.encode_special_tokens = True
        self._backend.no_truncation()
        self._backend.no_padding()
        self._folder = folder

    def encode(self, text: str, *, add_special_tokens: bool = True) -> Any:
        """The encoding of one text."""
        return self.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0]

    def encode_batch_fast(self, texts: Sequence[str], *, add_special_tokens: bool = True) -> Any:
        """The encodings of texts, without offsets."""
        try:
            return self._backend.encode_batch_fast(texts, add_special_tokens=add_special_tokens)
        except Exception as error:  # of no class of their own
            raise InputError(
                f"{self._folder}: the tokenizer cannot encode the text ({one_line(error)})"
            ) from error
