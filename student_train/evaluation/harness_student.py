"""lm-evaluation-harness's view of a student. Importing this module imports the harness.

The harness reads a text as a model reads a prompt. Three things differ in training, where a dataset
has BOS tokens: BOS is never a label, and with BOS before each sequence, a text that was cut at its
beginning begins with BOS too.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM

from shards.spec import DatasetSpec
from student_train.model.model import cap_attention

# On a CPU: float32 logits of a batch, and as many log-probabilities.
_BATCH_BYTES = 1 << 30
_TORCHRUN = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")


class HarnessStudent(HFLM):  # type: ignore[misc]
    """The student in `model`, trained in `dtype` on a dataset: it reads as it read in training.

    Its head runs in float32: bfloat16 logits tie heavily.
    """

    add_bos_token: bool | None

    def __init__(self, model: Path, spec: DatasetSpec, dtype: str, device: torch.device) -> None:
        documents = spec.documents
        bos, eos = documents.bos_token_id, documents.eos_token_id
        self._first = bos if documents.bos_before_sequences else None
        row_bytes = 2 * 4 * spec.sequence_length * spec.tokenizer.vocab_size
        with _without_other_processes():
            super().__init__(
                pretrained=str(model),
                dtype="float32",
                mixed_precision_dtype=None if dtype == "float32" else dtype,
                softmax_dtype="float32",
                device=str(device),
                batch_size="auto" if device.type == "cuda" else max(1, _BATCH_BYTES // row_bytes),
                max_length=spec.sequence_length,
                add_bos_token=bos is not None,
                prefix_token_id=eos if bos is None else bos,
            )
        cap_attention(self.model)
        head = self.model.get_output_embeddings()
        narrow = head.forward

        def wide(hidden: torch.Tensor) -> Any:
            with torch.autocast(device.type, enabled=False):
                return narrow(hidden.float())

        head.forward = wide

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
        """The log-likelihood of whole texts, after BOS: the harness puts it before each of them.

        The tokenizer must not add another one, which would be scored.
        """
        adds_bos, self.add_bos_token = self.add_bos_token, False
        try:
            found: list[float] = super().loglikelihood_rolling(requests, disable_tqdm)
        finally:
            self.add_bos_token = adds_bos
        return found

    def _loglikelihood_tokens(
        self, requests: list[tuple[Any, list[int], list[int]]], *arguments: Any, **options: Any
    ) -> list[tuple[float, bool]]:
        fitted = [
            (text, self._fitted(context, scored), scored) for text, context, scored in requests
        ]
        found: list[tuple[float, bool]]
        found = super()._loglikelihood_tokens(fitted, *arguments, **options)
        return found

    def tok_batch_encode(
        self, strings: list[str], *arguments: Any, **options: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Token ids and mask [B, T] of texts, padded; a text that fills its row begins with BOS."""
        ids, mask = super().tok_batch_encode(strings, *arguments, **options)
        if self._first is not None:
            ids[mask[:, 0] == 1, 0] = self._first
        return ids, mask

    def _fitted(self, context: list[int], scored: list[int]) -> list[int]:
        """A context cut so that it fits before the scored tokens, with BOS first."""
        if self._first is None:
            return context
        text = context[1:] if context[0] == self._first else context
        room = self.max_length - len(scored)
        return [self._first, *text[max(0, len(text) - room) :]]


@contextmanager
def _without_other_processes() -> Iterator[None]:
    """Let the harness see one process: those of torchrun have ended, and it would wait for them."""
    hidden = {name: os.environ.pop(name) for name in _TORCHRUN if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(hidden)
