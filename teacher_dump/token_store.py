"""Documents -> flat token arrays on disk, once per dataset, in O(1) addressable.

A text corpus has no random access, and neither a resumed pass nor a repaired shard may tokenise it
from the start. So each split (`train`, `validation`) becomes two flat files: its tokens (uint16, or
uint32 above 65,536 ids) with every document closed by the end-of-document token, and the int64
position at which each document starts. Whole documents are held out, by a hash of their text and
the seed: no document is in both splits, and the same text always falls on the same side.

Text that happens to spell a special token is encoded as text. Tokenising runs in the threads of
`tokenizers` while the next batch is read. Everything written is flushed and recorded in
`progress.json` every few seconds; after a kill the files are cut back to the last record and the
documents up to it are read again but not encoded. `store.json`, written last, makes it count.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from shards import durable
from shards.errors import IdentityMismatchError, InputError, RunError
from shards.identity import Json, differences
from shards.sealed import seal, unseal
from teacher_dump.corpus import CorpusFile, file_sha256, read_documents
from teacher_dump.sequences import SplitSequences

logger = logging.getLogger(__name__)

SPLITS = ("train", "validation")
_BATCH_CHARACTERS = 1 << 20
_RECORD_EVERY_S = 5.0
_STORE, _PROGRESS = "store.json", "progress.json"

Report = Callable[[int, int], None]


@dataclass(frozen=True, kw_only=True)
class TokenisingRules:
    """How text becomes tokens; part of the store's identity together with the corpus files."""

    tokenizer_sha256: str
    vocab_size: int
    eos_token_id: int
    text_key: str
    held_out: float
    seed: int

    @property
    def dtype(self) -> np.dtype[Any]:
        """The narrowest unsigned type that holds every id."""
        return np.dtype(np.uint16 if self.vocab_size <= 1 << 16 else np.uint32)

    def is_held_out(self, text: str) -> bool:
        """Whether a document belongs to the validation split, by its content."""
        digest = hashlib.blake2b(
            text.encode("utf-8", "surrogatepass"), digest_size=8, key=str(self.seed).encode()
        )
        return int.from_bytes(digest.digest(), "big") < self.held_out * 2.0**64


class TokenStore:
    """A finished store, memory-mapped. `sha256` covers tokens and document borders."""

    def __init__(self, folder: Path) -> None:
        content = unseal(folder / _STORE)
        self.folder = folder
        self.sha256 = str(content["sha256"])
        self._dtype = np.dtype(str(content["dtype"]))
        self._sizes: Any = content["splits"]

    def sequences(self, split: str, sequence_length: int) -> SplitSequences:
        """The split cut into sequences; RunError if a file is not as long as recorded."""
        tokens, documents = _paths(self.folder, split)
        sizes = self._sizes[split]
        return SplitSequences(
            split=split,
            tokens=_map(tokens, self._dtype, sizes["tokens"]),
            document_starts=_map(documents, np.dtype(np.int64), sizes["documents"]),
            sequence_length=sequence_length,
        )


def _paths(folder: Path, split: str) -> tuple[Path, Path]:
    return folder / f"{split}.tokens", folder / f"{split}.documents"


def _map(path: Path, dtype: np.dtype[Any], count: int) -> Any:
    found = path.stat().st_size if path.exists() else 0
    if found != count * dtype.itemsize:
        raise RunError(
            f"{path}: {found} bytes, expected {count * dtype.itemsize}: delete the folder "
            f"{path.parent} to have it made again"
        )
    return np.memmap(path, dtype=dtype, mode="r") if count else np.empty(0, dtype=dtype)


