"""A sample of a corpus, tokenised without writing anything: for plans and probes.

It is read from the fronts of files spread over the corpus.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from shards.spec import TRAIN
from teacher_dump.config import DumpConfig
from teacher_dump.corpus.documents import Document, read_sample
from teacher_dump.corpus.listing import CorpusFile
from teacher_dump.corpus.rules import TokenisingRules
from teacher_dump.prepare import Prepared
from teacher_dump.tokens.encoding import Encoded, encode, encode_of_file, make_encoder
from teacher_dump.tokens.sequences import SplitSequences, cut

SAMPLED_FILES = 32
SAMPLED_CHARACTERS = 4 << 20


@dataclass(frozen=True, kw_only=True)
class Sample:
    """Tokens [N] int32 of the sampled documents, document_starts [documents] int64.

    label_mask [N] says which of them count as labels, None: all. `num_tokens` is that of the whole
    corpus, exact if `share`, the part that was read, is 1.
    """

    tokens: npt.NDArray[np.int32]
    document_starts: npt.NDArray[np.int64]
    label_mask: npt.NDArray[np.bool_] | None
    num_tokens: int
    share: float

    def sequences(self, config: DumpConfig, bos_token_id: int | None) -> SplitSequences:
        """The sample cut as the corpus would be, with this token before each sequence."""
        return cut(
            joined=config.joined,
            bos_token_id=bos_token_id,
            split=TRAIN,
            tokens=self.tokens,
            document_starts=self.document_starts,
            label_mask=self.label_mask,
            sequence_length=config.sequence_length,
        )

    def num_positions(self, split: SplitSequences) -> int:
        """Labelled positions of the whole corpus, in the sample's proportion to tokens."""
        return max(1, round(split.num_positions * self.num_tokens / len(self.tokens)))


def read_corpus_sample(ready: Prepared) -> Sample:
    """Tokenise the sample, and extrapolate by the sizes of files."""
    encoder = make_encoder(ready.tokenizer)
    pieces: list[Encoded] = []
    estimate = read_bytes = 0.0
    for file, documents, share in _documents(ready, SAMPLED_CHARACTERS):
        for document in encode_of_file(file.path, documents, encoder, ready.rules):
            if document is not None:
                copies = ready.rules.num_copies(document.content, file.weight)
                estimate += copies * len(document.tokens) / share
                pieces.append(document)
        read_bytes += share * file.path.stat().st_size
    all_bytes = sum(file.path.stat().st_size for file in ready.files)
    sampled = _spread(ready.files, SAMPLED_FILES)
    sampled_bytes = sum(file.path.stat().st_size for file in sampled)
    return _sample(
        pieces,
        num_tokens=round(estimate * all_bytes / max(1, sampled_bytes)),
        share=read_bytes / max(1, all_bytes),
    )


def read_documents_of_sample(ready: Prepared, characters: int) -> list[Document]:
    """About this many characters of documents from the same places, for `sample_of`.

    This encodes them once, because only here an error can name the file.
    """
    encoder = make_encoder(ready.tokenizer)
    sample: list[Document] = []
    for file, documents, _ in _documents(ready, characters):
        encode_of_file(file.path, documents, encoder, ready.rules)
        sample += documents
    return sample


def sample_of(documents: Sequence[Document], ready: Prepared, rules: TokenisingRules) -> Sample:
    """Documents tokenised by other rules than those of the dump."""
    encoded = encode(documents, make_encoder(ready.tokenizer), rules)
    pieces = [piece for piece in encoded if piece is not None]
    return _sample(pieces, num_tokens=sum(len(piece.tokens) for piece in pieces), share=1.0)


def _documents(
    ready: Prepared, characters: int
) -> Iterator[tuple[CorpusFile, list[Document], float]]:
    files = _spread(ready.files, SAMPLED_FILES)
    for file in files:
        documents, share = read_sample(file, ready.rules, characters // len(files))
        yield file, documents, share


def _sample(pieces: Sequence[Encoded], *, num_tokens: int, share: float) -> Sample:
    ends = np.cumsum([0, *(len(piece.tokens) for piece in pieces)], dtype=np.int64)
    masks = [piece.mask for piece in pieces if piece.mask is not None]
    return Sample(
        tokens=np.concatenate([*(piece.tokens for piece in pieces), np.empty(0)]).astype(np.int32),
        document_starts=ends[:-1],
        label_mask=np.concatenate(masks) if masks else None,
        num_tokens=num_tokens,
        share=share,
    )


def _spread(files: Sequence[CorpusFile], limit: int) -> list[CorpusFile]:
    if len(files) <= limit:
        return list(files)
    return [files[number * len(files) // limit] for number in range(limit)]
