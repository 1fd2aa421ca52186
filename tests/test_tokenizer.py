"""The teacher's ids are those of tokenizer.json, whatever class its configuration names."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import AutoTokenizer, LlamaConfig

from shards.errors import InputError
from shards.tokenizer.content import tokenizer_sha256
from teacher_dump.tokenizer import TeacherTokenizer, load_tokenizer
from teacher_dump.tokens.encoding import make_encoder

TEXTS = [
    "How are you doing?\nWe need to add 9 and 6 twice",
    "  two leading blanks, a\ttab, and an end\r\n\n\n",
    "1234567890 12,345.67 x2y3",
    "Grüße, naïve “quotes” — 日本語 \U0001f600 e\u0301 ﬁ",
    "don't DON'T we'LL <s> </s> <|endoftext|> ▁under",
    "",
]
BOS, EOS = "<|begin|>", "<|end|>"
CL100K = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def save(tokenizer: TeacherTokenizer, folder: Path) -> None:
    """What a dataset has of a tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in tokenizer.files().items():
        (folder / name).write_text(text, encoding="utf-8")


def byte_level(*before: Any, use_regex: bool = True) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    last = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*before, last])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=[BOS, EOS],
        show_progress=False,
    )
    tokenizer.train_from_iterator(
        [*TEXTS, "12345 67890 twice to add, and\n\n  to need"] * 3, trainer
    )
    return tokenizer


def cl100k_split() -> Tokenizer:
    return byte_level(pre_tokenizers.Split(Regex(CL100K), "isolated"), use_regex=False)


def digit_split() -> Tokenizer:
    return byte_level(pre_tokenizers.Digits(individual_digits=True))


def byte_fallback() -> Tokenizer:
    """As Llama 2 and Gemma have it: a blank is U+2581, and what is unknown becomes bytes."""
    pieces = [
        BOS,
        EOS,
        *(f"<0x{byte:02X}>" for byte in range(256)),
        *"▁abdenotwy",
        "▁a",
        "do",
        "▁do",
    ]
    merges = [("▁", "a"), ("d", "o"), ("▁", "do")]
    tokenizer = Tokenizer(
        models.BPE({p: i for i, p in enumerate(pieces)}, merges, byte_fallback=True, fuse_unk=True)
    )
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    tokenizer.add_special_tokens([BOS, EOS])
    return tokenizer


FILES = {f.__name__: f() for f in (byte_level, cl100k_split, digit_split, byte_fallback)}
CLASSES = ["LlamaTokenizerFast", "LlamaTokenizer", "GPT2Tokenizer", "Qwen2Tokenizer"]
OTHERS = ["GemmaTokenizerFast", "PreTrainedTokenizerFast", "NoSuchTokenizer", None]


def write_folder(folder: Path, tokenizer: Tokenizer, **settings: Any) -> Path:
    folder.mkdir(exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"bos_token": BOS, "eos_token": EOS, **settings}
    settings = {key: value for key, value in settings.items() if value is not None}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return folder


def ids_of(tokenizer: TeacherTokenizer, texts: list[str]) -> list[list[int]]:
    encodings = make_encoder(tokenizer).encode_batch_fast(texts, add_special_tokens=False)
    return [encoding.ids for encoding in encodings]


