"""Corpora that are tokens already: each format gives the same store, masks stay with tokens."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tokenizers import Tokenizer, models

from shards import inspect
from shards.dataset import Dataset
from shards.errors import IdentityMismatchError, InputError
from shards.options import OptionError
from teacher_dump.config import DumpConfig
from teacher_dump.corpus import tables
from teacher_dump.corpus import token_files as token_corpus
from teacher_dump.corpus.flat_tokens import check_flat
from teacher_dump.corpus.listing import list_corpus
from teacher_dump.corpus.rules import TokenisingRules
from teacher_dump.prepare import prepare
from teacher_dump.sample import read_corpus_sample, read_documents_of_sample
from teacher_dump.tokenizer import load_tokenizer
from teacher_dump.tokens.open_store import open_or_build
from teacher_dump.tokens.store import TokenStore
from tests.command_runs import run
from tests.test_token_store import rules_of
from tests.tiny_teacher import TOKENIZER_LENGTH, dense_logprobs, dump_command

EOS = 0
DOCUMENTS = [
    np.append(np.random.default_rng(n).integers(1, TOKENIZER_LENGTH, 3 + 7 * n), EOS)
    for n in range(12)
]
FLAT = np.concatenate(DOCUMENTS)


def write_megatron(path: Path, documents: list[np.ndarray], dtype: str, code: int) -> None:
    """An indexed dataset, every document in one or two pieces, as Megatron-LM lays it out."""
    pieces = [
        part for d in documents for part in (np.split(d, [len(d) // 2]) if len(d) > 9 else [d])
    ]
    borders = np.cumsum([0] + [2 if len(d) > 9 else 1 for d in documents])
    lengths = np.array([len(piece) for piece in pieces], np.int32)
    width = np.dtype(dtype).itemsize
    pointers = (np.cumsum(lengths, dtype=np.int64) - lengths) * width
    path.write_bytes(np.concatenate(pieces).astype(dtype).tobytes())
    path.with_suffix(".idx").write_bytes(
        b"MMIDIDX\x00\x00"
        + struct.pack("<QBQQ", 1, code, len(pieces), len(borders))
        + lengths.tobytes()
        + pointers.tobytes()
        + borders.astype(np.int64).tobytes()
    )


def token_table() -> pa.Table:
    return pa.table({"tokens": [d.tolist() for d in DOCUMENTS], "n": list(range(len(DOCUMENTS)))})


def write_arrow(path: Path) -> None:
    with (
        pa.OSFile(str(path), "wb") as sink,
        pa.ipc.new_stream(sink, token_table().schema) as writer,
    ):
        writer.write_table(token_table(), max_chunksize=5)


def write_arrow_file(path: Path) -> None:
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, token_table().schema) as writer:
        writer.write_table(token_table(), max_chunksize=5)


FORMATS: dict[str, tuple[str, Callable[[Path], Any]]] = {
    "flat npy": ("a.npy", lambda path: np.save(path, FLAT)),
    "flat bin": ("a.bin", lambda path: FLAT.astype(np.uint16).tofile(path)),
    "megatron uint16": ("a.bin", lambda path: write_megatron(path, DOCUMENTS, "uint16", 8)),
    "megatron int32": ("a.bin", lambda path: write_megatron(path, DOCUMENTS, "int32", 4)),
    "parquet": ("a.parquet", lambda path: pq.write_table(token_table(), path, row_group_size=5)),
    "arrow stream": ("a.arrow", write_arrow),
    "arrow file": ("a.arrow", write_arrow_file),
}


@pytest.fixture(scope="module")
def tokenizer(tiny_teacher: Path) -> Any:
    return load_tokenizer(tiny_teacher)


def build(folder: Path, path: Path, tokenizer: Any, **more: Any) -> TokenStore:
    weights = more.pop("weights", ())
    rules: TokenisingRules = rules_of(tokenizer, **{"held_out": 0.0, **more})
    return open_or_build(
        folder, list_corpus([path], weights).files, tokenizer, rules, lambda *_: None
    )


def tokens_of(store: TokenStore, split: str = "train") -> np.ndarray:
    sequences = store.sequences(split, 1 << 20)
    return sequences[0].tokens if len(sequences) else np.empty(0, np.int32)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("chunk", [1 << 20, 16])
def test_every_format_gives_the_same_documents(
    name: str, chunk: int, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(token_corpus, "_CHUNK", chunk)
    file, write = FORMATS[name]
    write(tmp_path / file)
    store = build(tmp_path / "store", tmp_path / file, tokenizer, token_key="tokens")
    sequence = store.sequences("train", 1 << 20)[0]
    assert np.array_equal(sequence.tokens, FLAT)
    expected = np.repeat(np.arange(len(DOCUMENTS)), [len(d) for d in DOCUMENTS])
    assert np.array_equal(sequence.segments, expected)
    assert sequence.loss_mask is None


def test_rows_of_an_npy_are_documents_that_are_closed(tokenizer: Any, tmp_path: Path) -> None:
    rows = np.arange(1, 13, dtype=np.int64).reshape(3, 4)
    np.save(tmp_path / "a.npy", rows)
    closed = build(tmp_path / "closed", tmp_path / "a.npy", tokenizer)
    assert tokens_of(closed).tolist() == [1, 2, 3, 4, 0, 5, 6, 7, 8, 0, 9, 10, 11, 12, 0]
    as_they_are = build(tmp_path / "open", tmp_path / "a.npy", tokenizer, close_documents=False)
    assert tokens_of(as_they_are).tolist() == rows.ravel().tolist()
    assert as_they_are.sequences("train", 100)[0].segments.max() == 2
    begun = build(tmp_path / "begun", tmp_path / "a.npy", tokenizer, bos_token_id=9)
    assert tokens_of(begun).tolist() == [9, 1, 2, 3, 4, 0, 9, 5, 6, 7, 8, 0, 9, 10, 11, 12, 0]


def test_lists_of_a_fixed_size_are_documents_too(tokenizer: Any, tmp_path: Path) -> None:
    flat = np.arange(1, 61) % TOKENIZER_LENGTH
    table = pa.table({"tokens": pa.FixedSizeListArray.from_arrays(pa.array(flat), 4)})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=5)
    store = build(tmp_path / "store", tmp_path / "a.parquet", tokenizer, token_key="tokens")
    assert np.array_equal(tokens_of(store).reshape(-1, 5)[:, :4], flat.reshape(-1, 4))


def test_weights_repeat_and_leave_out_whole_documents(tokenizer: Any, tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.arange(1, 201).reshape(200, 1))
    twice = tokens_of(build(tmp_path / "2", tmp_path / "a.npy", tokenizer, weights=[2.0]))
    assert twice[twice > 0].tolist() == np.tile(np.arange(1, 201), 2).tolist()
    more = tokens_of(build(tmp_path / "2.5", tmp_path / "a.npy", tokenizer, weights=[2.5]))
    assert set(np.bincount(more)[1:]) == {2, 3}
    half = tokens_of(build(tmp_path / "0.5", tmp_path / "a.npy", tokenizer, weights=[0.5]))
    assert 60 < (half > 0).sum() < 140  # 200 at 0.5: over five standard deviations
    with pytest.raises(IdentityMismatchError, match="weight"):
        build(tmp_path / "2", tmp_path / "a.npy", tokenizer)


def test_copies_come_after_everything_that_is_taken_once(tokenizer: Any, tmp_path: Path) -> None:
    for name, first in (("a", 1), ("b", 11), ("c", 21)):
        np.save(tmp_path / f"{name}.npy", np.arange(first, first + 3).reshape(3, 1))
    files = list_corpus([tmp_path / f"{name}.npy" for name in "abc"], [2.0, 1.0, 3.0]).files
    rules = rules_of(tokenizer, held_out=0.0)
    found = tokens_of(open_or_build(tmp_path / "store", files, tokenizer, rules, lambda *_: None))
    passes = [1, 2, 3, 11, 12, 13, 21, 22, 23], [1, 2, 3, 21, 22, 23], [21, 22, 23]
    assert found[found > 0].tolist() == [token for part in passes for token in part]


def test_a_mask_stays_with_its_tokens_to_the_shard(tiny_teacher: Path, tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    documents = [random.integers(1, TOKENIZER_LENGTH, n) for n in random.integers(2, 50, 30)]
    masks = [random.random(len(d)) < 0.6 for d in documents]
    table = pa.table({"ids": [d.tolist() for d in documents], "m": [m.tolist() for m in masks]})
    pq.write_table(table, tmp_path / "corpus.parquet")
    out = tmp_path / "out"
    options = ("--token-key", "ids", "--mask-key", "m", "--engine", "transformers")
    words = dump_command(tiny_teacher, tmp_path / "corpus.parquet", out, *options)[3:]
    words += ["--dtype", "float32", "--held-out", "0"]
    planned = run("dump-logits", *words, "--plan")
    result = run("dump-logits", *words)
    assert result.exit_code == 0, result.output
    assert inspect.verify(out) == []
    labels = np.concatenate([np.append(m, m[-1]) for m in masks])[1:]
    tokens = np.concatenate([np.append(d, EOS) for d in documents])
    place = 0
    for row in Dataset.open(out).split("train").rows():
        here = labels[place : place + len(row.counts)]
        assert np.array_equal(row.tokens, tokens[place : place + len(row.counts) + 1])
        assert row.loss_mask is not None
        assert np.array_equal(row.loss_mask, here)
        assert np.array_equal(row.counts > 0, here)
        exact = dense_logprobs(tiny_teacher, row.tokens, TOKENIZER_LENGTH)
        where = np.repeat(np.arange(len(row.counts)), row.counts)
        assert np.abs(row.logprobs - exact[where, row.ids]).max(initial=0) <= 1 / 32 + 1e-3
        nll = -exact[np.arange(len(exact)), row.tokens[1:]]
        assert row.teacher_nll == pytest.approx(nll[here].sum(), abs=2e-2)
        place += len(row.counts)
    assert place == len(labels)
    found = inspect.describe(out)
    assert found["tokens"] == labels.sum()
    assert f"out: {labels.sum():,} tokens in" in result.stdout
    assert f"{labels.sum():,} counted, labels of {len(labels):,}" in planned.stdout
    said = dict(line.split(maxsplit=1) for line in planned.stdout.splitlines())
    entries = float(said["entries/token"].split()[0])
    assert entries == pytest.approx(found["entries_per_token"], rel=0.01)
    assert f"{entries} entries/token" in result.stdout


def test_a_plan_counts_documents_as_often_as_weights_take_them(
    tiny_teacher: Path, tmp_path: Path
) -> None:
    np.save(tmp_path / "a.npy", np.arange(1, 201).reshape(200, 1))
    config = DumpConfig(
        teacher=str(tiny_teacher), corpus=(tmp_path / "a.npy",), weights=(0.5,),
        out=tmp_path / "out", sequence_length=32, held_out=0.0,
    )  # fmt: skip
    ready = prepare(config)
    sample = read_corpus_sample(ready)
    store = open_or_build(
        tmp_path / "store", ready.files, ready.tokenizer, ready.rules, lambda *_: None
    )
    assert sample.share == 1
    assert sample.num_tokens == len(tokens_of(store))


def cut_index(path: Path) -> None:
    write_megatron(path, DOCUMENTS, "uint16", 8)
    index = path.with_suffix(".idx")
    index.write_bytes(index.read_bytes()[:-9])


def short_data(path: Path) -> None:
    write_megatron(path, DOCUMENTS, "uint16", 8)
    path.write_bytes(path.read_bytes()[:-20])


def replaced(token: int) -> np.ndarray:
    """The documents with something else in the place of their largest token."""
    return np.where(FLAT.max() == FLAT, token, FLAT)


def borders_beyond(path: Path) -> None:
    """The last document ends two pieces after the last one."""
    write_megatron(path, DOCUMENTS, "uint16", 8)
    index = path.with_suffix(".idx")
    content = bytearray(index.read_bytes())
    content[-8:] = struct.pack("<q", struct.unpack("<q", content[-8:])[0] + 2)
    index.write_bytes(content)


def no_last_border(path: Path) -> None:
    """The index of a writer that ended before it said where its last document ends."""
    write_megatron(path, DOCUMENTS, "uint16", 8)
    index = path.with_suffix(".idx")
    content = bytearray(index.read_bytes()[:-8])
    content[26:34] = struct.pack("<Q", struct.unpack("<Q", content[26:34])[0] - 1)
    index.write_bytes(content)


def foreign_index(path: Path) -> None:
    FLAT.astype(np.uint16).tofile(path)
    path.with_suffix(".idx").write_bytes(b"something else of the same name, and long enough")


@pytest.mark.parametrize(
    ("file", "write", "says"),
    [
        (
            "a.npy",
            lambda path: np.save(path, replaced(301)),
            "token id 301, but the tokenizer has 301",
        ),
        ("a.npy", lambda path: np.save(path, replaced(-1)), "token id -1, but the tokenizer"),
        (
            "a.npy",
            lambda path: np.save(path, FLAT / 2),
            "has dtype float64 and 1 dimensions, expected",
        ),
        ("a.npy", lambda path: np.save(path, FLAT.astype(object)), "not a .npy file that can be"),
        ("a.npy", lambda path: np.save(path, np.full(500, 7)), "no end-of-document token 0 in"),
        (
            "a.bin",
            lambda path: path.write_bytes(b"abc"),
            "has 3 bytes, not a multiple of the size of uint16",
        ),
        ("a.bin", cut_index, "damaged, or not version 1"),
        ("a.bin", short_data, "shorter than its index says, at document"),
        ("a.bin", foreign_index, "not an index of Megatron-LM"),
        ("a.bin", borders_beyond, "damaged: its documents are not in order"),
        ("a.bin", no_last_border, "damaged: some of its pieces belong to no document"),
        ("a.parquet", lambda path: pq.write_table(pa.table({"ids": [[1]]}), path), "no column"),
        (
            "a.parquet",
            lambda path: pq.write_table(pa.table({"tokens": [[0.5]]}), path),
            "expected lists of integers",
        ),
        (
            "a.parquet",
            lambda path: pq.write_table(pa.table({"tokens": [[1], None]}), path),
            "expected lists without nulls",
        ),
        (
            "a.parquet",
            lambda path: pq.write_table(pa.table({"tokens": [[1, None]]}), path),
            "expected lists of integers",
        ),
        ("a.arrow", lambda path: path.write_bytes(b"nothing"), "not an Arrow file"),
    ],
)
def test_what_cannot_be_meant_is_refused_by_name(
    file: str,
    write: Callable[[Path], Any],
    says: str,
    tokenizer: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(token_corpus, "LONGEST_DOCUMENT", 300)
    write(tmp_path / file)
    with pytest.raises(InputError, match=says.replace("(", r"\(")) as error:
        build(tmp_path / "store", tmp_path / file, tokenizer, token_key="tokens")
    assert str(tmp_path / "a.") in str(error.value)


def test_a_mask_of_another_length_is_refused_with_its_row(tokenizer: Any, tmp_path: Path) -> None:
    table = pa.table({"tokens": [[1, 2], [3, 4]], "mask": [[True, True], [True]]})
    pq.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(InputError, match="row 1: 'mask' and 'tokens' differ in length"):
        build(
            tmp_path / "store",
            tmp_path / "a.parquet",
            tokenizer,
            token_key="tokens",
            mask_key="mask",
        )


def test_a_token_beyond_the_tokenizer_is_an_error_that_begins_with_the_file_wherever_it_is_read(
    tokenizer: Any, tmp_path: Path
) -> None:
    pq.write_table(pa.table({"tokens": [[1, 2, 3]]}), tmp_path / "a.parquet")
    pq.write_table(pa.table({"tokens": [[1, 60_000]]}), tmp_path / "b.parquet")
    files = list_corpus([tmp_path]).files
    rules = rules_of(tokenizer, token_key="tokens")
    ready: Any = SimpleNamespace(tokenizer=tokenizer, files=files, rules=rules)
    reads: list[Callable[[], Any]] = [
        lambda: open_or_build(tmp_path / "store", files, tokenizer, rules, lambda *_: None),
        lambda: read_corpus_sample(ready),
        lambda: read_documents_of_sample(ready, 1000),
    ]
    for read in reads:
        with pytest.raises(InputError) as error:
            read()
        assert str(error.value).startswith(
            f"{tmp_path}/b.parquet: token id 60000, but the tokenizer"
        )


def test_a_tokenizer_that_cannot_encode_is_an_error_that_names_the_file_too(tmp_path: Path) -> None:
    (tmp_path / "teacher").mkdir()
    Tokenizer(models.WordLevel({"<eos>": 0}, "<unk>")).save(
        str(tmp_path / "teacher/tokenizer.json")
    )
    (tmp_path / "teacher/tokenizer_config.json").write_text('{"eos_token": "<eos>"}')
    (tmp_path / "a.txt").write_text("a")
    loaded = load_tokenizer(tmp_path / "teacher")
    with pytest.raises(InputError) as error:
        build(tmp_path / "store", tmp_path / "a.txt", loaded)
    says = f"{tmp_path}/a.txt: {tmp_path}/teacher: the tokenizer cannot encode the text (WordLevel"
    assert str(error.value).startswith(says)


@pytest.mark.parametrize(
    ("dtype", "says"),
    [
        ("uint32", "read as uint16, every second token is the high part of a wider one;"),
        ("int64", "read as uint16, three of four tokens are the high part of a wider one;"),
    ],
)
def test_tokens_read_with_half_or_a_quarter_of_their_width_are_said(
    dtype: str, says: str, tmp_path: Path
) -> None:
    tokens = (np.arange(400) % 60 + 1).astype(dtype).view(np.uint16)
    with pytest.raises(InputError) as error:
        check_flat(tmp_path / "a.bin", tokens, 64)
    assert f"a.bin: {says} if the tokens are {dtype}, give" in str(error.value)


@pytest.mark.parametrize("weight", [1.0, 2.0])
def test_a_mask_of_which_no_label_counts_is_refused_and_names_its_option(
    weight: float, tokenizer: Any, tmp_path: Path
) -> None:
    table = pa.table({"tokens": [[1, 2], [3, 4]], "m": [[False, False], [False, False]]})
    pq.write_table(table, tmp_path / "a.parquet")
    more = {"token_key": "tokens", "mask_key": "m", "weights": [weight]}
    for _ in range(2):  # also when it continues
        with pytest.raises(OptionError, match="masks every token of the training split") as error:
            build(tmp_path / "store", tmp_path / "a.parquet", tokenizer, **more)
        assert error.value.as_flag().startswith("--mask-key m: ")
    table = pa.table({"tokens": [[1, 2], [3, 4]], "m": [[False, False], [False, True]]})
    pq.write_table(table, tmp_path / "a.parquet")
    store = build(tmp_path / "other", tmp_path / "a.parquet", tokenizer, **more)
    mask = store.sequences("train", 100)[0].loss_mask
    assert mask is not None
    assert mask.sum() == 2 * weight  # the last token and the end that closes it


def test_a_dataset_on_disk_is_what_was_saved_and_not_what_was_computed_from_it(
    tokenizer: Any, tmp_path: Path
) -> None:
    import datasets

    rows = [d.tolist() for d in DOCUMENTS]
    splits = {
        "train": datasets.Dataset.from_dict({"tokens": rows}),
        "test": datasets.Dataset.from_dict({"tokens": rows[:2]}),
    }
    folder = tmp_path / "saved"
    datasets.DatasetDict(splits).save_to_disk(folder, num_shards={"train": 3, "test": 1})
    loaded = datasets.load_from_disk(folder / "train")
    loaded.map(lambda row: {"tokens": row["tokens"][:1]})
    loaded.shuffle(seed=0)
    cached = {path.name for path in (folder / "train").glob("cache-*.arrow")}
    assert len(cached) == 2
    assert len(list_corpus([folder / "train"]).files) == 3
    store = build(tmp_path / "store", folder / "train", tokenizer, token_key="tokens")
    assert np.array_equal(tokens_of(store), FLAT)
    for parent in (folder, tmp_path):
        with pytest.raises(
            InputError, match=r"saved: contains several splits \(test, train\); give one"
        ):
            list_corpus([parent])
    (folder / "train" / "data-00001-of-00003.arrow").unlink()
    with pytest.raises(InputError, match=r"data-00001-of-00003.arrow: missing, but"):
        list_corpus([folder / "train"])


def test_a_cache_of_a_hub_dataset_is_not_read_as_one_corpus(tmp_path: Path) -> None:
    for split in ("train", "test"):
        write_arrow(tmp_path / f"data-{split}.arrow")
    with pytest.raises(InputError, match=r"several splits \(test, train\); give one"):
        list_corpus([tmp_path])
    (tmp_path / "dataset_info.json").write_text("{}")
    with pytest.raises(InputError, match="is a cache of `datasets`, which mixes all splits"):
        list_corpus([tmp_path])
    assert len(list_corpus([tmp_path / "data-train.arrow"]).files) == 1


def test_a_token_that_the_teacher_lacks_is_refused(tokenizer: Any, tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", FLAT)
    fewer = int(FLAT.max())
    with pytest.raises(InputError, match=f"a.npy: token id {fewer}, but the teacher has only"):
        build(tmp_path / "store", tmp_path / "a.npy", tokenizer, teacher_vocab_size=fewer)
    build(tmp_path / "store2", tmp_path / "a.npy", tokenizer, teacher_vocab_size=fewer + 1)


def test_batches_of_any_size_give_the_same_lists(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lists = [[1, 2], [3], [4, 5, 6], [7], [8, 9], [10]]
    masks = [[token % 2 == 0 for token in tokens] for tokens in lists]
    table = pa.table({"tokens": lists, "mask": masks})
    with pa.ipc.new_file(tmp_path / "a.arrow", table.schema) as file:
        file.write_table(table)
    for rows in (1, 4, 100):
        monkeypatch.setattr(tables, "_BATCH_ROWS", rows)
        found = list(token_corpus.read_lists(tmp_path / "a.arrow", "tokens", "mask"))
        assert [document.tokens.tolist() for document in found] == lists
        assert [None if d.mask is None else d.mask.tolist() for d in found] == masks
