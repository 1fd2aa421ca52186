"""Several devices that share a teacher: which numbers fit it, and which cores each process gets."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

from shards.errors import InputError
from teacher_dump.engines.options import CONFIG_FORMAT, EngineOptions

_THREADS = "VLLM_CPU_OMP_THREADS_BIND"
_VOCABULARY_MULTIPLE = 64


def check_tensor_parallel(options: EngineOptions) -> None:
    """InputError for more devices than there are, or for a number that the teacher does not fit."""
    size = options.tensor_parallel
    if size == 1:
        return
    import torch

    asked = f"--tensor-parallel {size}"
    if torch.cuda.is_available() and torch.cuda.device_count() < size:
        raise InputError(f"{asked}: this process sees {torch.cuda.device_count()} GPUs")
    parts = _parts(options)
    if parts is not None and not parts.fit(size):
        sizes = [str(number) for number in range(1, parts.heads + 1) if parts.fit(number)]
        raise InputError(
            f"{asked}: {size} devices cannot share the teacher equally ({parts.heads} attention"
            f" heads, {parts.kv_heads or 'no'} heads of keys and values, a vocabulary of"
            f" {parts.vocabulary}); possible are {', '.join(sizes)}"
        )


class _Parts(NamedTuple):
    """What devices share of a teacher; no heads of keys and values: these are not shared."""

    heads: int
    kv_heads: int
    vocabulary: int

    def fit(self, size: int) -> bool:
        """By the rules of vLLM's QKVParallelLinear and VocabParallelEmbedding.

        Fewer heads of keys and values than devices are repeated. A vocabulary is padded first.
        """
        return (
            self.heads % size == 0
            and (not self.kv_heads or self.kv_heads % size == 0 or size % self.kv_heads == 0)
            and -(-self.vocabulary // _VOCABULARY_MULTIPLE) * _VOCABULARY_MULTIPLE % size == 0
        )


def _parts(options: EngineOptions) -> _Parts | None:
    """As vLLM reads the teacher's configuration.

    None for one that it does not read, or that has no heads: its own error says more, at the start.
    """
    from vllm.engine.arg_utils import EngineArgs

    try:
        model: Any = EngineArgs(
            model=str(options.teacher_folder),
            max_model_len=options.sequence_length,
            config_format=CONFIG_FORMAT,
            skip_tokenizer_init=True,
            language_model_only=True,
            trust_remote_code=options.trust_remote_code,
        ).create_model_config()
    except Exception:  # whatever reading a configuration may raise
        return None
    heads = int(model.model_arch_config.total_num_attention_heads)
    kv_heads = 0 if model.use_mla else int(model.get_total_num_kv_heads())
    return _Parts(heads, kv_heads, int(model.get_vocab_size())) if heads else None


@contextmanager
def cores_of_ranks(num_ranks: int) -> Iterator[None]:
    """A context in which vLLM's processes on a CPU divide the cores of this one.

    vLLM's own choice leaves one core of two unused, and wants a NUMA node for each rank. What the
    user has set stands.
    """
    if _THREADS in os.environ:
        yield
        return
    os.environ[_THREADS] = divide_cores(sorted(os.sched_getaffinity(0)), num_ranks)
    try:
        yield
    finally:
        del os.environ[_THREADS]


def divide_cores(cores: Sequence[int], num_ranks: int) -> str:
    """vLLM's notation: `0,1|2,3` are two cores for each of two ranks. A core may serve several."""
    num = len(cores)
    parts = []
    for rank in range(num_ranks):
        first = rank * num // num_ranks
        last = max(first + 1, (rank + 1) * num // num_ranks)
        parts.append(",".join(str(core) for core in cores[first:last]))
    return "|".join(parts)