def auto_ids(folder: Path) -> list[list[int]]:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids: list[list[int]] = tokenizer(
        TEXTS, add_special_tokens=False, split_special_tokens=True
    ).input_ids
    return ids


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("name", [*CLASSES, *OTHERS])
def test_the_ids_are_those_of_the_file_for_every_class_and_in_the_datasets_copy_too(
    file: str, name: str | None, tmp_path: Path
) -> None:
    folder = write_folder(tmp_path / "teacher", FILES[file], tokenizer_class=name)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}), encoding="utf-8")
    expected = [FILES[file].encode(text).ids for text in TEXTS]
    tokenizer = load_tokenizer(folder)
    assert ids_of(tokenizer, TEXTS) == expected
    assert tokenizer.sha256 == tokenizer_sha256(FILES[file].to_str())
    assert tokenizer.vocab_size == FILES[file].get_vocab_size()
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1)

    copy = tmp_path / "copy"
    save(tokenizer, copy)
    assert (copy / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()
    assert auto_ids(copy) == expected
    LlamaConfig().save_pretrained(copy)  # as a student that is exported there
    assert auto_ids(copy) == expected
    assert load_tokenizer(copy).eos_token_id == 1


def test_transformers_gives_other_ids_for_such_a_folder(tmp_path: Path) -> None:
    """What the test above would notice."""
    folder = write_folder(tmp_path, FILES["byte_level"], tokenizer_class="LlamaTokenizerFast")
    assert auto_ids(folder) != [FILES["byte_level"].encode(text).ids for text in TEXTS]


def test_a_class_that_agrees_with_the_file_stays_in_the_datasets_copy(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "teacher", FILES["byte_level"], model_max_length=77)
    save(load_tokenizer(folder), tmp_path / "copy")
    copied = json.loads((tmp_path / "copy" / "tokenizer_config.json").read_text("utf-8"))
    assert copied == {"bos_token": BOS, "eos_token": EOS, "model_max_length": 77}


def test_a_folder_without_tokenizer_json_is_converted_by_its_class(tmp_path: Path) -> None:
    FILES["byte_level"].model.save(str(tmp_path))
    settings = {"tokenizer_class": "GPT2Tokenizer", "bos_token": BOS, "eos_token": EOS}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    tokenizer = load_tokenizer(tmp_path)
    expected = auto_ids(tmp_path)
    assert ids_of(tokenizer, TEXTS) == expected
    assert tokenizer.eos_token_id == 1
    save(tokenizer, tmp_path / "copy")
    assert auto_ids(tmp_path / "copy") == expected
    assert load_tokenizer(tmp_path / "copy").sha256 == tokenizer.sha256


def test_truncation_padding_and_dropout_in_the_file_change_no_ids(tmp_path: Path) -> None:
    tokenizer = byte_level()
    expected = [tokenizer.encode(text).ids for text in TEXTS]
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=64)
    tokenizer.model.dropout = 0.5
    loaded = load_tokenizer(write_folder(tmp_path / "teacher", tokenizer))
    for _ in range(20):
        assert ids_of(loaded, TEXTS) == expected
    save(loaded, tmp_path / "copy")
    for _ in range(20):
        assert auto_ids(tmp_path / "copy") == expected


def test_text_that_spells_a_special_token_is_encoded_as_text(tmp_path: Path) -> None:
    loaded = load_tokenizer(write_folder(tmp_path, FILES["byte_level"]))
    ((ids),) = ids_of(loaded, [f"a{EOS}b"])
    assert loaded.eos_token_id not in ids
    assert loaded.backend.decode(ids) == f"a{EOS}b"


def test_ids_above_the_last_one_do_not_exist_also_where_the_vocabulary_has_gaps(
    tmp_path: Path,
) -> None:
    vocabulary = {"<eos>": 0, "a": 5, "b": 9}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, "<eos>"))
    assert tokenizer.get_vocab_size() == 3
    loaded = load_tokenizer(write_folder(tmp_path, tokenizer, bos_token=None, eos_token="<eos>"))
    assert loaded.vocab_size == 10


def test_an_eos_that_is_in_the_vocabulary_alone_is_one(tmp_path: Path) -> None:
    tokenizer = Tokenizer(models.WordLevel({"<eos>": 0, "a": 1, "b": 2}, "<eos>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    folder = write_folder(tmp_path / "teacher", tokenizer, bos_token=None, eos_token="<eos>")
    loaded = load_tokenizer(folder)
    save(loaded, tmp_path / "copy")
    assert ids_of(loaded, ["a b c"]) == [[1, 2, 0]]
    assert AutoTokenizer.from_pretrained(tmp_path / "copy")("a b c").input_ids == [1, 2, 0]
    assert load_tokenizer(tmp_path / "copy").sha256 == loaded.sha256


def with_template() -> Tokenizer:
    tokenizer = byte_level()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, 0)]
    )
    return tokenizer


@pytest.mark.parametrize(
    ("tokenizer", "settings", "adds_bos"),
    [
        (byte_level(), {}, False),
        (byte_level(), {"add_bos_token": False}, False),
        (byte_level(), {"add_bos_token": True}, True),
        (with_template(), {}, True),
        (with_template(), {"bos_token": None}, False),
        (with_template(), {"bos_token": EOS}, False),
    ],
)
def test_whether_a_tokenizer_adds_bos_is_what_its_post_processor_does_or_its_settings_say(
    tokenizer: Tokenizer, settings: dict[str, Any], adds_bos: bool, tmp_path: Path
) -> None:
    folder = write_folder(
        tmp_path, tokenizer, tokenizer_class="PreTrainedTokenizerFast", **settings
    )
    assert load_tokenizer(folder).adds_bos is adds_bos


def test_special_tokens_come_from_the_older_file_and_from_the_class_as_well(tmp_path: Path) -> None:
    folder = write_folder(tmp_path, FILES["byte_level"], bos_token=None, eos_token=None)
    with pytest.raises(InputError, match="no end-of-document"):
        load_tokenizer(folder)
    special = {"bos_token": BOS, "eos_token": {"content": EOS, "lstrip": False}}
    (folder / "special_tokens_map.json").write_text(json.dumps(special), encoding="utf-8")
    assert (load_tokenizer(folder).bos_token_id, load_tokenizer(folder).eos_token_id) == (0, 1)

    tokenizer = byte_level()
    tokenizer.add_tokens([AddedToken("<|endoftext|>", special=True)])
    folder = tmp_path / "of the class"
    write_folder(folder, tokenizer, tokenizer_class="GPT2Tokenizer", bos_token=None, eos_token=None)
    assert load_tokenizer(folder).eos_token_id == tokenizer.token_to_id("<|endoftext|>")


