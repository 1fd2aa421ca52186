"""A student folder's tokenizer is compared by its tokenizer.json, wherever it has one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, LlamaConfig

from shards.dataset import Dataset
from shards.errors import IdentityMismatchError, InputError
from student_train.model.model import export, make_student
from student_train.model.student_tokenizer import check_tokenizer
from tests.tiny_dataset import make_dataset, make_tokenizer


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return Dataset.open(make_dataset(tmp_path_factory.mktemp("datasets") / "tiny", train=2))


def test_the_class_that_a_folder_names_does_not_matter_where_there_is_a_tokenizer_json(
    dataset: Dataset, tmp_path: Path
) -> None:
    make_tokenizer(tmp_path)
    for name in ("LlamaTokenizerFast", "GPT2Tokenizer", "NoSuchTokenizer"):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": name}))
        check_tokenizer(tmp_path, dataset)


def test_an_option_of_the_model_is_a_difference(dataset: Dataset, tmp_path: Path) -> None:
    make_tokenizer(tmp_path)
    path = tmp_path / "tokenizer.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    content["model"]["unk_token"] = "word1"
    path.write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(IdentityMismatchError, match="has another tokenizer"):
        check_tokenizer(tmp_path, dataset)


def test_a_folder_without_tokenizer_json_is_read_as_transformers_reads_it(
    dataset: Dataset, tmp_path: Path
) -> None:
    tokenizer = Tokenizer(models.BPE({"a": 0, "b": 1, "ab": 2}, [("a", "b")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.model.save(str(tmp_path))
    settings = {"tokenizer_class": "GPT2Tokenizer"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(IdentityMismatchError, match="has another tokenizer"):
        check_tokenizer(tmp_path, dataset)


@pytest.mark.parametrize("content", [None, "", "[]", '{"version": "1.0"}'])
def test_a_missing_or_broken_tokenizer_is_one_line(
    content: str | None, dataset: Dataset, tmp_path: Path
) -> None:
    LlamaConfig().save_pretrained(tmp_path)
    if content is not None:
        (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(
        InputError, match="not a tokenizer" if content is not None else "no token"
    ) as e:
        check_tokenizer(tmp_path, dataset)
    assert "\n" not in str(e.value)
    assert str(tmp_path) in str(e.value)


def test_a_config_of_no_causal_model_is_one_short_line(dataset: Dataset, tmp_path: Path) -> None:
    file = tmp_path / "student.json"
    file.write_text('{"model_type": "t5"}')
    with pytest.raises(InputError, match="not a causal language model") as error:
        make_student(str(file), dataset, seed=0)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 400


def test_an_exported_student_has_the_datasets_ids(dataset: Dataset, tmp_path: Path) -> None:
    export(make_student("demo", dataset, seed=0), dataset, tmp_path)
    check_tokenizer(tmp_path, dataset)
    assert AutoTokenizer.from_pretrained(tmp_path)("word3 word5").input_ids == [3, 5]
