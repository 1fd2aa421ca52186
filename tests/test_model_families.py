"""Teachers of many architectures through the real engines: rows are what transformers computes."""

from __future__ import annotations

import json
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

import cli
from shards import inspect
from tests.tiny_families import FAMILIES, make_family, quantise
from tests.tiny_teacher import (
    BOUND,
    ROOT,
    TAIL_NOISE,
    TOKENIZER_LENGTH,
    all_rows,
    dense_logprobs,
    dump_command,
    largest_error,
    run_dump,
    write_corpus,
)

FAST = (
    "Qwen3ForCausalLM",
    "Gemma2ForCausalLM",
    "OlmoeForCausalLM",
    "SmolVLMForConditionalGeneration",
)
ON_VLLM = [
    name if name in FAST else pytest.param(name, marks=pytest.mark.slow)
    for name in FAMILIES
    if name not in ("Gemma3ForConditionalGeneration", "LlavaForConditionalGeneration")
]

# Several dumps in one process, one after the other: vLLM is imported once.
ONE_AFTER_THE_OTHER = """
import json, sys
import cli
codes = []
for options in json.loads(sys.argv[1]):
    try:
        cli.dump_logits(options, prog_name="dump-logits")
    except SystemExit as end:
        codes.append(end.code)
print("CODES", *codes)
"""


def _run_all(commands: list[list[str]], before: str = "") -> tuple[list[str], str]:
    """Exit codes of several dumps, and what they wrote on standard error."""
    options = json.dumps([command[3:] for command in commands])
    result = run_dump([sys.executable, "-c", before + ONE_AFTER_THE_OTHER, options], cwd=ROOT)
    return result.stdout.partition("CODES")[2].split(), result.stderr


def _dump_all(engine: str, teachers: dict[str, Path], folder: Path) -> dict[str, Path]:
    """Dump every teacher in float32; name -> folder of the dataset."""
    corpus = write_corpus(folder / "corpus.jsonl", num_documents=20)
    outs = {name: folder / name for name in teachers}
    more = ("--engine", engine, "--dtype", "float32")
    commands = [dump_command(teachers[name], corpus, outs[name], *more) for name in teachers]
    codes, says = _run_all(commands)
    assert codes == ["0"] * len(teachers), says
    return outs


@pytest.fixture(scope="module")
def teachers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("families")
    return {name: make_family(name, folder / name) for name in FAMILIES}


def _asked_for(request: pytest.FixtureRequest, test: str) -> list[str]:
    """The architectures of a test that were selected on the command line."""
    return [
        item.callspec.params["architecture"]
        for item in request.session.items
        if isinstance(item, pytest.Function) and item.originalname == test
    ]


