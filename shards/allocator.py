"""Allocators told to keep the memory that they are given back.

Page faults cost a stream of row groups, or of blocks of logits, a fifth of its speed where each
frees what the next one needs. The process then keeps its peak.
"""

import ctypes
import os

# Names of <malloc.h>. 32 MiB is the largest threshold that glibc takes; its own grows up to that.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_MMAP_THRESHOLD_BYTES = 32 << 20
_TRIM_THRESHOLD_BYTES = (1 << 31) - 1


def keep_freed_row_groups() -> None:
    """Make mimalloc, Arrow's allocator, reuse freed memory instead of giving it to the kernel.

    To be called before pyarrow is imported, afterwards it has no effect. A MIMALLOC_PURGE_DELAY
    that is set already stays.
    """
    os.environ.setdefault("MIMALLOC_PURGE_DELAY", "-1")


def keep_freed_tensors() -> None:
    """Make the C library, torch's allocator on a CPU, do the same; without glibc nothing happens.

    Not for training, whose tensors are of so many sizes that memory comes apart: it would take a
    fifth more at its peak.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _MMAP_THRESHOLD_BYTES)
        mallopt(_M_TRIM_THRESHOLD, _TRIM_THRESHOLD_BYTES)
