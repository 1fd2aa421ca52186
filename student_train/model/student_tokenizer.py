"""A student's tokenizer beside the dataset's: compared by how a text becomes ids.

Where a folder has a tokenizer.json, the ids are those of that file; the class that a configuration
names may build another tokenizer from it.
"""

from __future__ import annotations

import os
from pathlib import Path

from tokenizers import Tokenizer
from transformers import AutoTokenizer

from shards.dataset import Dataset
from shards.errors import IdentityMismatchError, InputError, one_line
from shards.tokenizer.content import (
    TOKENIZER_NAME,
    read_tokenizer,
    switch_dropout_off,
    tokenizer_sha256,
)


def check_tokenizer(folder: Path, dataset: Dataset, *, option: str = "--student") -> None:
    """IdentityMismatchError unless a model folder has the dataset's tokenizer.

    InputError, one line, where no tokenizer can be read from the folder.
    """
    sha256 = _sha256(folder, option)
    expected = dataset.spec.tokenizer.sha256
    if sha256 != expected:
        raise IdentityMismatchError(
            f"{option} {folder}: has another tokenizer ({sha256[:12]}) than {dataset.path}"
            f" ({expected[:12]}), so the ids in the shards mean other tokens to it"
        )


def _sha256(folder: Path, option: str) -> str:
    file = folder / TOKENIZER_NAME
    if os.path.lexists(file):
        return tokenizer_sha256(read_tokenizer(file, Tokenizer.from_str).to_str())
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
        backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    except Exception as error:
        raise InputError(
            f"{option} {folder}: has no tokenizer that can be read ({one_line(error)}); copy the"
            f" {TOKENIZER_NAME} that it was trained with into the folder"
        ) from error
    switch_dropout_off(backend, folder)
    return tokenizer_sha256(backend.to_str())
