"""What this project adds to vLLM's worker, by `worker_extension_cls`.

The extension is a name, so every worker process of any runner can load it.
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

NAME = f"{__name__}.WorkerExtension"

_SHARED_MEMORY = Path("/dev/shm")


class WorkerExtension:
    """Mixed into vLLM's worker, which has `get_model`."""

    def limit_vocabulary(self, size: int) -> None:
        """Make the logits of columns from `size` on minus infinity.

        Models pad their vocabulary, and vLLM's own softmax is over all of it. This wraps the one
        function that gives logits, whatever the model does to them before.
        """
        model: Any = self.get_model()  # type: ignore[attr-defined]
        original = model.compute_logits

        def compute_logits(*arguments: Any, **options: Any) -> torch.Tensor | None:
            logits: torch.Tensor | None = original(*arguments, **options)
            if logits is not None:  # on the rank that holds the gathered ones
                logits[..., size:] = float("-inf")
            return logits

        model.compute_logits = compute_logits

    def forget_shared_memory(self) -> None:
        """Remove the names of the memory that ranks on a CPU share; they all have it by now.

        vLLM removes them when a worker ends by itself, which a killed one does not.
        """
        ident = os.environ.get("VLLM_DIST_IDENT")
        for path in _SHARED_MEMORY.glob(f"{ident}-*cpushm*") if ident else ():
            with suppress(FileNotFoundError):  # another rank was faster
                path.unlink()
