"""Weight files: which ones are the teacher's, and that each is whole before it is needed."""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import save_file

import cli
from shards.errors import InputError
from teacher_dump.weights import check_weights, has_plain_head, weights_sha256
from tests.tiny_teacher import dump_command, write_corpus

FILES = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 4096\n"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two files and their index, as transformers saves a large model."""
    folder = tmp_path / "teacher"
    folder.mkdir()
    weight_map = {}
    for number, name in enumerate(FILES):
        save_file({f"layer.{number}": torch.full((4, 4), number + 1.0)}, folder / name)
        weight_map[f"layer.{number}"] = name
    write_index(folder, weight_map)
    return folder


def write_index(folder: Path, weight_map: object, name: str = "model.safetensors") -> None:
    text = json.dumps({"metadata": {"total_size": 128}, "weight_map": weight_map})
    (folder / f"{name}.index.json").write_text(text, encoding="utf-8")


def error_of(folder: Path) -> str:
    with pytest.raises(InputError) as error:
        check_weights(folder)
    with pytest.raises(InputError) as again:
        weights_sha256(folder)
    assert str(error.value) == str(again.value)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_the_files_are_those_of_the_index(folder: Path) -> None:
    assert check_weights(folder) == list(FILES)


@pytest.mark.parametrize(
    "name",
    [
        *("training_args.bin", "optimizer.pt", "consolidated.00.pth", "consolidated.safetensors"),
        *("original/model.safetensors", "pytorch_model.bin", "adapter.safetensors", "rng.pth"),
    ],
)
def test_what_no_loader_reads_changes_nothing(name: str, folder: Path) -> None:
    before = weights_sha256(folder)
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_bytes(b"something else")
    assert weights_sha256(folder) == before


def test_other_weights_change_the_hash(folder: Path) -> None:
    before = weights_sha256(folder)
    save_file({"layer.1": torch.full((4, 4), 7.0)}, folder / FILES[1])
    assert weights_sha256(folder) != before


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_a_single_file_needs_no_index(name: str, tmp_path: Path) -> None:
    tensors = {"weight": torch.ones(3)}
    if name.endswith(".bin"):
        torch.save(tensors, tmp_path / name)
    else:
        save_file(tensors, tmp_path / name)
    assert check_weights(tmp_path) == [name]
    (tmp_path / "training_args.bin").write_bytes(b"x")
    assert check_weights(tmp_path) == [name]


@pytest.mark.parametrize(
    ("named", "other"),
    [
        ("model.safetensors", "model_backup.safetensors"),
        ("model.safetensors", "consolidated.safetensors"),
        ("pytorch_model.bin", "old_model.bin"),
        ("pytorch_model.bin", "adapter.safetensors"),
    ],
)
def test_what_vllm_would_load_too_is_refused(named: str, other: str, tmp_path: Path) -> None:
    tensors = {"weight": torch.ones(3)}
    for name in (named, other):
        if name.endswith(".bin"):
            torch.save(tensors, tmp_path / name)
        else:
            save_file(tensors, tmp_path / name)
    assert f"{other}: lies beside {named}, and vLLM would load it too" in error_of(tmp_path)


def test_a_file_of_the_same_size_and_time_is_hashed_again(folder: Path) -> None:
    before = weights_sha256(folder)
    path = folder / FILES[0]
    times = path.stat()
    save_file({"layer.0": torch.full((4, 4), 7.0)}, path)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert path.stat().st_size == times.st_size
    assert weights_sha256(folder) != before


def test_safetensors_are_read_before_pickles(folder: Path) -> None:
    torch.save({"other": torch.ones(1)}, folder / "pytorch_model.bin")
    assert check_weights(folder) == list(FILES)


def test_a_pickle_is_read_by_its_index(tmp_path: Path) -> None:
    torch.save({"weight": torch.ones(3)}, tmp_path / "part.bin")
    write_index(tmp_path, {"weight": "part.bin"}, "pytorch_model.bin")
    assert check_weights(tmp_path) == ["part.bin"]


def cut(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


def rewrite_header(path: Path, header: bytes) -> None:
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    path.write_bytes(len(header).to_bytes(8, "little") + header + data[8 + length :])


SIZE = 136  # of each file: 8, a header of 64 bytes, 4 x 4 float32


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda p: cut(p, 100), f"expected {SIZE} bytes, found 100"),
        (lambda p: cut(p, 20), "expected at least 72 bytes, found 20"),
        (lambda p: cut(p, 5), "expected at least 8 bytes, found 5"),
        (lambda p: cut(p, 0), "expected at least 8 bytes, found 0"),
        (lambda p: p.write_bytes(p.read_bytes() + b"more"), f"expected {SIZE} bytes, found 140"),
        (lambda p: p.write_bytes(b"<!doctype html>" * 9), "not safetensors, its header has"),
        (lambda p: rewrite_header(p, b"{"), "not a header of safetensors"),
        (lambda p: rewrite_header(p, b"[]"), "not a header of safetensors"),
        (lambda p: rewrite_header(p, b'{"a": 1}'), "not a header of safetensors"),
        (lambda p: rewrite_header(p, b"\xff\xff"), "not a header of safetensors"),
        (lambda p: p.write_text(LFS), "git lfs pull"),
        (lambda p: p.unlink(), "missing, but the index names it"),
        (lambda p: (p.unlink(), p.mkdir()), "Is a directory"),
        (lambda p: save_file({"other": torch.ones(1)}, p), "no tensor layer.1"),
    ],
)
def test_a_damaged_file_is_one_line_with_its_name(
    damage: Callable[[Path], object], reason: str, folder: Path
) -> None:
    assert (folder / FILES[1]).stat().st_size == SIZE
    damage(folder / FILES[1])
    message = error_of(folder)
    assert message.startswith(f"{folder / FILES[1]}: ")
    assert reason in message


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{", "not JSON"),
        ("[]", "expected a JSON object"),
        ("{}", "no weight_map"),
        ('{"weight_map": []}', "no weight_map"),
        ('{"weight_map": {}}', "no weight_map"),
        ('{"weight_map": {"a": 7}}', "a is in 7"),
        ('{"weight_map": {"a": "../other/model.safetensors"}}', "expected a file of the folder"),
        ('{"weight_map": {"a": "/model.safetensors"}}', "expected a file of the folder"),
    ],
)
def test_a_broken_index_is_one_line_with_its_name(text: str, reason: str, folder: Path) -> None:
    index = folder / "model.safetensors.index.json"
    index.write_text(text, encoding="utf-8")
    message = error_of(folder)
    assert message.startswith(f"{index}: ")
    assert reason in message


