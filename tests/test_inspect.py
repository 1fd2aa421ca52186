"""The figures of a description are those of the rows, and a check finds what is damaged."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from logitshards.decoding import token_decoder
from shards.dataset import Dataset
from shards.errors import ShardError, ShardFormatError
from shards.inspect import describe, find_row, format_row, render, verify
from shards.keep import Draws, Threshold, Tokens, TopPK
from shards.options import OptionError
from tests.strategies import example_row, make_spec, write_dataset
from tests.tiny_dataset import make_dataset

SPEC = make_spec(sequences_per_shard=4, sequences_per_row_group=3)


@pytest.fixture
def path(tmp_path):
    write_dataset(tmp_path / "dataset", SPEC, train=6, validation=2)
    return tmp_path / "dataset"


def drop(path, split, shard):
    """Remove a shard by hand."""
    for suffix in ("json", "parquet"):
        (path / split / f"shard-{shard:06}.{suffix}").unlink()


def check_figures(figures, rows, files):
    tokens = sum(len(row.counts) for row in rows)
    assert figures["sequences"] == len(rows)
    assert figures["tokens"] == tokens
    assert figures["entries"] == sum(len(row.ids) for row in rows)
    assert figures["bytes"] == sum(file.stat().st_size for file in files)
    assert figures["entries_per_token"] == figures["entries"] / tokens
    assert figures["bytes_per_token"] == figures["bytes"] / tokens
    assert figures["teacher_cross_entropy"] == pytest.approx(
        sum(row.teacher_nll for row in rows) / tokens
    )
    assert figures["teacher_entropy"] == pytest.approx(
        sum(row.teacher_entropy for row in rows) / tokens
    )
    kept = sum((1 - np.exp(row.tail_logmass.astype(float))).sum() for row in rows)
    assert figures["kept_mass"] == pytest.approx(kept / tokens)
    assert 0 < sum(figures["columns"].values()) < figures["bytes_per_token"]
    assert figures["missing_shards"] == 0


def test_a_dataset_is_described_as_a_whole_and_by_split(path):
    description = describe(path)
    train, validation = ([example_row(i) for i in range(n)] for n in (6, 2))
    check_figures(description, train + validation, path.glob("*/*.parquet"))
    check_figures(description["splits"]["train"], train, path.glob("train/*.parquet"))
    check_figures(
        description["splits"]["validation"], validation, path.glob("validation/*.parquet")
    )
    assert description["spec"] == SPEC.to_json()
    assert description["recorded"] == [{"engine": "example"}]
    assert json.loads(json.dumps(description, allow_nan=False)) == description


def test_a_dataset_without_entropies_is_sound_and_shows_none(tmp_path):
    path = tmp_path / "dataset"
    spec = make_spec(sequences_per_shard=4, sequences_per_row_group=3, has_entropy=False)
    write_dataset(path, spec, train=6, validation=2)
    assert verify(path) == []
    description = describe(path)
    assert description["teacher_entropy"] is None
    assert description["teacher_cross_entropy"] > 0
    assert not {"teacher_entropy", "entropies"} & set(description["columns"])
    (line,) = [line for line in render(description).splitlines() if "teacher entropy" in line]
    assert line.split()[-2:] == ["-", "-"]


def test_one_shard_is_described_alone(path):
    shard = path / "train" / "shard-000001.parquet"
    description = describe(shard)
    check_figures(description, [example_row(i) for i in (4, 5)], [shard])
    assert (description["split"], description["shard"]) == ("train", 1)
    assert description["spec"] == SPEC.to_json()


def test_an_incomplete_dataset_is_described_as_far_as_it_is(path):
    drop(path, "train", 0)
    description = describe(path)
    assert description["missing_shards"] == 1
    assert description["splits"]["train"]["sequences"] == 2
    drop(path, "train", 1)
    train = describe(path)["splits"]["train"]
    assert (train["missing_shards"], train["tokens"], train["kept_mass"]) == (2, 0, None)
    assert "-" in render(describe(path))


def test_what_is_neither_a_dataset_nor_a_shard_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("hello")
    for call in (describe, verify):
        with pytest.raises(ShardFormatError, match="not a dataset"):
            call(tmp_path)
        with pytest.raises(ShardFormatError, match="not a dataset"):
            call(tmp_path / "absent")
    with pytest.raises(ShardError):
        describe(tmp_path / "notes.txt")


@pytest.mark.parametrize("check", [describe, verify, lambda path: find_row(path, None, 0)])
def test_the_sidecar_of_a_sound_shard_is_no_damaged_shard(path, check):
    file = path / "train" / "shard-000000.json"
    try:
        (text,) = check(file)
    except ShardFormatError as error:
        text = str(error)
    assert text == f"{file}: not a shard; the name of a shard ends with .parquet"


def test_a_row_of_a_shard_is_not_of_another_split(path):
    file = path / "validation" / "shard-000000.parquet"
    row, _ = find_row(file, "validation", 1)
    assert (row.tokens == example_row(1).tokens).all()
    with pytest.raises(OptionError, match=r"split train: .* is a shard of validation"):
        find_row(file, "train", 1)


def test_the_text_names_every_split_column_and_part_of_the_spec(path):
    text = render(describe(path))
    for expected in (
        "train",
        "validation",
        "label_logprobs",
        "entropies",
        "teacher.kind: model",
        "keep.method: top-p-k",
        "keep.top_k: 100",
        "documents.bos: none",
        "engine: example",
    ):
        assert expected in text
    assert "shard" in render(describe(path / "train" / "shard-000000.parquet"))


def test_an_intact_dataset_or_shard_has_no_problems(path):
    assert verify(path) == []
    assert verify(path / "train" / "shard-000000.parquet") == []


def test_every_problem_is_one_line_that_names_the_file(path):
    drop(path, "validation", 0)
    for name in ("shard-000000", "shard-000001"):
        shard = path / "train" / f"{name}.parquet"
        content = bytearray(shard.read_bytes())
        content[100] ^= 1
        shard.write_bytes(content)
    problems = verify(path)
    assert len(problems) == 3
    for problem, name in zip(problems, ("000000", "000001", "validation"), strict=True):
        assert name in problem
        assert "\n" not in problem
    assert verify(path / "train" / "shard-000000.parquet") == problems[:1]


def test_a_damaged_sidecar_of_the_last_shard_hides_no_other_problem(path):
    sidecar = path / "validation" / "shard-000000.json"
    sidecar.write_text(sidecar.read_text().replace('"tokens": ', '"tokens": 1'))
    shard = path / "train" / "shard-000000.parquet"
    content = shard.read_bytes()
    shard.write_bytes(content[:-1])
    problems = verify(path)
    assert len(problems) == 2
    assert shard.name in problems[0]
    assert f"{sidecar}: damaged" in problems[1]
    assert "delete it" in problems[1]
    shard.write_bytes(content)
    with pytest.raises(ShardError, match="delete it"):
        describe(path)
    sidecar.unlink()
    assert describe(path)["missing_shards"] == 1


def test_a_dataset_of_tokens_alone_is_sound_and_shows_what_there_is(tmp_path):
    path = make_dataset(tmp_path / "dataset", tokens_only=True, masked=True)
    assert verify(path) == []
    description = describe(path)
    assert description["spec"]["teacher"] is None
    assert description["spec"]["keep"] == {"method": "tokens"}
    with Dataset.open(path).split("train") as split:
        rows = list(split.rows())
    figures = description["splits"]["train"]
    assert figures["tokens"] == sum(row.loss_mask.sum() for row in rows)
    assert figures["entries"] == figures["entries_per_token"] == 0
    for name in ("teacher_cross_entropy", "teacher_entropy", "kept_mass"):
        assert figures[name] is None
    assert set(description["columns"]) == {
        *("sequence", "tokens", "segments", "loss_mask", "positions")
    }
    assert json.loads(json.dumps(description, allow_nan=False)) == description
    text = render(description)
    for expected in ("keep.method: tokens", "teacher: None", "segments"):
        assert expected in text
    (line,) = [line for line in text.splitlines() if "kept mass" in line]
    assert line.split()[-2:] == ["-", "-"]
    shard = describe(path / "train" / "shard-000000.parquet")
    assert shard["spec"] == description["spec"]
    assert "segments" in render(shard)


def test_a_row_of_tokens_alone_is_shown_token_by_token(tmp_path):
    path = make_dataset(tmp_path / "dataset", tokens_only=True)
    with Dataset.open(path).split("train") as split:
        row = split.row(3)
    lines = format_row(row, Tokens(), lambda i: f"<{i}>").splitlines()
    assert lines[:3] == ["sequence 3: 16 positions", "", "token             label"]
    assert len(lines) == 3 + 16
    for t, line in enumerate(lines[3:]):
        assert line.split() == [f"'<{row.tokens[t]}>'", f"'<{row.tokens[t + 1]}>'"]


def test_a_row_is_shown_position_by_position():
    row = example_row(3, num_tokens=5, most_entries=4)
    lines = format_row(row, TopPK(), lambda i: f"<{i}>", num_predictions=2).splitlines()
    assert lines[0] == "sequence 3: 4 positions"
    positions = lines[3:]
    assert len(positions) == 4
    ends = np.cumsum(row.counts)
    for t, line in enumerate(positions):
        assert line.startswith(f"'<{row.tokens[t]}>'")
        assert f"'<{row.tokens[t + 1]}>'" in line
        assert f"{100 * np.exp(row.label_logprobs[t]):.2f}" in line
        kept = row.ids[ends[t] - row.counts[t] : ends[t]]
        for i, token in enumerate(kept):
            assert (f"'<{token}>' " in line) == (i < 2)


def test_entries_that_were_drawn_by_chance_are_marked():
    row = example_row(0, num_tokens=2, most_entries=0)
    likely = [np.log(0.5), np.log(0.05), np.log(0.05)]
    row = replace(row, counts=[3], ids=[7, 8, 9], logprobs=np.array(likely, np.float32))
    shown = {
        keep.method: format_row(row, keep, str).splitlines()[2:]
        for keep in (TopPK(), Threshold(threshold=0.05), Draws())
    }
    assert shown["top-p-k"][0].endswith("leading predictions, %")
    assert shown["top-p-k"][1].endswith("'7' 50.0  '8' 5.0  '9' 5.0")
    assert shown["threshold"][0].endswith("leading predictions, %; ~ drawn by chance")
    assert shown["threshold"][1].endswith("'7' 50.0  '8' ~5.0  '9' ~5.0")
    assert shown["draws"][1].endswith("'7' ~50.0  '8' ~5.0  '9' ~5.0")


def test_a_token_with_a_line_end_stays_on_its_line_and_a_long_one_is_cut():
    row = example_row(0, num_tokens=3, most_entries=0)
    lines = format_row(row, TopPK(), lambda i: "\n" * 40).splitlines()
    assert len(lines) == 5
    assert "..." in lines[3]


def test_a_label_that_does_not_count_has_no_probability():
    row = example_row(0)
    row = replace(row, loss_mask=np.arange(len(row.counts)) != 1)
    lines = format_row(row, TopPK(), str).splitlines()[3:]
    assert [" - " in line for line in lines] == [t == 1 for t in range(len(lines))]


def test_predictions_at_another_temperature_than_the_label_say_so():
    text = format_row(example_row(0), Draws(temperature=2.0), str)
    assert "leading predictions at temperature 2, %; ~ drawn by chance" in text


@pytest.fixture
def folder_of_words(path):
    """A dataset whose tokenizer drops the space at the start of a text, as that of Llama 2."""
    from tokenizers import Tokenizer, decoders, models

    tokenizer = Tokenizer(models.BPE({"<unk>": 0, "the": 1, "\u2581the": 2, "\u2581": 3}, []))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.save(str(path / "tokenizer" / "tokenizer.json"))
    return path


def test_tokens_that_differ_by_a_space_look_different(folder_of_words):
    decode = token_decoder(folder_of_words)
    assert [decode(token) for token in (1, 2, 3, 0)] == ["the", " the", " ", "<unk>"]


def test_the_tokenizer_of_a_shard_is_found_from_its_own_folder(folder_of_words, monkeypatch):
    monkeypatch.chdir(folder_of_words / "train")
    assert token_decoder(Path("shard-000000.parquet"))(2) == " the"
