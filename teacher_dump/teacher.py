"""The teacher as a folder of files, and what identifies it.

What a teacher is, is the content of its files: a dataset compares hashes of its configuration,
its weights and its tokenizer, so that a folder may be moved or renamed. Hashes of weights are
cached per file (by path, size and time), since a large teacher takes minutes to read.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shards.errors import InputError
from shards.tokenizer_json import tokenizer_sha256
from teacher_dump.corpus import file_sha256
from teacher_dump.custom_code import custom_code_sha256

WEIGHTS = (".safetensors", ".bin", ".pt", ".pth")
_NOT_CONTENT = ("transformers_version", "_name_or_path")
_NO_LM = ("ForMaskedLM", "Classification", "ForQuestionAnswering", "RewardModel")
_HUB_FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]


@dataclass(frozen=True, kw_only=True)
class Teacher:
    """A teacher that is on this machine; `name` as given, `folder` where its files are."""

    name: str
    folder: Path
    revision: str | None
    architecture: str
    max_length: int | None
    vocab_size: int | None  # with padding, as its configuration says
    config_sha256: str
    quantized: bool
    code_sha256: str | None  # of Python files of the model's own, where it needs them


def find_teacher(name: str, revision: str | None, *, trust_remote_code: bool = False) -> Teacher:
    """A folder, or a model of the Hugging Face hub (downloaded once); else InputError."""
    folder = Path(name)
    if not folder.is_dir():
        folder = _from_hub(name, revision, [*_HUB_FILES, *(["*.py"] if trust_remote_code else [])])
        revision = folder.name
    elif revision is not None:
        raise InputError(f"--teacher-revision {revision}: {name} is a folder and has no revisions")
    path = folder / "config.json"
    if not path.is_file():
        raise InputError(f"{folder}: no config.json in it, not a Hugging Face model folder")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path}: not JSON ({error})") from error
    architectures = config.get("architectures") or []
    if not architectures:
        raise InputError(f"{path}: names no architecture")
    if config.get("is_encoder_decoder") or architectures[0].endswith(_NO_LM):
        raise InputError(f"{name}: {architectures[0]} is no causal language model")
    content = {key: value for key, value in config.items() if key not in _NOT_CONTENT}
    text = json.dumps(content, sort_keys=True)
    return Teacher(
        name=name,
        folder=folder,
        revision=revision,
        architecture=architectures[0],
        max_length=_find(config, "max_position_embeddings", "n_positions"),
        vocab_size=_find(config, "vocab_size"),
        config_sha256=hashlib.sha256(text.encode()).hexdigest(),
        quantized="quantization_config" in config,
        code_sha256=custom_code_sha256(folder, trusted=trust_remote_code),
    )


def _find(config: Mapping[str, Any], *keys: str) -> int | None:
    """The first of these that the model's configuration has, or that of its text part."""
    for part in (config, config.get("text_config") or {}):
        for key in keys:
            if part.get(key) is not None:
                return int(part[key])
    return None


def _from_hub(name: str, revision: str | None, files: list[str]) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=files))
    except Exception as error:
        reason = str(error).strip().splitlines()
        raise InputError(
            f"--teacher {name}: neither a folder nor a model that the hub gives"
            f" ({type(error).__name__}: {reason[0] if reason else ''})"
        ) from error


def load_tokenizer(folder: Path, *, trust_remote_code: bool = False) -> Any:
    """The teacher's tokenizer (a fast one, of `tokenizers`); InputError where it has none."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:
        reason = str(error).strip().splitlines()
        raise InputError(
            f"{folder}: no tokenizer that transformers loads ({reason[0] if reason else error!r})"
        ) from error
    if getattr(tokenizer, "backend_tokenizer", None) is None:
        raise InputError(f"{folder}: {type(tokenizer).__name__} is no fast tokenizer")
    if tokenizer.eos_token_id is None:
        raise InputError(f"{folder}: the tokenizer has no end-of-document (eos) token")
    return tokenizer


def tokenizer_identity(tokenizer: Any) -> dict[str, Any]:
    """Hash over the tokenizer's content, and its length: ids at or above it do not exist."""
    return {
        "tokenizer_sha256": tokenizer_sha256(tokenizer.backend_tokenizer.to_str()),
        "vocab_size": len(tokenizer),
    }


def weights_sha256(folder: Path) -> str:
    """One hash over all weight files of a folder, by name; InputError where there are none."""
    files = sorted(path for path in folder.iterdir() if path.name.endswith(WEIGHTS))
    if not files:
        raise InputError(f"{folder}: no weights in it, expected *.safetensors")
    cache = _HashCache()
    lines = [f"{path.name} {cache.sha256(path)}\n" for path in files]
    cache.save()
    return hashlib.sha256("".join(lines).encode()).hexdigest()


class _HashCache:
    """path -> (size, modification time, hash) in the user's cache folder; losing it costs time."""

    def __init__(self) -> None:
        root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        self._path = root / "logitshards" / "weights.json"
        try:
            self._known: dict[str, list[Any]] = json.loads(self._path.read_text())
        except (OSError, ValueError):
            self._known = {}

    def sha256(self, path: Path) -> str:
        status = path.stat()
        key = str(path.resolve())
        known = self._known.get(key)
        if known is None or known[:2] != [status.st_size, status.st_mtime_ns]:
            known = [status.st_size, status.st_mtime_ns, file_sha256(path)]
            self._known[key] = known
        return str(known[2])

    def save(self) -> None:
        temporary = self._path.with_suffix(f".{os.getpid()}")
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_text(json.dumps(self._known))
            temporary.replace(self._path)
        except OSError:
            return  # a read-only home only means hashing again
