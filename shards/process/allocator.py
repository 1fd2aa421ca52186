"""Which allocators, and how much of the memory that they are given back they keep.

Page faults cost a stream of row groups, or of blocks of logits, a fifth of its speed and more where
each frees what the next one needs and the kernel has it in between.
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

    To be called before pyarrow is imported, afterwards it has no effect. An
    ARROW_DEFAULT_MEMORY_POOL that is set already stays.
    """
    if sys.platform == "linux":  # pyarrow's wheels for others come without it
        os.environ.setdefault(ARROW_POOL, "jemalloc")


def keep_freed_tensors() -> None:
    """Make the C library, torch's allocator on a CPU, do the same; without glibc nothing happens.

    Not for training, whose tensors are of so many sizes that memory comes apart: it would take a
    fifth more at its peak.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _MMAP_THRESHOLD_BYTES)
        mallopt(_M_TRIM_THRESHOLD, _TRIM_THRESHOLD_BYTES)
