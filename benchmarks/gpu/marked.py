"""The tests that are marked `gpu`."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from benchmarks.gpu.check import ROOT, Figures, expect, find_device
from tests.gpus import SHOWN


def gpu_tests(folder: Path, small: bool) -> Figures:
    """How many tests passed and were skipped, which they are without a GPU."""
    # Other files may need packages that are not here.
    files = [
        str(file)
        for file in sorted((ROOT / "tests").glob("test_*.py"))
        if "mark.gpu" in file.read_text(encoding="utf-8")
    ]
    expect(bool(files), "no test is marked gpu")
    # Another release of a package may warn, which is no error here.
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-W", "default"]
    result = subprocess.run(
        [*command, "-p", "no:cacheprovider", *files],
        cwd=ROOT,
        env={**os.environ, SHOWN: "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    sys.stderr.write(result.stdout)
    last = (result.stdout.strip().splitlines() or [""])[-1]
    counts = {name: int(number) for number, name in re.findall(r"(\d+) (\w+)", last)}
    problems = re.findall(r"^(?:FAILED|ERROR) (.*)$", result.stdout, re.MULTILINE)
    expect(result.returncode == 0, "; ".join(problems) or last)
    passed = counts.get("passed", 0)
    expect(passed > 0 or find_device().type == "cpu", f"no test ran: {last}")
    return {"passed": passed, "skipped": counts.get("skipped", 0)}
