"""What `--corpus` stands for: every file is read, left out by name, or an error by name."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from shards.errors import InputError
from teacher_dump.corpus.kinds import Kind, kind_of
from teacher_dump.corpus.listing import list_corpus
from teacher_dump.corpus.summary import CorpusSummary

LINE = b'{"text": "w1 w2"}\n'


def make(folder: Path, *names: str) -> Path:
    """A folder with files of these names, each of one JSON line."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(LINE)
    return folder


def read(corpus: Path, **more: Any) -> list[str]:
    return [file.name for file in list_corpus([corpus], **more).files]


def left_out(corpus: Path) -> dict[str, list[str]]:
    """Names by the reason for leaving them out."""
    summary = list_corpus([corpus]).summary
    return {of.reason: [Path(name).name for name in of.names] for of in summary.left_out}


def refusal(*corpus: Path, out: Path | None = None) -> str:
    with pytest.raises(InputError) as error:
        list_corpus(corpus, out=out)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("compression", ["", ".gz", ".zst", ".zstd", ".bz2", ".xz", ".GZ"])
@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".ndjson", ".JSONL", ".Json"])
def test_json_lines_are_known_by_any_of_their_names(suffix: str, compression: str) -> None:
    assert kind_of(f"a{suffix}{compression}") is Kind.JSON_LINES


def test_other_kinds_are_known_in_any_case_and_not_compressed() -> None:
    names = {"a.PARQUET": Kind.PARQUET, "a.Arrow": Kind.ARROW, "a.TXT": Kind.TEXT}
    names |= {"a.MD": Kind.TEXT, "a.NPY": Kind.NUMPY, "a.BIN": Kind.FLAT}
    assert {name: kind_of(name) for name in names} == names
    for name in names:
        assert kind_of(f"{name}.gz") is None


def test_a_link_to_a_folder_is_followed(tmp_path: Path) -> None:
    elsewhere = make(tmp_path / "disk2", "b.jsonl")
    corpus = make(tmp_path / "corpus", "a.jsonl")
    (corpus / "part2").symlink_to(elsewhere)
    assert read(corpus) == ["a.jsonl", "part2/b.jsonl"]


@pytest.mark.parametrize("pattern", ["", "**/*.jsonl"])
def test_links_that_lead_back_end_where_they_began(pattern: str, tmp_path: Path) -> None:
    corpus = make(tmp_path / "corpus", "a.jsonl", "deep/b.jsonl")
    (corpus / "deep" / "up").symlink_to(corpus)
    (corpus / "self").symlink_to(corpus)
    assert read(corpus / pattern) == ["a.jsonl", "deep/b.jsonl"]


@pytest.mark.parametrize("name", ["shard.jsonl", "part2", "sub/photo.png"])
def test_a_link_to_nothing_is_an_error(name: str, tmp_path: Path) -> None:
    corpus = make(tmp_path / "corpus", "a.jsonl", "sub/b.jsonl")
    (corpus / name).symlink_to(tmp_path / "gone")
    for given in (corpus, corpus / name, corpus / "**"):
        assert f"{name}: is a broken link to {tmp_path}/gone" in refusal(given)


def test_a_folder_without_permission_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus = make(tmp_path / "corpus", "a.jsonl", "closed/b.jsonl")
    scandir = os.scandir

    def refuse(path: Any) -> Any:
        if Path(path).name == "closed":
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    for given in (corpus, corpus / "*", corpus / "**/*.jsonl"):
        assert "closed: cannot be read (Permission denied)" in refusal(given)


def test_a_file_without_permission_is_an_error_before_anything_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus = make(tmp_path / "corpus", "a.jsonl", "b.jsonl")
    opens = Path.open

    def refuse(path: Path, *more: Any, **options: Any) -> Any:
        if path.name == "b.jsonl":
            raise PermissionError(13, "Permission denied", str(path))
        return opens(path, *more, **options)

    monkeypatch.setattr(Path, "open", refuse)
    assert "b.jsonl: cannot be read (Permission denied)" in refusal(corpus)


