"""lm-evaluation-harness on an exported student: the right figures, once, and refusals in time."""

from __future__ import annotations

import json
import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from transformers import AutoModelForCausalLM, LlamaConfig

import cli
from shards.dataset import Dataset
from shards.errors import InputError, RunError
from student_train.config import TrainConfig
from student_train.evaluation import tasks
from student_train.run import run
from student_train.run_folder import RunFolder
from tests.capped_model import assert_capped, write_capped_model
from tests.report_page import Page, make_run
from tests.tiny_dataset import SEQUENCE_LENGTH, VOCAB_SIZE, make_dataset

# The harness and what it stands on warn about each other's future.
pytestmark = pytest.mark.filterwarnings("ignore")

NUM_QUESTIONS = 20
CHOICES = 4


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    """A finished run of few steps."""
    folder = tmp_path_factory.mktemp("tasks")
    LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=64,
    ).save_pretrained(folder)  # fmt: skip
    config = TrainConfig(
        shards=[make_dataset(folder / "shards")],
        student=str(folder / "config.json"),
        out=folder / "out",
        tokens=20 * 4 * SEQUENCE_LENGTH,
        batch_tokens=4 * SEQUENCE_LENGTH,
        micro_batch_sequences=3,
        learning_rate=1e-2,
        dtype="float32",
    )
    assert not {name for name in run(config) if "acc" in name}
    return config


def questions() -> list[dict[str, object]]:
    """Which of four words comes after five others."""
    random = np.random.default_rng(0)
    found = []
    for _ in range(NUM_QUESTIONS):
        words = random.integers(1, VOCAB_SIZE, 5 + CHOICES)
        texts = [f"word{word}" for word in words]
        answer = int(random.integers(CHOICES))
        found.append({"text": " ".join(texts[:5]), "choices": texts[5:], "answer": answer})
    return found


def write_task(folder: Path, name: str, *, data: bool = True, metric: str = "acc") -> str:
    """The YAML file of a task over data beside it."""
    if data:
        lines = [json.dumps(question) for question in questions()]
        (folder / "data.jsonl").write_text("\n".join(lines) + "\n")
    path = folder / f"{name}.yaml"
    path.write_text(
        f"task: {name}\n"
        "dataset_path: json\n"
        f"dataset_kwargs: {{data_files: {{test: {folder / 'data.jsonl'}}}}}\n"
        "test_split: test\n"
        "output_type: multiple_choice\n"
        "doc_to_text: '{{text}}'\n"
        "doc_to_choice: '{{choices}}'\n"
        "doc_to_target: '{{answer}}'\n"
        f"metric_list: [{{metric: {metric}, aggregation: mean, higher_is_better: true}}]\n"
    )
    return str(path)


def expected_accuracy(model_folder: Path) -> float:
    """Of the choice with the highest probability, computed here."""
    model = AutoModelForCausalLM.from_pretrained(model_folder)
    hits = 0
    for question in questions():
        words = [int(word[4:]) for word in str(question["text"]).split()]
        choices = [int(word[4:]) for word in question["choices"]]  # type: ignore[attr-defined]
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([words])).logits[0, -1]
        hits += int(logits[choices].argmax()) == question["answer"]
    return hits / NUM_QUESTIONS


