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
from shards.rows import Int32Array
from teacher_dump.head import WideHead
from teacher_dump.keep import Keep
from teacher_dump.packing import Selected, unpack
from teacher_dump.random_keys import position_keys, sequence_key
from teacher_dump.selection import make_selector
from teacher_dump.sequences import TokenSequence

BLOCK_ROWS = 64


class TransformersEngine:
    """A Hugging Face causal LM, unmodified but for the dtype of its head."""

    def __init__(
        self, *, teacher_folder: Path, dtype: str, head_dtype: str, keep: Keep, seed: int
    ) -> None:
        import transformers

        try:
            model: Any = transformers.AutoModelForCausalLM.from_pretrained(
                teacher_folder, dtype=getattr(torch, dtype)
            )
        except (OSError, ValueError) as error:
            reason = str(error).strip().splitlines()[0]
            raise InputError(f"transformers does not load {teacher_folder}: {reason}") from error
        if head_dtype not in ("model", dtype):
            head = model.get_output_embeddings()
            bias = getattr(head, "bias", None)
            model.set_output_embeddings(WideHead(head.weight, bias, getattr(torch, head_dtype)))
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._model = model.to(self._device).eval()
        self._keep = keep
        self._seed = seed
        self._select = make_selector(keep)

    @torch.inference_mode()
    def logits(self, tokens: Int32Array) -> torch.Tensor:
        """tokens [T] -> logits [T, V] float32 on the engine's device, padded columns included."""
        ids = torch.from_numpy(tokens).to(self._device, torch.int64)
        logits: torch.Tensor = self._model(ids[None], use_cache=False).logits[0]
        return logits.float()

    @torch.inference_mode()
    def score(self, sequences: Iterable[TokenSequence]) -> Iterator[tuple[TokenSequence, Selected]]:
        """See `TeacherEngine.score`."""
        for sequence in sequences:
            logits = self.logits(sequence.tokens[:-1])
            labels = torch.from_numpy(sequence.tokens[1:]).to(self._device, torch.int64)
            key = sequence_key(self._seed, sequence.split, sequence.number)
            keys = torch.from_numpy(position_keys(key, 0, len(logits))).to(self._device)
            blocks = zip(
                *(torch.split(part, BLOCK_ROWS) for part in (logits, labels, keys)), strict=True
            )
            packed = torch.cat([self._select(*block) for block in blocks])
            yield sequence, unpack(packed.cpu().numpy(), self._keep)