def test_a_pipe_is_an_error_and_does_not_hang(tmp_path: Path) -> None:
    corpus = make(tmp_path / "corpus", "a.jsonl")
    os.mkfifo(corpus / "b.jsonl")
    for given in (corpus, corpus / "b.jsonl"):
        assert "b.jsonl: expected a regular file, found a pipe or device" in refusal(given)


def test_hidden_and_temporary_names_are_left_out_and_named(tmp_path: Path) -> None:
    hidden = [".a.jsonl", ".cache/a.jsonl", ".git/a.json"]
    temporary = ["b.jsonl.tmp", "c.part", "d.crdownload", "e.jsonl~", "f.incomplete", "g.lock"]
    corpus = make(tmp_path / "corpus", "a.jsonl", *hidden, *temporary)
    (corpus / ".dangling").symlink_to("gone")
    assert read(corpus) == ["a.jsonl"]
    assert left_out(corpus)["hidden"] == [".a.jsonl", ".cache", ".dangling", ".git"]
    of = {of.reason: of for of in list_corpus([corpus]).summary.left_out}
    assert (of["temporary"].files, len(of["temporary"].names)) == (6, 5)
    assert read(corpus / ".cache") == ["a.jsonl"]  # by name, everything can be given
    assert read(corpus / ".a.jsonl") == [".a.jsonl"]


@pytest.mark.parametrize(
    "name",
    ["a.csv", "a.tsv", "a.zip", "a.tar", "a.7z", "a.jsonl.lz4", "a.msgpack", "a.h5", "a.npz",
     "a.txt.gz", "a.parquet.zst", "a.tar.gz", "a.CSV", "a.feather", "a.html"],
)  # fmt: skip
def test_what_looks_like_data_is_named_and_refused_when_given(name: str, tmp_path: Path) -> None:
    corpus = make(tmp_path / "corpus", "b.jsonl", name)
    assert read(corpus) == ["b.jsonl"]
    assert left_out(corpus) == {"looks like data that this command does not read": [name]}
    assert f"{name}: not a kind of corpus file, expected .jsonl" in refusal(corpus / name)


@pytest.mark.parametrize(("log", "kind"), [("_delta_log", "Delta"), (".hoodie", "Hudi")])
@pytest.mark.parametrize("part", ["", "*.parquet"])
def test_a_table_whose_log_says_which_files_count_is_an_error(
    part: str, log: str, kind: str, tmp_path: Path
) -> None:
    (tmp_path / log).mkdir()
    (tmp_path / "part-0.parquet").write_bytes(b"")
    with pytest.raises(InputError, match=f"is a {kind} table, whose folder also holds rows"):
        list_corpus([tmp_path / part])


@pytest.mark.parametrize("names", [("a.jsonl", "a.jsonl.gz"), ("a.jsonl.gz", "a.jsonl.zst")])
def test_a_file_and_its_compressed_form_are_an_error(
    names: tuple[str, str], tmp_path: Path
) -> None:
    for name in (*names, "b.jsonl.gz"):
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(InputError, match=f"{names[1]}: seems to hold the documents of {names[0]}"):
        list_corpus([tmp_path])


def test_metadata_of_a_hub_dataset_is_left_out_and_named(tmp_path: Path) -> None:
    names = ["config.json", "dataset_dict.json", "dataset_info.json", "dataset_infos.json"]
    corpus = make(tmp_path / "corpus", "data/a.json", *names)
    assert read(corpus) == ["data/a.json"]
    assert left_out(corpus) == {"metadata": names}


def test_a_dataset_card_and_a_licence_beside_data_are_left_out_and_named(tmp_path: Path) -> None:
    cards = ["CONTRIBUTING.md", "LICENSE", "LICENSE.txt", "README.md", "README_zh.md"]
    corpus = make(tmp_path / "corpus", "data/a.parquet", "notes.txt", *cards)
    assert read(corpus) == ["data/a.parquet", "notes.txt"]
    assert left_out(corpus) == {"dataset card or licence": cards}


