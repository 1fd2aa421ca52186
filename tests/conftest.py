"""Teachers that tests share: the real SmolLM2-135M, and a tiny random one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.gpus import SHOWN, has_gpu, hide_gpus

ROOT = Path(__file__).parent.parent

hide_gpus()
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Torch reads it at import, here and in the processes that tests start. Tests run in one process per
# core; with more threads than cores, threads mostly spin while they wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# GiB of an engine's key-value cache, which is filled when it starts; dozens of engines start here.
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")

# Files that take longest, first: whoever got one of them last would run it alone.
LONGEST_FIRST = (
    "test_engines",
    "test_model_families",
    "test_train",
    "test_train_kill",
    "test_engine_limits",
    "test_dump",
    "test_publication",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long files first; skip what needs a GPU that is not there or is hidden."""
    order = {name: place for place, name in enumerate(LONGEST_FIRST)}
    items.sort(key=lambda item: order.get(item.path.stem, len(order)))
    for item in items:
        if item.get_closest_marker("gpu") and not has_gpu():
            item.add_marker(pytest.mark.skip(reason="this machine has no GPU"))
        elif item.path.stem == "test_gpu" and SHOWN not in os.environ:
            item.add_marker(pytest.mark.skip(reason="make gpu-check runs it"))


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """Folder of the real teacher, made once per checkout (as the demo does)."""
    folder = ROOT / "build" / "teacher"
    subprocess.run(
        [sys.executable, str(ROOT / "experiments" / "demo" / "make_teacher.py"), str(folder)],
        check=True,
        capture_output=True,
    )
    return folder


@pytest.fixture(scope="session")
def tiny_teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a random two-layer Llama whose model vocabulary is wider than its tokenizer's."""
    from tests.tiny_teacher import make_tiny_teacher

    return make_tiny_teacher(tmp_path_factory.mktemp("teacher"))
