"""The pooler that turns hidden states into packed targets inside vLLM's model runner.

Letters: T positions scheduled in this step, D hidden, V vocabulary, W packed words per position.

The LM head and the selection run a block of rows at a time, sized by the bytes of its logits, so
that no [T, V] tensor of the batch ever exists. A request leaves as one int32 tensor [n, W]. Its
labels (the last of them is not in the prompt) and its random key travel with it in
`PoolingParams.extra_kwargs`, which both model runners hand through unchanged; neither the prompt's
ids nor their device then matter. `extra_kwargs` is "internal use" in vLLM, hence the pinned minor
version and the unit tests against both shapes of metadata.

Invariant: the pieces of a request are the prompt from its first to its last position, once each.
A gap (a prefix cache that was left on, say) raises; a preempted request starts again at 0.
"""

from __future__ import annotations

from collections.abc import Callable, Set
from typing import Any

import numpy as np
import torch
from torch import nn
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.pooler import PoolingParamsUpdate
from vllm.model_executor.layers.pooler.abstract import Pooler

from teacher_dump.engines.head import WideHead, block_rows
from teacher_dump.keep.packed_size import Selection
from teacher_dump.keep.random_keys import position_keys
from teacher_dump.keep.selection import select_in_blocks, selector_of

CONFIG_KEY = "logitshards"  # in vLLM's additional_config
# In PoolingParams.extra_kwargs: int32 bytes, one per prompt token, and the sequence's random key.
LABELS_KEY = "labels"
RANDOM_KEY = "random_key"


class TeacherPooler(Pooler):  # type: ignore[misc]  # vLLM has no types here
    """hidden states [T, D] -> one packed int32 [n, W] per finished request, None for the others."""

    def __init__(
        self,
        compute_logits: Callable[[torch.Tensor], torch.Tensor | None],
        selection: Selection,
    ) -> None:
        super().__init__()
        self.compute_logits = compute_logits
        self.selection = selection
        self.select = selector_of(selection)

    def get_supported_tasks(self) -> Set[str]:
        return {"token_classify"}

    def get_pooling_updates(self, task: str) -> PoolingParamsUpdate:
        return PoolingParamsUpdate()

    def score(
        self, hidden_states: torch.Tensor, labels: torch.Tensor, keys: torch.Tensor
    ) -> torch.Tensor:
        """hidden [T, D], labels, keys [T] int64, all on one device -> packed [T, W] int32."""
        rows = block_rows(hidden_states.device, self.selection.vocab_size)
        packed = []
        for hidden, wanted, chance in zip(
            torch.split(hidden_states, rows),
            torch.split(labels, rows),
            torch.split(keys, rows),
            strict=True,
        ):
            logits = self.compute_logits(hidden)
            if logits is None:  # a tensor-parallel rank that holds no gathered logits
                packed.append(
                    hidden.new_zeros((len(hidden), self.selection.width), dtype=torch.int32)
                )
            else:
                packed.append(select_in_blocks(self.select, logits, wanted, chance))
        return packed[0] if len(packed) == 1 else torch.cat(packed)

    def forward(
        self, hidden_states: torch.Tensor, pooling_metadata: Any
    ) -> list[torch.Tensor | None]:
        """One result per request of the batch; raises RuntimeError on a gap in a request."""
        cursor = pooling_metadata.get_pooling_cursor()
        scheduled = cursor.num_scheduled_tokens_cpu.tolist()
        starts = (cursor.seq_lens_cpu - cursor.num_scheduled_tokens_cpu).tolist()
        words = np.concatenate(
            [
                _labels_and_keys(params, start, count)
                for params, start, count in zip(
                    pooling_metadata.pooling_params, starts, scheduled, strict=True
                )
            ],
            axis=1,
        )
        labels, keys = _on_device(words, hidden_states.device)
        packed = torch.split(self.score(hidden_states, labels, keys), scheduled)
        finished = cursor.get_finished_mask()
        lengths = cursor.prompt_lens_cpu.tolist()
        return [
            _collect(state, piece, start, length if done else None)
            for state, piece, start, length, done in zip(
                pooling_metadata.pooling_states, packed, starts, lengths, finished, strict=True
            )
        ]


