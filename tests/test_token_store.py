"""The token store and the sequences cut from it."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shards.errors import IdentityMismatchError, RunError
from teacher_dump.corpus.documents import read_documents
from teacher_dump.corpus.listing import CorpusFile, list_corpus
from teacher_dump.corpus.rules import TokenisingRules
from teacher_dump.tokenizer import load_tokenizer
from teacher_dump.tokens import builder as token_builder
from teacher_dump.tokens import sequences
from teacher_dump.tokens.open_store import open_or_build
from teacher_dump.tokens.sequences import JoinedSequences, SeparateSequences
from tests.tiny_teacher import write_corpus


def rules_of(tokenizer: Any, **more: Any) -> TokenisingRules:
    options = {"text_key": "text", "held_out": 0.2, "seed": 0, **more}
    return TokenisingRules(
        tokenizer_sha256=tokenizer.sha256,
        vocab_size=tokenizer.vocab_size,
        eos_token_id=tokenizer.eos_token_id,
        **options,
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
        patch.setattr(sequences, "_DOCUMENTS_PER_BLOCK", per_mark)
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
    corpus = list_corpus(
        [write_corpus(tmp_path / "corpus.jsonl", num_documents=200)], [weight]
    ).files
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


def interrupted(folder: Path, corpus: Path, tokenizer: Any, rules: TokenisingRules) -> None:
    """A store that is half made."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(token_builder, "_BATCH_CHARACTERS", 2000)
        patch.setattr(token_builder, "_RECORD_EVERY_S", 0.0)
        with pytest.raises(KeyboardInterrupt):
            open_or_build(folder, list_corpus([corpus]).files, tokenizer, rules, stop_after(150))


def some_files(folder: Path) -> Path:
    folder.mkdir()
    for number, name in enumerate(("a.jsonl", "b.jsonl", "c.jsonl")):
        write_corpus(folder / name, num_documents=100, seed=number)
    return folder


@pytest.mark.parametrize("finished", [True, False])
def test_a_corpus_that_is_renamed_and_moved_continues_without_being_hashed_again(
    finished: bool, tiny_teacher: Path, tmp_path: Path
) -> None:
    corpus = some_files(tmp_path / "corpus")
    tokenizer = load_tokenizer(tiny_teacher)
    rules = rules_of(tokenizer)
    whole = open_or_build(
        tmp_path / "whole", list_corpus([corpus]).files, tokenizer, rules, lambda *_: None
    )
    store = tmp_path / "store"
    if finished:
        shutil.copytree(tmp_path / "whole", store)
    else:
        interrupted(store, corpus, tokenizer, rules)
    record = (store / ("store.json" if finished else "progress.json")).read_text()
    assert "corpus" not in record
    assert ".jsonl" not in record
    (corpus / "a.jsonl").rename(corpus / "z.JSON")  # is read last, and was read first
    moved = corpus.rename(tmp_path / "another")
    hashed: list[int] = []
    again = open_or_build(
        store,
        list_corpus([moved]).files,
        tokenizer,
        rules,
        lambda *_: None,
        lambda *_: hashed.append(1),
    )
    assert again.sha256 == whole.sha256
    assert not hashed
    for path in (moved / "b.jsonl", moved / "c.jsonl", moved / "z.JSON"):
        copy = tmp_path / "copies" / path.name
        copy.parent.mkdir(exist_ok=True)
        copy.write_bytes(path.read_bytes())  # other inodes and times: content decides
    copied = list_corpus([tmp_path / "copies"]).files
    assert open_or_build(store, copied, tokenizer, rules, lambda *_: None).sha256 == whole.sha256


@pytest.mark.parametrize("finished", [True, False])
def test_a_corpus_of_another_content_is_refused_by_the_name_of_the_file(
    finished: bool, tiny_teacher: Path, tmp_path: Path
) -> None:
    corpus = some_files(tmp_path / "corpus")
    tokenizer = load_tokenizer(tiny_teacher)
    rules = rules_of(tokenizer)
    store = tmp_path / "store"
    if finished:
        open_or_build(store, list_corpus([corpus]).files, tokenizer, rules, lambda *_: None)
    else:
        interrupted(store, corpus, tokenizer, rules)

    def refusal(weights: Sequence[float] = (), **more: Any) -> str:
        files = list_corpus([corpus], weights).files
        with pytest.raises(IdentityMismatchError) as error:
            open_or_build(store, files, tokenizer, rules_of(tokenizer, **more), lambda *_: None)
        assert "\n" not in str(error.value)
        return str(error.value)

    original = (corpus / "b.jsonl").read_bytes()
    (corpus / "b.jsonl").write_bytes(original.replace(b"w1", b"w2", 1))
    assert f"{corpus}/b.jsonl: its content changed; give another --out" in refusal()
    (corpus / "b.jsonl").unlink()
    assert "missing files: 1" in refusal()
    (corpus / "b.jsonl").write_bytes(original)
    (corpus / "new.jsonl").write_bytes(original + b"\n")
    assert f"{corpus}/new.jsonl: it is new" in refusal()
    (corpus / "new.jsonl").unlink()
    assert f"{corpus}/a.jsonl: weight 2.0, was 1.0" in refusal([2.0])
    assert "tokens.held_out: 0.5 here, 0.2 there" in refusal(held_out=0.5)
    (corpus / "b.jsonl").rename(corpus / "b.txt")
    assert f"{corpus}/b.txt: kind plain text, was JSON lines" in refusal()


def test_copies_of_a_file_are_read_and_said(
    tiny_teacher: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    corpus = some_files(tmp_path / "corpus")
    (corpus / "d.jsonl").write_bytes((corpus / "a.jsonl").read_bytes())
    tokenizer = load_tokenizer(tiny_teacher)
    files = list_corpus([corpus]).files
    open_or_build(tmp_path / "store", files, tokenizer, rules_of(tokenizer), lambda *_: None)
    assert f"d.jsonl: has the same content as {corpus}/a.jsonl; the run reads both" in caplog.text


def test_a_store_that_is_shorter_than_its_record_is_not_filled_with_zeros(
    tiny_teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus = list_corpus([write_corpus(tmp_path / "corpus.jsonl", num_documents=200)]).files
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
    with pytest.raises(RunError, match=r"b.jsonl: Input/output error; run the same command"):
        list(read_documents(files[1], rules))


def test_documents_are_held_out_whole_and_equal_ones_together(
    tiny_teacher: Path, tmp_path: Path
) -> None:
    path = write_corpus(tmp_path / "corpus.jsonl", num_documents=300)
    path.write_text(path.read_text() * 2)
    tokenizer = load_tokenizer(tiny_teacher)
    store = open_or_build(
        tmp_path / "store",
        list_corpus([path]).files,
        tokenizer,
        rules_of(tokenizer),
        lambda *_: None,
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
        list_corpus([corpus]).files,
        tokenizer,
        rules_of(tokenizer, held_out=0.0),
        lambda *_: None,
    )
    sequence = store.sequences("train", 100)[0]
    assert sequence.segments.max() == 0
    assert tokenizer.eos_token_id == sequence.tokens[-1]
