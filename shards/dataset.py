"""A complete dataset folder, opened for reading.

Opening a dataset whose manifest says that it is complete costs that file and the hashes of its
tokenizer, whatever the size; otherwise a listing per split tells whether shards are missing. A
split finds any sequence by arithmetic and keeps nothing per sequence or shard but a few open
readers.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from shards.closing import Closing
from shards.errors import IdentityMismatchError, ShardCorruptError, ShardError
from shards.folder.completeness import missing_shards
from shards.manifest import Manifest, SplitSize, load_manifest
from shards.reader import RowGroup, ShardReader
from shards.rows import Row
from shards.sidecar import Sidecar, sidecar_path
from shards.spec import DatasetSpec, TrainingRun, differences
from shards.tokenizer.files import check_tokenizer
from shards.writer import shard_name

# Every open reader holds a map and a parsed footer; opening one again costs about a millisecond.
_MAX_OPEN_READERS = 8


@dataclass(frozen=True)
class Dataset:
    """A complete dataset."""

    path: Path
    manifest: Manifest

    @classmethod
    def open(cls, path: Path) -> Dataset:
        """Open a folder.

        ShardFormatError if it is no dataset, ShardError if it is incomplete, ShardCorruptError if
        its tokenizer is missing or changed.
        """
        manifest = load_manifest(path)
        for name, size in () if manifest.complete else manifest.splits.items():
            missing = missing_shards(path, manifest, name)
            if missing:
                raise ShardError(
                    f"{path}: {len(missing)} of {manifest.spec.layout.num_shards(size.sequences)}"
                    f" shards of split {name} are missing; the same {_command(manifest.spec)}"
                    " command completes it"
                )
        check_tokenizer(path, manifest.tokenizer_files)
        return cls(path, manifest)

    @property
    def spec(self) -> DatasetSpec:
        """What the dataset is."""
        return self.manifest.spec

    @property
    def split_names(self) -> list[str]:
        """The splits that hold at least one sequence."""
        return [name for name, size in self.manifest.splits.items() if size.sequences]

    def split(self, name: str) -> Split:
        """A split with readers of its own. ShardError if there is none of this name."""
        if name not in self.split_names:
            names = ", ".join(self.split_names)
            raise ShardError(f"{self.path}: no split {name}; there is {names}")
        return Split(self.path / name, self.manifest.splits[name], self.spec)


def _command(spec: DatasetSpec) -> str:
    """The command that writes such a dataset."""
    return "train-student" if isinstance(spec.teacher, TrainingRun) else "dump-logits"


class Split(Closing):
    """The sequences of one split, 0 to num_sequences - 1; a context manager that closes.

    Not for use by several threads at once: give each a split of its own.
    """

    def __init__(self, path: Path, size: SplitSize, spec: DatasetSpec) -> None:
        self.path = path
        self._size = size
        self.spec = spec
        self._layout = spec.layout
        self._readers: OrderedDict[int, ShardReader] = OrderedDict()

    @property
    def num_sequences(self) -> int:
        """Sequences of the split."""
        return self._size.sequences

    @property
    def num_positions(self) -> int:
        """Labelled positions of the split."""
        return self._size.positions

    @property
    def num_shards(self) -> int:
        """Shards of the split."""
        return self._layout.num_shards(self.num_sequences)

    @property
    def num_row_groups(self) -> int:
        """Row groups of all shards."""
        return self._layout.num_row_groups(self.num_sequences)

    def row_group_range(self, g: int) -> range:
        """The sequences of row group g, numbered over all shards."""
        if not 0 <= g < self.num_row_groups:
            raise IndexError(f"row group {g} of {self.num_row_groups} in {self.path}")
        return self._layout.row_group_range(g, self.num_sequences)

    def locate(self, sequence: int) -> tuple[int, int, int]:
        """(shard, row group in the shard, offset in the row group) of a sequence."""
        if not 0 <= sequence < self.num_sequences:
            raise IndexError(f"sequence {sequence} of {self.num_sequences} in {self.path}")
        return self._layout.locate(sequence)

    def read_row_group(
        self, g: int, columns: Sequence[str] | None = None, *, use_threads: bool = True
    ) -> RowGroup:
        """Row group g, numbered over all shards; the rest as for a `ShardReader`."""
        shard, row_group, _ = self.locate(self.row_group_range(g).start)
        return self._reader(shard).read_row_group(row_group, columns, use_threads=use_threads)

    def row(self, sequence: int) -> Row:
        """One sequence; decodes the row group that it is in."""
        shard, row_group, offset = self.locate(sequence)
        return self._reader(shard).read_row_group(row_group).row(offset)

    def rows(self) -> Iterator[Row]:
        """All sequences in order, one row group in memory at a time."""
        for g in range(self.num_row_groups):
            group = self.read_row_group(g)
            for r in range(group.num_rows):
                yield group.row(r)

    def sidecars(self) -> Iterator[Sidecar]:
        """The sidecars of all shards in order."""
        for shard in range(self.num_shards):
            yield Sidecar.read(sidecar_path(self.path / shard_name(shard)))

    def verify_shard(self, shard: int) -> None:
        """Read and check everything in a shard. ShardError, of the kinds that reading raises."""
        self._reader(shard).verify()

    def reopened(self) -> Split:
        """The same split with readers of its own, for another thread."""
        return Split(self.path, self._size, self.spec)

    def close(self) -> None:
        """Close all readers; the next read opens them again."""
        while self._readers:
            self._readers.popitem()[1].close()

    def _reader(self, shard: int) -> ShardReader:
        """The shard's reader, kept open until it is the least recently used of too many."""
        if shard in self._readers:
            self._readers.move_to_end(shard)
            return self._readers[shard]
        reader = self._open(shard)
        self._readers[shard] = reader
        if len(self._readers) > _MAX_OPEN_READERS:
            self._readers.popitem(last=False)[1].close()
        return reader

    def _open(self, shard: int) -> ShardReader:
        """Open a shard and make sure that it is this dataset's and stands where it belongs."""
        reader = ShardReader(self.path / shard_name(shard))
        try:
            mismatches = differences(self.spec, reader.spec)
            if mismatches:
                raise IdentityMismatchError(
                    f"{reader.path}: a shard of another dataset than the one around it:"
                    f" {'; '.join(mismatches)} (here: the dataset, there: the shard)"
                )
            sequences = self._layout.shard_range(shard, self.num_sequences)
            expected = (self.path.name, sequences.start, len(sequences))
            sidecar = reader.sidecar
            if (sidecar.split, sidecar.first_sequence, sidecar.sequences) != expected:
                raise ShardCorruptError(
                    f"{reader.path}: holds {sidecar.sequences} sequences of split {sidecar.split}"
                    f" from {sidecar.first_sequence} on; split, start and number must be {expected}"
                )
        except ShardError:
            reader.close()
            raise
        return reader
