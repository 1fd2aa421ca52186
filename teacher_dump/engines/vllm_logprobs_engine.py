"""Engine `vllm-logprobs`: vLLM's own prompt log-probabilities, the fallback without the plugin.

Every sequence is an ordinary request to generate one token. vLLM returns the largest
log-probabilities at each position of the prompt, and that of the prompt's own token, the label. The
last label is not in the prompt: it is the only token that may be generated, and log-probabilities
are taken before that rule applies (`raw_logprobs`). So the model reads the same tokens as with the
other engines; `max_model_len` has one place more, which the model never sees.

What the largest entries alone cannot tell is not recorded (`teacher_entropy`) or refused (sampling
needs the whole distribution). Lists of numbers come through the frontend, about 30 us of its time
per token with 100 entries, and vLLM may hold the logits of all prompt positions of a step at once.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from shards.errors import InputError, RunError
from shards.rows import Float32Array, Int32Array
from teacher_dump.engines.architectures import longrope_lengths, names_no_head
from teacher_dump.engines.options import CONFIG_FORMAT, EngineOptions
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
from teacher_dump.keep.packed import Selected
from teacher_dump.keep.packed_size import Selection
from teacher_dump.keep.rows import TokenSequence
from teacher_dump.keep.top_logprobs import num_known, select_from_largest

NAME = "vllm-logprobs"


def check(options: EngineOptions) -> None:
    """InputError for what the engine will not take, as far as that can be told without a start."""
    check_arguments(options.engine_args)
    prepare_environment()
    found, numbers = installed_version(NAME)
    if numbers < SUPPORTED_VLLM:
        raise InputError(
            f"--engine {NAME} needs vLLM {'.'.join(map(str, SUPPORTED_VLLM))} or newer, found "
            f"{found}: install it (make setup), or use --engine transformers"
        )
    reason = refusal(options)
    if reason is not None:
        raise InputError(
            f"vLLM {found}, {options.architecture}: {reason}: use --engine transformers"
        )
    check_tensor_parallel(options)
    check_lengths(options)


def refusal(options: EngineOptions) -> str | None:
    """Why vLLM does not generate with a teacher, as its configuration tells; None if it does."""
    from vllm import ModelRegistry
    from vllm.engine.arg_utils import EngineArgs

    architecture, sequence_length = options.architecture, options.sequence_length
    if names_no_head(architecture):
        return "no LM head, by its name"
    asked = options.engine_args.get("model_impl", "auto")
    try:
        if architecture in ModelRegistry.models:
            ModelRegistry.models[architecture].inspect_model_cls()  # says what its import raises
        model = EngineArgs(
            model=str(options.teacher_folder),
            runner="generate",
            max_model_len=sequence_length,
            config_format=CONFIG_FORMAT,
            skip_tokenizer_init=True,
            language_model_only=True,
            trust_remote_code=options.trust_remote_code,
            model_impl=asked,
        ).create_model_config()
        unknown = model.using_transformers_backend() and architecture not in ModelRegistry.models
    except Exception as error:  # whatever the import of a model may raise, in another process
        return last_line(error)
    if unknown and asked != "transformers":
        return (
            "a model that vLLM does not know, whose layers it would take from transformers, and "
            "whose logits from a head of its own, without what the model may do to them "
            "(--engine-arg model_impl=transformers if it does nothing)"
        )
    if sequence_length in longrope_lengths(model.hf_text_config):
        return (
            f"the engine needs room for one token more than --sequence-length {sequence_length}, "
            "with which this teacher's positions are scaled in another way"
        )
    return None


@contextmanager
def _room_for_one_more() -> Iterator[None]:
    """Let vLLM take a length that is one beyond the model's; no position there is computed."""
    name = "VLLM_ALLOW_LONG_MAX_MODEL_LEN"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def start(options: EngineOptions) -> VllmLogprobsEngine:
    """Load the teacher. InputError for what the engine does not take."""
    return VllmLogprobsEngine(options)


class VllmLogprobsEngine:
    """A vLLM engine with the stock model, asked for the largest log-probabilities."""

    prefixes_agree = True

    def __init__(self, options: EngineOptions) -> None:
        check(options)
        selection = self._selection = options.selection
        with _room_for_one_more():
            started = start_llm(
                options,
                {
                    "runner": "generate",
                    "max_model_len": options.sequence_length + 1,
                    "max_logprobs": num_known(selection),
                    "logprobs_mode": "raw_logprobs",
                },
                fallback="--engine transformers",
            )
        llm = started.llm
        if llm.llm_engine.model_config.get_vocab_size() > selection.vocab_size:
            llm.collective_rpc("limit_vocabulary", args=(selection.vocab_size,))
        self._stream = VllmStream(started)

    def score(self, sequences: Iterable[TokenSequence]) -> Iterator[tuple[TokenSequence, Selected]]:
        """See `TeacherEngine.score`."""
        for sequence, output in self._stream.run(sequences, self._submit):
            labels, ids, logprobs = read_output(output, sequence, self._selection)
            yield sequence, select_from_largest(ids, logprobs, labels, self._selection)

    def _submit(self, request: str, sequence: TokenSequence) -> None:
        from vllm import SamplingParams

        num = num_known(self._selection)
        params = SamplingParams(
            temperature=0.0,
            max_tokens=1,
            allowed_token_ids=[int(sequence.tokens[-1])],
            prompt_logprobs=num,
            logprobs=num,
            flat_logprobs=True,
            detokenize=False,
        )
        prompt = {"prompt_token_ids": sequence.tokens[:-1].tolist()}
        self._stream.engine.add_request(request, prompt, params)


def read_output(
    output: Any, sequence: TokenSequence, selection: Selection
) -> tuple[Float32Array, Int32Array, Float32Array]:
    """Label log-probabilities [T], known ids and log-probabilities [T, K] of an output.

    RunError unless they are those of every position, of its label, and largest first.
    """
    prompt, last = output.prompt_logprobs, output.outputs[0].logprobs
    expected = (len(sequence.tokens) - 1, 1 + num_known(selection))
    ids = np.array([*prompt.token_ids, *last.token_ids], np.int32)
    logprobs = np.array([*prompt.logprobs, *last.logprobs], np.float32)
    where = f"{sequence.split} sequence {sequence.number}"
    if ids.size != expected[0] * expected[1]:
        raise RunError(f"{where}: {ids.size} log-probabilities came back, not {expected}")
    ids, logprobs = ids.reshape(expected), logprobs.reshape(expected)
    if not np.array_equal(ids[:, 0], sequence.tokens[1:]):
        raise RunError(f"{where}: log-probabilities of other labels came back")
    if ids.min() < 0 or ids.max() >= selection.vocab_size:
        raise RunError(f"{where}: ids beyond the tokenizer's length came back")
    if (np.diff(logprobs[:, 1:]) > 0).any():
        raise RunError(f"{where}: log-probabilities came back in another order")
    return (
        np.ascontiguousarray(logprobs[:, 0]),
        np.ascontiguousarray(ids[:, 1:]),
        np.ascontiguousarray(logprobs[:, 1:]),
    )
