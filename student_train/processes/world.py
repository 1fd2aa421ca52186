"""The processes that train one student together, started by torchrun, and what they agree on.

A collective is a call that every process makes, in the same order. Numbers travel between CPUs
(gloo), also where the model is on GPUs, so that counting never waits for a GPU.

A process that fails leaves the others waiting. So whatever can fail on one process alone goes
through `together`, or through a flag that `sum_counts` adds up: then all of them end at the same
place, and only the one that failed prints its error.
"""

from __future__ import annotations

import atexit
import logging
import os
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import HashStore, Store
from torch.distributed.rendezvous import rendezvous

from shards.errors import (
    FailedElsewhereError,
    InputError,
    LogitshardsError,
    RunError,
    first_line,
    one_line,
)

_T = TypeVar("_T")
_E = TypeVar("_E", bound=BaseException)

# How long a process waits for the others: longer than exporting a large student takes.
_TIMEOUT = timedelta(hours=1)
_JOIN_TIMEOUT = timedelta(minutes=10)  # for all to start; another machine may be slow
_GRACE_S = 3.0
_AGREED = "agreed_by_all_processes"


@dataclass(frozen=True, kw_only=True)
class World:
    """This process, `rank` of `size`, and its device. A process alone makes no collective call."""

    device: torch.device
    rank: int = 0
    size: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this process writes what only one may write: figures, logs, the student."""
        return self.rank == 0

    def sum_counts(self, counts: Sequence[int]) -> list[int]:
        """The sums of whole numbers over all processes. Collective."""
        if self.size == 1:
            return list(counts)
        summed = torch.tensor(counts, dtype=torch.int64)
        dist.all_reduce(summed)
        return [int(count) for count in summed]

    def largest(self, number: int) -> int:
        """The largest of the numbers that all processes give. Collective."""
        if self.size == 1:
            return number
        reduced = torch.tensor(number)
        dist.all_reduce(reduced, dist.ReduceOp.MAX)
        return int(reduced)

    def largest_of_each(self, figures: Mapping[str, float]) -> dict[str, float]:
        """The largest value of each figure; all processes give the same figures. Collective."""
        if self.size == 1:
            return dict(figures)
        reduced = torch.tensor(list(figures.values()), dtype=torch.float64)
        dist.all_reduce(reduced, dist.ReduceOp.MAX)
        return dict(zip(figures, reduced.tolist(), strict=True))

    def add(self, tensor: Tensor) -> Tensor:
        """A tensor on the device, replaced by its sum over all processes. Collective."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def from_first(self, value: _T) -> _T:
        """What the first process gives here. Collective."""
        if self.size == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=0, device=torch.device("cpu"))
        return values[0]

    def from_all(self, value: _T) -> list[_T]:
        """What every process gives here, by rank. Collective."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def to_first(self, value: _T) -> list[_T]:
        """On the first process what every one gives here, by rank; else []. Collective."""
        if self.size == 1:
            return [value]
        values: list[Any] | None = [None] * self.size if self.is_first else None
        dist.gather_object(value, values, dst=0)
        return values or []

    def together(self, function: Callable[[], _T]) -> _T:
        """The result of a function that every process calls; if one fails, all fail. Collective.

        The first process that failed raises its error, the others a FailedElsewhereError.
        `function` makes no collective call after something that can fail on one process alone.
        """
        if self.size == 1:
            return function()
        outcomes: list[_T] = []
        error: Exception | None = None
        try:
            outcomes.append(function())
        except Exception as caught:
            error = caught
        failed = self.sum_counts([error is not None and r == self.rank for r in range(self.size)])
        if not any(failed):
            return outcomes[0]
        first = next(rank for rank, count in enumerate(failed) if count)
        if error is not None and first == self.rank:
            raise _agreed(error)
        elsewhere = FailedElsewhereError(f"process {first} of this run failed")
        raise _agreed(elsewhere) from error

    def fail(self, error: LogitshardsError) -> NoReturn:
        """End all processes for a reason that all have found: one of them prints it."""
        if self.is_first:
            raise _agreed(error)
        raise _agreed(FailedElsewhereError(str(error), error.exit_code))


@contextmanager
def joined(device: torch.device, environ: Mapping[str, str] = os.environ) -> Iterator[World]:
    """Join the other processes that torchrun started; alone without its variables.

    One process on a GPU is a group of its own, for the same sharded model. Loggers of all but the
    first process are quiet. InputError for variables that contradict each other, RunError if the
    others cannot be reached.
    """
    rank, size = (
        _number(environ, name, default) for name, default in (("RANK", 0), ("WORLD_SIZE", 1))
    )
    if not 0 <= rank < size:
        raise InputError(f"RANK={rank} and WORLD_SIZE={size}: no rank; start processes by torchrun")
    world = World(device=device, rank=rank, size=size)
    if size == 1 and device.type == "cpu":
        yield world
        return
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    try:
        if size == 1:
            dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1)
        else:
            store = _meet(rank, size, device)
            dist.init_process_group(
                backend, store=store, rank=rank, world_size=size, timeout=_TIMEOUT
            )
    except (RuntimeError, ValueError) as error:
        raise RunError(
            f"process {rank} of {size}: cannot reach the others: {first_line(error)}"
        ) from error
    root = logging.getLogger()
    level = root.level
    if rank:
        root.setLevel(logging.ERROR)
    try:
        _check_devices(world)
        yield world
        dist.destroy_process_group()
    except BaseException as error:
        _leave(error, world)
        if _is_own(error):
            raise RunError(
                f"process {rank}: {one_line(error)}; NCCL_DEBUG=WARN in the environment says more"
            ) from error
        if not is_lost(error):
            raise
        lost = (
            f"another process of this run ended ({first_line(error)}); run the same command again"
            " to continue"
        )
        raise (RunError(lost) if world.is_first else FailedElsewhereError(lost)) from error
    finally:
        root.setLevel(level)


def _meet(rank: int, size: int, device: torch.device) -> Store:
    """The store of a run, once all its processes are there.

    InputError if some have a GPU and others none, which the first one prints; RuntimeError if one
    does not come in time.
    """
    store: Store
    store, _, _ = next(rendezvous("env://", timeout=_JOIN_TIMEOUT))
    names, read = ([f"logitshards/{what}/{r}" for r in range(size)] for what in ("device", "read"))
    store.set(names[rank], device.type)
    store.wait(names, _JOIN_TIMEOUT)
    kinds = [store.get(name).decode() for name in names]
    store.set(read[rank], "")
    if len(set(kinds)) > 1:
        found = ", ".join(f"{kinds.count(kind)} x {kind}" for kind in sorted(set(kinds)))
        text = f"--device: the processes of a run need devices of one kind, found {found}"
        if rank:
            raise FailedElsewhereError(text, InputError.exit_code)
        with suppress(RuntimeError):
            store.wait(read, timedelta(seconds=_GRACE_S))  # it may end with this process
        raise InputError(text)
    store.set_timeout(_TIMEOUT)
    return store


def under_torchrun() -> bool:
    """Whether torchrun started this process, and passes signals on to it."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def is_agreed(error: BaseException | None) -> bool:
    """Whether all processes fail with this error or for its sake, at the same place."""
    while error is not None:
        if getattr(error, _AGREED, False):
            return True
        error = error.__cause__
    return False


