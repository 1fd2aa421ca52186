"""The folder of a run: its settings, its progress, and whether it is finished.

    OUT/run.json         settings and dataset; compared when the same command comes again
    OUT/metrics.jsonl    one line per step and evaluation (`metrics.py`), OUT/tensorboard/ beside it
    OUT/speed.jsonl      one line per step: time and memory, which differ from run to run
    OUT/checkpoints/     the newest two (`checkpoint.py`)
    OUT/model/           the student as a Hugging Face folder, there in full or not at all
    OUT/summary.json     written last: the run is finished
    OUT/tasks.json       results of --eval-tasks (`tasks.py`), after that

A run rejects other settings and names every difference, because no single command would describe
the student. Paths, `save_every` and `eval_tasks` may change: the student does not depend on them.
`device`, `compile`, `micro_batch_sequences` and `gradient_checkpointing` may change too, for a run
that moves to another machine or had too little memory: they only change how sums are rounded.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from shards.dataset import Dataset
from shards.errors import InputError
from shards.files import durable
from shards.files.checksums import path_sha256
from shards.files.json_text import Json, canonical_json, json_differences
from student_train.config import TrainConfig
from student_train.model.presets import PRESETS

_COMPUTING = ("micro_batch_sequences", "gradient_checkpointing", "compile")
_NOT_COMPARED = (
    *("shards", "eval_shards", "eval_tasks", "student", "teacher", "out", "save_every", "device"),
    *_COMPUTING,
)
_WEIGHTS = (".safetensors", ".bin", ".index.json")
_RUN = "run.json"
_SUMMARY = "summary.json"


class RunFolder:
    """Paths of a run, and its files that are JSON."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.metrics = path / "metrics.jsonl"
        self.speed = path / "speed.jsonl"
        self.tensorboard = path / "tensorboard"
        self.checkpoints = path / "checkpoints"
        self.model = path / "model"
        self.tasks = path / "tasks.json"

    def check(self, description: Mapping[str, Json]) -> None:
        """InputError if the folder holds other files, or a run with other settings, naming them."""
        if self.path.exists() and not self.path.is_dir():
            raise InputError(f"{self.path}: expected a folder for the run, found a file")
        file = self.path / _RUN
        if file.is_file():
            self._check_same(description, _read_settings(file))
            return
        names = sorted(os.listdir(self.path)) if self.path.exists() else []
        others = [name for name in names if not durable.is_temporary(name)]
        if others:
            raise InputError(
                f"{self.path}: contains {others[0]} but no run; give an empty or a new folder"
            )

    def start(self, description: Mapping[str, Json]) -> None:
        """Make the folder of a run, or tidy up what a killed one left in it.

        The settings are those of the last command: what differs may change.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        remove_unpublished(self.path)
        durable.replace(self.path / _RUN, json.dumps(description, indent=2) + "\n")

    def settings(self) -> dict[str, Any]:
        """The settings of the run. InputError if the folder holds no run."""
        file = self.path / _RUN
        if not file.is_file():
            raise InputError(
                f"{self.path}: not the folder of a run, it has no {_RUN}; give the --out folder of"
                " a train-student command"
            )
        return _read_settings(file)

    def summary(self) -> dict[str, Any] | None:
        """The summary of a finished run, else None."""
        file = self.path / _SUMMARY
        return _read_json(file) if file.is_file() else None

    def finish(self, summary: Mapping[str, Json]) -> None:
        """Mark the run as finished."""
        durable.replace(self.path / _SUMMARY, json.dumps(summary, indent=2) + "\n")

    def _check_same(self, here: Mapping[str, Json], there: Mapping[str, Any]) -> None:
        differences = json_differences(_compared(here), _compared(there))
        if not differences:
            return
        reason = ""
        if any(line.startswith("config.tokens:") for line in differences):
            reason = "; another --tokens changes the learning rate of every step"
        elif any(".sequences." in line for line in differences):
            reason = "; if dump-logits extended the dataset, the run needs the one before"
        raise InputError(
            f"{self.path}: holds a run with other settings: {'; '.join(differences)}"
            f" (here: this command, there: the folder){reason}; repeat its command to continue it,"
            " or give another --out"
        )


def describe_run(
    config: TrainConfig,
    datasets: Sequence[Dataset],
    evaluation_dataset: Dataset | None,
    own_logits: Mapping[str, Json] | None = None,
) -> dict[str, Json]:
    """Everything that a run's result depends on, and the paths that were given.

    The first dataset is `dataset`, the others are `dataset_2` and so on. `own_logits` describes
    what the run saves of its own distributions.
    """
    others = enumerate(datasets[1:], start=2)
    return {
        "config": config.to_json(),
        "student": _describe_model(config.student),
        "teacher": None if config.teacher is None else _describe_model(config.teacher),
        "dataset": _describe_dataset(datasets[0]),
        **{f"dataset_{number}": _describe_dataset(other) for number, other in others},
        "evaluation_dataset": None
        if evaluation_dataset is None
        else _describe_dataset(evaluation_dataset),
        **({} if own_logits is None else {"own_logits": dict(own_logits)}),
    }


def run_sha256(description: Mapping[str, Json]) -> str:
    """A hash of what two runs must have in common to be the same one."""
    return hashlib.sha256(canonical_json(_compared(description)).encode()).hexdigest()


def agreed_settings(description: Mapping[str, Any]) -> dict[str, Any]:
    """What the processes of a run must have in common: what two runs must, and how they compute."""
    computing = {name: description["config"][name] for name in _COMPUTING}
    return {**_compared(description), "computing": computing}


def publish_folder(final: Path, fill: Callable[[Path], None]) -> None:
    """Make a folder appear whole or not at all; one of this name is replaced.

    `fill` writes files into the folder it is given, which has another name until all of them are
    flushed to disk.
    """
    temporary = begin_folder(final)
    try:
        fill(temporary)
        name_folder(temporary, final)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def begin_folder(final: Path) -> Path:
    """A new folder beside `final`, to be filled and then named by `name_folder`."""
    final.parent.mkdir(parents=True, exist_ok=True)
    temporary = durable.temporary_name(final)
    temporary.mkdir()
    return temporary


def name_folder(temporary: Path, final: Path) -> None:
    """Flush a folder to disk, then give it its name; one of this name is replaced."""
    durable.sync_files(temporary)
    remove_folder(final)
    temporary.rename(final)
    durable.sync_folder(final.parent)


def remove_folder(path: Path) -> None:
    """Remove a folder so that an interruption leaves no half of it under its name.

    What cannot be removed yet (a file that is open, over NFS) is left to `remove_unpublished`.
    """
    if path.exists():
        temporary = durable.temporary_name(path)
        path.rename(temporary)
        shutil.rmtree(temporary, ignore_errors=True)


def remove_unpublished(parent: Path) -> None:
    """Remove, as far as possible, what runs left of folders that they wrote or removed."""
    if parent.is_dir():
        for entry in list(parent.iterdir()):
            if entry.is_dir() and entry.name.startswith(".") and entry.name.endswith(".tmp"):
                shutil.rmtree(entry, ignore_errors=True)


def _describe_dataset(dataset: Dataset) -> dict[str, Json]:
    sizes = {name: size.sequences for name, size in dataset.manifest.splits.items()}
    return {"spec": dataset.spec.to_json(), "sequences": sizes}


def _describe_model(model: str) -> str:
    """What a model is at the start: its preset, or a hash of its configuration and weights."""
    path = Path(model)
    if model in PRESETS or not path.exists():
        return model
    files = [path] if path.is_file() else sorted(filter(_is_of_a_model, path.iterdir()))
    digest = hashlib.sha256()
    for file in files:
        digest.update(bytes.fromhex(path_sha256(file)))
    return digest.hexdigest()


def _is_of_a_model(file: Path) -> bool:
    return file.name == "config.json" or file.name.endswith(_WEIGHTS)


def _compared(description: Mapping[str, Any]) -> dict[str, Any]:
    config = {
        key: value for key, value in description["config"].items() if key not in _NOT_COMPARED
    }
    own = description.get("own_logits")
    own = {} if own is None else {"own_logits": {**own, "path": None}}
    return {**description, "config": config, **own}


def _read_settings(file: Path) -> dict[str, Any]:
    """The content of run.json. InputError unless it has the parts that `describe_run` gives it."""
    content = _read_json(file)
    for key in ("config", "dataset"):
        if not isinstance(content.get(key), dict):
            raise InputError(
                f"{file}: not the settings of a run, it has no object {key!r}; give another folder"
            )
    return content


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError("not an object")
    except (OSError, ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{file}: cannot be read ({reason}); give another folder") from error
    return content