def _on_device(words: np.ndarray[Any, np.dtype[np.int64]], device: torch.device) -> torch.Tensor:
    """A copy that does not wait for what the device is still doing."""
    host = torch.from_numpy(words)
    if device.type == "cuda":
        host = host.pin_memory()
    return host.to(device, non_blocking=True)


def _labels_and_keys(params: Any, start: int, count: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    """[2, count] for the scheduled positions; zeros in the engine's own profiling run."""
    words = np.zeros((2, count), dtype=np.int64)
    sent = params.extra_kwargs or {}
    if LABELS_KEY in sent:
        words[0] = np.frombuffer(sent[LABELS_KEY], dtype=np.int32)[start : start + count]
        words[1] = position_keys(sent[RANDOM_KEY], start, count)
    return words


def _collect(
    state: Any, piece: torch.Tensor, start: int, finished_length: int | None
) -> torch.Tensor | None:
    """Put a request's pieces together; its whole result once it is finished."""
    pieces = state.hidden_states_cache
    if start == 0:
        pieces.clear()  # first piece, or started again after a preemption
    have = sum(len(earlier) for earlier in pieces)
    if have != start:
        raise RuntimeError(
            f"prefill continues at position {start} after {have} scored ones; is prefix caching on?"
        )
    if finished_length is None:
        pieces.append(piece.clone())  # the batch's tensor must not live on through a view
        return None
    pieces.append(piece)
    whole = piece if len(pieces) == 1 else torch.cat(pieces)
    state.clean()
    if len(whole) != finished_length:
        raise RuntimeError(f"{len(whole)} positions scored of a prompt of {finished_length}")
    return whole


class _CastOnceHead:
    """Replaces `LogitsProcessor._apply_head` on a CPU, which casts the whole head at every call.

    The logits are those of the last call alone: the next one overwrites them.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self._heads: dict[int, WideHead] = {}
        self._logits = torch.empty(0, 0)

    def __call__(
        self, lm_head: Any, hidden_states: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        head = self._heads.get(id(lm_head))
        if head is None:
            head = self._heads[id(lm_head)] = WideHead(lm_head.weight, None, self._dtype)
        shape = (len(hidden_states), len(head.weight))
        if self._logits.shape[0] < shape[0] or self._logits.shape[1] != shape[1]:
            self._logits = torch.empty(shape, dtype=self._dtype)
        logits: torch.Tensor = head(hidden_states, out=self._logits)
        return logits if bias is None else logits + bias.to(self._dtype)


def _keep_cast_heads(model: nn.Module, model_dtype: torch.dtype) -> None:
    """Give the logits processors of a CPU model a head that is cast once."""
    for module in model.modules():
        if isinstance(module, LogitsProcessor) and module.head_dtype not in (None, model_dtype):
            module._apply_head = _CastOnceHead(module.head_dtype)


def teacher_class(
    base: type[Any], pooler_class: type[TeacherPooler], *, name: str, module: str
) -> type[Any]:
    """A subclass of a stock causal LM that vLLM runs as a pooling model with `pooler_class`."""

    class Teacher(base):  # type: ignore[misc]
        is_pooling_model = True

        def __init__(self, *, vllm_config: Any, prefix: str = "", **kwargs: Any) -> None:
            super().__init__(vllm_config=vllm_config, prefix=prefix, **kwargs)
            if vllm_config.device_config.device_type == "cpu":
                _keep_cast_heads(self, vllm_config.model_config.dtype)
            selection = Selection.from_json(vllm_config.additional_config[CONFIG_KEY])
            self.pooler = pooler_class(self.compute_logits, selection)

    Teacher.__name__ = Teacher.__qualname__ = name
    Teacher.__module__ = module
    return Teacher