def _agreed(error: _E) -> _E:
    setattr(error, _AGREED, True)
    return error


def _leave(error: BaseException, world: World) -> None:
    """Leave a group because of an error, so that no process waits for another one.

    If all leave for the same reason, those that print nothing wait a moment, because torchrun
    kills the others when the first one ends. Taking NCCL down waits for the other processes, so one
    that fails alone must not do that.
    """
    agreed = is_agreed(error) or world.size == 1
    if not agreed and world.device.type == "cuda":
        atexit.register(os._exit, 1)
        return
    if agreed and isinstance(error, FailedElsewhereError) and under_torchrun():
        time.sleep(_GRACE_S)
    dist.destroy_process_group()


def _check_devices(world: World) -> None:
    """InputError if two processes have the same GPU."""
    if world.device.type != "cuda":
        return
    uuid = str(torch.cuda.get_device_properties(world.device).uuid)
    devices = world.from_all(f"{socket.gethostname()}, GPU {uuid}")
    shared = {device for device in devices if devices.count(device) > 1}
    if shared:
        world.fail(InputError(f"several processes use one GPU ({min(shared)}); start one per GPU"))


def _is_own(error: BaseException) -> bool:
    """Whether an error is of a call of NCCL that failed here; that another one ended is not."""
    text = str(error)
    return (
        isinstance(error, dist.DistBackendError)
        and "NCCL error" in text
        and "ncclRemoteError" not in text
    )


def is_lost(error: BaseException) -> bool:
    """Whether an error is of a collective call: mostly, another process of the run is gone."""
    return isinstance(error, dist.DistError) or "gloo/transport" in str(error)


def _number(environ: Mapping[str, str], name: str, default: int) -> int:
    value = environ.get(name) or str(default)
    if not value.isdecimal():
        raise InputError(f"{name}={value}: expected a number")
    return int(value)
