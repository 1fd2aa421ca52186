"""One check in a process of its own, so that neither its memory nor its crash is another's.

    python -m benchmarks.gpu.child NAME FOLDER [--small]

The result is FOLDER/result.json.
"""

from __future__ import annotations

import json
import sys
import traceback
from pathlib import Path

import click

from benchmarks.gpu.check import CHECKS, ROOT, VLLM_CHECKS, NotHereError

RESULT = "result.json"
_HELPERS = (
    __file__,
    *(str(Path(__file__).with_name(name)) for name in ("check.py", "commands.py")),
)
_MESSAGE_LENGTH = 500


def where(error: BaseException) -> str:
    """The innermost line of the project that an error went through."""
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if frame.filename.startswith(f"{ROOT}/") and frame.filename not in _HELPERS
    ]
    if not frames:
        return "outside the project"
    return f"{Path(frames[-1].filename).relative_to(ROOT)}:{frames[-1].lineno}"


def describe(error: BaseException) -> str:
    """The line of an error, its type and its message, on one line."""
    message = " ".join(str(error).split())
    return f"{where(error)}: {type(error).__name__}: {message}"[:_MESSAGE_LENGTH]


@click.command()
@click.argument("name")
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--small", is_flag=True)
def main(name: str, folder: Path, small: bool) -> None:
    """Run a check and write its result."""
    (check,) = [check for check in (*CHECKS, *VLLM_CHECKS) if check.name == name]
    try:
        figures = check.load()(folder, small)
        text = json.dumps({"status": "ok", "figures": figures}, allow_nan=False)
    except NotHereError as reason:
        text = json.dumps({"status": "left out", "reason": str(reason)})
    except Exception as error:
        traceback.print_exc(file=sys.stderr)
        text = json.dumps({"status": "failed", "error": describe(error)})
    (folder / RESULT).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