def test_among_plain_text_a_readme_is_a_document_and_named(tmp_path: Path) -> None:
    corpus = make(tmp_path / "corpus", "README.md", "a/README.md", "b.txt", "LICENSE")
    assert read(corpus) == ["README.md", "a/README.md", "b.txt"]
    summary = list_corpus([corpus]).summary
    assert summary.cards_read == (str(corpus / "README.md"), str(corpus / "a/README.md"))
    assert any(line.startswith("documents too ") for line in summary.lines())


@pytest.mark.parametrize(
    ("names", "splits", "give"),
    [
        (["train-00000-of-00002.parquet", "test-00000-of-00001.parquet"], "test, train", "train*"),
        (["data/train-0.parquet", "data/validation-0.parquet"], "train, validation", "data/train*"),
        (["train/a.jsonl", "test/b.jsonl"], "test, train", "train"),
        (["train.jsonl", "dev.jsonl"], "train, validation", "train*"),
        (["train.txt", "valid.txt"], "train, validation", "train*"),
        (["c4-train.00000-of-01024.json.gz", "c4-validation.0-of-8.json.gz"],
         "train, validation", "c4-train*"),
        (["en/wiki_Train_1.npy", "en/wiki_EVAL_1.npy"], "test, train", "en/wiki_Train*"),
        (["00.jsonl", "01.jsonl", "val.jsonl"], "validation", "val*"),
        (["a/00.bin", "test/00.bin"], "test", "test"),
        (["en.train.jsonl", "en.heldout.jsonl"], "held out, train", "en.train*"),
        (["part-0.jsonl", "holdout.jsonl"], "held out", "holdout*"),
        (["part-0.jsonl", "en.held-out.jsonl.gz"], "held out", "en.held-out*"),
        (["a_train_0.parquet", "a_held_out_0.parquet"], "held out, train", "a_train*"),
        (["wiki.train.raw.txt", "wiki.valid.raw.txt"], "train, validation", "wiki.train*"),
        (["wiki.Test.txt", "wiki.training-01.txt"], "test, train", "wiki.training*"),
    ],
)  # fmt: skip
def test_several_splits_side_by_side_are_an_error_that_names_them(
    names: list[str], splits: str, give: str, tmp_path: Path
) -> None:
    corpus = make(tmp_path / "corpus", *names)
    for given in (corpus, corpus / "**"):
        says = refusal(given)
        assert f"split{'s' if ',' in splits else ''} ({splits})" in says
        assert f"--corpus '{corpus / give}'" in says
    one = read(corpus / give)  # what is suggested works
    assert 0 < len(one) < len(names)
    assert len(list_corpus([corpus / name for name in names]).files) == len(names)  # all, by name


@pytest.mark.parametrize(
    "names",
    [
        ["train-travel.md", "test-cricket.md", "dev/notes.md"],  # documents about something
        ["en/train-0.parquet", "de/train-0.parquet"],
        ["latest.jsonl", "trainer.jsonl", "invalid.jsonl"],
        ["train.jsonl", "more.jsonl"],
        ["training.md", "evaluation.md", "testing.txt", "format.md"],  # pages of a manual
    ],
)
def test_names_that_only_look_like_splits_are_read(names: list[str], tmp_path: Path) -> None:
    assert sorted(read(make(tmp_path / "corpus", *names))) == sorted(names)


