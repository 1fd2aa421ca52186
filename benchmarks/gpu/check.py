"""Checks of a machine with a GPU: what each is, and what all of them share.

A check is a function (folder, small) -> figures. It works in an empty folder of its own. It raises
an exception if it fails, and NotHereError if the machine lacks what it needs. Without a GPU it runs
on the CPU, which tests the check itself.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    import torch

ROOT = Path(__file__).parent.parent.parent
Figures = dict[str, Any]
Function = Callable[[Path, bool], Figures]


class CheckFailedError(Exception):
    """The machine computes something else than it should."""


class NotHereError(Exception):
    """The check does not apply to this machine."""


@dataclass(frozen=True)
class Check:
    """A check by name; `share` is the part of the time budget after which it is killed."""

    name: str
    place: str  # module:function in this folder
    share: float

    def load(self) -> Function:
        """The function of the check."""
        module, _, function = self.place.partition(":")
        return cast(Function, getattr(import_module(f"benchmarks.gpu.{module}"), function))


CHECKS = (
    Check("packed-attention", "attention:packed_attention", 0.35),
    Check("selection", "selection:selection", 0.25),
    Check("transformers-engine", "engine:transformers_engine", 0.2),
    Check("train-step", "training:train_step", 0.2),
    Check("train-step-compiled", "training:train_step_compiled", 0.3),
    Check("resume", "resume:resume", 0.25),
    Check("gpu-tests", "marked:gpu_tests", 0.2),
)
VLLM_CHECKS = (
    Check("vllm-chunks", "vllm_dump:chunks", 0.4),
    Check("vllm-kill", "vllm_dump:kill", 0.5),
    Check("vllm-defaults", "vllm_dump:defaults", 0.4),
    Check("vllm-tensor-parallel", "vllm_dump:tensor_parallel", 0.4),
)


def expect(holds: bool, message: str) -> None:
    """CheckFailedError with this message unless it holds."""
    if not holds:
        raise CheckFailedError(message)


def find_device() -> torch.device:
    """The GPU, or the CPU."""
    import torch

    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def peak_bytes() -> int:
    """The most memory of tensors on the GPU so far, of the whole process on a CPU."""
    import torch

    from student_train.speed import peak_memory_bytes

    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    return peak_memory_bytes()
