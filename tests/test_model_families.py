"""Teachers of many architectures through the real engines: rows are what transformers computes."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shards import inspect
from tests.command_runs import run
from tests.tiny_families import FAMILIES, make_family, quantise
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

QUANTISED = "Qwen3ForCausalLM"
FAST = (
    "Qwen3ForCausalLM",
    "Gemma2ForCausalLM",
    "OlmoeForCausalLM",
    "SmolVLMForConditionalGeneration",
)
# What vLLM's CPU build loads.
ON_VLLM = [
    name
    for name in FAMILIES
    if name not in ("Gemma3ForConditionalGeneration", "LlavaForConditionalGeneration")
]


def _slow_unless(fast: tuple[str, ...], names: Iterable[str]) -> list[Any]:
    return [name if name in fast else pytest.param(name, marks=pytest.mark.slow) for name in names]


GPTQ = "gptq"


def _dump_all(engine: str, teachers: dict[str, Path], folder: Path) -> dict[str, Path]:
    """Dump every teacher, in float32 but for GPTQ; name -> folder of the dataset."""
    corpus = write_corpus(folder / "corpus.jsonl", num_documents=20)
    outs = {name: folder / name for name in teachers}
    commands = []
    for name, teacher in teachers.items():
        dtype = () if name == GPTQ else ("--dtype", "float32")
        commands.append(dump_command(teacher, corpus, outs[name], "--engine", engine, *dtype))
    if engine == "transformers":
        for command in commands:
            result = run("dump-logits", *command[3:])
            assert result.exit_code == 0, result.output
    else:
        codes, says = run_all(commands)
        assert codes == ["0"] * len(teachers), says
    return outs


@pytest.fixture(scope="module")
def teachers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("families")
    return {name: make_family(name, folder / name) for name in FAMILIES}


@pytest.fixture(scope="module")
def quantised(teachers: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a GPTQ teacher, and beside it `unpacked`, of plain floats."""
    folder = tmp_path_factory.mktemp("gptq")
    quantise(teachers[QUANTISED], folder / GPTQ, folder / "unpacked")
    return folder / GPTQ


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
    quantised: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, Path]:
    names = _asked_for(request, "test_rows_of_vllm_are_the_distributions_of_transformers")
    folder = tmp_path_factory.mktemp("vllm")
    asked = {name: teachers[name] for name in names}
    return _dump_all("vllm", {**asked, GPTQ: quantised}, folder)


@pytest.fixture(scope="module")
def on_vllm_logprobs(
    request: pytest.FixtureRequest,
    teachers: dict[str, Path],
    quantised: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, Path]:
    names = _asked_for(request, "test_rows_of_vllm_logprobs_are_those_of_transformers_too")
    folder = tmp_path_factory.mktemp("vllm-logprobs")
    asked = {name: teachers[name] for name in names}
    return _dump_all("vllm-logprobs", {**asked, GPTQ: quantised}, folder)


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


@pytest.mark.parametrize("architecture", _slow_unless(FAST, ON_VLLM))
def test_rows_of_vllm_are_the_distributions_of_transformers(
    architecture: str, teachers: dict[str, Path], on_vllm: dict[str, Path]
) -> None:
    _assert_exact(teachers[architecture], on_vllm[architecture])


# vllm-logprobs runs vLLM's own classes, so few of them are enough.
@pytest.mark.parametrize("architecture", _slow_unless(FAST[:2], FAST))
@pytest.mark.slow
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


@pytest.mark.parametrize("engine", ["vllm", pytest.param("vllm-logprobs", marks=pytest.mark.slow)])
def test_a_quantised_teacher_is_that_of_its_unpacked_weights(
    engine: str, teachers: dict[str, Path], quantised: Path, request: pytest.FixtureRequest
) -> None:
    out = request.getfixturevalue(f"on_{engine.replace('-', '_')}")[GPTQ]
    assert inspect.verify(out) == []
    manifest = json.loads((out / "manifest.json").read_text(encoding="utf-8"))
    assert manifest["spec"]["teacher"]["head_dtype"] == "float32"  # which is not quantised
    unpacked, source = quantised.with_name("unpacked"), teachers[QUANTISED]
    mean = {}
    for folder in (unpacked, source):
        errors = []
        for row in all_rows(out).values():
            exact = dense_logprobs(folder, row.tokens, TOKENIZER_LENGTH)
            label = exact[np.arange(len(exact)), row.tokens[1:]]
            errors.append(np.abs(row.label_logprobs - label))
        mean[folder] = float(np.concatenate(errors).mean())
    # bfloat16, the grid and no more; a processor with AMX rounds more (0.070) than one without
    assert mean[unpacked] < 0.08
    assert mean[source] > 0.5
