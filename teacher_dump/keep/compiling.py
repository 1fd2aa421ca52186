"""A function that torch.compile fuses into one pass, once it has had enough to do to be worth it.

Compiling takes seconds and, on a CPU, a C++ compiler. A pass over little does not wait for it, and
where it fails the function goes on as it was.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable

import torch

Function = Callable[[torch.Tensor], tuple[torch.Tensor, ...]]

# Bytes of logits: those of 5,500 rows of a vocabulary of 49,152, six seconds of a pass with a small
# teacher on 2 cores.
WORTH_COMPILING = 1 << 30

_logger = logging.getLogger(__name__)


class CompiledLater:
    """Calls `plain` until it was given so many bytes, and `function`, compiled, from then on.

    Both make the same of [T, any], up to rounding. T may be another at every call.
    """

    def __init__(self, function: Function, plain: Function, after_bytes: int) -> None:
        self._plain = plain
        self._function = function
        self._compiled: Function | None = None
        self._bytes_left: float = after_bytes  # infinite: it cannot be compiled

    def __call__(self, values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """What the function makes of values [T, any]."""
        if self._bytes_left > 0 or torch._dynamo.config.disable:
            self._bytes_left -= values.nbytes
            return self._plain(values)
        if self._compiled is None:
            # Whole or not at all: of a part that is not compiled, every result is as large as the
            # block. Worker processes would be as large as this one and have nothing more to do.
            self._compiled = torch.compile(
                self._function, fullgraph=True, options={"compile_threads": 1}
            )
        torch._dynamo.maybe_mark_dynamic(values, 0)
        try:
            return self._compiled(values)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            reason = str(error).strip().partition("\n")[0]
            _logger.warning("the pass over the logits stays uncompiled and slower: %s", reason)
            self._bytes_left = math.inf
            return self._plain(values)
