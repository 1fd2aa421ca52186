"""Checkpoints: everything that the next step depends on, in a folder that is complete or absent.

    checkpoints/step-00000100/model.safetensors   float32 weights, tied ones once
                              optimizer.pt        AdamW's moments
                              progress.json       step, tokens, sequences, last evaluation

A checkpoint does not store what follows from numbers: learning rate, random numbers and the
datasets of a step follow from its number, and the order of a dataset from the number of its
sequences so far (`schedules.py`, `loop.py`, `mixture.py`, `order.py`). Nor does it store AdamW's
options, which come from the command and the machine, so a run that started on a GPU can continue
without one. The newest checkpoint is complete before an older one is removed, so a kill at any
moment leaves one.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_model, save_model
from torch.optim import Optimizer
from transformers import PreTrainedModel

from shards.errors import RunError, first_line
from shards.files import durable
from student_train.run_folder import publish_folder, remove_folder, remove_unpublished

_KEPT = 2
_PREFIX = "step-"
_MODEL = "model.safetensors"
_OPTIMIZER = "optimizer.pt"
_PROGRESS = "progress.json"
_DAMAGED = (FileNotFoundError, ValueError, TypeError, KeyError, RuntimeError, SafetensorError)


@dataclass(frozen=True, kw_only=True)
class Progress:
    """Optimizer steps done, labelled positions trained on, the last evaluation.

    `sequences` counts those trained on, by dataset. `evaluation_due`: this step still has to be
    evaluated.
    """

    step: int
    tokens: int
    sequences: Sequence[int]
    evaluation: dict[str, float] | None = None
    evaluation_due: bool = False


def save(folder: Path, model: PreTrainedModel, optimizer: Optimizer, progress: Progress) -> None:
    """Write the checkpoint of a step and remove all but the newest. RunError if the disk fails."""

    def fill(path: Path) -> None:
        save_model(model, str(path / _MODEL))
        torch.save(optimizer.state_dict(), path / _OPTIMIZER)
        (path / _PROGRESS).write_text(_to_text(progress), encoding="utf-8")

    try:
        publish_folder(folder / _name(progress.step), fill)
        for old in _checkpoints(folder)[:-_KEPT]:
            remove_folder(old)
    except (OSError, RuntimeError, SafetensorError) as error:
        raise RunError(
            f"{folder}: cannot write the checkpoint of step {progress.step}: {error};"
            " the one before is kept; run the same command again to continue from there"
        ) from error


def record(folder: Path, progress: Progress) -> None:
    """Replace the progress of a checkpoint that is there, of the same step. OSError if it fails."""
    durable.replace(folder / _name(progress.step) / _PROGRESS, _to_text(progress))


def load_newest(folder: Path, model: PreTrainedModel, optimizer: Optimizer) -> Progress | None:
    """Bring model and optimizer to the newest checkpoint; None, and no change, without any.

    RunError if it cannot be read.
    """
    remove_unpublished(folder)
    checkpoints = _checkpoints(folder)
    if not checkpoints:
        return None
    path = checkpoints[-1]
    try:
        _remove_unrecorded(path)
        progress = Progress(**json.loads((path / _PROGRESS).read_text(encoding="utf-8")))
        load_model(model, path / _MODEL)
        state = torch.load(path / _OPTIMIZER, map_location="cpu", weights_only=True)
        optimizer.load_state_dict(state | {"param_groups": optimizer.state_dict()["param_groups"]})
    except torch.OutOfMemoryError:
        raise
    except _DAMAGED as error:
        raise RunError(
            f"{path}: the checkpoint cannot be read ({first_line(error)}); delete this folder, and"
            " the same command continues from the checkpoint before"
        ) from error
    except OSError as error:
        raise RunError(f"{path}: the checkpoint cannot be read ({error})") from error
    return progress


def _name(step: int) -> str:
    return f"{_PREFIX}{step:08}"


def _to_text(progress: Progress) -> str:
    return json.dumps(asdict(progress)) + "\n"


def _remove_unrecorded(path: Path) -> None:
    """Remove what a kill left of a progress that was being replaced."""
    for entry in list(path.iterdir()):
        if durable.is_temporary(entry.name):
            entry.unlink()


def _checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    return sorted(folder.glob(f"{_PREFIX}*"))
