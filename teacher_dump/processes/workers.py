"""`--workers N`: the head hands out missing shards to engines that Ray places and restarts.

Rows never travel: a worker writes whole shards. A worker that is lost takes nothing with it but the
shard it was writing, which another one writes again, at most three times. What a worker reports as
an error ends the run at once.
"""

from __future__ import annotations

import logging
import os
import signal
import time
from collections import Counter, deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from shards.errors import InputError, RunError, one_line
from shards.options import OptionError
from shards.row_group import Totals
from shards.writer import shard_name
from teacher_dump.collector import ShardPlan
from teacher_dump.config import DumpConfig
from teacher_dump.coordinate import Planned
from teacher_dump.pass_progress import PassProgress
from teacher_dump.processes.ray_worker import Board, Failure, RayWorker
from teacher_dump.processes.shard_queue import ShardQueue
from teacher_dump.shard_pass import DumpSummary, expect_own

logger = logging.getLogger(__name__)

TRIES = 3
_POLL_S = 1.0


def check_ray() -> None:
    """OptionError without Ray. Sets variables that Ray reads when it is imported."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    try:
        import ray  # noqa: F401
    except ImportError as error:
        raise OptionError(
            "workers", f": needs Ray, the extra 'cluster' of logitshards ({error})"
        ) from error


def run_workers(
    config: DumpConfig,
    queue: ShardQueue,
    plans: Iterator[ShardPlan],
    planned: Planned,
    num_workers: int,
    gpus_per_worker: int,
) -> DumpSummary:
    """Write the shards of `plans` by `num_workers` engines.

    InputError and RunError as the worker that met them says; RunError for a shard whose workers
    were lost three times. Finished shards are kept. Call `check_ray` before.
    """
    import ray

    with _connected(ray) as is_local:
        gpus = _gpus_per_worker(ray, num_workers, gpus_per_worker)
        config = config.with_absolute_paths()  # workers have a working directory of their own
        head = _Head(ray, config, queue, plans, planned, num_workers, gpus, is_local)
        return head.run()


@contextmanager
def _connected(ray: Any) -> Iterator[bool]:
    """Ray on this machine, or on the cluster of RAY_ADDRESS; whether it is on this machine."""
    address = os.environ.get("RAY_ADDRESS")
    # Ray replaces the handlers by which this command ends in one line.
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    try:
        if address:
            ray.init(address=address, **options)
        else:
            ray.init(address="local", include_dashboard=False, **options)
    except (ConnectionError, RuntimeError, ValueError, TimeoutError) as error:
        where = f"RAY_ADDRESS={address}" if address else "on this machine"
        raise RunError(f"--workers: Ray does not start ({where}): {one_line(error)}") from error
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    try:
        yield not address
    finally:
        ray.shutdown()


def _gpus_per_worker(ray: Any, num_workers: int, wanted: int) -> int:
    """GPUs of a worker; 0 on a cluster that has none. OptionError if there are too few."""
    resources = ray.cluster_resources()
    gpus, cpus = int(resources.get("GPU", 0)), int(resources.get("CPU", 0))
    # A worker's GPUs are on one machine.
    machines = [node["Resources"].get("GPU", 0) for node in ray.nodes() if node["Alive"]]
    if gpus and sum(int(number) // wanted for number in machines) < num_workers:
        each = f" of {wanted} GPUs each" if wanted > 1 else ""
        on = ", ".join(f"{number:g}" for number in machines if number)
        raise OptionError("workers", f" {num_workers}{each}: Ray has machines with {on} GPUs")
    if not gpus and cpus < num_workers:
        raise OptionError("workers", f" {num_workers}: Ray has no GPU and {cpus} CPU cores")
    return wanted if gpus else 0


@dataclass(frozen=True)
class _Job:
    """What a worker does: the shard it writes, None: it starts."""

    worker: Any
    number: int
    plan: ShardPlan | None


class _Head:
    def __init__(
        self,
        ray: Any,
        config: DumpConfig,
        queue: ShardQueue,
        plans: Iterator[ShardPlan],
        planned: Planned,
        num_workers: int,
        gpus: int,
        is_local: bool,
    ) -> None:
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        self._ray = ray
        self._config = config
        self._queue = queue
        self._plans = plans
        self._again: deque[ShardPlan] = deque()
        self._exhausted = False
        self._published = [0, 0, 0]  # sequences, positions, entries
        num_shards = sum(map(len, queue.own.values()))
        self._num_workers = max(1, min(num_workers, num_shards))
        self._cores_of = self._num_workers if is_local and not gpus else None
        self._actor = ray.remote(num_cpus=1, num_gpus=gpus)(RayWorker)
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
        self._board = ray.remote(num_cpus=0, scheduling_strategy=here)(Board).remote()
        self._jobs: dict[Any, _Job] = {}
        self._losses: Counter[tuple[str, int] | None] = Counter()
        self._progress = _ClusterProgress(self._num_workers)
        expect_own(self._progress, queue, planned)

    def run(self) -> DumpSummary:
        try:
            for number in range(self._num_workers):
                self._start_worker(number)
            while not self._is_done():
                done, _ = self._ray.wait(list(self._jobs), timeout=_POLL_S)
                for reference in done:
                    self._finish(reference, self._jobs.pop(reference))
                self._show()
        finally:
            self._progress.finish()
            for job in self._jobs.values():
                self._ray.kill(job.worker)
        # What lost workers scored and did not publish is not in the summary.
        progress = self._progress
        progress.sequences, progress.positions, progress.entries = self._published
        return DumpSummary.of(self._config.out, self._progress)

    def _is_done(self) -> bool:
        """Whether nothing is left to hand out and nothing is being written."""
        if any(job.plan is not None for job in self._jobs.values()):
            return False
        return not self._jobs or (self._exhausted and not self._again)

    def _start_worker(self, number: int) -> None:
        worker = self._actor.remote(self._config, self._board, number, self._cores_of)
        self._jobs[worker.start.remote()] = _Job(worker, number, None)

    def _finish(self, reference: Any, job: _Job) -> None:
        try:
            result = self._ray.get(reference)
        except self._ray.exceptions.RayTaskError as error:
            raise RunError(f"a worker failed: {one_line(error.cause)}") from error
        except self._ray.exceptions.RayError as error:
            self._lost(job, error)
            return
        if isinstance(result, Failure):
            raise (InputError if result.exit_code == 2 else RunError)(result.text)
        if result is None:
            self._progress.started()
        else:
            totals = Totals(tokens=result.tokens, entries=result.entries)
            self._progress.wrote(totals, result.bytes, result.shards)
            numbers = (result.sequences, result.positions, result.entries)
            self._published = [a + b for a, b in zip(self._published, numbers, strict=True)]
        plan = self._next()
        if plan is None:
            self._ray.kill(job.worker)
        else:
            self._jobs[job.worker.write.remote(plan)] = replace(job, plan=plan)

    def _lost(self, job: _Job, error: Exception) -> None:
        """Replace a worker whose process is gone. RunError when that happened too often."""
        plan = job.plan
        key = None if plan is None else (plan.split, plan.shard)
        self._losses[key] += 1
        cause = one_line(error)
        if self._losses[key] >= TRIES:
            what = "starting" if plan is None else f"{plan.split}/{shard_name(plan.shard)}"
            raise RunError(
                f"{self._config.out}: {what}: lost {TRIES} workers, the last one because: {cause};"
                " finished shards are kept"
            )
        logger.warning("warning: a worker was lost (%s); another one takes its place", cause)
        self._progress.stopped(plan is not None)
        if plan is not None:
            self._again.append(plan)
        self._start_worker(job.number)

    def _next(self) -> ShardPlan | None:
        while self._again:
            plan = self._again.popleft()
            if self._queue.is_missing(plan):
                return plan
        next_plan = next(self._plans, None)
        self._exhausted = next_plan is None
        return next_plan

    def _show(self) -> None:
        self._progress.set(*self._ray.get(self._board.totals.remote()))


class _ClusterProgress(PassProgress):
    """One line over all workers. The clock runs from the first engine that is ready."""

    def __init__(self, num_workers: int) -> None:
        super().__init__()
        self._num_workers = num_workers
        self._alive = 0

    def started(self) -> None:
        """Count a worker whose engine is ready."""
        if not self._alive and not self.positions:
            self._started = time.monotonic()
        self._alive += 1

    def stopped(self, had_started: bool) -> None:
        """Count a worker that was lost."""
        self._alive -= had_started

    def set(self, sequences: int, positions: int, entries: int) -> None:
        """Take what all workers have scored, and show the line when it is time."""
        self.sequences, self.positions, self.entries = sequences, positions, entries
        self.show_when_due()

    def _more(self) -> list[str]:
        return [f"{self._alive} of {self._num_workers} workers"]