def test_a_finished_run_is_evaluated_on_a_task_of_local_data_once(
    config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = write_task(tmp_path, "next_word")
    asked = replace(config, eval_tasks=[task])
    summary = run(asked)
    accuracy = expected_accuracy(config.out / "model")
    assert summary["next_word_acc"] == pytest.approx(accuracy)
    assert 0 < accuracy < 1
    error = np.sqrt(accuracy * (1 - accuracy) / (NUM_QUESTIONS - 1))
    assert summary["next_word_acc_stderr"] == pytest.approx(error)
    content = tasks.read_tasks(RunFolder(config.out).tasks)
    assert content["results"]["next_word"]["sample_len"] == NUM_QUESTIONS
    with monkeypatch.context() as patch:
        patch.setattr("student_train.run.check_tasks", None)  # nothing is left to do
        assert run(asked) == summary
    out = tmp_path / "report.html"
    command = ["report", str(config.out), str(make_run(tmp_path / "other")), "--out", str(out)]
    assert CliRunner().invoke(cli.train_student, command).exit_code == 0
    shown = f"{accuracy:.4f} \N{PLUS-MINUS SIGN} {error:.4f}"
    assert Page(out.read_text()).rows["next_word acc"] == [shown, "\N{EN DASH}"]
    other = write_task(tmp_path, "other_name")
    both = run(replace(config, eval_tasks=[other]))
    assert both == summary | {name.replace("next_word", "other_name"): value
                              for name, value in summary.items()}  # fmt: skip
    Path(task).write_text(Path(task).read_text() + "# changed\n")
    assert tasks.missing_tasks([task], content) == [task]


def test_the_harness_sees_a_student_that_caps_its_attention_logits(
    config: TrainConfig, tmp_path: Path
) -> None:
    from student_train.evaluation.harness_student import HarnessStudent

    dataset = Dataset.open(config.shards[0])
    write_capped_model(tmp_path)
    shutil.copytree(dataset.path / "tokenizer", tmp_path, dirs_exist_ok=True)
    student = HarnessStudent(tmp_path, dataset.spec, "float32", torch.device("cpu"))
    tokens = torch.arange(12)[None]
    assert_capped(student._model_call(tokens), tmp_path, tokens)


def test_tasks_that_cannot_be_run_are_refused_before_training(
    config: TrainConfig, tmp_path: Path
) -> None:
    fresh = replace(config, out=tmp_path / "out")
    (tmp_path / "empty").mkdir()
    no_data = write_task(tmp_path / "empty", "no_data", data=False)
    broken = tmp_path / "broken.yaml"
    broken.write_text("task: [broken\n")
    code = tmp_path / "code.yaml"
    code.write_text(Path(write_task(tmp_path, "code")).read_text() + "unsafe_code: true\n")
    same = [write_task(tmp_path, "same"), str(tmp_path / "another.yaml")]
    shutil.copy(*same)
    for asked, match in (
        (["no_such_task"], "no_such_task: cannot be loaded: .* is not a registered task"),
        ([str(tmp_path / "no.yaml")], "no.yaml: cannot be loaded: .* or valid YAML path"),
        ([no_data], "no_data.yaml: cannot be loaded: Unable to find"),
        ([str(broken)], "broken.yaml: cannot be loaded: while parsing"),
        ([str(code)], "code runs generated code"),
        (same, r"another\.yaml: its task same is also in .*same\.yaml"),
    ):
        with pytest.raises(InputError, match=match) as caught:
            run(replace(fresh, eval_tasks=asked))
        assert "\n" not in str(caught.value)
        assert not fresh.out.exists()


@pytest.mark.parametrize("module", ["lm_eval.tasks", "lm_eval.models.huggingface"])
def test_without_the_harness_its_extra_is_named(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch, module: str
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(InputError, match="the extra 'eval' of logitshards"):
        run(replace(config, eval_tasks=["some.yaml"]))


def test_a_task_that_fails_is_tried_again(config: TrainConfig, tmp_path: Path) -> None:
    task = Path(write_task(tmp_path, "bad"))
    good = task.read_text()
    first = questions()[0]["answer"]  # which the harness tries when it loads a task
    bad = f"'{{{{answer if answer == {first} else answer / 0}}}}'"
    task.write_text(good.replace("'{{answer}}'", bad))
    asked = replace(config, eval_tasks=[str(task)])
    with pytest.raises(RunError, match=r"bad\.yaml: ZeroDivision.*; the student is complete"):
        run(asked)
    task.write_text(good)
    assert run(asked)["bad_acc"] == pytest.approx(expected_accuracy(config.out / "model"))


BOS = 5


def student_with_bos(
    config: TrainConfig, folder: Path, mode: str, *, dtype: str = "float32"
) -> Any:
    """The harness's view of the run's student, as if `mode` had placed BOS in its dataset."""
    from student_train.evaluation.harness_student import HarnessStudent

    spec = Dataset.open(config.shards[0]).spec
    documents = replace(spec.documents, bos=mode, bos_token_id=BOS, masked=True)
    shutil.copytree(config.out / "model", folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"bos_token": "word5"}))
    spec = replace(spec, documents=documents)
    return HarnessStudent(folder, spec, dtype, torch.device("cpu"))


