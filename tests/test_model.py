"""Students: presets, config files and folders; what is refused and how it is named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    GraniteConfig,
    LlamaConfig,
    LlamaForCausalLM,
    OlmoeConfig,
    PhiConfig,
    PretrainedConfig,
)

from shards.dataset import Dataset
from shards.errors import InputError
from student_train.model.model import (
    default_learning_rate,
    export,
    head_weight,
    hidden_states,
    make_student,
    num_parameters,
)
from student_train.model.presets import PRESETS
from tests.capped_model import assert_capped, write_capped_model
from tests.strategies import make_spec
from tests.tiny_dataset import SEQUENCE_LENGTH, make_dataset, make_tokenizer

SMALL: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 0,
    "eos_token_id": 0,
}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return Dataset.open(make_dataset(tmp_path_factory.mktemp("datasets") / "tiny", train=2))


def write_config(config: PretrainedConfig, folder: Path) -> str:
    config.save_pretrained(folder)
    return str((folder / "config.json").rename(folder / "student.json"))


def make_folder(folder: Path, **changes: Any) -> Path:
    LlamaForCausalLM(LlamaConfig(**{**SMALL, **changes})).save_pretrained(folder)
    make_tokenizer(folder)
    return folder


@pytest.mark.parametrize(
    ("name", "vocab_size", "least", "most"),
    [
        ("330M", 151_552, 320e6, 340e6),
        ("670M", 151_552, 650e6, 690e6),
        ("1.9B", 151_552, 1.85e9, 1.95e9),
        ("3.8B", 151_552, 3.7e9, 3.9e9),
        ("6.8B", 151_552, 6.7e9, 6.9e9),
    ],
)
def test_presets_are_as_large_as_their_names_say(
    name: str, vocab_size: int, least: float, most: float
) -> None:
    with torch.device("meta"):
        config = PRESETS[name].config_json(make_spec(vocab_size=vocab_size))
        model = LlamaForCausalLM(LlamaConfig(**config))
    assert least <= num_parameters(model)[0] <= most


def test_the_demo_student_has_a_million_parameters_beside_its_embedding(dataset: Dataset) -> None:
    model = make_student("demo", dataset, seed=0)
    assert 0.9e6 <= num_parameters(model)[1] <= 1.1e6
    assert len(head_weight(model)) == 64
    assert default_learning_rate("demo") > 0


def test_fresh_weights_depend_on_the_seed_alone(dataset: Dataset) -> None:
    first, again, other = (make_student("demo", dataset, seed) for seed in (0, 0, 1))
    assert torch.equal(head_weight(first), head_weight(again))
    assert not torch.equal(head_weight(first), head_weight(other))


@pytest.mark.parametrize(
    "config",
    [
        LlamaConfig(**SMALL),
        LlamaConfig(**SMALL, tie_word_embeddings=True),
        GPTNeoXConfig(**SMALL),
        GPT2Config(vocab_size=64, n_embd=16, n_layer=1, n_head=2, n_positions=64),
        Gemma2Config(**SMALL, final_logit_softcapping=None),
    ],
    ids=lambda config: config.model_type,
)
def test_config_files_of_several_families_make_students(
    dataset: Dataset, tmp_path: Path, config: PretrainedConfig
) -> None:
    model = make_student(write_config(config, tmp_path), dataset, seed=0).eval()
    tokens = torch.tensor([[1, 2, 3]])
    with torch.no_grad():
        product = hidden_states(model, tokens) @ head_weight(model).T
        torch.testing.assert_close(product, model(tokens).logits)


@pytest.mark.parametrize(
    "config",
    [
        LlamaConfig(**SMALL, is_causal=False),
        Gemma3TextConfig(**SMALL, use_bidirectional_attention=True),
    ],
    ids=lambda config: config.model_type,
)
def test_a_model_that_would_read_its_labels_is_refused(
    dataset: Dataset, tmp_path: Path, config: PretrainedConfig
) -> None:
    with pytest.raises(InputError, match="sees the tokens after a position"):
        make_student(write_config(config, tmp_path), dataset, seed=0)


def test_the_padding_id_gets_the_gradient_of_any_token(dataset: Dataset, tmp_path: Path) -> None:
    student = make_student(write_config(LlamaConfig(**SMALL), tmp_path), dataset, seed=0)
    config = LlamaConfig(**{**SMALL, "pad_token_id": None})
    expected = LlamaForCausalLM(config)
    expected.load_state_dict(student.state_dict())
    tokens = torch.tensor([[3, 0, 5, 0]])
    for model in (student, expected):
        hidden_states(model, tokens).square().sum().backward()  # type: ignore[no-untyped-call]
    found, wanted = (m.get_input_embeddings().weight.grad for m in (student, expected))
    assert wanted[0].abs().max() > 0
    torch.testing.assert_close(found, wanted)
    weight = student.get_input_embeddings().weight
    assert 0.5 < weight[0].std() / weight.std() < 2


def test_a_loss_of_experts_that_is_left_out_is_a_warning(
    dataset: Dataset, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    small = {key: value for key, value in SMALL.items() if key != "head_dim"}
    for wanted in (False, True):
        config = OlmoeConfig(**small, output_router_logits=wanted, num_experts=8)
        make_student(write_config(config, tmp_path), dataset, seed=0)
        assert ("router_aux_loss_coef 0.01 has no effect" in caplog.text) == wanted


def test_attention_logits_are_capped_in_training_as_they_are_afterwards(
    dataset: Dataset, tmp_path: Path
) -> None:
    write_capped_model(tmp_path / "model")
    make_tokenizer(tmp_path / "model")
    tokens = torch.arange(12)[None]
    model = make_student(str(tmp_path / "model"), dataset, seed=0).eval()
    with torch.no_grad():
        assert_capped(model(tokens).logits, tmp_path / "model", tokens)
    fresh = make_student(str(tmp_path / "model" / "config.json"), dataset, seed=0).eval()
    fresh.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert_capped(fresh(tokens).logits, tmp_path / "model", tokens)


@pytest.mark.parametrize(
    ("config", "match"),
    [
        (Gemma2Config(**SMALL), "final_logit_softcapping 30"),
        (GraniteConfig(**SMALL, logits_scaling=8.0), "logits_scaling 8"),
        (CohereConfig(**SMALL, logit_scale=0.0625), "logit_scale 0.0625"),
        (
            PhiConfig(**{key: SMALL[key] for key in SMALL if key != "head_dim"}),
            "a bias of the head",
        ),
    ],
    ids=lambda value: getattr(value, "model_type", ""),
)
def test_a_model_whose_logits_are_not_a_plain_product_is_refused_by_name(
    dataset: Dataset, tmp_path: Path, config: PretrainedConfig, match: str
) -> None:
    with pytest.raises(InputError, match=match):
        make_student(write_config(config, tmp_path), dataset, seed=0)


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("not json", "not a Hugging Face config file"),
        ('{"model_type": "nonesuch"}', "not a Hugging Face config file"),
        ('{"model_type": "t5"}', "not a causal language model"),
        ('{"model_type": "x", "auto_map": {"AutoConfig": "code.Config"}}', "config file"),
    ],
)
def test_files_that_describe_no_student_are_refused(
    dataset: Dataset, tmp_path: Path, text: str, match: str
) -> None:
    file = tmp_path / "student.json"
    file.write_text(text)
    with pytest.raises(InputError, match=match):
        make_student(str(file), dataset, seed=0)


def test_a_folder_keeps_its_weights_and_a_padded_vocabulary_is_fine(
    dataset: Dataset, tmp_path: Path
) -> None:
    folder = make_folder(tmp_path / "model", vocab_size=128)
    expected = load_file(folder / "model.safetensors")
    model = make_student(str(folder), dataset, seed=5)
    assert torch.equal(head_weight(model), expected["lm_head.weight"])
    assert head_weight(model).dtype == torch.float32


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"vocab_size": 60}, "a vocabulary of 60"),
        ({"max_position_embeddings": SEQUENCE_LENGTH - 1}, "at most 15 positions"),
    ],
)
def test_a_student_that_is_too_small_for_the_dataset_is_refused(
    dataset: Dataset, tmp_path: Path, changes: dict[str, int], match: str
) -> None:
    folder = make_folder(tmp_path / "model", **changes)
    with pytest.raises(InputError, match=match):
        make_student(str(folder), dataset, seed=0)


def test_missing_weights_are_not_made_up(dataset: Dataset, tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    del weights["lm_head.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"lm_head\.weight"):
        make_student(str(folder), dataset, seed=0)


def test_a_folder_without_a_tokenizer_or_with_a_damaged_model_is_refused(
    dataset: Dataset, tmp_path: Path
) -> None:
    folder = make_folder(tmp_path / "model")
    (folder / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(InputError, match="cannot be loaded"):
        make_student(str(folder), dataset, seed=0)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    with pytest.raises(InputError, match="no tokenizer"):
        make_student(str(folder), dataset, seed=0)


def test_code_in_a_model_folder_is_not_run(dataset: Dataset, tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    config["model_type"] = "nonesuch"
    config["auto_map"] = {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    with pytest.raises(InputError):
        make_student(str(folder), dataset, seed=0)
    assert not (tmp_path / "ran").exists()


def test_an_exported_student_is_the_same_model(dataset: Dataset, tmp_path: Path) -> None:
    model = make_student("demo", dataset, seed=0).eval()
    export(model, dataset, tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    tokens = torch.tensor([[1, 2, 3]])
    with torch.no_grad():
        assert torch.equal(loaded(tokens).logits, model(tokens).logits)
    assert (tmp_path / "out" / "tokenizer.json").is_file()


def test_only_presets_have_a_default_learning_rate() -> None:
    with pytest.raises(InputError, match="--learning-rate"):
        default_learning_rate("folder/of/a/model")
