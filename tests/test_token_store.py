"""The token store and the sequences cut from it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shards.errors import RunError
from teacher_dump import sequences, token_builder
from teacher_dump.corpus import read_documents
from teacher_dump.corpus_listing import CorpusFile, list_files
from teacher_dump.open_store import open_or_build
from teacher_dump.rules import TokenisingRules
from teacher_dump.sequences import JoinedSequences, SeparateSequences
from teacher_dump.tokenizer import load_tokenizer, tokenizer_identity
from tests.tiny_teacher import write_corpus


def rules_of(tokenizer: Any, **more: Any) -> TokenisingRules:
    options = {"text_key": "text", "held_out": 0.2, "seed": 0, **more}
    return TokenisingRules(
        **tokenizer_identity(tokenizer), eos_token_id=tokenizer.eos_token_id, **options
    )


@settings(max_examples=100, deadline=None)
@given(lengths=st.lists(st.integers(1, 12), min_size=1, max_size=20), length=st.integers(1, 9))
def test_sequences_overlap_by_one_and_number_their_documents(
    lengths: list[int], length: int
) -> None:
    document = np.repeat(np.arange(len(lengths)), lengths)
    tokens = np.arange(len(document), dtype=np.uint16)
    starts = np.cumsum(lengths) - lengths
    split = JoinedSequences(
        split="train", tokens=tokens, document_starts=starts, sequence_length=length
    )
    assert split.positions_of(len(split)) == split.num_positions == len(tokens) - 1
    labels = []
    for number in range(len(split)):
        sequence = split[number]
        assert 2 <= len(sequence.tokens) <= length + 1
        assert sequence.tokens[0] == number * length
        labels += sequence.tokens[1:].tolist()
        of = document[sequence.tokens]
        assert np.array_equal(sequence.segments, of - of[0])
    assert labels == tokens[1:].tolist()
    with pytest.raises(IndexError):
        split[len(split)]


@settings(max_examples=100, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 12), min_size=1, max_size=20),
    length=st.integers(1, 9),
    per_mark=st.integers(1, 5),
)
def test_separate_documents_have_sequences_of_their_own(
    lengths: list[int], length: int, per_mark: int
) -> None:
    document = np.repeat(np.arange(len(lengths)), lengths)
    tokens = np.arange(len(document), dtype=np.uint16)
    starts = np.cumsum(lengths) - lengths
    counts = tokens % 3 > 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sequences, "_DOCUMENTS_PER_MARK", per_mark)
        split = SeparateSequences(
            split="train",
            tokens=tokens,
            document_starts=starts,
            sequence_length=length,
            label_mask=counts,
        )
        found = [split[number] for number in range(len(split))]
        before = [split.positions_of(number) for number in range(len(split) + 1)]
        within = [split.sequences_within(positions) for positions in before]
    for sequence in found:
        assert 2 <= len(sequence.tokens) <= length + 1
        assert len(set(document[sequence.tokens])) == 1
        assert not sequence.segments.any()
        np.testing.assert_array_equal(sequence.loss_mask, counts[sequence.tokens[1:]])
    labels = [token for sequence in found for token in sequence.tokens[1:].tolist()]
    assert labels == np.setdiff1d(tokens, starts).tolist()  # all but every document's first
    sizes = [len(sequence.tokens) - 1 for sequence in found]
    assert before == np.cumsum([0, *sizes]).tolist()
    assert within == list(range(len(found) + 1))
    assert split.num_positions == sum(sizes)
    assert split.mean_positions == (-(-sum(sizes) // len(sizes)) if sizes else length)


def stop_after(number: int) -> Callable[[int, int], None]:
    """What interrupts a store that is being made."""

    def stop(documents: int, tokens: int) -> None:
        if documents > number:
            raise KeyboardInterrupt

    return stop


@pytest.mark.parametrize(("weight", "after"), [(1.0, 100), (2.5, 100), (2.5, 300)])
def test_a_store_that_was_interrupted_continues_to_the_same_bytes(
    weight: float,
    after: int,
    tiny_teacher: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    corpus = list_files([write_corpus(tmp_path / "corpus.jsonl", num_documents=200)], [weight])
    tokenizer = load_tokenizer(tiny_teacher)
    rules = rules_of(tokenizer)
    whole = open_or_build(tmp_path / "whole", corpus, tokenizer, rules, lambda *_: None)
    monkeypatch.setattr(token_builder, "_BATCH_CHARACTERS", 2000)
    monkeypatch.setattr(token_builder, "_RECORD_EVERY_S", 0.0)

    with pytest.raises(KeyboardInterrupt):
        open_or_build(tmp_path / "cut", corpus, tokenizer, rules, stop_after(after))
    assert (tmp_path / "cut" / "progress.json").exists()
    with (tmp_path / "cut" / "train.tokens").open("ab") as stream:
        stream.write(b"written after the last record")
    seen: list[int] = []
    again = open_or_build(
        tmp_path / "cut", corpus, tokenizer, rules, lambda documents, _: seen.append(documents)
    )
    assert again.sha256 == whole.sha256
    assert seen[0] > after - 20  # what was recorded was not encoded again
    for name in ("train.tokens", "train.documents", "validation.tokens", "validation.documents"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_a_store_that_is_shorter_than_its_record_is_not_filled_with_zeros(
    tiny_teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus = list_files([write_corpus(tmp_path / "corpus.jsonl", num_documents=200)])
    tokenizer = load_tokenizer(tiny_teacher)
    monkeypatch.setattr(token_builder, "_BATCH_CHARACTERS", 2000)
    monkeypatch.setattr(token_builder, "_RECORD_EVERY_S", 0.0)

    store = tmp_path / "store"
    with pytest.raises(KeyboardInterrupt):
        open_or_build(store, corpus, tokenizer, rules_of(tokenizer), stop_after(100))
    (store / "train.tokens").write_bytes(b"")
    with pytest.raises(RunError, match=r"train.tokens: shorter than progress.json says; remove"):
        open_or_build(store, corpus, tokenizer, rules_of(tokenizer), lambda *_: None)


def test_a_disk_that_fails_loses_no_tokens(tiny_teacher: Path, tmp_path: Path) -> None:
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    write_corpus(corpus / "a.jsonl", num_documents=3)
    (corpus / "b.jsonl").symlink_to("/proc/self/mem")  # opens, and fails to be read with EIO
    rules = rules_of(load_tokenizer(tiny_teacher))
    files = [CorpusFile(path=corpus / name, name=name) for name in ("a.jsonl", "b.jsonl")]
    assert len(list(read_documents(files[0], rules))) == 3
    with pytest.raises(RunError, match=r"b.jsonl: Input/output error; the same command"):
        list(read_documents(files[1], rules))


def test_documents_are_held_out_whole_and_equal_ones_together(
    tiny_teacher: Path, tmp_path: Path
) -> None:
    path = write_corpus(tmp_path / "corpus.jsonl", num_documents=300)
    path.write_text(path.read_text() * 2)
    tokenizer = load_tokenizer(tiny_teacher)
    store = open_or_build(
        tmp_path / "store", list_files([path]), tokenizer, rules_of(tokenizer), lambda *_: None
    )
    documents: dict[str, set[bytes]] = {}
    for split in ("train", "validation"):
        found = store.sequences(split, 1 << 20)
        assert len(found) == 1
        tokens = found[0].tokens
        ends = np.flatnonzero(tokens == tokenizer.eos_token_id) + 1
        documents[split] = {part.tobytes() for part in np.split(tokens, ends)[:-1]}
    assert not documents["train"] & documents["validation"]
    share = len(documents["validation"]) / sum(map(len, documents.values()))
    assert 0.12 < share < 0.28  # 300 documents at 0.2: over three standard deviations


def test_text_that_spells_a_special_token_stays_text(tiny_teacher: Path, tmp_path: Path) -> None:
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("w1 <eos> w2", encoding="utf-8")
    tokenizer = load_tokenizer(tiny_teacher)
    store = open_or_build(
        tmp_path / "store",
        list_files([corpus]),
        tokenizer,
        rules_of(tokenizer, held_out=0.0),
        lambda *_: None,
    )
    sequence = store.sequences("train", 100)[0]
    assert sequence.segments.max() == 0
    assert tokenizer.eos_token_id == sequence.tokens[-1]
