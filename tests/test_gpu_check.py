"""The checks of a machine with a GPU run on a CPU too, and their runner reports what they do."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.gpu.check import CHECKS, ROOT, VLLM_CHECKS, Check, expect
from benchmarks.gpu.child import describe
from benchmarks.gpu.runner import run_checks

LEFT_OUT = {"vllm-tensor-parallel"}  # by a machine without two GPUs


@pytest.mark.slow
@pytest.mark.parametrize(("option", "checks"), [((), CHECKS), (("--vllm",), VLLM_CHECKS)])
def test_every_check_passes_on_a_small_scale(
    option: tuple[str, ...], checks: tuple[Check, ...], tmp_path: Path
) -> None:
    file = tmp_path / "result.json"
    script = [sys.executable, str(ROOT / "benchmarks" / "gpu_check.py"), "--small", *option]
    result = subprocess.run(
        [*script, "--budget-s", "3600", "--json", str(file)],
        capture_output=True,
        text=True,
        check=False,
    )
    said = json.loads(result.stdout.splitlines()[-1])
    assert result.returncode == 0, (said["checks"], result.stderr)
    assert said["ok"]
    assert list(said["checks"]) == [check.name for check in checks]
    for name, found in said["checks"].items():
        assert found["status"] == ("left out" if name in LEFT_OUT else "ok"), found
    written = json.loads(file.read_text(encoding="utf-8"))
    assert written["checks"] == said["checks"]


def test_a_check_that_fails_or_does_not_end_does_not_stop_the_others() -> None:
    checks = [
        Check("unknown", "unknown:unknown", 0.5),
        Check("resume", "resume:resume", 0.001),
        Check("gpu-tests", "marked:gpu_tests", 0.5),
    ]
    results = {check.name: found for check, found in run_checks(checks, small=True, budget_s=900)}
    assert results["unknown"]["error"] == "its process ended with 1"
    assert results["resume"]["error"] == "did not end within 1 s"
    assert results["gpu-tests"]["status"] == "ok", results
    assert results["gpu-tests"]["seconds"] > 0


def test_checks_that_do_not_fit_are_not_run() -> None:
    results = [found for _, found in run_checks(CHECKS, small=True, budget_s=1)]
    assert [found["status"] for found in results] == ["not run"] * len(CHECKS)


def test_a_failure_is_named_by_its_line() -> None:
    with pytest.raises(Exception, match="of two lines") as raised:
        expect(False, "a message\n of two lines")
    line = describe(raised.value)
    number = raised.tb.tb_lineno
    assert line == f"tests/test_gpu_check.py:{number}: CheckFailedError: a message of two lines"
