"""What a teacher's folder says about itself: everything that is not as it should be is one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from shards.errors import InputError
from teacher_dump.custom_code import custom_code_sha256
from teacher_dump.teacher import find_teacher


def write_config(folder: Path, **config: object) -> Path:
    config = {"architectures": ["LlamaForCausalLM"], "vocab_size": 300, **config}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def error_of(folder: Path) -> str:
    with pytest.raises(InputError) as error:
        find_teacher(str(folder), None)
    assert "\n" not in str(error.value)
    assert str(folder) in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"[]", "config.json: expected a JSON object, found []"),
        (b"null", "expected a JSON object, found null"),
        (b"7", "expected a JSON object, found 7"),
        (b'"text"', 'expected a JSON object, found "text"'),
        (b"{", "not JSON"),
        (b"", "not JSON"),
        (b'{"a": "\xff"}', "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
    ],
)
def test_a_config_that_is_no_object_is_one_line(
    content: bytes, reason: str, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_bytes(content)
    assert reason in error_of(tmp_path)


def test_a_folder_or_a_link_to_nothing_in_its_place_is_one_line(tmp_path: Path) -> None:
    assert "it has no config.json" in error_of(tmp_path)
    (tmp_path / "config.json").symlink_to(tmp_path / "gone")
    assert "config.json: missing" in error_of(tmp_path)
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").mkdir()
    assert "config.json: cannot be read (Is a directory)" in error_of(tmp_path)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"architectures": None}, "names no architecture"),
        ({"architectures": []}, "names no architecture"),
        ({"architectures": "LlamaForCausalLM"}, "expected a list of class names"),
        ({"architectures": [7]}, "expected a list of class names"),
        ({"architectures": {"a": "b"}}, "expected a list of class names"),
        ({"architectures": ["T5ForConditionalGeneration"]}, "is not a causal language model"),
        ({"architectures": ["BartForConditionalGeneration"]}, "is not a causal language model"),
        ({"architectures": ["T5EncoderModel"]}, "is not a causal language model"),
        ({"architectures": ["MarianMTModel"]}, "is not a causal language model"),
        ({"architectures": ["BertForMaskedLM"]}, "is not a causal language model"),
        ({"is_encoder_decoder": True}, "is not a causal language model"),
        ({"vocab_size": "300"}, 'vocab_size is "300", expected a whole number'),
        ({"max_position_embeddings": [1]}, "max_position_embeddings is [1]"),
        ({"text_config": [1]}, "text_config is not a JSON object"),
    ],
)
def test_a_config_of_something_else_is_one_line(
    config: dict[str, object], reason: str, tmp_path: Path
) -> None:
    assert reason in error_of(write_config(tmp_path, **config))


@pytest.mark.parametrize(
    "architecture",
    ["LlamaForCausalLM", "GPT2LMHeadModel", "Gemma3ForConditionalGeneration"],
)
def test_causal_models_are_taken_with_and_without_images(architecture: str, tmp_path: Path) -> None:
    folder = write_config(tmp_path, architectures=[architecture], n_positions=64)
    teacher = find_teacher(str(folder), None)
    assert (teacher.architecture, teacher.vocab_size) == (architecture, 300)
    assert teacher.max_length == 64


def test_an_auto_map_that_is_none_is_one_line_and_an_old_one_is_code(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer_config.json"
    for content in ("[]", "null", "7", "{"):
        path.write_text(content)
        with pytest.raises(InputError, match=r"tokenizer_config\.json: "):
            custom_code_sha256(tmp_path, trusted=True)
    path.write_text('{"auto_map": 7}')
    with pytest.raises(InputError, match="auto_map is 7, expected a JSON object"):
        custom_code_sha256(tmp_path, trusted=True)
    path.write_text('{"auto_map": [null, "tokenization.Fast"]}')
    with pytest.raises(InputError, match="contains Python code"):
        custom_code_sha256(tmp_path, trusted=False)
    assert custom_code_sha256(tmp_path, trusted=True)
