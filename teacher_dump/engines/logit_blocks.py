"""A causal LM's logits, a block of positions at a time, through the model's own forward.

Letters: T positions, R rows of a block, V columns of the head.

What a model does to its logits behind the head (soft-capping, scaling) is in its forward and
nowhere else. So forward runs once for every block, and its backbone, the layers below the head,
runs in the first of them alone: afterwards it answers with the next rows of what it found.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import torch

logger = logging.getLogger(__name__)

_PROBE_POSITIONS, _PROBE_ROWS = 8, 3
_PROBE_TOLERANCE = 0.02  # of the largest logit: blocks of other sizes add up in another order


class LogitBlocks:
    """Gives the logits of a model by blocks, or whole where its forward does not allow that."""

    def __init__(self, model: Any, rows: int) -> None:
        self._model, self._rows = model, rows
        self._backbone = model.base_model
        if not self._agrees():
            logger.info("%s: its logits are computed whole", type(model).__name__)
            self._backbone = None

    def __call__(self, tokens: torch.Tensor) -> Iterator[torch.Tensor]:
        """tokens [T] int64 -> logits [<= R, V] float32 of one block after the other."""
        if self._backbone is None:
            yield self._whole(tokens)
        else:
            yield from self._blocks(tokens, self._rows)

    def _whole(self, tokens: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self._model(tokens[None], use_cache=False).logits[0]
        return logits.float()

    def _blocks(self, tokens: torch.Tensor, rows: int) -> Iterator[torch.Tensor]:
        found: list[Any] = []
        run = self._backbone.forward
        for start in range(0, len(tokens), rows):

            def answer(*args: Any, first: int = start, **options: Any) -> Any:
                if not found:
                    found.append(run(*args, **options))
                hidden = found[0].last_hidden_state[:, first : first + rows]
                return type(found[0])(**{**found[0], "last_hidden_state": hidden})

            self._backbone.forward = answer
            try:
                logits = self._whole(tokens)
            finally:
                del self._backbone.forward
            yield logits

    @torch.inference_mode()
    def _agrees(self) -> bool:
        """Whether blocks give the logits that the model gives at once."""
        if self._backbone is self._model:
            return False
        tokens = torch.arange(_PROBE_POSITIONS, device=self._model.device)
        whole = self._whole(tokens)
        try:
            blocks = torch.cat(list(self._blocks(tokens, _PROBE_ROWS)))
        except Exception:  # a model's own code may do anything with what its backbone answers
            return False
        limit = _PROBE_TOLERANCE * float(whole.abs().max())
        return blocks.shape == whole.shape and bool(((blocks - whole).abs() <= limit).all())
