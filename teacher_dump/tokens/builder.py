"""Write a token store: encode documents, or take their tokens, and append them to flat files.

Tokenising runs in the threads of `tokenizers` while the builder reads the next batch. Every few
seconds the builder flushes the files and records their sizes in `progress.json`. After a kill it
truncates the files to the last record. It reads the documents up to there again, but does not
encode them.
"""

from __future__ import annotations

import hashlib
import logging
import math
import os
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from shards.errors import InputError, RunError
from shards.files import durable
from shards.files.checksums import path_sha256
from shards.files.sealed import seal, unseal
from shards.options import OptionError
from shards.spec import SPLITS, TRAIN, VALIDATION
from teacher_dump.corpus.documents import Document, read_documents, size_of
from teacher_dump.corpus.listing import CorpusFile
from teacher_dump.corpus.rules import TokenisingRules
from teacher_dump.tokenizer import TeacherTokenizer
from teacher_dump.tokens.encoding import Encoded, encode_of_file, make_encoder
from teacher_dump.tokens.long_documents import log_long_texts
from teacher_dump.tokens.store import (
    PROGRESS_NAME,
    STORE_NAME,
    Report,
    columns_of,
)

logger = logging.getLogger(__name__)

_BATCH_CHARACTERS = 1 << 20
# Two: while one batch's ids become an array, which holds the interpreter, the other is encoded.
_ENCODING_THREADS = 2
_RECORD_EVERY_S = 5.0


@dataclass(frozen=True)
class _Batch:
    """Documents of a file. It stands for one copy of those whose weight gives more than `copy`."""

    documents: list[Document]
    file: CorpusFile
    copy: int


def _batches(files: Sequence[CorpusFile], rules: TokenisingRules, skip: int) -> Iterator[_Batch]:
    """Documents of a file of about a million characters together, but for the first `skip`."""
    number = 0
    for file, copy in _passes(files):
        batch: list[Document] = []
        size = 0
        for document in read_documents(file, rules):
            number += 1
            if number <= skip:
                continue
            batch.append(document)
            size += size_of(document)
            if size >= _BATCH_CHARACTERS:
                yield _Batch(batch, file, copy)
                batch, size = [], 0
        if batch:
            yield _Batch(batch, file, copy)


def _passes(files: Sequence[CorpusFile]) -> Iterator[tuple[CorpusFile, int]]:
    """All files, then again those with a weight above 1, and so on, with the number of the pass.

    If two copies were in one sequence, the teacher would read the second off the first.
    """
    for copy in range(max(math.ceil(file.weight) for file in files)):
        yield from ((file, copy) for file in files if file.weight > copy)