def test_the_chat_template_is_read_from_either_place_and_kept_in_the_copy(tmp_path: Path) -> None:
    named = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "yes"}]
    folder = write_folder(tmp_path / "teacher", FILES["byte_level"], chat_template=named)
    assert load_tokenizer(folder).chat_template == "yes"
    (folder / "chat_template.jinja").write_text("{{ messages }}", encoding="utf-8")
    loaded = load_tokenizer(folder)
    assert loaded.chat_template == "{{ messages }}"
    save(loaded, tmp_path / "copy")
    assert AutoTokenizer.from_pretrained(tmp_path / "copy").chat_template == "{{ messages }}"


@pytest.mark.parametrize("name", [[1], {"a": 1}, None, 7])
def test_a_chat_template_of_an_odd_name_is_passed_over(name: object, tmp_path: Path) -> None:
    odd = [{"name": name}, 3, {"name": "default", "template": "yes"}, {"template": "no"}]
    folder = write_folder(tmp_path, FILES["byte_level"], chat_template=odd)
    assert load_tokenizer(folder).chat_template == "yes"
    folder = write_folder(tmp_path, FILES["byte_level"], chat_template=odd[:2])
    assert load_tokenizer(folder).chat_template is None


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (models.WordLevel({EOS: 0, "b": 1}, "<unk>"), "WordLevel error: Missing [UNK] token"),
        (models.WordLevel({}, "<unk>"), "WordLevel error: Missing [UNK] token"),
        (
            models.WordPiece({EOS: 0, "b": 1}, unk_token="<unk>"),
            "WordPiece error: Missing [UNK] token",
        ),
        (models.BPE({EOS: 0, "b": 1}, [], unk_token="<unk>"), "Unk token `<unk>` not found"),
        (models.Unigram([(EOS, 0.0), ("b", -1.0)]), "unknown token but `unk_id` is missing"),
    ],
)
def test_a_tokenizer_that_cannot_encode_is_named_with_the_reason(
    model: Any, reason: str, tmp_path: Path
) -> None:
    tokenizer = Tokenizer(model)
    tokenizer.add_special_tokens([EOS])
    loaded = load_tokenizer(write_folder(tmp_path / "teacher", tokenizer, bos_token=None))
    says = f"{tmp_path}/teacher: the tokenizer cannot encode the text ("
    with pytest.raises(InputError, match=re.escape(says) + f".*{re.escape(reason)}") as error:
        make_encoder(loaded).encode_batch_fast(["zz"])
    assert "\n" not in str(error.value)
    save(loaded, tmp_path / "copy")  # for a corpus of tokens, it will do
    with pytest.raises(InputError, match=re.escape(says)):
        load_tokenizer(write_folder(tmp_path / "teacher", tokenizer, bos_token=EOS))


def test_an_eos_that_is_no_token_of_the_file_is_refused(tmp_path: Path) -> None:
    folder = write_folder(tmp_path, FILES["byte_level"], eos_token="</s>")
    with pytest.raises(
        InputError, match=r"eos_token is '</s>', which is not a token of tokenizer\.j"
    ):
        load_tokenizer(folder)


@pytest.mark.parametrize("name", ["tokenizer_config.json", "special_tokens_map.json"])
@pytest.mark.parametrize("content", ["[]", "null", "7", "{", "", b"\xff\xfe"])
def test_a_settings_file_that_is_no_object_is_one_line(
    name: str, content: str | bytes, tmp_path: Path
) -> None:
    folder = write_folder(tmp_path, FILES["byte_level"])
    (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError) as error:
        load_tokenizer(folder)
    assert str(folder / name) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_folder_without_any_tokenizer_is_one_line_with_the_whole_reason(tmp_path: Path) -> None:
    LlamaConfig().save_pretrained(tmp_path)
    with pytest.raises(InputError, match="no tokenizer that transformers can load") as error:
        load_tokenizer(tmp_path)
    assert "\n" not in str(error.value)
    assert "expected tokenizer.json" in str(error.value)


def test_a_link_to_nothing_is_no_folder_without_tokenizer_json(tmp_path: Path) -> None:
    folder = write_folder(tmp_path, FILES["byte_level"])
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.json").symlink_to(tmp_path / "gone")
    with pytest.raises(InputError, match=r"tokenizer\.json: cannot be read \(No such file"):
        load_tokenizer(folder)
