"""Makes the golden datasets of the current format version. Run by hand, once for each version.

    python tests/golden/make.py

Files of a released version are never made again: that they can still be read is what they are for.
The rows come from plain arithmetic, so that `<name>.json` beside each dataset says what is in it
independently of anything that reads or writes shards.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from shards.dataset import SplitSize, create_or_continue, missing_shards
from shards.rows import Row
from shards.writer import ShardWriter

_HERE = Path(__file__).parent
_LAYOUT = {"sequences_per_shard": 4, "sequences_per_row_group": 3}
_VOCAB_SIZE = 151_936
_SEQUENCES = {"train": 6, "validation": 2}


def _identity(keep: dict[str, Any], *, has_entropy: bool) -> dict[str, Any]:
    return {
        "format_version": 1,
        "teacher": {
            "config_sha256": "0a" * 32,
            "weights_sha256": "0b" * 32,
            "revision": "main",
            "dtype": "bfloat16",
            "head_dtype": "float32",
        },
        "tokenizer_sha256": "0c" * 32,
        "vocab_size": _VOCAB_SIZE,
        "tokens_sha256": "0d" * 32,
        "documents": {"bos": False, "eos_token_id": 0, "joined": True, "held_out": 0.25},
        "sequence_length": 8,
        "keep": keep,
        "seed": 0,
        "layout": _LAYOUT,
        **({} if has_entropy else {"teacher_entropy": False}),
    }


def _row(sequence: int, *, has_tail: bool, has_mask: bool, has_entropy: bool) -> dict[str, Any]:
    """Plain numbers; the last sequence of a split has two tokens, one position."""
    num_tokens = 2 if sequence in (1, 5) else 9
    positions = range(num_tokens - 1)
    mask = [(t + sequence) % 4 != 0 for t in positions]
    counts = [(3 * t + sequence) % 6 if mask[t] or not has_mask else 0 for t in positions]
    row = {
        "sequence": sequence,
        "tokens": [(7919 * (t + 1) * (sequence + 1)) % _VOCAB_SIZE for t in range(num_tokens)],
        "ids": [
            [(104_729 * (e + 1) + 31 * t + sequence) % _VOCAB_SIZE for e in range(count)]
            for t, count in enumerate(counts)
        ],
        "logprobs": [
            [-0.0625 * (e * (t + 2) + 1) for e in range(count)] for t, count in enumerate(counts)
        ],
        "label_logprobs": [-0.0625 * (5 * t + sequence) for t in positions],
        "segments": [t // 4 for t in range(num_tokens)],
        "teacher_nll": 0.5 + sequence,
    }
    if has_entropy:
        row["teacher_entropy"] = 0.25 + sequence
    if has_tail:
        row["tail_logmass"] = [-0.0625 * (t + 1) for t in positions]
    if has_mask:
        row["loss_mask"] = mask
    return row


def _to_row(values: dict[str, Any]) -> Row:
    def optional(name: str, dtype: type[np.generic]) -> Any:
        return np.array(values[name], dtype) if name in values else None

    return Row(
        sequence=values["sequence"],
        tokens=np.array(values["tokens"], np.int32),
        segments=np.array(values["segments"], np.int32),
        counts=np.array([len(ids) for ids in values["ids"]], np.int32),
        ids=np.array([i for ids in values["ids"] for i in ids], np.int32),
        logprobs=np.array([x for logprobs in values["logprobs"] for x in logprobs], np.float32),
        tail_logmass=optional("tail_logmass", np.float32),
        label_logprobs=np.array(values["label_logprobs"], np.float32),
        loss_mask=optional("loss_mask", np.bool_),
        teacher_nll=values["teacher_nll"],
        teacher_entropy=values.get("teacher_entropy"),
    )


def _make(name: str, keep: dict[str, Any], *, has_entropy: bool = True, **optional: bool) -> None:
    rows = {
        split: [_row(i, has_entropy=has_entropy, **optional) for i in range(number)]
        for split, number in _SEQUENCES.items()
    }
    sizes = {
        split: SplitSize(sequences=len(of), positions=sum(len(row["ids"]) for row in of))
        for split, of in rows.items()
    }
    path = _HERE / name
    identity = _identity(keep, has_entropy=has_entropy)
    manifest = create_or_continue(path, identity, sizes, {"made_by": "tests/golden/make.py"})
    size = _LAYOUT["sequences_per_row_group"]
    for split, of in rows.items():
        for shard, numbers in missing_shards(path, manifest, split):
            with ShardWriter(
                path / split,
                shard=shard,
                split=split,
                identity=manifest.identity,
                sequences_per_row_group=size,
            ) as writer:
                for first in range(numbers.start, numbers.stop, size):
                    part = of[first : min(first + size, numbers.stop)]
                    writer.write_rows([_to_row(row) for row in part])
                writer.publish()
    path.with_suffix(".json").write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    _make(
        "v1-top-p-k",
        {"method": "top-p-k", "top_p": 0.95, "top_k": 5, "logprob_step": 0.0625},
        has_tail=True,
        has_mask=False,
    )
    _make(
        "v1-no-tail-masked",
        {"method": "sample", "draws": 5, "logprob_step": None},
        has_tail=False,
        has_mask=True,
    )
    _make(
        "v1-no-entropy",
        {"method": "top-p-k", "top_p": 0.95, "top_k": 5, "logprob_step": 0.0625},
        has_tail=True,
        has_mask=False,
        has_entropy=False,
    )
