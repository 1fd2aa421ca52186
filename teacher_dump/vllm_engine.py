"""Engine `vllm`: one continuous stream of pooling requests, results taken as they finish.

The engine is kept fed with a bounded number of requests and stepped by hand, so that it never
waits for a shard border and memory does not grow with the corpus. On a machine without a GPU it
runs in this process and eagerly: compiling costs over 100 s of start there (measured), which a
short run never earns back; `--engine-arg enforce_eager=false` turns that round. On a GPU vLLM's own
defaults stand. Prefix caching is always off: cached positions would have no hidden states to score.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from shards.errors import InputError, RunError
from teacher_dump.keep import Keep
from teacher_dump.packing import Selected, unpack
from teacher_dump.random_keys import sequence_key
from teacher_dump.sequences import TokenSequence

SUPPORTED_VLLM = "0.32"
_OWNED = ("model", "runner", "enable_prefix_caching", "skip_tokenizer_init", "dtype",
          "hf_overrides", "additional_config", "max_model_len", "model_class_overrides",
          "language_model_only", "trust_remote_code")  # fmt: skip


def _vllm_version() -> str:
    """The installed vLLM's version; InputError where there is none or not the supported minor."""
    try:
        import vllm
    except ImportError as error:
        raise InputError(
            f"--engine vllm: {error}; run make setup, or use --engine transformers"
        ) from error

    found = str(vllm.__version__)
    if found.split("+")[0].rsplit(".", 1)[0] != SUPPORTED_VLLM:
        raise InputError(
            f"--engine vllm needs vLLM {SUPPORTED_VLLM}.x, found {found}: install the pinned "
            "version (make setup), or use --engine transformers"
        )
    return found


def _prepare_environment() -> None:
    """vLLM reads these when it is imported; what the user has set stands."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    import torch

    if torch.cuda.is_available():
        return
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")
    # vLLM's own choice leaves one core of two unused
    cores = ",".join(str(core) for core in sorted(os.sched_getaffinity(0)))
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", cores)


def check(architecture: str, engine_args: Mapping[str, object]) -> None:
    """InputError for what the engine will not take, as far as that can be told without a start."""
    for name in engine_args:
        if name in _OWNED:
            raise InputError(f"--engine-arg {name}: set by the pass itself")
    _prepare_environment()
    found = _vllm_version()
    from teacher_dump import vllm_plugin

    try:
        known = vllm_plugin.inspect(architecture)
    except Exception as error:  # whatever the import of a model may raise, in another process
        raise InputError(
            f"vLLM {found} does not load {architecture} ({_last_line(error)}): "
            "use --engine transformers"
        ) from error
    if not known:
        raise InputError(f"vLLM {found} has no causal LM {architecture}: use --engine transformers")


class VllmEngine:
    """A vLLM engine whose model is the teacher's architecture wrapped by `vllm_plugin`."""

    def __init__(
        self,
        *,
        teacher_folder: Path,
        architecture: str,
        dtype: str,
        head_dtype: str,
        sequence_length: int,
        keep: Keep,
        seed: int,
        engine_args: Mapping[str, object],
        trust_remote_code: bool,
    ) -> None:
        check(architecture, engine_args)
        from vllm import LLM, PoolingParams

        from teacher_dump import vllm_plugin
        from teacher_dump.vllm_pooler import CONFIG_KEY, LABELS_KEY, RANDOM_KEY

        self._keep = keep
        self._seed = seed
        self._labels_key, self._random_key = LABELS_KEY, RANDOM_KEY
        self._pooling_params = PoolingParams
        llm = _start(
            LLM,
            {
                "model": str(teacher_folder),
                "runner": "pooling",
                "dtype": dtype,
                "max_model_len": sequence_length,
                "enable_prefix_caching": False,
                "skip_tokenizer_init": True,
                "model_class_overrides": vllm_plugin.overrides(architecture),
                "language_model_only": True,
                "trust_remote_code": trust_remote_code,
                "hf_overrides": {"head_dtype": head_dtype},
                "additional_config": {CONFIG_KEY: keep.to_plain()},
                **_default_args(),
                **engine_args,
            },
        )
        self._engine = llm.llm_engine
        batch = int(self._engine.vllm_config.scheduler_config.max_num_batched_tokens)
        # four full batches ahead: the scheduler never runs dry between two steps of ours
        self._max_in_flight = max(8, 4 * batch // sequence_length)

    def score(self, sequences: Iterable[TokenSequence]) -> Iterator[tuple[TokenSequence, Selected]]:
        """See `TeacherEngine.score`."""
        source = iter(sequences)
        in_flight: dict[str, TokenSequence] = {}
        while True:
            for sequence in islice(source, self._max_in_flight - len(in_flight)):
                request = f"{sequence.split}-{sequence.number}"
                self._submit(request, sequence)
                in_flight[request] = sequence
            if not in_flight:
                return
            for output in self._step():
                sequence = in_flight.pop(output.request_id)
                yield sequence, self._unpack(output.outputs.data, sequence)

    def _submit(self, request: str, sequence: TokenSequence) -> None:
        labels = np.ascontiguousarray(sequence.tokens[1:], dtype=np.int32).tobytes()
        key = sequence_key(self._seed, sequence.split, sequence.number)
        sent = {self._labels_key: labels, self._random_key: key}
        params = self._pooling_params(task="token_classify", extra_kwargs=sent)
        prompt = {"prompt_token_ids": sequence.tokens[:-1].tolist()}
        self._engine.add_request(request, prompt, params)

    def _step(self) -> list[Any]:
        try:
            return [output for output in self._engine.step() if output.finished]
        except Exception as error:
            raise RunError(f"the engine stopped: {type(error).__name__}: {error}") from error

    def _unpack(self, data: Any, sequence: TokenSequence) -> Selected:
        expected = len(sequence.tokens) - 1
        if len(data) != expected:
            raise RunError(
                f"{sequence.split} sequence {sequence.number}: {len(data)} positions came back "
                f"of {expected}"
            )
        return unpack(data.numpy(), self._keep)


def _default_args() -> dict[str, object]:
    import torch

    return {} if torch.cuda.is_available() else {"enforce_eager": True}


def _start(llm_class: Any, arguments: dict[str, object]) -> Any:
    """Construct the engine; what it refuses is the user's model or arguments, as one line."""
    try:
        return llm_class(**arguments)
    except (TypeError, ValueError, RuntimeError, NotImplementedError) as error:
        raise InputError(
            f"vLLM does not start with this teacher: {_last_line(error)}"
            " (--debug shows all; --engine transformers is the fallback)"
        ) from error


def _last_line(error: Exception) -> str:
    """What an error says; vLLM puts a traceback before it, pydantic its input and a link behind."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    lines = [line for line in lines if not line.startswith("For further information")]
    last = lines[-1] if lines else type(error).__name__
    return last.split(" [type=")[0].removeprefix("Value error, ")
