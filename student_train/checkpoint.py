"""Checkpoints: everything that the next step depends on, in a folder that is complete or absent.

    checkpoints/step-00000100/weights/        float32 weights and AdamW's moments
                              rows.arrow      with --save-logits: rows that are in no shard yet
                              progress.json   step, tokens, positions, last evaluation; its hash
                              sha256.json     hashes of all files but the last two

Each process writes its part of the weights (`torch.distributed.checkpoint`), and any number of
processes continues from it. Reading compares every hash: the format itself would load a changed
byte without an error. Its `.metadata` is a pickle, so never continue from a checkpoint that a
stranger made.

A checkpoint does not store what follows from numbers: learning rate, random numbers and the
datasets of a step follow from its number, and the order of a dataset from its position
(`schedules.py`, `loop.py`, `mixture.py`, `order.py`). Nor does it store AdamW's
options, which come from the command and the machine, so a run that started on a GPU can continue
without one. The newest checkpoint is complete before an older one is removed, so a kill at any
moment leaves one.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from pickle import UnpicklingError

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.state_dict_loader import load as read_state
from torch.distributed.checkpoint.state_dict_saver import save as write_state
from torch.optim import Optimizer

from shards.errors import FailedElsewhereError, RunError, first_line
from shards.files import durable
from shards.files.checksums import path_sha256
from student_train.data.order import Position
from student_train.processes.world import World, is_lost
from student_train.run_folder import (
    begin_folder,
    name_folder,
    remove_folder,
    remove_unpublished,
)

# The library reports every call of it there, with its tracebacks.
logging.getLogger("c10d-NullHandler-dcp_logger").setLevel(logging.CRITICAL)

_KEPT = 2
_PREFIX = "step-"
_WEIGHTS = "weights"
_HASHES = "sha256.json"
_PROGRESS = "progress.json"
_OWN_HASH = "sha256"
_MOMENTS = ("exp_avg", "exp_avg_sq", "step")
_DAMAGED = (
    FileNotFoundError,
    ValueError,
    TypeError,
    KeyError,
    RuntimeError,
    EOFError,
    UnpicklingError,
)


@dataclass(frozen=True, kw_only=True)
class Progress:
    """Optimizer steps done, labelled positions trained on, the last evaluation.

    `sequences` counts those trained on, by dataset, and `positions` says where each dataset is.
    `evaluation_due`: this step still has to be evaluated.
    """

    step: int
    tokens: int
    sequences: Sequence[int]
    positions: Sequence[Position]
    evaluation: dict[str, float] | None = None
    evaluation_due: bool = False


def save(
    folder: Path,
    model: nn.Module,
    optimizer: Optimizer,
    progress: Progress,
    world: World,
    write_more: Callable[[Path], None] | None = None,
) -> None:
    """Write the checkpoint of a step and remove all but the newest. Collective.

    `write_more` writes other files into its folder, in the first process.

    RunError if the disk fails, for any process.
    """
    final = folder / _name(progress.step)
    try:
        temporary = world.from_first(
            world.together(lambda: begin_folder(final) if world.is_first else final)
        )
        try:
            _write_weights(temporary / _WEIGHTS, _state(model, optimizer), world)
            own = world.together(lambda: _own_hashes(temporary / _WEIGHTS, world))
            hashes = world.from_all(own)
            if write_more is not None:
                world.together(lambda: write_more(temporary) if world.is_first else None)
            world.together(lambda: _finish(temporary, final, hashes, progress, world))
        finally:
            if world.is_first:
                shutil.rmtree(temporary, ignore_errors=True)
    except (OSError, RuntimeError) as error:
        if is_lost(error):
            raise
        raise RunError(
            f"{folder}: cannot write the checkpoint of step {progress.step}: {first_line(error)};"
            " the one before is kept; run the same command again to continue from there"
        ) from error


def record(folder: Path, progress: Progress) -> None:
    """Replace the progress of a checkpoint that is there, of the same step. OSError if it fails."""
    durable.replace(folder / _name(progress.step) / _PROGRESS, _to_text(progress))


def find_newest(folder: Path) -> Path | None:
    """The newest checkpoint, None without any; removes what kills left beside and in it."""
    remove_unpublished(folder)
    checkpoints = _checkpoints(folder)
    if not checkpoints:
        return None
    _remove_unrecorded(checkpoints[-1])
    return checkpoints[-1]


def load(path: Path, model: nn.Module, optimizer: Optimizer, world: World) -> Progress:
    """Bring model and optimizer to a checkpoint, of any number of processes. Collective.

    RunError if it cannot be read, for any process.
    """
    advice = "delete this folder, and the same command continues from the checkpoint before"
    try:
        progress = world.together(lambda: _read_progress(path))
        world.together(lambda: _check_hashes(path, world))
        advice = (
            "its files are as they were written, so do not delete it; did the versions of torch or"
            " transformers change?"
        )
        _read_weights(path / _WEIGHTS, model, optimizer, world)
    except torch.OutOfMemoryError:
        raise
    except _DAMAGED as error:
        if is_lost(error):
            raise
        raise RunError(
            f"{path}: the checkpoint cannot be read ({first_line(error)}); {advice}"
        ) from error
    except OSError as error:
        raise RunError(f"{path}: the checkpoint cannot be read ({error})") from error
    return progress


def _write_weights(folder: Path, state: Mapping[str, Tensor], world: World) -> None:
    """Write this process' part of the tensors."""
    with _own_errors(world):
        write_state(
            dict(state),
            storage_writer=FileSystemWriter(folder),
            no_dist=not dist.is_initialized(),
        )


