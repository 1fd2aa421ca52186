"""Engine `transformers`: the reference for tests, and for models that vLLM lacks.

One sequence at a time through the model's own forward, so that soft-capping, scaling and whatever
else a model does to its logits is included. The head runs in `head_dtype`, as in the vLLM engine.
Memory holds one sequence's logits: L x V in float32 (400 MB at L = 2,048, V = 49,152).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from shards.errors import InputError
from teacher_dump.selection import Selected, TopPK, TopPKSelector, unpack
from teacher_dump.sequences import TokenSequence

BLOCK_ROWS = 64


class _CastHead(torch.nn.Module):
    """An output embedding that runs in another dtype than the model's."""

    def __init__(self, head: Any, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(head.weight.detach().to(dtype), requires_grad=False)
        bias = getattr(head, "bias", None)
        self.bias = None
        if bias is not None:
            self.bias = torch.nn.Parameter(bias.detach().to(dtype), requires_grad=False)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(hidden.to(self.weight.dtype), self.weight, self.bias)


class TransformersEngine:
    """A Hugging Face causal LM, unmodified but for the dtype of its head."""

    def __init__(self, *, teacher_folder: Path, dtype: str, head_dtype: str, keep: TopPK) -> None:
        import transformers

        try:
            model: Any = transformers.AutoModelForCausalLM.from_pretrained(
                teacher_folder, dtype=getattr(torch, dtype)
            )
        except (OSError, ValueError) as error:
            reason = str(error).strip().splitlines()[0]
            raise InputError(f"transformers does not load {teacher_folder}: {reason}") from error
        if head_dtype not in ("model", dtype):
            head = _CastHead(model.get_output_embeddings(), getattr(torch, head_dtype))
            model.set_output_embeddings(head)
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._model = model.to(self._device).eval()
        self._keep = keep
        self._select = TopPKSelector(keep)

    @torch.inference_mode()
    def score(self, sequences: Iterable[TokenSequence]) -> Iterator[tuple[TokenSequence, Selected]]:
        """See `TeacherEngine.score`."""
        for sequence in sequences:
            tokens = torch.from_numpy(sequence.tokens).to(self._device, torch.int64)
            logits = self._model(tokens[None, :-1], use_cache=False).logits[0].float()
            blocks = zip(
                torch.split(logits, BLOCK_ROWS), torch.split(tokens[1:], BLOCK_ROWS), strict=True
            )
            packed = torch.cat([self._select(block, labels) for block, labels in blocks])
            yield sequence, unpack(packed.cpu().numpy(), self._keep)