@pytest.mark.parametrize(
    ("names", "named"),
    [
        (["my_test.jsonl", "extra.jsonl"], ["my_test.jsonl"]),
        (["a.dev-2.jsonl", "b-held_out-1.json", "c.npy"], None),  # two splits
        (
            ["test-cricket.md", "train-vs-test.txt", "a.md"],
            ["test-cricket.md", "train-vs-test.txt"],
        ),
        (["wiki.valid.raw.txt", "notes.txt"], ["wiki.valid.raw.txt"]),
        (["dev/notes.md", "a.md"], ["dev/notes.md"]),
        (["my_test.jsonl", "your_test.jsonl"], []),  # there are no others
        (["latest.jsonl", "contest-1.jsonl", "invalid.jsonl", "devices.jsonl"], []),
        (["training-notes.txt", "attest.txt", "protest.md", "evaluate.me.txt"], []),
        (["holdouts.jsonl", "a.jsonl", "testament.txt", "greatest.hits.txt"], []),
    ],
)
def test_a_name_that_mentions_a_held_out_split_beside_others_is_said(
    names: list[str], named: list[str] | None, tmp_path: Path
) -> None:
    corpus = make(tmp_path / "corpus", *names)
    if named is None:
        assert "several splits" in refusal(corpus)
        return
    assert len(read(corpus)) == len(names)
    summary = list_corpus([corpus]).summary
    assert list(summary.splits_read) == [str(corpus / name) for name in named]
    said = [line for line in summary.lines() if line.startswith("read too       ")]
    shown = ", ".join(str(corpus / name) for name in named)
    assert said == [f"read too       {shown} (named like a validation or test split)"][: len(named)]


def test_a_pattern_stands_for_the_files_and_folders_that_match_it(tmp_path: Path) -> None:
    corpus = make(
        tmp_path / "corpus", "train-0.jsonl", "train-1.jsonl", "test-0.jsonl", "more/a.jsonl",
        "train-2.csv", ".train-3.jsonl",
    )  # fmt: skip
    assert read(corpus / "train-*") == ["train-0.jsonl", "train-1.jsonl"]
    assert read(corpus / "m?r[e]") == ["a.jsonl"]
    assert read(corpus / "**/a.*") == ["a.jsonl"]
    assert read(corpus / ".*") == [".train-3.jsonl"]
    assert left_out(corpus / "train-*") == {
        "looks like data that this command does not read": ["train-2.csv"],
        "hidden": [".train-3.jsonl"],
    }
    assert "no file matches this pattern" in refusal(corpus / "nothing-*")
    literal = make(tmp_path / "literal", "a[1].jsonl")
    assert read(literal / "a[1].jsonl") == ["a[1].jsonl"]


def test_a_relative_pattern_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path, "a.jsonl", "b.jsonl")
    monkeypatch.chdir(tmp_path)
    assert read(Path("*.jsonl")) == ["a.jsonl", "b.jsonl"]


def doubles(tmp_path: Path) -> Iterator[list[Path]]:
    corpus = make(tmp_path / "corpus", "a.jsonl", "sub/b.jsonl")
    link = tmp_path / "link"
    link.symlink_to(corpus)
    yield [corpus, corpus]
    yield [corpus, corpus / "sub"]
    yield [corpus / "sub" / "b.jsonl", corpus]
    yield [corpus, link]
    yield [corpus / "a*", corpus / "*.jsonl"]
    same = make(tmp_path / "same", "a.jsonl")
    (same / "b.jsonl").symlink_to(same / "a.jsonl")
    yield [same]
    hard = make(tmp_path / "hard", "a.jsonl")
    (hard / "b.jsonl").hardlink_to(hard / "a.jsonl")
    yield [hard]
    linked = make(tmp_path / "linked", "part/a.jsonl")
    (linked / "part2").symlink_to(linked / "part")
    yield [linked]


def test_a_file_that_is_given_twice_is_an_error_that_names_both(tmp_path: Path) -> None:
    for corpus in doubles(tmp_path):
        says = refusal(*corpus)
        assert "given twice" in says
        assert len(re.findall(r"\S+\.jsonl", says)) == 2 or len(corpus) == 2


