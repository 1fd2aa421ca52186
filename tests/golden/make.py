"""Makes the golden datasets of the current format version. Run by hand, once for each version.

    python -m tests.golden.make

Files of a released version are never made again: that they can still be read is what they are for.
The rows come from plain arithmetic, so that `<name>.json` beside each dataset says what is in it
independently of anything that reads or writes shards.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from shards.folder.completeness import missing_shards
from shards.folder.continuing import create_or_continue, record_completeness
from shards.keep import Threshold, Tokens, TopPK
from shards.layout import Layout
from shards.manifest import SplitSize
from shards.rows import Row
from shards.schema import ALL_COLUMNS
from shards.spec import DatasetSpec, Documents, Model, Tokenizer
from shards.tokenizer.content import tokenizer_sha256
from shards.tokenizer.files import hash_texts, write_tokenizer
from shards.writer import ShardWriter

_HERE = Path(__file__).parent
_VOCAB_SIZE = 151_936
_BOS_TOKEN_ID = 1
_SEQUENCES = {"train": 6, "validation": 2}
_TOKENIZER_JSON = (
    '{"model": {"type": "WordLevel", "vocab": {"golden": 0}, "unk_token": "golden"}}\n'
)
_TOKENIZER_FILES = {"tokenizer.json": _TOKENIZER_JSON, "tokenizer_config.json": "{}\n"}

_TEACHER = Model(
    config_sha256="0a" * 32,
    weights_sha256="0b" * 32,
    revision="main",
    dtype="bfloat16",
    head_dtype="float32",
)
_DOCUMENTS = Documents(
    joined=True, bos="none", bos_token_id=None, eos_token_id=0, held_out=0.25, masked=False
)
_TOP_P_K = DatasetSpec(
    teacher=_TEACHER,
    tokenizer=Tokenizer(sha256=tokenizer_sha256(_TOKENIZER_JSON), vocab_size=_VOCAB_SIZE),
    documents=_DOCUMENTS,
    keep=TopPK(top_p=0.95, top_k=5),
    layout=Layout(sequences_per_shard=4, sequences_per_row_group=3),
    sequence_length=8,
    seed=0,
    tokens_sha256="0d" * 32,
)
SPECS = {
    "v1-top-p-k": _TOP_P_K,
    "v1-threshold-masked": replace(
        _TOP_P_K, keep=Threshold(), documents=replace(_DOCUMENTS, masked=True)
    ),
    "v1-no-entropies": replace(
        _TOP_P_K,
        teacher=replace(
            _TEACHER,
            entropies=False,
            revision=None,
            code_sha256="0e" * 32,
            engine_args={"quantization": "fp8"},
        ),
    ),
    "v1-tokens": replace(_TOP_P_K, teacher=None, keep=Tokens()),
    "v1-bos": replace(
        _TOP_P_K,
        documents=replace(
            _DOCUMENTS, bos="sequence+document", bos_token_id=_BOS_TOKEN_ID, masked=True
        ),
    ),
}


def _row(sequence: int, spec: DatasetSpec) -> dict[str, Any]:
    """Plain numbers; the last sequence of a split has two tokens, one position."""
    num_tokens = 2 if sequence in (1, 5) else 9
    positions = range(num_tokens - 1)
    tokens = [(7919 * (t + 1) * (sequence + 1)) % _VOCAB_SIZE for t in range(num_tokens)]
    segments = [t // 4 for t in range(num_tokens)]
    mask = [(t + sequence) % 4 != 0 for t in positions]
    if spec.documents.bos != "none":
        # The row begins with the token, and so does every document in it: these are no labels.
        tokens = [_BOS_TOKEN_ID if t % 4 == 0 else token for t, token in enumerate(tokens)]
        mask = [(t + 1) % 4 != 0 for t in positions]
    counted = mask if spec.documents.masked else [True for _ in positions]
    counts = [(3 * t + sequence) % 6 if counted[t] else 0 for t in positions]
    values: dict[str, Any] = {
        "sequence": sequence,
        "tokens": tokens,
        "ids": [
            [(104_729 * (e + 1) + 31 * t + sequence) % _VOCAB_SIZE for e in range(count)]
            for t, count in enumerate(counts)
        ],
        "logprobs": [
            [-0.0625 * (e * (t + 2) + 1) for e in range(count)] for t, count in enumerate(counts)
        ],
        "tail_logmass": [-0.0625 * (t + 1) for t in positions],
        "label_logprobs": [-0.0625 * (5 * t + sequence) for t in positions],
        "entropies": [0.0625 * (3 * t + sequence + 1) if counted[t] else 0.0 for t in positions],
        "segments": segments,
        "loss_mask": mask,
        "positions": num_tokens - 1,
        "teacher_nll": 0.5 + sequence,
        "teacher_entropy": 0.25 + sequence,
    }
    return {name: values[name] for name in ALL_COLUMNS if name in spec.columns}


def _to_row(values: dict[str, Any]) -> Row:
    def optional(name: str, dtype: type[np.generic]) -> Any:
        return np.array(values[name], dtype) if name in values else None

    def flat(name: str, dtype: type[np.generic]) -> Any:
        return np.array([x for part in values[name] for x in part], dtype)

    has_entries = "ids" in values
    return Row(
        sequence=values["sequence"],
        tokens=np.array(values["tokens"], np.int32),
        segments=np.array(values["segments"], np.int32),
        counts=np.array([len(ids) for ids in values["ids"]], np.int32) if has_entries else None,
        ids=flat("ids", np.int32) if has_entries else None,
        logprobs=flat("logprobs", np.float32) if has_entries else None,
        tail_logmass=optional("tail_logmass", np.float32),
        label_logprobs=optional("label_logprobs", np.float32),
        entropies=optional("entropies", np.float32),
        loss_mask=optional("loss_mask", np.bool_),
        teacher_nll=values.get("teacher_nll"),
        teacher_entropy=values.get("teacher_entropy"),
    )


def _make(name: str, spec: DatasetSpec) -> None:
    rows = {split: [_row(i, spec) for i in range(number)] for split, number in _SEQUENCES.items()}
    sizes = {
        split: SplitSize(
            sequences=len(of_split), positions=sum(len(row["tokens"]) - 1 for row in of_split)
        )
        for split, of_split in rows.items()
    }
    path = _HERE / name
    write_tokenizer(path, _TOKENIZER_FILES)
    hashes = hash_texts(_TOKENIZER_FILES)
    manifest = create_or_continue(path, spec, sizes, {"made_by": "tests/golden/make.py"}, hashes)
    size = spec.layout.sequences_per_row_group
    for split, of_split in rows.items():
        for shard, numbers in missing_shards(path, manifest, split):
            with ShardWriter(path / split, shard=shard, split=split, spec=spec) as writer:
                for first in range(numbers.start, numbers.stop, size):
                    part = of_split[first : min(first + size, numbers.stop)]
                    writer.write_rows([_to_row(row) for row in part])
                writer.publish()
    record_completeness(path, manifest)
    path.with_suffix(".json").write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    for _name, _spec in SPECS.items():
        _make(_name, _spec)
