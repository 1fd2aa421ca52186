"""Equal tokenizers hash the same however they are saved; what changes ids changes the hash."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers

from shards.errors import InputError
from shards.tokenizer.content import read_tokenizer, tokenizer_sha256

PIECES_OF_TEXT = ["<unk>", "a", "b", "c", "ab", "abc", "##b", "##c", " ", "c</w>"]
VOCABULARY = {piece: index for index, piece in enumerate(PIECES_OF_TEXT)}
MERGES = [("a", "b")]
NO_LETTERS = {"<unk>": 0, "?": 1, **{f"<0x{byte:02X}>": 2 + byte for byte in range(256)}}
PIECES = [("<unk>", 0.0), ("?", -1.0), *((f"<0x{byte:02X}>", -9.0) for byte in range(256))]


def bpe(vocabulary: dict[str, int] = VOCABULARY, merges: Any = MERGES, **options: Any) -> Tokenizer:
    return Tokenizer(models.BPE(vocabulary, merges, **options))


def word_piece(**options: Any) -> Tokenizer:
    return Tokenizer(models.WordPiece(VOCABULARY, **{"unk_token": "<unk>", **options}))


def with_added(**flags: Any) -> Tokenizer:
    """The token B-C, which a normalizer that knows no capitals cannot find."""
    tokenizer = bpe()
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "isolated")
    content = "BC" if flags.pop("capitals", False) else "bc"
    tokenizer.add_tokens([AddedToken(content, **{"normalized": False, **flags})])
    tokenizer.encode_special_tokens = True
    return tokenizer


def with_parts(**parts: Any) -> Tokenizer:
    tokenizer = bpe()
    for name, part in parts.items():
        setattr(tokenizer, name, part)
    return tokenizer


@pytest.mark.parametrize(
    ("one", "other", "text"),
    [
        (bpe(merges=[]), bpe(merges=[], ignore_merges=True), "abc"),
        (bpe(NO_LETTERS, []), bpe(NO_LETTERS, [], byte_fallback=True), "abc"),
        (
            bpe(NO_LETTERS, [], unk_token="<unk>"),
            bpe(NO_LETTERS, [], unk_token="<unk>", fuse_unk=True),
            "abc",
        ),
        (bpe(NO_LETTERS, []), bpe(NO_LETTERS, [], unk_token="<unk>"), "abc"),
        (bpe(), bpe(dropout=1.0), "abc"),
        (bpe(merges=[]), bpe(merges=[], continuing_subword_prefix="##"), "abc"),
        (bpe(), bpe(end_of_word_suffix="</w>"), "abc"),
        (bpe(), bpe(merges=[]), "abc"),
        (bpe(), bpe(merges=[("a", "b"), ("ab", "c")]), "abc"),
        (bpe(), bpe({**VOCABULARY, "ab": 5, "abc": 4}), "abc"),
        (word_piece(), word_piece(continuing_subword_prefix="b"), "acb"),
        (word_piece(), word_piece(max_input_chars_per_word=2), "abc"),
        (word_piece(), word_piece(unk_token="a"), "?"),
        (
            Tokenizer(models.WordLevel(VOCABULARY, "<unk>")),
            Tokenizer(models.WordLevel(VOCABULARY, "a")),
            "abcd",
        ),
        (word_piece(), Tokenizer(models.WordLevel(VOCABULARY, "<unk>")), "acb"),
        (Tokenizer(models.Unigram(PIECES, 0)), Tokenizer(models.Unigram(PIECES, 1)), "abc"),
        (
            Tokenizer(models.Unigram(PIECES, 0, False)),
            Tokenizer(models.Unigram(PIECES, 0, True)),
            "abc",
        ),
        (
            Tokenizer(models.Unigram([("u", 0.0), ("a", -1.0), ("b", -1.0), ("ab", -1.5)], 0)),
            Tokenizer(models.Unigram([("u", 0.0), ("a", -1.0), ("b", -1.0), ("ab", -3.0)], 0)),
            "ab",
        ),
        (bpe(), with_parts(normalizer=normalizers.Replace("b", "c")), "abc"),
        (bpe(), with_parts(pre_tokenizer=pre_tokenizers.Split("b", "isolated")), "abc"),
        (bpe(), with_added(), "abc"),
        (with_added(), with_added(single_word=True), "abc"),
        (with_added(), with_added(lstrip=True), "a bc"),
        (with_added(), with_added(rstrip=True), "abc a"),
        (with_added(), with_added(special=True), "abc"),
        (with_added(capitals=True), with_added(capitals=True, normalized=True), "abc"),
    ],
)
def test_what_changes_the_ids_of_a_text_changes_the_hash(
    one: Tokenizer, other: Tokenizer, text: str
) -> None:
    assert one.encode(text).ids != other.encode(text).ids
    assert tokenizer_sha256(one.to_str()) != tokenizer_sha256(other.to_str())


def saved(tokenizer: Tokenizer, **changes: Any) -> str:
    return json.dumps({**json.loads(tokenizer.to_str()), **changes})


def saved_model(tokenizer: Tokenizer, *left_out: str, **changes: Any) -> str:
    model = {**json.loads(tokenizer.to_str())["model"], **changes}
    return saved(tokenizer, model={k: v for k, v in model.items() if k not in left_out})


METASPACE = with_parts(pre_tokenizer=pre_tokenizers.Metaspace())
BYTE_LEVEL = with_parts(pre_tokenizer=pre_tokenizers.ByteLevel(add_prefix_space=False))
TWO_ADDED = with_added()
TWO_ADDED.add_special_tokens(["<eos>"])
UNIGRAM = Tokenizer(models.Unigram(PIECES, None))


BPE_OPTIONS = set(json.loads(bpe().to_str())["model"]) - {"vocab", "merges"}
NO_OPTIONS: dict[str, Any] = {"fuse_unk": None, "byte_fallback": None, "ignore_merges": None}
EARLY_METASPACE = {"type": "Metaspace", "replacement": "▁", "add_prefix_space": True}
EARLY_BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
REVERSED = json.loads(TWO_ADDED.to_str())["added_tokens"][::-1]


@pytest.mark.parametrize(
    ("tokenizer", "text"),
    [
        (bpe(), saved(bpe(), post_processor={"type": "ByteLevel"}, decoder={"type": "Fuse"})),
        (bpe(), saved(bpe(), truncation={"max_length": 512}, padding={"pad_id": 4})),
        (bpe(), saved(bpe(), version="0.9", added_tokens=None)),
        (TWO_ADDED, saved(TWO_ADDED, added_tokens=REVERSED)),
        (bpe(), json.dumps(json.loads(bpe().to_str()), sort_keys=True, indent=3)),
        (bpe(), saved_model(bpe(), merges=["a b"])),
        (bpe(), saved_model(bpe(), vocab=dict(reversed(VOCABULARY.items())))),
        (bpe(), saved_model(bpe(), *BPE_OPTIONS)),
        (bpe(), saved_model(bpe(), **NO_OPTIONS, dropout=0.0)),
        (bpe(), saved_model(bpe(), continuing_subword_prefix="", end_of_word_suffix="")),
        (word_piece(), saved_model(word_piece(), "type")),
        (UNIGRAM, saved_model(UNIGRAM, "unk_id", "byte_fallback", "type")),
        (BYTE_LEVEL, saved(BYTE_LEVEL, pre_tokenizer=EARLY_BYTE_LEVEL)),
        (METASPACE, saved(METASPACE, pre_tokenizer=EARLY_METASPACE)),
    ],
)
def test_the_same_tokenizer_saved_in_another_way_has_the_same_hash(
    tokenizer: Tokenizer, text: str
) -> None:
    assert tokenizer_sha256(text) == tokenizer_sha256(tokenizer.to_str())


def test_keys_that_nobody_knows_yet_count() -> None:
    texts = {
        bpe().to_str(),
        saved_model(bpe(), new_rule=True),
        saved_model(bpe(), new_rule=False),
        saved(bpe(), new_part={"type": "New"}),
    }
    assert len({tokenizer_sha256(text) for text in texts}) == len(texts)


@pytest.mark.parametrize("text", ["", "[]", "{}", "null", '{"model": {"type": "BPE"}}'])
def test_a_text_that_is_no_tokenizer_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="tokenizer"):
        tokenizer_sha256(text)


def test_the_file_itself_is_hashed_as_the_object_read_from_it_is(tmp_path: Path) -> None:
    for tokenizer in (TWO_ADDED, METASPACE, BYTE_LEVEL, UNIGRAM, word_piece()):
        path = tmp_path / "tokenizer.json"
        tokenizer.save(str(path))
        read = read_tokenizer(path, Tokenizer.from_str)
        assert tokenizer_sha256(path.read_text("utf-8")) == tokenizer_sha256(read.to_str())


def test_dropout_is_switched_off_so_that_a_text_has_the_same_ids_each_time(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    random = bpe(dropout=0.5)
    random.save(str(path))
    assert len({tuple(random.encode("ab").ids) for _ in range(100)}) == 2
    read = read_tokenizer(path, Tokenizer.from_str)
    assert {tuple(read.encode("ab").ids) for _ in range(100)} == {(VOCABULARY["ab"],)}
    assert tokenizer_sha256(read.to_str()) == tokenizer_sha256(bpe().to_str())


PANIC = saved_model(bpe(), vocab={"a": 0, "b": 1}, merges=["a b"], continuing_subword_prefix="##")
GAP = saved(
    bpe(), added_tokens=[{**json.loads(with_added().to_str())["added_tokens"][0], "id": 77}]
)
TWICE = saved_model(with_added(), vocab={**VOCABULARY, "c</w>": 10}, merges=["a b"])


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "EOF while parsing"),
        ("null", "invalid type: null"),
        ('{"version": "2.0"}', "Unknown tokenizer version '2.0'"),
        (saved_model(bpe(), merges=["a z"]), "Token `z` out of vocabulary"),
        (PANIC, "slice index starts at 1 but ends at 0"),
        (GAP, "added token 'bc' has id 77 in the file, but the library tokenizers gives it 10"),
        (TWICE, "added token 'bc' and a token of the vocabulary both have id 10"),
        ("version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        (b"\xff", "not UTF-8"),
        (None, "No such file"),
    ],
)
def test_a_broken_tokenizer_json_is_one_line_with_the_file_and_the_whole_reason(
    text: str | bytes | None, reason: str, tmp_path: Path
) -> None:
    path = tmp_path / "tokenizer.json"
    if text is not None:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(InputError) as error:
        read_tokenizer(path, Tokenizer.from_str)
    assert "\n" not in str(error.value)
    assert str(path) in str(error.value)
    assert reason in str(error.value)


def test_the_librarys_own_report_of_a_panic_is_not_printed(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text(PANIC, encoding="utf-8")
    code = (
        "import sys, pathlib, tokenizers, shards.tokenizer.content as t\n"
        "try: t.read_tokenizer(pathlib.Path(sys.argv[1]), tokenizers.Tokenizer.from_str)\n"
        "except t.InputError as error: print(error, file=sys.stderr)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, str(path)],
        capture_output=True, text=True, check=True, cwd=Path(__file__).parent.parent,
    )  # fmt: skip
    (line,) = result.stderr.splitlines()
    assert line.startswith(f"{path}: not a tokenizer")
