"""The sidecar of a shard: a small JSON file, published last, that makes the shard count.

It holds what must be known without opening the Parquet file: counts, and the sums behind dataset
means. It also holds what the Parquet file cannot say about itself:

- its size, so that a truncated file is rejected before it is mapped
- the hash of the footer and the CRC-32 of every column chunk. Page checksums leave out the footer
  and the page headers, where one flipped byte can turn BYTE_STREAM_SPLIT into PLAIN without an
  error
- the hash of the whole file
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from shards.errors import ShardCorruptError, ShardError, ShardFormatError
from shards.files.durable import write_flushed
from shards.files.sealed import seal, unseal
from shards.files.typed_json import parse
from shards.row_group import Totals


@dataclass(frozen=True, kw_only=True)
class Sidecar:
    """What one shard holds: counts, sums in nats over its labelled positions, checksums.

    `tokens` counts labelled positions, `entries` kept vocabulary entries. `kept_mass` is the sum
    over positions of the probability that was kept: 1 - exp(tail_logmass), or the sum of
    exp(logprobs) for sampled methods; None without a teacher. `teacher_nll` and `teacher_entropy`
    are None if the shard has no such column.
    `chunks_crc32[i][j]` is of column j in row group i.
    """

    shard: int
    split: str
    first_sequence: int
    sequences: int
    tokens: int
    entries: int
    bytes: int
    teacher_nll: float | None
    teacher_entropy: float | None
    kept_mass: float | None
    footer_sha256: str
    sha256: str
    chunks_crc32: Sequence[Sequence[int]]

    @property
    def totals(self) -> Totals:
        """The counts and sums alone, which can be added up over shards."""
        return Totals(**{field.name: getattr(self, field.name) for field in fields(Totals)})

    def write(self, path: Path) -> None:
        """Write a new file, with a checksum of its own, and flush it to disk."""
        write_flushed(path, seal(asdict(self)))

    @classmethod
    def read(cls, path: Path) -> Sidecar:
        """Read a sidecar.

        ShardError if there is none, ShardCorruptError if it is damaged, ShardFormatError for an
        unknown version or key.
        """
        try:
            content = unseal(path)
        except FileNotFoundError as error:
            raise ShardError(
                f"{path}: missing, so the shard beside it is not finished; the command that made"
                " it completes it"
            ) from error
        except ShardCorruptError as error:
            raise ShardCorruptError(
                f"{error}; delete it, and the command that made the shard writes it again"
            ) from error
        except OSError as error:
            raise ShardCorruptError(f"{path}: cannot be read: {error.strerror}") from error
        try:
            return parse(cls, content)
        except ValueError as error:
            raise ShardFormatError(f"{path}: not the sidecar of a shard: {error}") from error


def sidecar_path(shard_path: Path) -> Path:
    """`train/shard-000003.parquet` -> `train/shard-000003.json`."""
    return shard_path.with_suffix(".json")
