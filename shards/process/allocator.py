"""Choose allocators, and how much freed memory they keep.

A stream of row groups, or of blocks of logits, frees memory that the next one needs at once. If the
kernel gets it in between, page faults cost a fifth of the speed or more.
"""

import ctypes
import os
import sys

# The environment variable by which Arrow is told its allocator.
ARROW_POOL = "ARROW_DEFAULT_MEMORY_POOL"

# Names of <malloc.h>. 32 MiB is the largest threshold that glibc takes; its own grows up to that.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_MMAP_THRESHOLD_BYTES = 32 << 20
_TRIM_THRESHOLD_BYTES = (1 << 31) - 1


def choose_arrow_pool() -> None:
    """Make jemalloc Arrow's allocator, on Linux.

    Like mimalloc, Arrow's own choice, it keeps what is freed for a second, long enough for a stream
    of row groups; a training process takes 20 to 40 MiB less with it.

    Call this before pyarrow is imported; later it has no effect. It keeps an
    ARROW_DEFAULT_MEMORY_POOL that is already set.
    """
    if sys.platform == "linux":  # pyarrow's wheels for others come without it
        os.environ.setdefault(ARROW_POOL, "jemalloc")


def keep_freed_tensors() -> None:
    """Make glibc, torch's allocator on a CPU, do the same. Without glibc this does nothing.

    Not for training: its tensors have many sizes, and fragmentation would raise peak memory by a
    fifth.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _MMAP_THRESHOLD_BYTES)
        mallopt(_M_TRIM_THRESHOLD, _TRIM_THRESHOLD_BYTES)