def open_or_build(
    folder: Path,
    files: Sequence[CorpusFile],
    tokenizer: Any,
    rules: TokenisingRules,
    report: Report,
) -> TokenStore:
    """The store of this corpus under these rules: opened, continued after a kill, or made.

    `report(documents, tokens)` is called now and then. Raises IdentityMismatchError if the folder
    holds a store of something else, InputError for a corpus without text or with a bad record.
    """
    made_from = {"rules": _plain(vars(rules)), "files": _fingerprints(files, folder)}
    if (folder / _STORE).exists():
        _refuse_other(folder, made_from, unseal(folder / _STORE)["made_from"])
        return TokenStore(folder)
    folder.mkdir(parents=True, exist_ok=True)
    _Builder(folder, files, tokenizer, rules, made_from).build(report)
    return TokenStore(folder)


def _plain(value: Any) -> Any:
    return json.loads(json.dumps(value))


def _fingerprints(files: Sequence[CorpusFile], folder: Path) -> dict[str, Json]:
    """Per file: bytes, time and content hash; the hash of an unchanged file is not made again."""
    known: Any = {}
    for name in (_STORE, _PROGRESS):
        if (folder / name).exists():
            known = unseal(folder / name)["made_from"]
            known = known["files"]
            break
    prints: dict[str, Json] = {}
    for number, file in enumerate(files):
        status = file.path.stat()
        key = f"{number} {file.name}"
        old = known.get(key, {})
        if [old.get("bytes"), old.get("modified_ns")] == [status.st_size, status.st_mtime_ns]:
            prints[key] = old
        else:
            prints[key] = {
                "bytes": status.st_size,
                "modified_ns": status.st_mtime_ns,
                "sha256": file_sha256(file.path),
            }
    return prints


def _refuse_other(folder: Path, made_from: Mapping[str, Any], found: Any) -> None:
    """Raise IdentityMismatchError unless both are the same but for the files' times."""

    def timeless(content: Mapping[str, Any]) -> dict[str, Any]:
        files = {
            name: {key: value for key, value in entry.items() if key != "modified_ns"}
            for name, entry in content["files"].items()
        }
        return {"corpus": files, "tokens": content["rules"]}

    different = differences(timeless(made_from), timeless(found))
    if different:
        raise IdentityMismatchError(
            f"{folder}: tokens of something else: {'; '.join(different[:5])}; give another --out, "
            "or the corpus and options that it was made from"
        )


def _batches(texts: Iterator[str]) -> Iterator[list[str]]:
    """Lists of documents of about a million characters together."""
    batch: list[str] = []
    characters = 0
    for text in texts:
        batch.append(text)
        characters += len(text)
        if characters >= _BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


