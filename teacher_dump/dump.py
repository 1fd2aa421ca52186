"""A dump: what is asked for, what is there, what is missing; run that, write, continue later.

Order matters and is the same every time. A process checks options, teacher and tokenizer before it
writes anything. Rank 0 plans the dataset (`coordinate.py`), the other ranks wait for that. A new
dataset starts its engine first, so that a teacher that cannot run costs no tokenising, and probes
where the BOS token goes. Then every rank writes shards. The same command again does what is left
and nothing twice.
"""

from __future__ import annotations

import os
from dataclasses import replace
from itertools import chain

from shards.continuing import record_completeness
from teacher_dump.bos import BosProbe, probe, read_probe_sample
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
from teacher_dump.devices import take_devices
from teacher_dump.engines.interface import TeacherEngine
from teacher_dump.prepare import Prepared, prepare
from teacher_dump.preparing import sign_of_life, wait_for
from teacher_dump.ranks import ClusterOptions, Rank, find_rank
from teacher_dump.shard_pass import DumpSummary, run_pass
from teacher_dump.shard_queue import ShardQueue


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
    if ready.teacher is not None:
        take_devices(rank, gpus_per_process=1)
    if rank.is_coordinator:
        return _coordinate(config, ready, rank)
    asked = asked_spec(config, ready)
    planned = wait_for(config.out, lambda: planned_by_another(config, ready, asked))
    return _write(config, ready, planned, rank, None)


def _prepare(config: DumpConfig, ready: Prepared) -> DumpSummary:
    """Plan the dataset, without an engine."""
    asked = asked_spec(config, ready)
    with coordinating(config.out), sign_of_life(config.out) as sign:
        if not compare(config.out, asked):
            check_disk(config.out)
        ready.corpus.log()
        planned = plan_dataset(config, ready, asked, os.sched_getaffinity(0), sign)
    return DumpSummary(
        out=config.out,
        sequences=sum(size.sequences for size in planned.manifest.splits.values()),
        positions=sum(size.positions for size in planned.manifest.splits.values()),
        prepared=True,
    )


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
                engine, probed = _start_and_probe(config, ready)
                record = {} if probed is None else {"bos_probe": probed.to_json()}
            planned = plan_dataset(config, ready, asked, cores, sign, **record)
        return _write(config, ready, planned, rank, engine)


def _write(
    config: DumpConfig, ready: Prepared, planned: Planned, rank: Rank, engine: TeacherEngine | None
) -> DumpSummary:
    """Write the missing shards that this rank takes; start an engine only if there are any."""
    manifest = planned.manifest
    queue = ShardQueue(config.out, manifest, rank)
    plans = iter(queue)
    first = next(plans, None)
    if first is None:
        summary = DumpSummary(out=config.out, complete_before=True)
    else:
        if rank.is_coordinator and manifest.complete:
            manifest = record_completeness(config.out, manifest)
        if engine is None and ready.teacher is not None:
            if has_shards(config.out):
                engine = ready.start_engine(config)
            else:
                engine, _ = _start_and_probe(config, ready)
        all_plans = chain([first], plans)
        summary = run_pass(config, ready.tokenizer, queue.own, all_plans, planned, engine)
    if rank.is_coordinator and not (summary.complete_before and manifest.complete):
        record_completeness(config.out, manifest)
    return replace(summary, missing=queue.num_missing())


def _start_and_probe(
    config: DumpConfig, ready: Prepared
) -> tuple[TeacherEngine | None, BosProbe | None]:
    """The engine, and where the BOS token goes; neither without a teacher."""
    if ready.teacher is None:
        return None, None
    sample = read_probe_sample(ready)
    engine = ready.start_engine(config)
    return engine, probe(config, ready, sample, engine)
