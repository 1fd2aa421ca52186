"""The teacher's tokenizer: tokenizer.json decides the ids, if the folder has one.

transformers builds many tokenizers from the class that a configuration names, and uses only a part
of tokenizer.json. If the two disagree, a text gets ids that the teacher was not trained on. So this
module encodes with the file itself. The class only gives the names of special tokens that the
folder's JSON files leave out. If there is no tokenizer.json, the class converts the folder.

The dataset keeps this tokenizer.json, and settings that make AutoTokenizer give the same ids: the
folder's own settings if they do, else those of a class that uses the file unchanged.
"""

from __future__ import annotations

import json
import logging
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from shards.errors import InputError, one_line
from shards.tokenizer.content import (
    TOKENIZER_NAME,
    read_tokenizer,
    switch_dropout_off,
    tokenizer_sha256,
)
from teacher_dump.json_object import read_json_object
from teacher_dump.tokens.encoder import Encoder

logger = logging.getLogger(__name__)

_SETTINGS_NAME = "tokenizer_config.json"
_SPECIAL_MAP_NAME = "special_tokens_map.json"
_CHAT_TEMPLATE_NAME = "chat_template.jinja"
_KINDS = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
_SPECIAL_TOKENS = tuple(f"{kind}_token" for kind in _KINDS)
# A class that takes tokenizer.json as it is, and what else it may be told without changing ids.
_PLAIN_CLASS = "PreTrainedTokenizerFast"
_PLAIN_CLASSES = (_PLAIN_CLASS, "TokenizersBackend")
_PLAIN_SETTINGS = (
    *("add_bos_token", "add_eos_token", "chat_template", "clean_up_tokenization_spaces"),
    *("model_max_length", "padding_side", "truncation_side"),
)


@dataclass(frozen=True, kw_only=True, eq=False)
class TeacherTokenizer:
    """A tokenizer that gives a text the same ids each time; all ids are below `vocab_size`.

    `backend` is the `tokenizers.Tokenizer`, `sha256` the hash of how it maps text to ids.
    `adds_bos`: whether it begins a text with the BOS token by itself.
    """

    folder: Path
    backend: Any
    sha256: str
    vocab_size: int
    eos_token_id: int
    bos_token_id: int | None
    adds_bos: bool
    chat_template: str | None
    json_text: str = field(repr=False)
    settings: Mapping[str, Any] = field(repr=False)

    def files(self) -> dict[str, str]:
        """The dataset's copy, file name -> text; InputError if AutoTokenizer reads other ids."""
        files = self._files(self.json_text, self.settings)
        if self._agrees_with_auto(files):
            return files
        logger.info(
            "%s: %s gives other ids than tokenizer.json; the dataset's copy names the class %s",
            *(self.folder, self.settings.get("tokenizer_class", "its class"), _PLAIN_CLASS),
        )
        # transformers adds a padding token that the file names and does not have
        bare = {**json.loads(self.json_text), "truncation": None, "padding": None}
        for text in (self.json_text, json.dumps(bare, ensure_ascii=False)):
            files = self._files(text, self._plain_settings())
            if self._agrees_with_auto(files):
                return files
        raise InputError(
            f"{self.folder / TOKENIZER_NAME}: transformers gets other ids from a copy of this file,"
            " and so would a student; load the file with transformers and save it again"
        )

    def _files(self, text: str, settings: Mapping[str, Any]) -> dict[str, str]:
        written = json.dumps(settings, indent=2, ensure_ascii=False) + "\n"
        return {TOKENIZER_NAME: text, _SETTINGS_NAME: written}

    def _agrees_with_auto(self, files: Mapping[str, str]) -> bool:
        """Whether AutoTokenizer gives a text our ids, apart from special tokens it spells."""
        content = _auto_json(files)
        if content is None:
            return False
        ours = {token["content"] for token in json.loads(self.backend.to_str())["added_tokens"]}
        content["added_tokens"] = [
            token
            for token in content["added_tokens"]
            if token["content"] in ours
            or not token["special"]
            or self.backend.token_to_id(token["content"]) != token["id"]
        ]
        return tokenizer_sha256(json.dumps(content)) == self.sha256

    def _plain_settings(self) -> dict[str, Any]:
        settings = {key: self.settings[key] for key in _PLAIN_SETTINGS if key in self.settings}
        for key in _SPECIAL_TOKENS:
            content = _content(self.settings.get(key))
            if content is not None and self.backend.token_to_id(content) is not None:
                settings[key] = content
        names = ["input_ids", "attention_mask"]
        return {**settings, "model_input_names": names, "tokenizer_class": _PLAIN_CLASS}


def load_tokenizer(
    folder: Path, *, trust_remote_code: bool = False, eos_token: str | None = None
) -> TeacherTokenizer:
    """The tokenizer in a teacher's folder, with another EOS token if one is given.

    InputError, one line, where there is none that works.
    """
    settings = _settings(folder)
    file = folder / TOKENIZER_NAME
    from tokenizers import Tokenizer

    if os.path.lexists(file):
        backend = read_tokenizer(file, Tokenizer.from_str)
        _add_names_of_class(settings, folder, backend, trust_remote_code)
    else:
        converted = _from_class(folder, trust_remote_code)
        backend = Tokenizer.from_str(converted.backend_tokenizer.to_str())
        switch_dropout_off(backend, folder)
        settings |= converted.special_tokens_map
    if eos_token is not None:
        if backend.token_to_id(eos_token) is None:
            raise InputError(f"--eos-token {eos_token}: not a token of the tokenizer in {folder}")
        settings["eos_token"] = eos_token
    bos, eos = (_special_id(folder, settings, key, backend) for key in ("bos_token", "eos_token"))
    if eos is None:
        raise InputError(
            f"{folder}: the tokenizer has no end-of-document (eos) token; name one with --eos-token"
        )
    sha256 = tokenizer_sha256(backend.to_str())
    return TeacherTokenizer(
        folder=folder,
        backend=backend,
        sha256=sha256,
        vocab_size=max(backend.get_vocab(with_added_tokens=True).values()) + 1,
        eos_token_id=eos,
        bos_token_id=bos,
        adds_bos=bos is not None and _adds_bos(folder, backend, bos, settings),
        chat_template=_default_template(settings.get("chat_template")),
        json_text=_json_text(file, backend, sha256),
        settings=settings,
    )


