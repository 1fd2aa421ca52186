"""What dataset a run saves: its spec, its size, and whether the source datasets allow it.

Row number `(step - first_step) * step_sequences + line` is the sequence in that line of that step.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path

from shards.dataset import Dataset
from shards.errors import InputError, ShardError
from shards.files.json_text import Json
from shards.layout import Layout
from shards.manifest import load_manifest
from shards.spec import DatasetSpec, Documents, TrainingRun, keep_to_json
from student_train.config import TrainConfig
from student_train.own_logits.options import SaveLogits

_SHARD_TOKENS = 1 << 19  # rows wait in memory until their shard is full
_ROW_GROUP_TOKENS = 128 << 10


@dataclass(frozen=True, kw_only=True)
class SavePlan:
    """The dataset that a run saves in `path`, and the steps whose rows it holds.

    `source` is the dataset whose tokenizer it gets, `record` what the manifest says beside it.
    """

    path: Path
    spec: DatasetSpec
    source: Dataset
    first_step: int
    num_steps: int
    step_sequences: int
    record: Mapping[str, Json]

    @property
    def num_sequences(self) -> int:
        """Rows of the complete dataset."""
        return self.rows_after(self.num_steps)

    def rows_after(self, step: int) -> int:
        """How many rows there are after a step."""
        return max(0, step - self.first_step + 1) * self.step_sequences

    def row_number(self, step: int, line: int) -> int:
        """The row of a line of a step that is saved."""
        return self.rows_after(step - 1) + line


def describe(options: SaveLogits) -> dict[str, Json]:
    """The options as plain JSON, for the description of the run."""
    return {
        "path": str(options.save_logits),
        "first_step": options.save_logits_from,
        "keep": keep_to_json(options.keep),
        "sequences_per_shard": options.sequences_per_shard,
    }


def plan_saving(
    options: SaveLogits,
    config: TrainConfig,
    datasets: Sequence[Dataset],
    *,
    run_sha256: str,
    num_steps: int,
    step_sequences: int,
) -> SavePlan | None:
    """What to save; None without `--save-logits`. InputError for what cannot be saved."""
    path = options.save_logits
    if path is None:
        return None
    if path.resolve().is_relative_to(config.out.resolve()):
        raise InputError(f"--save-logits {path}: is in the folder of the run; give another one")
    if options.save_logits_from > num_steps:
        raise InputError(
            f"--save-logits-from {options.save_logits_from}: the run has only {num_steps} steps"
        )
    first = datasets[0]
    length = first.spec.sequence_length
    spec = DatasetSpec(
        teacher=TrainingRun(
            run_sha256=run_sha256,
            first_step=options.save_logits_from,
            dtype=config.dtype,
            head_dtype=config.dtype,
        ),
        tokenizer=first.spec.tokenizer,
        documents=_documents(datasets),
        keep=options.keep,
        layout=_layout(options.sequences_per_shard, length),
        sequence_length=length,
        seed=config.seed,
        tokens_sha256=_tokens_sha256(datasets),
    )
    packages = ("torch", "transformers", "pyarrow")
    return SavePlan(
        path=path,
        spec=spec,
        source=first,
        first_step=options.save_logits_from,
        num_steps=num_steps,
        step_sequences=step_sequences,
        record={
            "engine": "train-student",
            "student": config.student,
            "shards": [str(dataset.path) for dataset in datasets],
            "steps": num_steps,
            "step_sequences": step_sequences,
            "versions": {name: version(name) for name in packages},
        },
    )


def check_saved(plan: SavePlan) -> None:
    """InputError unless the dataset of a finished run is complete in its folder."""
    try:
        manifest = load_manifest(plan.path)
        there = manifest.complete and manifest.spec == plan.spec
    except ShardError:
        there = False
    if not there:
        raise InputError(
            f"--save-logits {plan.path}: the run is finished, but its dataset is missing here; name"
            " the folder that holds it"
        )


def _documents(datasets: Sequence[Dataset]) -> Documents:
    """Those of every dataset; the saved one has no validation split. InputError if they differ."""
    first = datasets[0]
    expected = replace(first.spec.documents, held_out=0.0)
    for dataset in datasets:
        documents = replace(dataset.spec.documents, held_out=0.0)
        if not documents.joined:
            raise InputError(
                f"--save-logits: {dataset.path} has separate documents, which the trainer packs;"
                " only sequences of joined documents can be saved"
            )
        if documents != expected:
            raise InputError(
                f"--save-logits: {dataset.path} and {first.path} differ in BOS token, end token or"
                " mask, so their sequences do not make one dataset"
            )
    return expected


def _tokens_sha256(datasets: Sequence[Dataset]) -> str:
    hashes = [dataset.spec.tokens_sha256 for dataset in datasets]
    return hashes[0] if len(hashes) == 1 else hashlib.sha256(" ".join(hashes).encode()).hexdigest()


def _layout(sequences_per_shard: int | None, length: int) -> Layout:
    per_shard = sequences_per_shard or max(1, _SHARD_TOKENS // length)
    per_group = max(1, _ROW_GROUP_TOKENS // length)
    return Layout(sequences_per_shard=per_shard, sequences_per_row_group=min(per_group, per_shard))
