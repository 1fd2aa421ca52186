"""Arrow's allocator, told to keep the memory that decoded row groups give back."""

import os


def keep_freed_memory() -> None:
    """Make mimalloc, Arrow's allocator, reuse freed memory instead of returning it to the kernel.

    A stream of row groups frees what the next one needs; page faults in between cost a reader a
    fifth of its speed. To be called before pyarrow is imported, afterwards it has no effect. The
    process then keeps its peak. A MIMALLOC_PURGE_DELAY that is set already stays.
    """
    os.environ.setdefault("MIMALLOC_PURGE_DELAY", "-1")
