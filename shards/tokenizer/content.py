"""A tokenizer as its tokenizer.json: the hash that tells it from others, and reading it safely.

The hash covers what decides which ids a text becomes, not the bytes of the file: libraries save the
same tokenizer with other key orders, merge notations and post-processors, and leave out keys at
their default. A key that this module does not know counts, because it may change ids.

`_DEFAULTS` follows the library's reader, tokenizers 0.23 (`models/*/serialization.rs` and
`#[serde(default)]` in `pre_tokenizers/*.rs`); keys not in it have no default there. A null is an
absent key everywhere. BPE inserts its prefix and suffix as they are, so an empty one is none.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from shards.errors import InputError, LogitshardsError, one_line
from shards.files.git_lfs import refuse_lfs_pointer
from shards.files.json_text import Json, canonical_json

logger = logging.getLogger(__name__)

TOKENIZER_NAME = "tokenizer.json"

_NO_IDS = {"version", "truncation", "padding", "post_processor", "decoder"}
_DEFAULTS: Mapping[str, Mapping[str, Json]] = {
    "BPE": {
        "dropout": 0,
        "continuing_subword_prefix": "",
        "end_of_word_suffix": "",
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": False,
    },
    "Unigram": {"byte_fallback": False},
    "ByteLevel": {"use_regex": True},
    "Metaspace": {"prepend_scheme": "always", "split": True},
    "Punctuation": {"behavior": "Isolated"},
    "FixedLength": {"length": 5},
}
# Older names: the reader wants the first to agree with prepend_scheme and ignores the second.
_OLD_KEYS = {"Metaspace": {"add_prefix_space", "str_rep"}}


def tokenizer_sha256(tokenizer_json: str) -> str:
    """SHA-256 over how a tokenizer maps text to ids, from the JSON text of a `tokenizers` object.

    It covers the whole model (with the order of merges), normalizer, pre-tokenizer, added tokens,
    and keys that are not known here. It leaves out post-processor, decoder, truncation and padding,
    because the ids of a plain text do not depend on them. ValueError for a text that is not such
    JSON.
    """
    try:
        parts = json.loads(tokenizer_json)
        content: dict[str, Any] = {
            key: _without_defaults(value)
            for key, value in parts.items()
            if key not in {*_NO_IDS, "model", "added_tokens"} and value is not None
        }
        content["model"] = _model(parts["model"])
        content["added_tokens"] = sorted(
            parts.get("added_tokens") or [], key=lambda token: token["id"]
        )
        text = canonical_json(content)
    except (KeyError, TypeError, AttributeError, ValueError, RecursionError) as error:
        raise ValueError(f"not the JSON of a tokenizers tokenizer: {error!r}") from error
    return hashlib.sha256(text.encode()).hexdigest()


def _model(model: Mapping[str, Any]) -> dict[str, Json]:
    kind = model.get("type") or _kind(model)
    options = {key: value for key, value in model.items() if key not in ("vocab", "merges")}
    return {
        **_without_defaults({**options, "type": kind}),
        "vocab": _vocabulary(model["vocab"]),
        "merges": [_merge(merge) for merge in model.get("merges") or []],
    }


def _kind(model: Mapping[str, Any]) -> str:
    """The type of a model that was saved before models had one, as the library guesses it."""
    if "merges" in model:
        return "BPE"
    if isinstance(model["vocab"], list):
        return "Unigram"
    return "WordPiece" if "max_input_chars_per_word" in model else "WordLevel"


def _without_defaults(value: Any) -> Any:
    """A component without nulls and keys at their default, at any depth."""
    if isinstance(value, list):
        return [_without_defaults(item) for item in value]
    if not isinstance(value, dict):
        return value
    kind = str(value.get("type"))
    defaults = _DEFAULTS.get(kind, {})
    return {
        key: _without_defaults(item)
        for key, item in value.items()
        if item is not None
        and key not in _OLD_KEYS.get(kind, ())
        and not (key in defaults and item == defaults[key])
    }


def _vocabulary(vocab: Mapping[str, int] | Sequence[Any]) -> list[Json]:
    """Entries in the order of their ids; a unigram vocabulary is a list with scores already."""
    if isinstance(vocab, Mapping):
        return [[index, token] for index, token in sorted((i, t) for t, i in vocab.items())]
    return [[token, float(score)] for token, score in vocab]


def _merge(merge: str | Sequence[str]) -> list[str]:
    """The two halves of a merge, written as "a b" by older and as ["a", "b"] by newer releases."""
    return merge.split(" ") if isinstance(merge, str) else list(merge)


def read_tokenizer(path: Path, from_str: Callable[[str], Any]) -> Any:
    """The tokenizer of a tokenizer.json, by `tokenizers.Tokenizer.from_str`; InputError, one line.

    This switches a BPE dropout off, which would give a text other ids each time. InputError also
    where the library gives an added token another id than the file does.
    """
    try:
        refuse_lfs_pointer(path)
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text ({error.reason})") from error
    try:
        with _panics_unprinted():
            tokenizer = from_str(text)
    except (KeyboardInterrupt, SystemExit, LogitshardsError):
        raise
    except BaseException as error:  # a panic of the library is no Exception
        raise InputError(
            f"{path}: not a tokenizer that the library tokenizers reads ({one_line(error)});"
            " copy or download it again"
        ) from error
    _check_added_tokens(path, text, tokenizer)
    switch_dropout_off(tokenizer, path)
    return tokenizer


def switch_dropout_off(tokenizer: Any, where: Path) -> None:
    """Make a `tokenizers` tokenizer give a text the same ids each time; a warning says so."""
    dropout = getattr(tokenizer.model, "dropout", None)
    if dropout:
        logger.warning("%s: encoding without the model's dropout of %g", where, dropout)
        tokenizer.model.dropout = None


def _check_added_tokens(path: Path, text: str, tokenizer: Any) -> None:
    """InputError unless each added token has its id of the file, and no other token has it.

    The library numbers added tokens itself, from the length of the vocabulary on.
    """
    ids = set(tokenizer.get_vocab(with_added_tokens=False).values())
    for token in json.loads(text).get("added_tokens") or []:
        content, expected = token["content"], token["id"]
        token_id = tokenizer.token_to_id(content)
        if token_id != expected:
            raise InputError(
                f"{path}: added token {content!r} has id {expected} in the file, but the library"
                f" tokenizers gives it {token_id}; close the gaps between the ids"
            )
        if expected in ids and tokenizer.model.token_to_id(content) is None:
            raise InputError(
                f"{path}: added token {content!r} and a token of the vocabulary both have id"
                f" {expected}; close the gaps between the ids"
            )


@contextmanager
def _panics_unprinted() -> Iterator[None]:
    """Keep Rust from printing a panic, which arrives as an exception as well, on standard error."""
    try:
        standard_error = os.dup(2)
    except OSError:  # closed: nothing is printed
        yield
        return
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(standard_error, 2)
        os.close(nowhere)
        os.close(standard_error)