@pytest.fixture(scope="module")
def on_vllm(
    request: pytest.FixtureRequest,
    teachers: dict[str, Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, Path]:
    names = _asked_for(request, "test_rows_of_vllm_are_the_distributions_of_transformers")
    folder = tmp_path_factory.mktemp("vllm")
    return _dump_all("vllm", {name: teachers[name] for name in names}, folder)


@pytest.fixture(scope="module")
def on_vllm_logprobs(
    request: pytest.FixtureRequest,
    teachers: dict[str, Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, Path]:
    names = _asked_for(request, "test_rows_of_vllm_logprobs_are_those_of_transformers_too")
    folder = tmp_path_factory.mktemp("vllm-logprobs")
    return _dump_all("vllm-logprobs", {name: teachers[name] for name in names}, folder)


@pytest.fixture(scope="module")
def on_transformers(
    teachers: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    return _dump_all("transformers", teachers, tmp_path_factory.mktemp("transformers"))


def _assert_exact(teacher: Path, out: Path, tail_noise: float = 0.0) -> None:
    rows = all_rows(out)
    assert len(rows) > 10
    for row in rows.values():
        assert row.ids.max() < TOKENIZER_LENGTH  # the padded rows would win every softmax
        exact = dense_logprobs(teacher, row.tokens, TOKENIZER_LENGTH)
        assert largest_error(row, exact, tail_noise) <= BOUND


@pytest.mark.parametrize("architecture", ON_VLLM)
def test_rows_of_vllm_are_the_distributions_of_transformers(
    architecture: str, teachers: dict[str, Path], on_vllm: dict[str, Path]
) -> None:
    _assert_exact(teachers[architecture], on_vllm[architecture])


@pytest.mark.parametrize("architecture", ON_VLLM)
def test_rows_of_vllm_logprobs_are_those_of_transformers_too(
    architecture: str, teachers: dict[str, Path], on_vllm_logprobs: dict[str, Path]
) -> None:
    _assert_exact(teachers[architecture], on_vllm_logprobs[architecture], TAIL_NOISE)


@pytest.mark.parametrize("architecture", FAMILIES)
def test_rows_of_the_engine_transformers_are_exact(
    architecture: str, teachers: dict[str, Path], on_transformers: dict[str, Path]
) -> None:
    _assert_exact(teachers[architecture], on_transformers[architecture])


@pytest.mark.parametrize(
    ("architecture", "option", "value"),
    [
        ("Gemma2ForCausalLM", "final_logit_softcapping", None),
        ("Gemma2ForCausalLM", "attn_logit_softcapping", None),
        ("CohereForCausalLM", "logit_scale", 1.0),
        ("GraniteForCausalLM", "logits_scaling", 1.0),
        ("OlmoeForCausalLM", "num_experts_per_tok", 1),
    ],
)
def test_the_bound_would_notice_an_engine_that_leaves_something_out(
    architecture: str,
    option: str,
    value: object,
    teachers: dict[str, Path],
    on_transformers: dict[str, Path],
    tmp_path: Path,
) -> None:
    without = tmp_path / "without"
    without.mkdir()
    for path in teachers[architecture].iterdir():
        (without / path.name).symlink_to(path)
    config = json.loads((without / "config.json").read_text(encoding="utf-8"))
    (without / "config.json").unlink()
    (without / "config.json").write_text(json.dumps({**config, option: value}), encoding="utf-8")
    row = all_rows(on_transformers[architecture])["train", 0]
    exact = dense_logprobs(without, row.tokens, TOKENIZER_LENGTH)
    assert largest_error(row, exact) > 3 * BOUND


@pytest.mark.parametrize("engine", ["vllm", "vllm-logprobs"])
def test_a_quantised_teacher_is_that_of_its_unpacked_weights(
    engine: str, teachers: dict[str, Path], tmp_path: Path
) -> None:
    source = teachers["Qwen3ForCausalLM"]
    quantised, unpacked = tmp_path / "gptq", tmp_path / "unpacked"
    quantise(source, quantised, unpacked)
    corpus = write_corpus(tmp_path / "corpus.jsonl", num_documents=20)
    out = tmp_path / "out"
    result = run_dump(dump_command(quantised, corpus, out, "--engine", engine))
    assert result.returncode == 0, result.stderr
    assert inspect.verify(out) == []
    manifest = json.loads((out / "manifest.json").read_text(encoding="utf-8"))
    assert manifest["identity"]["teacher"]["head_dtype"] == "model"
    mean = {}
    for folder in (unpacked, source):
        errors = []
        for row in all_rows(out).values():
            exact = dense_logprobs(folder, row.tokens, TOKENIZER_LENGTH)
            label = exact[np.arange(len(exact)), row.tokens[1:]]
            errors.append(np.abs(row.label_logprobs - label))
        mean[folder] = float(np.concatenate(errors).mean())
    assert mean[unpacked] < 0.06  # bfloat16, the grid and no more
    assert mean[source] > 0.5


def _folder_of(architecture: str, teacher: Path, folder: Path, **more: object) -> Path:
    """The files of a teacher, whose configuration names another architecture."""
    shutil.copytree(teacher, folder)
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config |= {"architectures": [architecture], **more}
    path.write_text(json.dumps(config), encoding="utf-8")
    return folder


def test_what_vllm_lacks_or_cannot_load_is_refused_by_name_with_the_fallback(
    tiny_teacher: Path, teachers: dict[str, Path], tmp_path: Path
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
        refused[name] = teachers[name]
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
    codes, says = _run_all(commands)
    assert codes == ["2"] * len(commands), says
    lines = [line for line in says.splitlines() if line.startswith("dump-logits: ")]
    for line, out in zip(lines, outs, strict=True):
        assert out.name.split("-")[1] in line
        assert line.endswith("use --engine transformers")
        assert not out.exists()


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
    codes, says = _run_all([sampled, *commands], before=registers)
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
    assert f"{architecture} is no causal language model" in result.output
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
