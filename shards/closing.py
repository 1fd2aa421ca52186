"""Context managers that close at the end of their block."""

from __future__ import annotations

from typing import Self


class Closing:
    """What has `close`, as a context manager."""

    def close(self) -> None:
        """Give back what this holds."""
        raise NotImplementedError

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
