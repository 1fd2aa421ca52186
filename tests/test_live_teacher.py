"""A teacher beside the student: the loss is the exact one over the whole vocabulary."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from shards.dataset import Dataset
from shards.errors import IdentityMismatchError, InputError
from shards.options import OptionError
from student_train.data.batches import TOKEN_COLUMNS, Batch, sequential_batches
from student_train.live_teacher import LiveTeacher
from student_train.memory import Setting, Shape, estimate, live_teacher_bytes
from student_train.model.model import export, head_weight, hidden_states, make_student
from student_train.objective.distillation import Objective
from student_train.run import run
from tests.capped_model import assert_capped, write_capped_model
from tests.tiny_dataset import VOCAB_SIZE, make_dataset, make_tokenizer
from tests.tiny_runs import lines, make_config, write_student

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tokens alone, a student, and a teacher of the same tokenizer."""
    folder = tmp_path_factory.mktemp("live")
    make_dataset(folder / "tokens", train=30, validation=4, tokens_only=True)
    make_dataset(folder / "separate", train=30, validation=4, tokens_only=True, separate=True)
    write_student(folder)
    dataset = Dataset.open(folder / "tokens")
    teacher = make_student(str(folder / "student.json"), dataset, seed=9)
    with torch.no_grad():
        head_weight(teacher).mul_(20)  # a distribution with something to learn
    export(teacher, dataset, folder / "teacher")
    return folder


def first_batch(dataset: Dataset) -> Batch:
    split = dataset.split("train")
    return next(iter(sequential_batches(split, batch_lines=4, columns=TOKEN_COLUMNS)))


def logits_of(model: PreTrainedModel, batch: Batch) -> Tensor:
    return hidden_states(model, batch.input_ids, batch.position_ids) @ head_weight(model).T


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("name", ["tokens", "separate"])
def test_the_loss_is_the_kl_over_the_whole_vocabulary(
    name: str, temperature: float, folder: Path
) -> None:
    dataset = Dataset.open(folder / name)
    student = make_student(str(folder / "student.json"), dataset, seed=1)
    teacher = LiveTeacher(folder / "teacher", [dataset], CPU)
    batch = first_batch(dataset)
    loss = teacher.loss_of(Objective(kind="kld", alpha=1.0, temperature=temperature))(
        student, batch
    )
    loss.total.backward()
    found = [parameter.grad.clone() for parameter in student.parameters()]
    student.zero_grad()
    labelled = batch.labels >= 0
    model = make_student(str(folder / "teacher"), dataset, seed=0)
    with torch.no_grad():
        targets = logits_of(model, batch)[labelled][:, :VOCAB_SIZE] / temperature
    outputs = logits_of(student, batch)[labelled].log_softmax(-1)[:, :VOCAB_SIZE]
    expected = F.kl_div(outputs, targets.log_softmax(-1), reduction="sum", log_target=True)
    expected.backward()
    torch.testing.assert_close(loss.total, expected, rtol=1e-4, atol=1e-4)
    for gradient, parameter in zip(found, student.parameters(), strict=True):
        torch.testing.assert_close(gradient, parameter.grad, rtol=1e-3, atol=1e-4)


def test_a_teacher_caps_its_attention_logits(folder: Path, tmp_path: Path) -> None:
    dataset = Dataset.open(folder / "tokens")
    write_capped_model(tmp_path)
    shutil.copytree(dataset.path / "tokenizer", tmp_path, dirs_exist_ok=True)
    batch = first_batch(dataset)
    entries = LiveTeacher(tmp_path, [dataset], CPU).with_targets(batch).entries
    assert entries is not None
    found = entries.logprobs[: batch.input_ids.numel() * VOCAB_SIZE]
    assert_capped(found.view(*batch.input_ids.shape, VOCAB_SIZE), tmp_path, batch.input_ids)


def test_the_memory_of_a_teacher_is_known_before_it_is_loaded(folder: Path) -> None:
    from torch.distributed._tools.mem_tracker import MemTracker

    dataset = Dataset.open(folder / "tokens")
    teacher = LiveTeacher(folder / "teacher", [dataset], CPU)
    batch = first_batch(dataset)
    teacher._model.requires_grad_(True)  # the tracker counts no other weights
    tracker = MemTracker()
    tracker.track_external(teacher._model)
    with tracker:
        teacher.with_targets(batch)
    measured = tracker.get_tracker_snapshot("peak")[CPU]["Total"]
    shape = Shape.of(teacher._model.config)
    setting = Setting(
        sequences=len(batch.input_ids),
        length=batch.input_ids.shape[1],
        teacher_parameters=shape.parameters,
        teacher_vocab_size=shape.vocab_size,
    )
    assert live_teacher_bytes(setting, activations=0) == pytest.approx(measured, rel=0.2)
    # Beside more activations than that, only the targets count.
    targets = 8 * shape.vocab_size * setting.tokens
    assert live_teacher_bytes(setting, activations=1 << 40) == 4 * shape.parameters + targets
    memory = estimate(shape, setting)
    assert memory.total == memory.states + memory.activations + memory.teacher
    assert ", teacher 0.0 GiB" in str(memory)
    assert "teacher" not in str(estimate(shape, Setting(sequences=1, length=8)))


def test_a_run_learns_from_a_teacher_beside_it(folder: Path, tmp_path: Path) -> None:
    config = make_config(
        folder / "tokens",
        str(folder / "student.json"),
        tmp_path / "out",
        teacher=str(folder / "teacher"),
        alpha=1.0,
        tokens=4000,
    )
    run(config)
    kd = [line["kd"] for line in lines(config.out)]
    assert kd[-1] < kd[0] / 2
    with pytest.raises(InputError, match=r"other settings: .*teacher: null here"):
        run(replace(config, teacher=None, alpha=0.0, tokens=4000))


def test_what_a_teacher_cannot_be_is_refused(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "teacher", tmp_path / "teacher")
    config_file = tmp_path / "teacher" / "config.json"
    content = json.loads(config_file.read_text())
    config_file.write_text(json.dumps(content | {"is_causal": False}))
    with pytest.raises(InputError, match=r"--teacher .* sees the tokens after a position"):
        LiveTeacher(tmp_path / "teacher", [Dataset.open(folder / "tokens")], CPU)
    config_file.write_text(json.dumps(content))
    make_tokenizer(tmp_path / "teacher", prefix="other")
    with pytest.raises(IdentityMismatchError, match=r"--teacher .*: has another tokenizer"):
        LiveTeacher(tmp_path / "teacher", [Dataset.open(folder / "tokens")], CPU)
    config = make_config(folder / "tokens", str(folder / "student.json"), tmp_path / "out")
    with pytest.raises(InputError, match=r"holds tokens without a teacher; .* or a --teacher"):
        run(config)
    with pytest.raises(OptionError, match="keeps every entry"):
        replace(config, teacher=str(folder / "teacher"), tail="bucket")