def _read_weights(folder: Path, model: nn.Module, optimizer: Optimizer, world: World) -> None:
    """Read this process' part into the tensors of model and optimizer, making those of AdamW."""
    with _own_errors(world):
        reader = FileSystemReader(folder)
        stored = reader.read_metadata().state_dict_metadata
        for name, parameter in model.named_parameters():
            fused = any(group.get("fused") for group in optimizer.param_groups)
            step = torch.zeros((), device=parameter.device if fused else "cpu")
            for key in _MOMENTS:
                if f"{key}.{name}" in stored:
                    value = step if key == "step" else torch.zeros_like(parameter.detach())
                    optimizer.state[parameter][key] = value
        state = dict(_state(model, optimizer))
        read_state(state, storage_reader=reader, no_dist=not dist.is_initialized())


def _state(model: nn.Module, optimizer: Optimizer) -> dict[str, Tensor]:
    """All tensors of a checkpoint by their names there; they share memory with the run's own."""
    lasting = model.state_dict()  # first: it lets go of weights that a failed step left gathered
    state = {f"model.{name}": weight.detach() for name, weight in model.named_parameters()}
    state |= {f"model.{name}": b.detach() for name, b in model.named_buffers() if name in lasting}
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            state[f"{key}.{name}"] = value
    return state


@contextmanager
def _own_errors(world: World) -> Iterator[None]:
    """Raise what a process failed with there, in place of the tracebacks of all everywhere."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*assuming the intent is to (save|load)")
            yield
    except CheckpointException as error:
        rank, (cause, _) = min(error.failures.items(), key=lambda failure: failure[0])
        if rank == world.rank:
            raise cause from error
        raise FailedElsewhereError(f"process {rank} of this run failed") from error


def _own_hashes(folder: Path, world: World) -> dict[str, str]:
    """SHA-256 of the files that this process wrote in weights/, by their paths in a checkpoint."""
    prefix = f"__{world.rank}_"
    names = [path.name for path in folder.iterdir() if path.name.startswith(prefix)]
    if world.is_first:
        names.append(".metadata")
    return {f"{_WEIGHTS}/{name}": path_sha256(folder / name) for name in names}


def _finish(
    temporary: Path,
    final: Path,
    hashes: Sequence[Mapping[str, str]],
    progress: Progress,
    world: World,
) -> None:
    """Give a checkpoint its name, once all processes have written their part."""
    if not world.is_first:
        return
    joined = {name: digest for part in hashes for name, digest in part.items()}
    for name in joined:  # a listing may be older than what another machine wrote
        if not (temporary / name).is_file():
            raise RuntimeError(
                f"{name}, the part of another process, is missing; all processes need one folder"
            )
    joined |= {path.name: path_sha256(path) for path in temporary.iterdir() if path.is_file()}
    (temporary / _HASHES).write_text(json.dumps(joined, indent=2) + "\n", encoding="utf-8")
    (temporary / _PROGRESS).write_text(_to_text(progress), encoding="utf-8")
    name_folder(temporary, final)
    for old in _checkpoints(final.parent)[:-_KEPT]:
        remove_folder(old)


def _check_hashes(path: Path, world: World) -> None:
    """ValueError for a file that is not what was written; each process reads some of them."""
    hashes = dict(json.loads((path / _HASHES).read_text(encoding="utf-8")))
    files = {str(file.relative_to(path)) for file in path.rglob("*") if file.is_file()}
    if files - {_HASHES, _PROGRESS} != hashes.keys():
        raise ValueError(f"{_HASHES} does not name the files of the checkpoint")
    for name in sorted(hashes)[world.rank :: world.size]:
        if path_sha256(path / name) != hashes[name]:
            raise ValueError(f"{name} was changed after it was written")


def _read_progress(path: Path) -> Progress:
    content = dict(json.loads((path / _PROGRESS).read_text(encoding="utf-8")))
    if content.pop(_OWN_HASH) != _text_sha256(content) or _name(content["step"]) != path.name:
        raise ValueError(f"{_PROGRESS} was changed after it was written")
    content["positions"] = [Position(**position) for position in content["positions"]]
    return Progress(**content)


def _name(step: int) -> str:
    return f"{_PREFIX}{step:08}"


def _to_text(progress: Progress) -> str:
    content = asdict(progress)
    return json.dumps({**content, _OWN_HASH: _text_sha256(content)}) + "\n"


def _text_sha256(content: Mapping[str, object]) -> str:
    """A hash of JSON in which a figure may be infinite, so not of `canonical_json`."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _remove_unrecorded(path: Path) -> None:
    """Remove what a kill left of a progress that was being replaced."""
    for entry in list(path.iterdir()):
        if durable.is_temporary(entry.name):
            entry.unlink()


def _checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    return sorted(folder.glob(f"{_PREFIX}*"))
