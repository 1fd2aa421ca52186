"""Row groups decoded ahead, several at a time.

Arrow would decode the columns of one row group in parallel, but only two of them are large, so
cores would stay idle. Here each thread decodes one group, column after column, and several groups
are decoded at once. This is as fast and needs less memory while decoding. The threads share
nothing: each has its own split.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Generator, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from itertools import islice

import pyarrow as pa

from shards.dataset import Split
from shards.row_group import RowGroup


def decode_ahead(
    split: Split, groups: Iterable[int], columns: Sequence[str], depth: int
) -> Generator[RowGroup]:
    """The row groups with these numbers in this order, `depth` of them ahead of the one given out.

    What reading raises is raised here, at the row group that it belongs to. Closing the iterator
    waits for what is being decoded. `split` itself is not read from.
    """
    own = threading.local()
    pending: deque[Future[RowGroup]] = deque()
    with ExitStack() as splits:
        lock = threading.Lock()

        def open_split() -> None:
            with lock:
                own.split = splits.enter_context(split.reopened())

        def decode(group: int) -> RowGroup:
            row_group: RowGroup = own.split.read_row_group(group, columns, use_threads=False)
            return row_group

        with ThreadPoolExecutor(
            min(depth, pa.cpu_count()), thread_name_prefix="decode", initializer=open_split
        ) as threads:
            try:
                numbers = iter(groups)
                pending.extend(threads.submit(decode, n) for n in islice(numbers, depth))
                while pending:
                    # The next one is begun before this one is used, not when that is done.
                    decoded = pending.popleft().result()
                    pending.extend(threads.submit(decode, n) for n in islice(numbers, 1))
                    yield decoded
                    del decoded
            finally:
                for future in pending:
                    future.cancel()
