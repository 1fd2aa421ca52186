"""A vLLM worker extension: columns of the model beyond the tokenizer's length get no probability.

Models pad their vocabulary, and vLLM's own softmax is over all of it. The extension is a name in
`worker_extension_cls`, so every worker process of any runner can load it; it wraps the one function
that gives logits, whatever the model does to them before.
"""

from __future__ import annotations

from typing import Any

import torch


class VocabularyLimit:
    """Mixed into vLLM's worker, which has `get_model`."""

    def limit_vocabulary(self, size: int) -> None:
        """Make the logits of columns from `size` on minus infinity."""
        model: Any = self.get_model()  # type: ignore[attr-defined]
        original = model.compute_logits

        def compute_logits(*arguments: Any, **options: Any) -> torch.Tensor | None:
            logits: torch.Tensor | None = original(*arguments, **options)
            if logits is not None:  # on the rank that holds the gathered ones
                logits[..., size:] = float("-inf")
            return logits

        model.compute_logits = compute_logits
