"""What an engine does not take is refused before anything is made, with the engine to use."""

from __future__ import annotations

import json
import os
import shutil
from importlib.util import find_spec
from pathlib import Path

import pytest
from click.testing import CliRunner

import cli
from teacher_dump.engines.vllm_start import check_arguments, defaults, prepare_environment
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
