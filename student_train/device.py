"""The device a run trains on: a GPU where one works, and never a CPU in place of a broken one."""

from __future__ import annotations

import os
import warnings
from pathlib import Path

import torch

from shards.errors import InputError, first_line

_VISIBLE = "CUDA_VISIBLE_DEVICES"
# What NVIDIA's driver makes for each GPU of the machine.
_GPU_FILES = ((Path("/dev"), "nvidia[0-9]*"), (Path("/proc/driver/nvidia/gpus"), "*"))


def training_device(config_device: str, local_rank: int = 0) -> torch.device:
    """The device of `--device` ("auto", "cuda" or "cpu") for a process of this machine.

    "auto" takes a GPU if the machine has one. CUDA_VISIBLE_DEVICES may hide it. `local_rank` counts
    the processes of the machine; one that sees a single GPU takes that. InputError if there is no
    GPU for the process, or one that torch cannot use.
    """
    if config_device == "cpu":
        return torch.device("cpu")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the error below says what torch warns of
        num_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if num_gpus:
        return torch.device("cuda", _index(local_rank, num_gpus))
    if config_device == "cuda":
        raise InputError(f"--device cuda: torch finds no GPU ({_cause()})")
    if os.environ.get(_VISIBLE) not in ("", "-1") and (gpu := _gpu_file()) is not None:
        raise InputError(
            f"this machine has a GPU ({gpu}), but torch cannot use it: {_cause()}; to train on the"
            " CPU all the same, give --device cpu"
        )
    return torch.device("cpu")


def describe_device(device: torch.device) -> str:
    """A device for the log: "cuda:0 (NVIDIA H100 80GB HBM3)", or "cpu (8 threads)"."""
    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    hidden = f"; {_VISIBLE} hides all GPUs" if os.environ.get(_VISIBLE) in ("", "-1") else ""
    return f"{device} ({torch.get_num_threads()} threads{hidden})"


def _index(local_rank: int, num_gpus: int) -> int:
    """The number of this process's GPU among those it sees."""
    if num_gpus == 1:
        return 0
    if local_rank >= num_gpus:
        raise InputError(
            f"process {local_rank + 1} of this machine has no GPU: torch sees {num_gpus}; start at"
            " most one process per GPU"
        )
    return local_rank


def _gpu_file() -> Path | None:
    for folder, pattern in _GPU_FILES:
        files = sorted(folder.glob(pattern))
        if files:
            return files[0]
    return None


def _cause() -> str:
    """Why torch has no GPU, in its own words."""
    if torch.version.cuda is None and torch.version.hip is None:
        return f"torch {torch.__version__} is built without CUDA"
    try:
        torch.cuda.init()  # type: ignore[no-untyped-call]
    except (RuntimeError, AssertionError) as error:
        return first_line(error)
    return "it reports no GPU"
