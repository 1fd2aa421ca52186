"""Engine `vllm`: pooling requests to the teacher's architecture, wrapped by `vllm_plugin`.

The pooler selects on the device, so that a position costs the frontend next to nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from shards.errors import InputError, RunError
from shards.keep import Keep, TopPK
from teacher_dump.engines import vllm_logprobs_engine
from teacher_dump.engines.options import EngineOptions
from teacher_dump.engines.vllm_errors import last_line
from teacher_dump.engines.vllm_parallel import check_tensor_parallel
from teacher_dump.engines.vllm_start import (
    SUPPORTED_VLLM,
    check_arguments,
    check_lengths,
    installed_version,
    prepare_environment,
    start_llm,
)
from teacher_dump.engines.vllm_stream import VllmStream
from teacher_dump.keep.packed import Selected, unpack
from teacher_dump.keep.random_keys import sequence_key
from teacher_dump.keep.rows import TokenSequence


def check(options: EngineOptions) -> None:
    """InputError for what the engine will not take, as far as that can be told without a start."""
    check_arguments(options.engine_args)
    if options.engine_args.get("model_impl", "auto") not in ("auto", "vllm"):
        raise InputError(
            f"--engine-arg model_impl={options.engine_args['model_impl']}: --engine vllm reads out"
            f" vLLM's own models, use {_fallbacks(options.selection.keep)}"
        )
    prepare_environment()
    found, numbers = installed_version("vllm")
    if numbers != SUPPORTED_VLLM:
        raise InputError(
            f"--engine vllm needs vLLM {'.'.join(map(str, SUPPORTED_VLLM))}.x, found {found}: "
            f"install the pinned version (make setup), or use {_fallbacks(options.selection.keep)}"
        )
    check_tensor_parallel(options)
    check_lengths(options)
    reason = _refusal(options.architecture)
    if reason is None:
        return
    fallback = "transformers"
    if isinstance(options.selection.keep, TopPK) and vllm_logprobs_engine.refusal(options) is None:
        fallback = vllm_logprobs_engine.NAME
    raise InputError(f"vLLM {found} {reason}: use --engine {fallback}")


def _refusal(architecture: str) -> str | None:
    """Why the plugin does not make a teacher of an architecture; None if it does."""
    from teacher_dump.engines import vllm_plugin

    try:
        known = vllm_plugin.inspect(architecture)
    except Exception as error:  # whatever the import of a model may raise, in another process
        return f"does not load {architecture} ({last_line(error)})"
    return None if known else f"has no causal LM {architecture}"


def _fallbacks(keep: Keep) -> str:
    """The engines to try where this one does not start."""
    others = ["transformers"]
    if isinstance(keep, TopPK):
        others.insert(0, vllm_logprobs_engine.NAME)
    return " or ".join(f"--engine {name}" for name in others)


def start(options: EngineOptions) -> VllmEngine:
    """Start vLLM with the teacher. InputError for what it does not take."""
    return VllmEngine(options)


class VllmEngine:
    """A vLLM engine whose model is the teacher's architecture wrapped by `vllm_plugin`."""

    prefixes_agree = True  # vLLM chooses by the longest prompt that it takes how to scale positions

    def __init__(self, options: EngineOptions) -> None:
        check(options)
        from vllm import PoolingParams

        from teacher_dump.engines import vllm_plugin
        from teacher_dump.engines.vllm_pooler import CONFIG_KEY, LABELS_KEY, RANDOM_KEY

        selection = self._selection = options.selection
        self._seed = options.seed
        self._labels_key, self._random_key = LABELS_KEY, RANDOM_KEY
        self._pooling_params = PoolingParams
        started = start_llm(
            options,
            {
                "runner": "pooling",
                "max_model_len": options.sequence_length,
                "model_class_overrides": vllm_plugin.overrides(options.architecture),
                "additional_config": {CONFIG_KEY: selection.to_json()},
            },
            fallback=_fallbacks(selection.keep),
        )
        self._stream = VllmStream(started)

    def score(self, sequences: Iterable[TokenSequence]) -> Iterator[tuple[TokenSequence, Selected]]:
        """See `TeacherEngine.score`."""
        for sequence, output in self._stream.run(sequences, self._submit):
            yield sequence, self._unpack(output.outputs.data, sequence)

    def _submit(self, request: str, sequence: TokenSequence) -> None:
        labels = np.ascontiguousarray(sequence.tokens[1:], dtype=np.int32).tobytes()
        key = sequence_key(self._seed, sequence.split, sequence.number)
        sent = {self._labels_key: labels, self._random_key: key}
        params = self._pooling_params(task="token_classify", extra_kwargs=sent)
        prompt = {"prompt_token_ids": sequence.tokens[:-1].tolist()}
        self._stream.engine.add_request(request, prompt, params)

    def _unpack(self, data: Any, sequence: TokenSequence) -> Selected:
        expected = len(sequence.tokens) - 1
        if len(data) != expected:
            raise RunError(
                f"{sequence.split} sequence {sequence.number}: {len(data)} positions came back "
                f"of {expected}"
            )
        return unpack(data.numpy(), self._selection)
