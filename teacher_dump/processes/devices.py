"""The GPUs and cores of one process among several on a machine.

This runs before anything starts CUDA: looking for GPUs goes through NVML, because vLLM forks.
"""

from __future__ import annotations

import logging
import os

from teacher_dump.processes.ranks import Rank

logger = logging.getLogger(__name__)

VISIBLE = "CUDA_VISIBLE_DEVICES"


def take_devices(rank: Rank, gpus_per_process: int) -> None:
    """Leave this process its own GPUs, or its own cores where there is no GPU.

    A launcher that already gives each process its own devices is left alone.
    """
    num_gpus = count_gpus()
    if num_gpus:
        _take_gpus(rank, gpus_per_process, num_gpus)
    elif rank.local_rank is not None and (rank.local_world_size or 1) > 1:
        take_cores(rank.local_rank, rank.local_world_size or 1)


def count_gpus() -> int:
    """The GPUs that this process may use."""
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    import torch

    return torch.cuda.device_count()


def take_cores(number: int, of: int) -> None:
    """Bind this process to its part of the cores that it may use; one at least."""
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) >= of:
        os.sched_setaffinity(0, cores[number * len(cores) // of : (number + 1) * len(cores) // of])


def _take_gpus(rank: Rank, wanted: int, num_gpus: int) -> None:
    if rank.world_size > 1 and num_gpus > wanted:
        local = rank.rank if rank.local_rank is None else rank.local_rank
        first = local * wanted % (num_gpus - num_gpus % wanted)
        names = os.environ.get(VISIBLE, ",".join(map(str, range(num_gpus)))).split(",")
        os.environ[VISIBLE] = ",".join(names[first : first + wanted])
        logger.info("%s: GPU %s", rank, os.environ[VISIBLE])
    elif rank.world_size == 1 and num_gpus > wanted:
        workers = num_gpus // wanted
        logger.info("%d of %d GPUs used (--workers %d uses all)", wanted, num_gpus, workers)
