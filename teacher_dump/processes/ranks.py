"""Which of several processes this one is: `--rank R --world-size W`, or what a launcher says.

Ranks share nothing but the folder of the dataset. Rank 0 writes what is common (tokens, manifest);
every rank writes shards. Nothing depends on when a rank starts, so the tasks of a Slurm array may
come one by one.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass

from shards.errors import InputError
from shards.options import OptionError, check, option

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class ClusterOptions:
    """Options of `dump-logits` for several processes."""

    rank: int | None = option(
        "Number of this process among --world-size, from 0. Each writes its share of the shards.",
        default=None,
        shown_default="from torchrun or Slurm, else 0",
    )
    world_size: int | None = option(
        "Number of processes that write this dataset together.",
        default=None,
        shown_default="from torchrun or Slurm, else 1",
    )
    workers: int | None = option(
        "Run this many engines through Ray, on this machine or on the cluster of RAY_ADDRESS.",
        default=None,
        shown_default="no Ray, one engine in this process",
    )
    prepare: bool = option(
        "Write tokens and manifest, and stop before the teacher runs. Needs no GPU.",
        default=False,
    )

    def __post_init__(self) -> None:
        if (self.rank is None) != (self.world_size is None):
            missing = "rank" if self.rank is None else "world_size"
            raise OptionError(missing, ": missing; --rank and --world-size go together")
        if self.world_size is not None and self.rank is not None:
            check(self.world_size >= 1, "world_size", self.world_size, "at least 1")
            expected = f"a number from 0 to {self.world_size - 1}"
            check(0 <= self.rank < self.world_size, "rank", self.rank, expected)
            if self.prepare and self.world_size > 1:
                raise OptionError("prepare", ": one process prepares; not with --world-size")
        if self.workers is not None:
            check(self.workers >= 1, "workers", self.workers, "at least 1")
            if self.rank is not None or self.prepare:
                other = "--prepare" if self.prepare else "--rank"
                raise OptionError("workers", f" {self.workers}: contradicts {other}")

    @property
    def processes(self) -> int:
        """Engines that write the dataset together."""
        return self.workers or self.world_size or 1


@dataclass(frozen=True, kw_only=True)
class Rank:
    """One of `world_size` processes. `source` says who named it, "" for a process alone.

    `local_rank` of `local_world_size` counts the processes of this machine, where that is known.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int | None = None
    local_world_size: int | None = None
    source: str = ""

    @property
    def is_coordinator(self) -> bool:
        """Whether this process writes what is common to all."""
        return self.rank == 0

    def __str__(self) -> str:
        return f"rank {self.rank} of {self.world_size}"


def find_rank(options: ClusterOptions, environ: Mapping[str, str] = os.environ) -> Rank:
    """The options' rank, else that of torchrun, of Slurm, or of a process alone; logged.

    InputError for variables of a launcher that contradict each other.
    """
    if options.prepare:
        return Rank()
    if options.workers is not None:
        launcher = _of_torchrun(environ) or _of_slurm(environ)
        if launcher is not None and launcher.world_size > 1:
            raise OptionError(
                "workers",
                f" {options.workers}: this process is {launcher} already (from {launcher.source});"
                " start it once, or without --workers",
            )
        return Rank()
    rank = _given(options, environ) or _of_torchrun(environ) or _of_slurm(environ) or Rank()
    if not 0 <= rank.rank < rank.world_size:
        raise InputError(
            f"{rank.source}: {rank} is no rank; give --rank and --world-size (0 and 1 for a"
            " dataset that one process writes)"
        )
    if rank.source and rank.world_size > 1:
        logger.info("%s (from %s)", rank, rank.source)
    return rank


def _given(options: ClusterOptions, environ: Mapping[str, str]) -> Rank | None:
    if options.rank is None or options.world_size is None:
        return None
    # A task that starts several ranks has one local number for all of them.
    step, array = (
        _number(environ, name) or 1 for name in ("SLURM_STEP_NUM_TASKS", "SLURM_ARRAY_TASK_COUNT")
    )
    is_task = step > 1 and step * array == options.world_size
    return Rank(
        rank=options.rank,
        world_size=options.world_size,
        local_rank=_number(environ, "LOCAL_RANK", *(["SLURM_LOCALID"] if is_task else [])),
        source="--rank",
    )


def _of_torchrun(environ: Mapping[str, str]) -> Rank | None:
    rank, world_size = _number(environ, "RANK"), _number(environ, "WORLD_SIZE")
    if rank is None or world_size is None:
        return None
    return Rank(
        rank=rank,
        world_size=world_size,
        local_rank=_number(environ, "LOCAL_RANK"),
        local_world_size=_number(environ, "LOCAL_WORLD_SIZE"),
        source="torchrun's RANK and WORLD_SIZE",
    )


def _of_slurm(environ: Mapping[str, str]) -> Rank | None:
    """The task of a job step, the index of an array, or both together."""
    tasks = _number(environ, "SLURM_STEP_NUM_TASKS") or 1
    task = _number(environ, "SLURM_PROCID") if tasks > 1 else 0
    index, count = _array_index(environ)
    if task is None or tasks * count == 1:
        return None
    names = [*(["SLURM_ARRAY_TASK_ID"] if count > 1 else []),
             *(["SLURM_PROCID"] if tasks > 1 else [])]  # fmt: skip
    return Rank(
        rank=index * tasks + task,
        world_size=count * tasks,
        local_rank=_number(environ, "SLURM_LOCALID") if tasks > 1 else None,
        source=f"Slurm's {' and '.join(names)}",
    )


def _array_index(environ: Mapping[str, str]) -> tuple[int, int]:
    """(place of this task in its Slurm array, size of the array); (0, 1) outside of one."""
    number, count, first, last = (
        _number(environ, f"SLURM_ARRAY_TASK_{name}") for name in ("ID", "COUNT", "MIN", "MAX")
    )
    if number is None or count is None or first is None or last is None or count < 2:
        return 0, 1
    step, rest = divmod(last - first, count - 1)
    if rest or (number - first) % step:
        raise InputError(
            f"SLURM_ARRAY_TASK_ID={number}: the array has gaps, so it gives no rank; give --rank"
            " and --world-size"
        )
    return (number - first) // step, count


def _number(environ: Mapping[str, str], *names: str) -> int | None:
    """The first of these variables that is set. InputError if it is no number."""
    for name in names:
        value = environ.get(name)
        if value:
            if not value.isdecimal():
                raise InputError(f"{name}={value}: expected a number")
            return int(value)
    return None
