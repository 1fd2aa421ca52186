"""A dump: check, plan the dataset, write the missing shards.

The order is always the same. A process checks options, teacher and tokenizer before it writes
anything. Rank 0 plans the dataset (`coordinate.py`), and the other ranks wait for it. For a new
dataset it first starts the engine, so that a teacher that cannot run costs no tokenising, and
probes where the BOS token goes. Then every rank writes shards. The same command again does what is
left and nothing twice.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import chain

from shards.folder.continuing import record_completeness
from teacher_dump.collector import ShardPlan
from teacher_dump.config import DumpConfig
from teacher_dump.coordinate import (
    Planned,
    asked_spec,
    check_disk,
    compare,
    coordinating,
    has_shards,
    plan_dataset,
    planned_by_another,
)
from teacher_dump.engines.interface import TeacherEngine
from teacher_dump.pass_progress import PassProgress
from teacher_dump.prepare import Prepared, prepare
from teacher_dump.processes.devices import take_devices
from teacher_dump.processes.preparing import sign_of_life, wait_for
from teacher_dump.processes.ranks import ClusterOptions, Rank, find_rank
from teacher_dump.processes.shard_queue import ShardQueue
from teacher_dump.processes.workers import check_ray, run_workers
from teacher_dump.shard_pass import (
    DumpSummary,
    expect_own,
    expect_shards,
    run_pass,
    start_and_probe,
)


def run(config: DumpConfig, cluster: ClusterOptions | None = None) -> DumpSummary:
    """Make or continue the dataset of `config`. Raises LogitshardsError, one line each.

    InputError and IdentityMismatchError leave the folder as it was; RunError leaves every finished
    shard in place.
    """
    options = cluster or ClusterOptions()
    rank = find_rank(options)
    ready = prepare(config)
    if options.prepare:
        return _prepare(config, ready)
    if ready.teacher is not None and options.workers is None:
        take_devices(rank, gpus_per_process=config.gpus)
    if options.workers is not None:
        check_ray()
        return _head(config, ready, options.workers)
    if rank.is_coordinator:
        return _coordinate(config, ready, rank)
    asked = asked_spec(config, ready)
    planned = wait_for(config.out, lambda: planned_by_another(config, ready, asked))
    return _write(config, planned, rank, _alone(config, ready, planned, None))


def _prepare(config: DumpConfig, ready: Prepared) -> DumpSummary:
    """Plan the dataset, without an engine."""
    with coordinating(config.out):
        planned = _plan_without_engine(config, ready)
    return DumpSummary(
        out=config.out,
        sequences=sum(size.sequences for size in planned.manifest.splits.values()),
        positions=sum(size.positions for size in planned.manifest.splits.values()),
        prepared=True,
    )


def _head(config: DumpConfig, ready: Prepared, num_workers: int) -> DumpSummary:
    """Plan the dataset, and let Ray's workers write it."""
    with coordinating(config.out):
        planned = _plan_without_engine(config, ready)

        def write(queue: ShardQueue, plans: Iterator[ShardPlan]) -> DumpSummary:
            return run_workers(config, queue, plans, planned, num_workers, config.gpus)

        return _write(config, planned, Rank(), write)


def _plan_without_engine(config: DumpConfig, ready: Prepared) -> Planned:
    asked = asked_spec(config, ready)
    with sign_of_life(config.out) as sign:
        if not compare(config.out, asked):
            check_disk(config.out)
        ready.corpus.log()
        return plan_dataset(config, ready, asked, os.sched_getaffinity(0), sign)


def _coordinate(config: DumpConfig, ready: Prepared, rank: Rank) -> DumpSummary:
    asked = asked_spec(config, ready)
    cores = os.sched_getaffinity(0)
    with coordinating(config.out):
        engine: TeacherEngine | None = None
        record: dict[str, object] = {}
        with sign_of_life(config.out) as sign:
            is_new = not compare(config.out, asked)
            ready.corpus.log()
            if is_new:
                check_disk(config.out)
                ready.check_engine(config)
                sign.text = "starting the engine"
                engine, probed = start_and_probe(config, ready)
                record = {} if probed is None else {"bos_probe": probed.to_json()}
            planned = plan_dataset(config, ready, asked, cores, sign, **record)
        return _write(config, planned, rank, _alone(config, ready, planned, engine))


Write = Callable[[ShardQueue, Iterator[ShardPlan]], DumpSummary]


def _alone(
    config: DumpConfig, ready: Prepared, planned: Planned, engine: TeacherEngine | None
) -> Write:
    """Write by an engine in this process, started now unless it is there."""

    def write(queue: ShardQueue, plans: Iterator[ShardPlan]) -> DumpSummary:
        started = engine
        if started is None and ready.teacher is not None:
            if has_shards(config.out):
                started = ready.start_engine(config)
            else:
                started, _ = start_and_probe(config, ready)
        progress = PassProgress()
        expect_own(progress, queue, planned)
        counted = _count_others(progress, queue, planned, plans)
        return run_pass(config, ready.tokenizer, counted, planned, started, progress)

    return write


def _count_others(
    progress: PassProgress, queue: ShardQueue, planned: Planned, plans: Iterator[ShardPlan]
) -> Iterator[ShardPlan]:
    """The same plans; shards of other ranks are counted as they are taken."""
    for plan in plans:
        if not queue.owns(plan):
            expect_shards(progress, planned, plan.split, plan.sequences)
        yield plan


def _write(config: DumpConfig, planned: Planned, rank: Rank, write: Write) -> DumpSummary:
    """Write the missing shards that this rank takes, if there are any."""
    manifest = planned.manifest
    queue = ShardQueue(config.out, manifest, rank)
    plans = iter(queue)
    first = next(plans, None)
    if first is None:
        summary = DumpSummary(out=config.out, complete_before=True)
    else:
        if rank.is_coordinator and manifest.complete:
            manifest = record_completeness(config.out, manifest)
        summary = write(queue, chain([first], plans))
    if rank.is_coordinator and not (summary.complete_before and manifest.complete):
        record_completeness(config.out, manifest)
    return replace(summary, missing=queue.num_missing())