@pytest.mark.parametrize(("bos", "prefix"), [(False, 0), (True, 5)])
def test_the_student_reads_as_in_training(
    config: TrainConfig, tmp_path: Path, bos: bool, prefix: int
) -> None:
    from student_train.evaluation.harness_student import HarnessStudent

    if bos:
        student = student_with_bos(config, tmp_path / "model", "document", dtype="bfloat16")
    else:
        spec = Dataset.open(config.shards[0]).spec
        student = HarnessStudent(config.out / "model", spec, "bfloat16", torch.device("cpu"))
    assert student.prefix_token_id == prefix
    assert student.max_length == SEQUENCE_LENGTH
    logits = student._model_call(torch.tensor([[1, 2, 3]]))
    assert logits.dtype == torch.float32
    assert not torch.equal(logits, logits.bfloat16().float())  # the head's, at least, are not


def log_likelihood(model: Any, read: list[int], scored: list[int]) -> float:
    """Of tokens after what the model has read."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([[*read, *scored][:-1]])).logits[0]
    rows = logits[len(read) - 1 :].log_softmax(-1)
    return float(sum(row[token] for row, token in zip(rows, scored, strict=True)))


def ask(kind: str, *arguments: str) -> list[Any]:
    from lm_eval.api.instance import Instance

    return [Instance(request_type=kind, doc={}, arguments=arguments, idx=0)]


WORDS = [10 + i % 50 for i in range(SEQUENCE_LENGTH * 5 // 2)]
TEXT = " ".join(f"word{word}" for word in WORDS)


def test_a_whole_text_is_scored_after_bos_and_bos_is_not_scored(
    config: TrainConfig, tmp_path: Path
) -> None:
    student = student_with_bos(config, tmp_path / "model", "sequence+document")
    (found,) = student.loglikelihood_rolling(ask("loglikelihood_rolling", TEXT))
    expected = 0.0
    for start in range(0, len(WORDS), SEQUENCE_LENGTH):
        scored = WORDS[start : start + SEQUENCE_LENGTH]
        before = WORDS[start - (SEQUENCE_LENGTH - len(scored)) : start]
        expected += log_likelihood(student.model, [BOS, *before], scored)
    assert found == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(("mode", "begins"), [("sequence", True), ("document", False)])
def test_a_context_that_is_cut_begins_as_a_sequence_in_training(
    config: TrainConfig, tmp_path: Path, mode: str, begins: bool
) -> None:
    student = student_with_bos(config, tmp_path / "model", mode)
    ((long, _),) = student.loglikelihood(ask("loglikelihood", TEXT, " word3 word4"))
    ((short, _),) = student.loglikelihood(ask("loglikelihood", "word1 word2", " word3"))
    room = SEQUENCE_LENGTH - 2
    read = [BOS, *WORDS[-room:]] if begins else WORDS[-room - 1 :]
    assert long == pytest.approx(log_likelihood(student.model, read, [3, 4]), rel=1e-4)
    expected = log_likelihood(student.model, [BOS, 1, 2], [3])
    assert short == pytest.approx(expected, rel=1e-4)
    ids, mask = student.tok_batch_encode([TEXT, "word1"], left_truncate_len=8)
    assert ids[0].tolist() == ([BOS, *WORDS[-7:]] if begins else WORDS[-8:])
    assert ids[1][mask[1] == 1].tolist() == [BOS, 1]


def test_the_harness_does_not_wait_for_the_other_processes_of_a_run(
    config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    torchrun = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    for name, value in torchrun.items():
        monkeypatch.setenv(name, value)
    student = student_with_bos(config, tmp_path / "model", "document")
    assert student.world_size == 1
    assert {name: os.environ[name] for name in torchrun} == torchrun


def test_the_filter_of_a_metric_stands_behind_its_name() -> None:
    values = {
        "alias": "x", "sample_len": 3, "acc,none": 0.5, "acc_stderr,none": 0.1,
        "exact_match,strict": 1, "exact_match_stderr,strict": "N/A", "f1_stderr,strict": 0.25,
    }  # fmt: skip
    assert tasks.task_figures({"results": {"x": values, "no_figure": {"alias": "y"}}}) == {
        "x": {"acc": 0.5, "acc_stderr": 0.1, "exact_match strict": 1, "f1 strict_stderr": 0.25}
    }
