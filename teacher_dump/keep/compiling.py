"""Let torch.compile fuse a function into one pass, once there is enough work to be worth it.

Compiling takes seconds and, on a CPU, needs a C++ compiler. A short pass does not wait for it. If
it fails, the function stays uncompiled.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch

Function = Callable[[torch.Tensor], tuple[torch.Tensor, ...]]

# Bytes of logits: those of 5,500 rows of a vocabulary of 49,152, six seconds of a pass with a small
# teacher on 2 cores.
WORTH_COMPILING = 1 << 30

_logger = logging.getLogger(__name__)
_may_compile = ContextVar("may_compile", default=True)


@contextmanager
def uncompiled() -> Iterator[None]:
    """Compile nothing in this block: results then do not depend on how much was done before."""
    token = _may_compile.set(False)
    try:
        yield
    finally:
        _may_compile.reset(token)


class CompiledLater:
    """Calls `plain` for the first `after_bytes` bytes, and then `function`, compiled.

    Both compute the same from [T, any], up to rounding. T may differ between calls.
    """

    def __init__(self, function: Function, plain: Function, after_bytes: int) -> None:
        self._plain = plain
        self._function = function
        self._compiled: Function | None = None
        self._bytes_left: float = after_bytes  # infinite: it cannot be compiled

    def __call__(self, values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """What the function makes of values [T, any]."""
        if not _may_compile.get():
            return self._plain(values)
        if self._bytes_left > 0 or torch._dynamo.config.disable:
            self._bytes_left -= values.nbytes
            return self._plain(values)
        if self._compiled is None:
            # Whole or not at all: every result of an uncompiled part is as large as the block.
            # Worker processes would be as large as this one, with nothing more to do.
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
