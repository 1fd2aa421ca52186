"""GPUs of the machine: hidden from tests, but for vLLM's engines and for tests marked `gpu`.

Training is the same bit for bit on a CPU, and tests say so. A process cannot show itself a GPU that
was hidden from it, so whatever needs one runs in a process of its own, with `environment()`, or in
one of `make gpu-check`, which hides none.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from functools import cache
from pathlib import Path

_VISIBLE = "CUDA_VISIBLE_DEVICES"
_HIDDEN = "LOGITSHARDS_TESTS_HID"  # what was visible; processes of pytest-xdist inherit it
_ALL = "all"
SHOWN = "LOGITSHARDS_TESTS_SHOW_GPUS"  # set by make gpu-check, which hides none

# vLLM takes nine tenths of a GPU, and compiles for minutes.
SMALL_ENGINE = ("--engine-arg", "gpu_memory_utilization=0.2", "--engine-arg", "enforce_eager=true")


@cache
def has_gpu() -> bool:
    """Whether the machine has a GPU of NVIDIA that works."""
    if shutil.which("nvidia-smi") is None:
        return False
    listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False)
    return listed.returncode == 0 and listed.stdout.startswith("GPU")


def hide_gpus() -> None:
    """Make this process and those that it starts see none, on a machine that has some.

    Also one whose driver does not work: training says that it cannot use such a GPU.
    """
    present = has_gpu() or any(Path("/dev").glob("nvidia[0-9]*"))
    if present and SHOWN not in os.environ and _HIDDEN not in os.environ:
        os.environ[_HIDDEN] = os.environ.get(_VISIBLE, _ALL)
        os.environ[_VISIBLE] = ""


def environment() -> dict[str, str]:
    """The environment of a process that may use the GPUs."""
    environ = dict(os.environ)
    hidden = environ.pop(_HIDDEN, None)
    if hidden is not None:
        environ[_VISIBLE] = hidden
        if hidden == _ALL:
            del environ[_VISIBLE]
    return environ