def test_an_out_in_the_corpus_or_a_corpus_in_out_is_an_error_at_once(tmp_path: Path) -> None:
    corpus = make(tmp_path / "corpus", "a.jsonl", "sub/b.jsonl")
    link = tmp_path / "link"
    link.symlink_to(corpus)
    elsewhere = make(tmp_path / "elsewhere", "c.jsonl")
    linked = make(tmp_path / "linked", "d.jsonl")
    (linked / "part").symlink_to(elsewhere)
    for given, out in (
        (corpus, corpus), (corpus, corpus / "out"), (corpus, corpus / "not" / "yet"),
        (corpus, link / "out"), (link, corpus / "out"), (linked, elsewhere / "out"),
        (corpus / "*", corpus / "out"), (corpus / "**/*.jsonl", corpus / "sub" / "out"),
    ):  # fmt: skip
        assert f"{out}: is inside" in refusal(given, out=out) or given == out
    for given in (corpus / "sub", corpus / "sub" / "b.jsonl", corpus / "sub" / "*", link / "sub"):
        assert f"is inside --out {corpus}" in refusal(given, out=corpus)
    assert read(corpus, out=tmp_path / "out") == ["a.jsonl", "sub/b.jsonl"]
    assert read(corpus / "*.jsonl", out=corpus / "out") == ["a.jsonl"]


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12345\n"


@pytest.mark.parametrize(
    "name", ["a.jsonl", "a.json.gz", "a.parquet", "a.arrow", "a.txt", "a.npy", "a.bin", "a.idx"]
)
def test_a_pointer_in_place_of_a_file_is_an_error(name: str, tmp_path: Path) -> None:
    corpus = make(tmp_path / "corpus", "b.jsonl", *(["a.bin"] if name == "a.idx" else []))
    (corpus / name).write_bytes(POINTER)
    assert f"{name}: is a Git LFS pointer" in refusal(corpus)
    assert "run `git lfs pull`" in refusal(corpus)
    (corpus / name).write_bytes(b"/annex/objects/SHA256E-s1--00\n")
    assert "run `git annex get`" in refusal(corpus)


def test_an_index_without_its_tokens_is_an_error(tmp_path: Path) -> None:
    corpus = make(tmp_path / "corpus", "b.jsonl")
    (corpus / "a.idx").write_bytes(b"MMIDIDX\x00\x00 and so on")
    assert "a.idx: is the index of a.bin, which is missing" in refusal(corpus)
    assert "a.idx: not a kind of corpus file" in refusal(corpus / "a.idx")
    (corpus / "a.idx").write_bytes(b"something else")
    assert read(corpus) == ["b.jsonl"]
    (corpus / "a.BIN").write_bytes(b"")
    assert read(corpus) == ["a.BIN", "b.jsonl"]


def test_a_folder_without_a_corpus_file_says_so(tmp_path: Path) -> None:
    corpus = make(tmp_path / "corpus", "a.csv")
    says = refusal(corpus)
    assert "corpus: contains no corpus file, expected .jsonl" in says
    assert says.endswith("; left out: a.csv (looks like data that this command does not read)")
    make(corpus, "sub/b.csv", ".hidden.jsonl")
    assert refusal(make(tmp_path / "other", "c.jsonl"), corpus).endswith(
        "; left out: a.csv, sub/b.csv (looks like data that this command does not read),"
        " .hidden.jsonl (hidden)"
    )
    (tmp_path / "empty").mkdir()
    assert "left out" not in refusal(tmp_path / "empty")
    assert "missing: no such corpus file or folder" in refusal(tmp_path / "missing")


def test_the_summary_says_what_is_read_and_what_is_not(tmp_path: Path) -> None:
    corpus = make(tmp_path / "corpus", "a.jsonl", "b.json.gz", "c.parquet", "README.md", "d.csv")
    summary: CorpusSummary = list_corpus([corpus]).summary
    size = len(LINE)
    assert summary.lines() == [
        f"corpus         JSON lines: 2 files, {2 * size} bytes; Parquet: 1 file, {size} bytes",
        f"left out       {corpus}/d.csv (looks like data that this command does not read)",
        f"left out       {corpus}/README.md (dataset card or licence)",
    ]
    assert summary.to_json() == {
        "kinds": {
            "JSON lines": {"files": 2, "bytes": 2 * size},
            "Parquet": {"files": 1, "bytes": size},
        },
        "left_out": {
            "looks like data that this command does not read": {
                "files": 1, "names": [f"{corpus}/d.csv"],
            },
            "dataset card or licence": {"files": 1, "names": [f"{corpus}/README.md"]},
        },
    }  # fmt: skip