def test_a_pickle_that_is_cut_off_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "pytorch_model.bin"
    torch.save({"weight": torch.ones(100)}, path)
    assert zipfile.is_zipfile(path)
    cut(path, 300)
    assert "truncated" in error_of(tmp_path)
    path.write_bytes(b"")
    assert "empty" in error_of(tmp_path)


def test_a_file_beside_an_index_of_others_is_refused(folder: Path) -> None:
    save_file({"layer.0": torch.ones(1)}, folder / "model.safetensors")
    assert "remove the one that is not the teacher's" in error_of(folder)
    write_index(folder, {"layer.0": "model.safetensors"})
    assert check_weights(folder) == ["model.safetensors"]


def test_a_folder_without_weights_is_refused(tmp_path: Path) -> None:
    (tmp_path / "training_args.bin").write_bytes(b"x")
    assert "contains no weights, expected model.safetensors or pytorch_model.bin" in error_of(
        tmp_path
    )


def test_hashes_are_cached_where_there_is_a_home_and_computed_where_there_is_none(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache" / "logitshards" / "weights.json"
    expected = weights_sha256(folder)
    assert len(json.loads(cache.read_text())) == 2
    for content in ("[]", "null", '{"x": 1}', "{", json.dumps({str(folder / FILES[0]): 7})):
        cache.write_text(content)
        assert weights_sha256(folder) == expected
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.delenv("HOME", raising=False)

    def nobody(_: int) -> None:
        raise KeyError("getpwuid(): uid not found")

    monkeypatch.setattr("pwd.getpwuid", nobody)
    with pytest.raises(RuntimeError):
        Path.home()
    assert weights_sha256(folder) == expected


def test_a_pointer_shows_before_the_corpus_is_tokenised(tiny_teacher: Path, tmp_path: Path) -> None:
    teacher = tmp_path / "teacher"
    teacher.mkdir()
    for path in tiny_teacher.iterdir():
        os.link(path, teacher / path.name)
    weights = teacher / "model.safetensors"
    weights.unlink()
    weights.write_text(LFS)
    corpus = write_corpus(tmp_path / "corpus.jsonl", num_documents=3)
    out = tmp_path / "out"
    result = CliRunner().invoke(cli.dump_logits, dump_command(teacher, corpus, out)[3:])
    assert result.exit_code == 2
    (line,) = result.output.splitlines()
    assert str(weights) in line
    assert "git lfs pull" in line
    assert not out.exists()


FLOATS = torch.zeros(2, 2, dtype=torch.bfloat16)
WORDS = torch.zeros(2, 2, dtype=torch.int32)


@pytest.mark.parametrize(
    ("tensors", "plain"),
    [
        ({"lm_head.weight": FLOATS, "model.layers.0.mlp.qweight": WORDS}, True),
        ({"language_model.lm_head.weight": FLOATS, "language_model.lm_head.bias": FLOATS}, True),
        ({"model.embed_tokens.weight": FLOATS.half(), "layer.qweight": WORDS}, True),  # tied
        ({"lm_head.qweight": WORDS, "lm_head.scales": FLOATS}, False),  # GPTQ, AWQ
        ({"lm_head.weight_packed": WORDS, "lm_head.weight_scale": FLOATS}, False),
        ({"lm_head.weight": FLOATS.to(torch.float8_e4m3fn)}, False),
        ({"lm_head.weight": FLOATS, "lm_head.weight_scale": FLOATS}, False),
        ({"lm_head.qweight": WORDS, "model.embed_tokens.weight": FLOATS}, False),
        ({"model.embed_tokens.weight_packed": WORDS}, False),
        ({"output_layer.weight": FLOATS}, False),  # a name that nobody here knows
    ],
)
def test_a_head_is_plain_if_it_holds_floats_alone(
    tensors: dict[str, torch.Tensor], plain: bool, tmp_path: Path
) -> None:
    copies = {name: tensor.clone() for name, tensor in tensors.items()}  # no memory twice
    save_file(copies, tmp_path / "model.safetensors")
    assert has_plain_head(tmp_path) == plain


def test_a_head_is_found_in_whichever_file_it_is(folder: Path) -> None:
    save_file({"lm_head.weight": FLOATS}, folder / FILES[1])
    write_index(folder, {"layer.0": FILES[0], "lm_head.weight": FILES[1]})
    assert has_plain_head(folder)


def test_a_head_that_is_no_safetensors_is_not_known_to_be_plain(tmp_path: Path) -> None:
    torch.save({"lm_head.weight": FLOATS}, tmp_path / "pytorch_model.bin")
    assert not has_plain_head(tmp_path)
