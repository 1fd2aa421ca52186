"""Python code that comes with a teacher: not run unless trusted, and then part of its identity."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

import cli
from shards.errors import InputError
from teacher_dump.custom_code import custom_code_sha256
from tests.command_runs import refused, run
from tests.tiny_teacher import (
    BOUND,
    MODEL_VOCABULARY,
    TOKENIZER_LENGTH,
    all_rows,
    dump_command,
    largest_error,
    make_tokenizer,
    run_dump,
    write_corpus,
)

CODE = """
import os
from pathlib import Path

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from .activation import squash

Path(os.environ["CODE_RAN"]).touch()  # fails where the test did not ask for it


class BigramConfig(PreTrainedConfig):
    model_type = "bigram"
    hidden_size: int = 32


class BigramForCausalLM(PreTrainedModel):
    config_class = BigramConfig

    def __init__(self, config):
        super().__init__(config)
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(self, input_ids, **_):
        return CausalLMOutput(logits=self.lm_head(squash(self.embedding(input_ids))))
"""
ACTIVATION = "def squash(hidden):\n    return hidden.tanh()\n"


@pytest.fixture
def bigram(tmp_path: Path) -> Path:
    """A teacher whose class is in its own folder: the next token depends on the last one alone."""
    folder = tmp_path / "bigram"
    folder.mkdir()
    make_tokenizer(folder)
    (folder / "modeling.py").write_text(CODE, encoding="utf-8")
    (folder / "activation.py").write_text(ACTIVATION, encoding="utf-8")
    config = {
        "architectures": ["BigramForCausalLM"],
        "model_type": "bigram",
        "vocab_size": MODEL_VOCABULARY,
        "hidden_size": 32,
        "auto_map": {
            "AutoConfig": "modeling.BigramConfig",
            "AutoModelForCausalLM": "modeling.BigramForCausalLM",
        },
    }
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    torch.manual_seed(0)
    names = ("embedding.weight", "lm_head.weight")
    weights = {name: torch.randn(MODEL_VOCABULARY, 32) for name in names}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def _exact(folder: Path, tokens: np.ndarray) -> np.ndarray:
    """[T, V] of the teacher's own formula, in float64."""
    weights = load_file(folder / "model.safetensors")
    hidden = weights["embedding.weight"][tokens[:-1].tolist()].double().tanh()
    logits = hidden @ weights["lm_head.weight"][:TOKENIZER_LENGTH].double().T
    return torch.log_softmax(logits, -1).numpy()


def test_trusted_code_runs_and_identifies_the_teacher(bigram: Path, tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "corpus.jsonl", num_documents=20)
    out, ran = tmp_path / "out", tmp_path / "ran"
    variables = {**os.environ, "CODE_RAN": str(ran), "HF_MODULES_CACHE": str(tmp_path / "modules")}
    command = dump_command(bigram, corpus, out, "--engine", "transformers", "--dtype", "float32")

    line = refused(run("dump-logits", *command[3:]))
    assert str(bigram) in line
    assert "--trust-remote-code" in line
    assert not out.exists()

    # Another process: what Python has imported once does not change any more.
    command.append("--trust-remote-code")
    result = run_dump(command, env=variables)
    assert result.returncode == 0, result.stderr
    assert ran.exists()
    rows = all_rows(out)
    assert len(rows) > 10
    for row in rows.values():
        assert largest_error(row, _exact(bigram, row.tokens)) <= BOUND
    manifest = json.loads((out / "manifest.json").read_text(encoding="utf-8"))
    assert manifest["spec"]["teacher"]["code_sha256"]
    assert manifest["recorded"][0]["trust_remote_code"] is True

    (bigram / "activation.py").write_text(ACTIVATION.replace("tanh", "sin"), encoding="utf-8")
    assert "teacher.code_sha256" in refused(run("dump-logits", *command[3:]))


def test_a_tokenizer_with_code_of_its_own_is_refused(tiny_teacher: Path, tmp_path: Path) -> None:
    teacher = tmp_path / "teacher"
    shutil.copytree(tiny_teacher, teacher)
    path = teacher / "tokenizer_config.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    content["auto_map"] = {"AutoTokenizer": [None, "tokenization.FastTokenizer"]}
    path.write_text(json.dumps(content), encoding="utf-8")
    corpus = write_corpus(tmp_path / "corpus.jsonl", num_documents=3)
    out = tmp_path / "out"
    result = CliRunner().invoke(cli.dump_logits, dump_command(teacher, corpus, out)[3:])
    assert result.exit_code == 2
    assert f"{teacher}: contains Python code (auto_map in tokenizer_config.json)" in result.output
    assert "--trust-remote-code" in result.output
    assert not out.exists()


def test_trust_changes_nothing_about_a_teacher_without_code(
    tiny_teacher: Path, tmp_path: Path
) -> None:
    corpus = write_corpus(tmp_path / "corpus.jsonl", num_documents=10)
    out = tmp_path / "out"
    options = dump_command(tiny_teacher, corpus, out, "--engine", "transformers")[3:]
    for more in ([], ["--trust-remote-code"]):
        result = CliRunner().invoke(cli.dump_logits, [*options, *more])
        assert result.exit_code == 0, result.output
    assert "nothing to do" in result.output
    manifest = json.loads((out / "manifest.json").read_text(encoding="utf-8"))
    assert manifest["spec"]["teacher"]["code_sha256"] is None


def test_code_of_another_repository_is_refused_even_if_trusted(bigram: Path) -> None:
    path = bigram / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["auto_map"]["AutoConfig"] = "somebody/else--modeling.BigramConfig"
    path.write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(InputError, match="somebody/else--modeling"):
        custom_code_sha256(bigram, trusted=True)
