"""Pack short sequences into lines of a batch, by their lengths alone.

Best fit, longest first: every sequence goes into the line with the least room left after it, or
into a new line. So no two lines would fit into one, and how many lines there are depends on the
lengths, not on their order.
"""

from __future__ import annotations

from bisect import bisect_left, insort

import numpy as np
import numpy.typing as npt


def pack(lengths: npt.NDArray[np.integer], capacity: int) -> list[list[int]]:
    """Lines of indices into lengths [N], 1 to `capacity` each; every index is in one line."""
    lines: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (what is left, line), ascending
    for index in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[index])
        position = bisect_left(room, (length, 0))
        if position < len(room):
            left, line = room.pop(position)
        else:
            left, line = capacity, len(lines)
            lines.append([])
        lines[line].append(index)
        if left > length:
            insort(room, (left - length, line))
    return lines
