"""What an engine does not take is refused before anything is made, with the engine to use."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from transformers import Phi3Config

import cli
from shards.errors import InputError
from shards.keep import TopPK
from teacher_dump.engines.options import EngineOptions
from teacher_dump.engines.vllm_start import (
    check_arguments,
    check_lengths,
    defaults,
    prepare_environment,
)
from teacher_dump.keep.packed_size import Selection
from teacher_dump.teacher import find_teacher
from tests.tiny_families import make_family
from tests.tiny_teacher import (
    BOUND,
    TAIL_NOISE,
    TOKENIZER_LENGTH,
    all_rows,
    dense_logprobs,
    dump_command,
    largest_error,
    run_all,
    write_corpus,
)


def _folder_of(architecture: str, teacher: Path, folder: Path, **more: object) -> Path:
    """The files of a teacher, whose configuration names another architecture."""
    shutil.copytree(teacher, folder)
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config |= {"architectures": [architecture], **more}
    path.write_text(json.dumps(config), encoding="utf-8")
    return folder


@pytest.mark.slow
def test_what_vllm_lacks_or_cannot_load_is_refused_by_name_with_the_fallback(
    tiny_teacher: Path, tmp_path: Path
) -> None:
    corpus = write_corpus(tmp_path / "corpus.jsonl", num_documents=5)
    refused = {
        # layers alone, no code of it anywhere, code of transformers alone
        "LlamaModel": _folder_of("LlamaModel", tiny_teacher, tmp_path / "headless"),
        "OddForCausalLM": _folder_of("OddForCausalLM", tiny_teacher, tmp_path / "odd"),
        "HeliumForCausalLM": _folder_of(
            "HeliumForCausalLM", tiny_teacher, tmp_path / "helium", model_type="helium"
        ),
    }
    if find_spec("torchvision") is None:  # which vLLM's class wants
        name = "Gemma3ForConditionalGeneration"
        refused[name] = make_family(name, tmp_path / name)
    outs = [
        tmp_path / f"out-{name}-{engine}"
        for name in refused
        for engine in ("vllm", "vllm-logprobs")
    ]
    commands = [
        dump_command(refused[name], corpus, out, "--engine", engine)
        for out in outs
        for _, name, engine in [out.name.split("-", 2)]
    ]
    codes, says = run_all(commands)
    assert codes == ["2"] * len(commands), says
    lines = [line for line in says.splitlines() if line.startswith("dump-logits: ")]
    for line, out in zip(lines, outs, strict=True):
        assert out.name.split("-")[1] in line
        assert line.endswith("use --engine transformers")
        assert not out.exists()


@pytest.mark.slow
def test_what_the_plugin_does_not_wrap_is_refused_with_the_fallback_that_runs_it(
    tiny_teacher: Path, tmp_path: Path
) -> None:
    teacher = _folder_of("LlamaOfOurOwn", tiny_teacher, tmp_path / "teacher")
    corpus = write_corpus(tmp_path / "corpus.jsonl", num_documents=5)
    # as a plugin of the user's own would
    registers = (
        "from vllm import ModelRegistry\n"
        "ModelRegistry.register_model('LlamaOfOurOwn',"
        " 'vllm.model_executor.models.llama:LlamaForCausalLM')\n"
    )
    outs = [tmp_path / engine for engine in ("vllm", "vllm-logprobs")]
    commands = [
        dump_command(teacher, corpus, out, "--engine", out.name, "--dtype", "float32")
        for out in outs
    ]
    sampled = dump_command(teacher, corpus, tmp_path / "none", keep=("--keep", "threshold"))
    codes, says = run_all([sampled, *commands], before=registers)
    assert codes == ["2", "2", "0"], says
    lines = [line for line in says.splitlines() if line.startswith("dump-logits: ")]
    for line, fallback in zip(lines, ("transformers", "vllm-logprobs"), strict=True):
        assert line.endswith(f"has no causal LM LlamaOfOurOwn: use --engine {fallback}")
    for row in all_rows(outs[1]).values():
        exact = dense_logprobs(tiny_teacher, row.tokens, TOKENIZER_LENGTH)
        assert largest_error(row, exact, TAIL_NOISE) <= BOUND


@pytest.mark.parametrize("engine", ["vllm", "vllm-logprobs", "transformers"])
@pytest.mark.parametrize(
    ("architecture", "more"),
    [
        ("T5ForConditionalGeneration", {"model_type": "t5", "is_encoder_decoder": True}),
        ("BertForMaskedLM", {"model_type": "bert"}),
        ("LlamaForSequenceClassification", {}),
    ],
)
def test_what_is_no_causal_language_model_is_refused_by_every_engine(
    engine: str, architecture: str, more: dict[str, object], tiny_teacher: Path, tmp_path: Path
) -> None:
    teacher = _folder_of(architecture, tiny_teacher, tmp_path / "teacher", **more)
    corpus = write_corpus(tmp_path / "corpus.jsonl", num_documents=5)
    out = tmp_path / "out"
    command = dump_command(teacher, corpus, out, "--engine", engine)
    result = CliRunner().invoke(cli.dump_logits, command[3:])
    assert result.exit_code == 2
    assert f"{architecture} is not a causal language model" in result.output
    assert not out.exists()


@pytest.mark.parametrize(
    ("architecture", "model_type"),
    [("OddForCausalLM", "llama"), ("LlamaModel", "llama"), ("BertLMHeadModel", "bert")],
)
def test_the_engine_transformers_takes_no_class_but_the_one_that_is_named(
    architecture: str, model_type: str, tiny_teacher: Path, tmp_path: Path
) -> None:
    teacher = _folder_of(architecture, tiny_teacher, tmp_path / "teacher", model_type=model_type)
    corpus = write_corpus(tmp_path / "corpus.jsonl", num_documents=5)
    out = tmp_path / "out"
    command = dump_command(teacher, corpus, out, "--engine", "transformers")
    result = CliRunner().invoke(cli.dump_logits, command[3:])
    assert result.exit_code == 2
    assert f"transformers has no causal LM {architecture}" in result.output
    assert not out.exists()


def test_models_of_transformers_within_vllm_are_not_for_the_plugin(
    tiny_teacher: Path, tmp_path: Path
) -> None:
    corpus = write_corpus(tmp_path / "corpus.jsonl", num_documents=5)
    more = ("--engine", "vllm", "--engine-arg", "model_impl=transformers")
    command = dump_command(tiny_teacher, corpus, tmp_path / "out", *more)
    result = CliRunner().invoke(cli.dump_logits, command[3:])
    assert result.exit_code == 2
    assert "model_impl=transformers" in result.output
    assert "vllm-logprobs" in result.output
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("engine", ["vllm", "vllm-logprobs"])
@pytest.mark.parametrize(
    ("argument", "says"),
    [
        ("kv_sharing_fast_prefill=true", "wrong results for positions before the end of a prompt"),
        ("prefill_context_parallel_size=2", "wrong results for positions before the end"),
        ("swa_bounded_replay=true", "set by the pass itself"),
        ("enable_prefix_caching=true", "set by the pass itself"),
        ("hf_config_path=elsewhere", "set by the pass itself"),
    ],
)
def test_arguments_that_would_make_targets_wrong_are_refused(
    engine: str, argument: str, says: str, tiny_teacher: Path, tmp_path: Path
) -> None:
    corpus = write_corpus(tmp_path / "corpus.jsonl", num_documents=5)
    more = ("--engine", engine, "--engine-arg", argument)
    command = dump_command(tiny_teacher, corpus, tmp_path / "out", *more)
    result = CliRunner().invoke(cli.dump_logits, command[3:])
    assert result.exit_code == 2
    assert f"--engine-arg {argument.partition('=')[0]}" in result.output
    assert says in result.output
    assert not (tmp_path / "out").exists()


def _without(tensors: dict[str, torch.Tensor]) -> None:
    del tensors["model.norm.weight"]


def _quantised(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.layers.0.mlp.up_proj.weight_scale"] = torch.ones(1)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (_without, "1 weights are missing or of another shape, such as model.norm.weight"),
        (_quantised, "does not use model.layers.0.mlp.up_proj.weight_scale"),
    ],
)
def test_the_engine_transformers_makes_no_weights_up(
    change: Callable[[dict[str, torch.Tensor]], None],
    says: str,
    tiny_teacher: Path,
    tmp_path: Path,
) -> None:
    teacher = Path(shutil.copytree(tiny_teacher, tmp_path / "teacher"))
    tensors = load_file(teacher / "model.safetensors")
    change(tensors)
    save_file(tensors, teacher / "model.safetensors", {"format": "pt"})
    corpus = write_corpus(tmp_path / "corpus.jsonl", num_documents=5)
    command = dump_command(teacher, corpus, tmp_path / "out", "--engine", "transformers")
    result = CliRunner().invoke(cli.dump_logits, command[3:])
    assert result.exit_code == 2
    assert says in result.output


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("adapter_config.json", "transformers would add this adapter to the teacher"),
        ("transformers_weights", "names weights that vLLM would not read"),
    ],
)
def test_a_folder_whose_weights_are_not_all_of_the_teacher_is_refused(
    change: str, says: str, tiny_teacher: Path, tmp_path: Path
) -> None:
    more = {change: "other.safetensors"} if change == "transformers_weights" else {}
    teacher = _folder_of("LlamaForCausalLM", tiny_teacher, tmp_path / "teacher", **more)
    if change.endswith(".json"):
        (teacher / change).write_text("{}")
    with pytest.raises(InputError, match=says):
        find_teacher(str(teacher), None)


def test_vllm_takes_no_short_documents_whose_positions_it_would_stretch(tmp_path: Path) -> None:
    factors = {"short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
    Phi3Config(
        hidden_size=32, num_attention_heads=4, num_key_value_heads=4, pad_token_id=0,
        max_position_embeddings=64, original_max_position_embeddings=16,
        rope_parameters={"rope_type": "longrope", "rope_theta": 10000.0, **factors},
    ).save_pretrained(tmp_path)  # fmt: skip
    options = EngineOptions(
        teacher_folder=tmp_path, architecture="Phi3ForCausalLM", dtype="float32",
        head_dtype="float32", sequence_length=17, selection=Selection(TopPK(), 64), joined=False,
    )  # fmt: skip
    with pytest.raises(InputError, match=r"--documents separate: .* as those of more than 16"):
        check_lengths(options)
    check_lengths(replace(options, sequence_length=16))
    check_lengths(replace(options, joined=True))


@pytest.mark.slow
def test_vllm_reads_the_weights_that_are_hashed_and_no_others(
    tiny_teacher: Path, tmp_path: Path
) -> None:
    teacher = Path(shutil.copytree(tiny_teacher, tmp_path / "teacher"))
    tensors = load_file(teacher / "model.safetensors")
    names = dict.fromkeys(tensors, "model.safetensors")
    (teacher / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    other = {name: torch.randn_like(tensor) for name, tensor in tensors.items()}
    save_file(other, teacher / "consolidated.safetensors", {"format": "pt"})
    (teacher / "params.json").write_text(json.dumps({"dim": 8, "n_layers": 1, "n_heads": 1}))
    corpus = write_corpus(tmp_path / "corpus.jsonl", num_documents=5)
    more = ("--keep", "top-p-k", "--dtype", "float32", "--engine")
    engines = ("vllm", "vllm-logprobs", "transformers")
    for engine in engines:  # a process each, as vLLM keeps the settings of its first start
        codes, says = run_all([dump_command(teacher, corpus, tmp_path / engine, *more, engine)])
        assert codes == ["0"], says
    *found, expected = (all_rows(tmp_path / engine) for engine in engines)
    for rows in found:
        assert rows.keys() == expected.keys()
        for key, row in rows.items():
            wanted = expected[key].label_logprobs
            np.testing.assert_allclose(row.label_logprobs, wanted, atol=0.1)  # a step of 1/16


@pytest.mark.parametrize("value", [("kv_sharing_fast_prefill", False),
                                   ("prefill_context_parallel_size", 1)])  # fmt: skip
def test_the_values_with_which_they_are_right_are_taken(value: tuple[str, object]) -> None:
    check_arguments(dict([value]))


def test_a_gpu_compiles_without_graphs_and_a_cpu_runs_eagerly() -> None:
    assert defaults(1, on_gpu=False) == {"enforce_eager": True}
    on_gpu = {"compilation_config": {"cudagraph_mode": "NONE"}}
    assert defaults(1, on_gpu=True) == on_gpu
    assert defaults(2, on_gpu=True) == {**on_gpu, "distributed_executor_backend": "mp"}


def test_looking_for_a_gpu_leaves_a_process_that_engines_can_be_forked_from(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(os, "environ", {})
    asked = []
    monkeypatch.setattr(
        "torch.cuda.is_available",
        lambda: asked.append(os.environ.get("PYTORCH_NVML_BASED_CUDA_CHECK")),
    )
    prepare_environment()
    assert asked == ["1"]  # without it, CUDA would be started by the question
