"""The cause of a failure in one of vLLM's processes reaches the one line of the command."""

from __future__ import annotations

import logging
import multiprocessing
import os
from importlib.util import find_spec
from pathlib import Path

import pytest

from teacher_dump.engines.vllm_errors import (
    REMEDIES,
    ErrorLog,
    collect_errors,
    last_line,
    not_started,
)

ELSEWHERE = RuntimeError("Engine core initialization failed. See root cause above.")


def _fail(name: str, text: str) -> None:
    try:
        raise ValueError(text)
    except ValueError:
        logging.getLogger(name).exception("EngineCore failed to start.")


def _spawned(name: str, text: str) -> None:
    collect_errors()
    collect_errors()  # as vLLM loads plugins more than once
    _fail(name, text)


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_the_first_error_of_an_engines_process_is_the_cause(method: str) -> None:
    context = multiprocessing.get_context(method)
    errors = ErrorLog()
    with errors.collecting():
        for arguments in [
            ("vllm.plugins", "a plugin of somebody else"),
            ("vllm.v1.executor", "Traceback ...\n  line 3\nno such kernel"),
            ("vllm.v1.engine.core", "See stack trace"),
        ]:
            process = context.Process(target=_spawned, args=arguments)
            process.start()
            process.join()
    assert errors.cause_of(ELSEWHERE) == "no such kernel"
    assert errors.cause_of(ELSEWHERE) == "no such kernel"  # asked again
    assert errors.cause_of(ValueError("said here")) == "said here"
    assert not [name for name in os.environ if name.startswith("LOGITSHARDS")]


def test_without_an_error_of_another_process_the_text_stays() -> None:
    assert ErrorLog().cause_of(ELSEWHERE) == str(ELSEWHERE).rstrip(".")
    assert ErrorLog().cause_of(ValueError("")) == "ValueError"


@pytest.mark.parametrize("cause", REMEDIES)
def test_no_other_engine_is_advised_where_none_helps(cause: str) -> None:
    says = str(not_started("LlamaForCausalLM", f"before {cause} after", "--engine transformers"))
    assert "transformers" not in says
    assert says == f"vLLM does not start: before {cause} after ({REMEDIES[cause]})"


def test_the_fallback_is_advised_for_what_another_engine_may_run() -> None:
    says = str(not_started("OddForCausalLM", "no weight of this name", "--engine transformers"))
    assert "(OddForCausalLM): no weight of this name" in says
    assert "--engine transformers is the fallback" in says


def test_the_remedies_are_for_messages_that_vllm_has() -> None:
    spec = find_spec("vllm")
    assert spec is not None
    assert spec.origin is not None
    folder = Path(spec.origin).parent
    parts = (
        *("v1/worker/utils.py", "v1/worker/cpu_worker.py", "v1/core/kv_cache_utils.py"),
        *("config/model.py", "distributed/utils.py", "utils/ompmultiprocessing.py"),
    )
    text = "".join((folder / part).read_text(encoding="utf-8") for part in parts)
    torchs = {"out of memory", "can't allocate memory"}
    assert [part for part in REMEDIES if part not in text and part not in torchs] == []


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("a\nb\n\n  c.  \n", "c"),
        ("1 validation error\nValue error, too long [type=value_error, input=1]\n"
         "    For further information visit ...", "too long"),
    ],
)  # fmt: skip
def test_the_last_line_says_what_is_wrong(text: str, line: str) -> None:
    assert last_line(ValueError(text)) == line