class TokenBuilder:
    """Appends documents to the files and records how far they are valid."""

    def __init__(
        self,
        folder: Path,
        files: Sequence[CorpusFile],
        tokenizer: TeacherTokenizer,
        rules: TokenisingRules,
        made_from: Mapping[str, Any],
    ) -> None:
        self._folder, self._files, self._rules = folder, files, rules
        self._made_from = dict(made_from)
        self._encoder = make_encoder(tokenizer)
        self._documents_read = 0
        self._sizes = {split: {"tokens": 0, "documents": 0} for split in SPLITS}
        self._columns = columns_of(rules.dtype, rules.has_mask)
        self._streams: dict[tuple[str, str], Any] = {}

    def build(self, report: Report) -> None:
        """Encode the remaining documents and write `store.json`."""
        self._resume()
        for split in SPLITS:
            for column in self._columns:
                self._streams[split, column.name] = column.path(self._folder, split).open("ab")
        try:
            recorded_at = time.monotonic()
            for batch, encoded in self._encoded():
                self._append(batch, encoded)
                report(self._documents_read, self._num_tokens())
                if time.monotonic() - recorded_at > _RECORD_EVERY_S:
                    self._record()
                    recorded_at = time.monotonic()
            self._record()
        finally:
            for stream in self._streams.values():
                stream.close()
        self._finish()

    def _num_tokens(self) -> int:
        return sum(sizes["tokens"] for sizes in self._sizes.values())

    def _resume(self) -> None:
        """Truncate the files to the last record; without a record, to nothing."""
        progress = self._folder / PROGRESS_NAME
        if progress.exists():
            content: Any = unseal(progress)
            self._documents_read = content["documents_read"]
            self._sizes = content["splits"]
            logger.info("tokenising: continuing after %d documents", self._documents_read)
        for split in SPLITS:
            for column in self._columns:
                size = column.dtype.itemsize * self._sizes[split][column.counts]
                path = column.path(self._folder, split)
                with path.open("ab") as stream:
                    if stream.tell() < size:
                        raise RunError(
                            f"{path}: shorter than {PROGRESS_NAME} says; remove {self._folder} to"
                            " tokenise from the start"
                        )
                    stream.truncate(size)

    def _encode(self, batch: _Batch) -> list[Encoded | None]:
        if batch.copy == 0:
            log_long_texts(batch.file.path, batch.documents)
        return encode_of_file(batch.file.path, batch.documents, self._encoder, self._rules)

    def _encoded(self) -> Iterator[tuple[_Batch, list[Encoded | None]]]:
        """Batches in order, some of them under way while the next is read."""
        waiting: deque[tuple[_Batch, Future[list[Encoded | None]]]] = deque()
        with ThreadPoolExecutor(_ENCODING_THREADS) as pool:
            for batch in _batches(self._files, self._rules, self._documents_read):
                waiting.append((batch, pool.submit(self._encode, batch)))
                if len(waiting) > _ENCODING_THREADS + 1:
                    first, encoded = waiting.popleft()
                    yield first, encoded.result()
            while waiting:
                first, encoded = waiting.popleft()
                yield first, encoded.result()

    def _append(self, batch: _Batch, encoded: Sequence[Encoded | None]) -> None:
        chosen: dict[str, list[Encoded]] = {split: [] for split in SPLITS}
        for document in encoded:
            if document is None:
                continue
            if self._rules.num_copies(document.content, batch.file.weight) > batch.copy:
                held_out = self._rules.is_held_out(document.content)
                chosen[VALIDATION if held_out else TRAIN].append(document)
        for split, documents in chosen.items():
            if documents:
                self._write(split, documents)
        self._documents_read += len(encoded)

    def _write(self, split: str, documents: Sequence[Encoded]) -> None:
        sizes = self._sizes[split]
        lengths = np.fromiter((len(d.tokens) for d in documents), np.int64, len(documents))
        starts = sizes["tokens"] + np.cumsum(lengths) - lengths
        self._streams[split, "tokens"].write(
            np.concatenate([d.tokens for d in documents]).tobytes()
        )
        self._streams[split, "documents"].write(starts.tobytes())
        if (split, "mask") in self._streams:
            masks = [d.mask for d in documents if d.mask is not None]
            self._streams[split, "mask"].write(np.concatenate(masks).tobytes())
        sizes["tokens"] += int(lengths.sum())
        sizes["documents"] += len(documents)

    def _record(self) -> None:
        """Flush the files, then record how far they are valid."""
        for stream in self._streams.values():
            stream.flush()
            os.fsync(stream.fileno())
        content: dict[str, Any] = {
            "made_from": self._made_from,
            "documents_read": self._documents_read,
            "splits": self._sizes,
        }
        durable.replace(self._folder / PROGRESS_NAME, seal(content))

    def _finish(self) -> None:
        if self._sizes[TRAIN]["tokens"] < 2:
            summary = f"{self._documents_read} documents, {self._num_tokens()} tokens"
            raise InputError(
                f"the corpus leaves nothing to train on ({summary} with --held-out"
                f" {self._rules.held_out})"
            )
        self._refuse_mask_of_nothing()
        digest = hashlib.sha256()
        for split in SPLITS:
            for column in self._columns:
                path = column.path(self._folder, split)
                digest.update(f"{path.name} {path_sha256(path)}\n".encode())
        content: dict[str, Any] = {
            "made_from": self._made_from,
            "dtype": self._rules.dtype.name,
            "has_mask": self._rules.has_mask,
            "splits": self._sizes,
            "sha256": digest.hexdigest(),
        }
        durable.replace(self._folder / STORE_NAME, seal(content))
        (self._folder / PROGRESS_NAME).unlink()

    def _refuse_mask_of_nothing(self) -> None:
        key = self._rules.mask_key
        if key is None:
            return
        (column,) = (column for column in self._columns if column.name == "mask")
        if not np.memmap(column.path(self._folder, TRAIN), column.dtype, "r").any():
            raise OptionError(
                "mask_key",
                f" {key}: masks every token of the training split; expected true for some",
            )