class _Builder:
    """Appends encoded documents to the four files and keeps the record of how far they are good."""

    def __init__(
        self,
        folder: Path,
        files: Sequence[CorpusFile],
        tokenizer: Any,
        rules: TokenisingRules,
        made_from: Mapping[str, Any],
    ) -> None:
        self._folder, self._files, self._rules = folder, files, rules
        self._made_from = dict(made_from)
        # A copy: the caller's tokenizer keeps its own treatment of special tokens
        self._encoder = type(tokenizer.backend_tokenizer).from_str(
            tokenizer.backend_tokenizer.to_str()
        )
        self._encoder.encode_special_tokens = True
        self._encoder.no_truncation()
        self._encoder.no_padding()
        self._documents_read = 0
        self._sizes = {split: {"tokens": 0, "documents": 0} for split in SPLITS}
        self._streams: dict[str, tuple[Any, Any]] = {}

    def build(self, report: Report) -> None:
        """Encode what is not there yet and write `store.json`."""
        self._resume()
        for split in SPLITS:
            tokens, documents = _paths(self._folder, split)
            self._streams[split] = (tokens.open("ab"), documents.open("ab"))
        try:
            recorded_at = time.monotonic()
            for encoded in self._encoded():
                self._append(encoded)
                report(self._documents_read, self._num_tokens())
                if time.monotonic() - recorded_at > _RECORD_EVERY_S:
                    self._record()
                    recorded_at = time.monotonic()
            self._record()
        finally:
            for streams in self._streams.values():
                for stream in streams:
                    stream.close()
        self._finish()

    def _num_tokens(self) -> int:
        return sum(sizes["tokens"] for sizes in self._sizes.values())

    def _resume(self) -> None:
        """Cut the files back to the last record; without a record, to nothing."""
        progress = self._folder / _PROGRESS
        if progress.exists():
            content: Any = unseal(progress)
            _refuse_other(self._folder, self._made_from, content["made_from"])
            self._documents_read = content["documents_read"]
            self._sizes = content["splits"]
            logger.info("tokens: continuing after %d documents", self._documents_read)
        for split in SPLITS:
            widths = (self._rules.dtype.itemsize, 8)
            counts = (self._sizes[split]["tokens"], self._sizes[split]["documents"])
            for path, width, count in zip(_paths(self._folder, split), widths, counts, strict=True):
                with path.open("ab") as stream:
                    stream.truncate(width * count)

    def _texts(self) -> Iterator[str]:
        """The documents that are not in the files yet."""
        number = 0
        for file in self._files:
            for text in read_documents(file, self._rules.text_key):
                number += 1
                if number > self._documents_read:
                    yield text

    def _encode(self, texts: list[str]) -> list[tuple[str, list[int]]]:
        """(split, ids) of each document that has any text."""
        encoded = self._encoder.encode_batch_fast(texts, add_special_tokens=False)
        return [
            ("validation" if self._rules.is_held_out(text) else "train", ids.ids)
            for text, ids in zip(texts, encoded, strict=True)
        ]

    def _encoded(self) -> Iterator[list[tuple[str, list[int]]]]:
        """Batches in order, two of them under way while the next is read."""
        waiting: deque[Future[list[tuple[str, list[int]]]]] = deque()
        with ThreadPoolExecutor(max_workers=1) as pool:
            for batch in _batches(self._texts()):
                waiting.append(pool.submit(self._encode, batch))
                if len(waiting) > 2:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()

    def _append(self, encoded: list[tuple[str, list[int]]]) -> None:
        for split in SPLITS:
            mine = [ids for where, ids in encoded if where == split and ids]
            if not mine:
                continue
            lengths = np.fromiter((len(ids) + 1 for ids in mine), np.int64, len(mine))
            sizes = self._sizes[split]
            starts = sizes["tokens"] + np.cumsum(lengths) - lengths
            eos = self._rules.eos_token_id
            flat = np.fromiter(
                (token for ids in mine for token in (*ids, eos)),
                self._rules.dtype,
                int(lengths.sum()),
            )
            tokens, documents = self._streams[split]
            tokens.write(flat.tobytes())
            documents.write(starts.tobytes())
            sizes["tokens"] += len(flat)
            sizes["documents"] += len(mine)
        self._documents_read += len(encoded)

    def _record(self) -> None:
        """Flush the files, then say how far they are good."""
        for streams in self._streams.values():
            for stream in streams:
                stream.flush()
                os.fsync(stream.fileno())
        content: dict[str, Any] = {
            "made_from": self._made_from,
            "documents_read": self._documents_read,
            "splits": self._sizes,
        }
        durable.replace(self._folder / _PROGRESS, seal(content))

    def _finish(self) -> None:
        if self._sizes["train"]["tokens"] < 2:
            found = f"{self._documents_read} documents, {self._num_tokens()} tokens"
            raise InputError(
                f"the corpus leaves nothing to train on ({found} with --held-out "
                f"{self._rules.held_out}): is it empty?"
            )
        digest = hashlib.sha256()
        for split in SPLITS:
            for path in _paths(self._folder, split):
                digest.update(f"{path.name} {file_sha256(path)}\n".encode())
        content: dict[str, Any] = {
            "made_from": self._made_from,
            "dtype": self._rules.dtype.name,
            "splits": self._sizes,
            "sha256": digest.hexdigest(),
        }
        durable.replace(self._folder / _STORE, seal(content))
        (self._folder / _PROGRESS).unlink()