def _settings(folder: Path) -> dict[str, Any]:
    """tokenizer_config.json with what transformers takes from files beside it."""
    settings = read_json_object(folder / _SETTINGS_NAME, optional=True)
    special = read_json_object(folder / _SPECIAL_MAP_NAME, optional=True)
    special = {key: special[key] for key in _SPECIAL_TOKENS if key in special}
    # The older file wins, unless the newer one lists the added tokens too, as transformers has it.
    is_complete = "added_tokens_decoder" in settings
    settings = {**special, **settings} if is_complete else {**settings, **special}
    template = folder / _CHAT_TEMPLATE_NAME
    if os.path.lexists(template):
        try:
            settings["chat_template"] = template.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"{template}: cannot be read ({one_line(error)})") from error
    return settings


def _add_names_of_class(
    settings: dict[str, Any], folder: Path, backend: Any, trust_remote_code: bool
) -> None:
    """Special tokens that only the declared class names; one that cannot be loaded names none."""
    missing = [key for key in ("bos_token", "eos_token") if key not in settings]
    if not missing or settings.get("tokenizer_class") in _PLAIN_CLASSES:
        return
    try:
        names = _from_class(folder, trust_remote_code).special_tokens_map
    except InputError as error:
        logger.info("%s", error)
        return
    for key in missing:
        if backend.token_to_id(names.get(key, "")) is not None:
            settings[key] = names[key]


def _from_class(folder: Path, trust_remote_code: bool) -> Any:
    from transformers import AutoTokenizer

    try:
        with _transformers_silent():
            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:
        raise InputError(
            f"{folder}: has no tokenizer that transformers can load ({one_line(error)}); expected"
            f" {TOKENIZER_NAME}, or the vocabulary of the class in {_SETTINGS_NAME}"
        ) from error
    if getattr(tokenizer, "backend_tokenizer", None) is None:
        raise InputError(f"{folder}: {type(tokenizer).__name__} is not a fast tokenizer")
    return tokenizer


def _auto_json(files: Mapping[str, str]) -> dict[str, Any] | None:
    """The tokenizer that AutoTokenizer makes of these files; None if it refuses them."""
    with tempfile.TemporaryDirectory() as name:
        for file, text in files.items():
            (Path(name) / file).write_text(text, encoding="utf-8")
        try:
            tokenizer = _from_class(Path(name), trust_remote_code=False)
        except InputError:
            return None
        content: dict[str, Any] = json.loads(tokenizer.backend_tokenizer.to_str())
        return content


@contextmanager
def _transformers_silent() -> Iterator[None]:
    """Without its warnings about a class that the ids do not come from."""
    from transformers.utils import logging as their_logging

    before = their_logging.get_verbosity()
    their_logging.set_verbosity_error()
    try:
        yield
    finally:
        their_logging.set_verbosity(before)


def _content(token: Any) -> str | None:
    """The text of a special token, which a JSON file gives as it is or as an object."""
    content = token.get("content") if isinstance(token, Mapping) else token
    return content if isinstance(content, str) else None


def _special_id(folder: Path, settings: Mapping[str, Any], key: str, backend: Any) -> int | None:
    content = _content(settings.get(key))
    if content is None:
        return None
    index: int | None = backend.token_to_id(content)
    if index is None and (key == "eos_token" or settings.get("add_bos_token") is True):
        raise InputError(
            f"{folder / _SETTINGS_NAME}: {key} is {content!r}, which is not a token of"
            f" {TOKENIZER_NAME}; name one of its tokens"
        )
    return index


def _adds_bos(folder: Path, backend: Any, bos: int, settings: Mapping[str, Any]) -> bool:
    """Whether the post-processor puts BOS before a text, or the settings say so."""
    encoder = Encoder(backend, folder)
    plain, processed = (encoder.encode("a", add_special_tokens=add).ids for add in (False, True))
    by_itself = len(processed) > len(plain) and processed[: len(plain) + 1] == [bos, *plain]
    return by_itself or settings.get("add_bos_token") is True


def _default_template(template: Any) -> str | None:
    """The chat template; of several, the one that is named default."""
    if isinstance(template, list):
        named = [item for item in template if isinstance(item, dict)]
        named = [item for item in named if item.get("name") == "default"]
        template = named[-1].get("template") if named else None
    return template if isinstance(template, str) else None


def _json_text(file: Path, backend: Any, sha256: str) -> str:
    """The file's own text, if its hash says what the backend does; else what the backend writes."""
    try:
        text = file.read_text(encoding="utf-8")
        if tokenizer_sha256(text) == sha256:
            return text
    except (OSError, ValueError):
        pass
    written: str = backend.to_str(pretty=True)
    return written
