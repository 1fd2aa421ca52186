"""The teacher as a folder of files, and what identifies it.

The content of its files identifies a teacher: a dataset compares hashes of its configuration, its
weights and its tokenizer. So the folder may be moved or renamed.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shards.errors import InputError, one_line
from teacher_dump.custom_code import custom_code_sha256
from teacher_dump.json_object import read_json_object
from teacher_dump.weights import has_plain_head

_NOT_CONTENT = ("transformers_version", "_name_or_path")
_NO_LM = (
    *("ForMaskedLM", "Classification", "ForQuestionAnswering", "RewardModel"),
    *("EncoderModel", "EncoderDecoderModel", "MTModel", "ForTextToText"),
)
_ADAPTER = "adapter_config.json"
_TOKENIZER_FILES = ["*.json", "*.model", "*.txt", "*.jinja"]
_OTHER_LAYOUT = ["consolidated*"]  # Mistral's, of the same weights
_HUB_FILES = [*_TOKENIZER_FILES, "*.safetensors"]


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


def head_dtype(teacher: Teacher) -> str:
    """float32: bf16 logits tie heavily. A quantised head cannot be cast and keeps the model's.

    Most quantised teachers have a head that is not.
    """
    plain = not teacher.quantized or has_plain_head(teacher.folder)
    return "float32" if plain else "model"


def find_tokenizer_folder(name: str) -> Path:
    """A folder with a tokenizer, or that of a hub model (downloaded once); else InputError."""
    folder = Path(name)
    return folder if folder.is_dir() else _from_hub("tokenizer", name, None, _TOKENIZER_FILES)


def find_teacher(name: str, revision: str | None, *, trust_remote_code: bool = False) -> Teacher:
    """A folder, or a model of the Hugging Face hub (downloaded once); else InputError."""
    folder = Path(name)
    if not folder.is_dir():
        folder = _from_hub(
            "teacher", name, revision, [*_HUB_FILES, *(["*.py"] if trust_remote_code else [])]
        )
        revision = folder.name
    elif revision is not None:
        raise InputError(f"--teacher-revision {revision}: {name} is a folder and has no revisions")
    path = folder / "config.json"
    if not os.path.lexists(path):
        raise InputError(f"{folder}: not a Hugging Face model folder, it has no config.json")
    config = read_json_object(path)
    if "transformers_weights" in config:
        raise InputError(f"{path}: transformers_weights names weights that vLLM would not read")
    if os.path.lexists(folder / _ADAPTER):
        raise InputError(
            f"{folder / _ADAPTER}: transformers would add this adapter to the teacher, and vLLM"
            " would not; give a folder without it, or merge it first"
        )
    architecture = _architecture(config, path)
    content = {key: value for key, value in config.items() if key not in _NOT_CONTENT}
    text = json.dumps(content, sort_keys=True)
    return Teacher(
        name=name,
        folder=folder,
        revision=revision,
        architecture=architecture,
        max_length=_find(config, path, "max_position_embeddings", "n_positions"),
        vocab_size=_find(config, path, "vocab_size"),
        config_sha256=hashlib.sha256(text.encode()).hexdigest(),
        quantized="quantization_config" in config,
        code_sha256=custom_code_sha256(folder, trusted=trust_remote_code),
    )


def _architecture(config: Mapping[str, Any], path: Path) -> str:
    """The class that config.json names; InputError unless it is a causal language model's."""
    architectures = config.get("architectures")
    if not architectures:
        raise InputError(f"{path}: names no architecture")
    if not isinstance(architectures, list) or not all(type(a) is str for a in architectures):
        text = json.dumps(architectures)[:40]
        raise InputError(f"{path}: architectures is {text}, expected a list of class names")
    name: str = architectures[0]
    if config.get("is_encoder_decoder") or name.endswith(_NO_LM) or _is_encoder_decoder(name):
        raise InputError(f"{path}: {name} is not a causal language model; expected ...ForCausalLM")
    return name


def _is_encoder_decoder(architecture: str) -> bool:
    """Whether transformers lists a class, such as T5's, for sequence to sequence alone."""
    if not architecture.endswith("ForConditionalGeneration"):  # models with images have that, too
        return False
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    )

    return (
        architecture in MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES.values()
        and architecture not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
    )


def _find(config: Mapping[str, Any], path: Path, *keys: str) -> int | None:
    """The first of these that the model's configuration has, or that of its text part."""
    text_config = config.get("text_config") or {}
    if not isinstance(text_config, dict):
        raise InputError(f"{path}: text_config is not a JSON object")
    for part in (config, text_config):
        for key in keys:
            value = part.get(key)
            if value is not None:
                if type(value) is not int:
                    text = json.dumps(value)[:40]
                    raise InputError(f"{path}: {key} is {text}, expected a whole number")
                return value
    return None


def _from_hub(option: str, name: str, revision: str | None, files: list[str]) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(
                name, revision=revision, allow_patterns=files, ignore_patterns=_OTHER_LAYOUT
            )
        )
    except Exception as error:
        raise InputError(
            f"--{option} {name}: neither a folder nor available on the hub"
            f" ({type(error).__name__}: {one_line(error)})"
        ) from error
