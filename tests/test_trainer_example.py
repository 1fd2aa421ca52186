"""examples/distil_with_trainer.py: a Trainer learns from shards, and continues where it was."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM, TrainingArguments

import logitshards
from examples.distil_with_trainer import DistillationTrainer
from tests.tiny_dataset import VOCAB_SIZE, make_dataset

OBJECTIVE = logitshards.Objective(kind="kld", alpha=0.9, temperature=1.0)
STEPS = 30


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("trainer") / "dataset", train=60, masked=True)


def make_trainer(shards: Path, out: Path, *, batches_of_a_step: int = 2) -> DistillationTrainer:
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCAB_SIZE,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=2,
        )
    )
    return DistillationTrainer(
        model,
        TrainingArguments(
            output_dir=str(out),
            max_steps=STEPS,
            gradient_accumulation_steps=batches_of_a_step,
            learning_rate=1e-2,
            logging_steps=1,
            save_steps=10,
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
        ),
        logitshards.batches(
            shards, batch_sequences=8, micro_batch_sequences=-(-8 // batches_of_a_step)
        ),
        OBJECTIVE,
    )


def test_a_machine_with_several_gpus_must_show_one(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TrainingArguments, "n_gpu", 2)
    with pytest.raises(ValueError, match="CUDA_VISIBLE_DEVICES"):
        make_trainer(shards, tmp_path)


def losses(trainer: DistillationTrainer) -> list[float]:
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


def test_a_trainer_learns_from_shards_and_continues_exactly(shards: Path, tmp_path: Path) -> None:
    whole = make_trainer(shards, tmp_path / "whole")
    whole.train()
    found = losses(whole)
    assert len(found) == STEPS
    assert sum(found[-5:]) / 5 < found[0] - 0.3
    again = make_trainer(shards, tmp_path / "whole")
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-20"))
    assert losses(again) == found
    expected = load_file(tmp_path / "whole" / "checkpoint-30" / "model.safetensors")
    for name, weight in again.model.state_dict().items():
        assert torch.equal(weight, expected[name]), name


def test_steps_of_another_number_of_batches_are_refused(shards: Path, tmp_path: Path) -> None:
    for number in (1, 3):
        trainer = make_trainer(shards, tmp_path / str(number), batches_of_a_step=2)
        trainer.args.gradient_accumulation_steps = number
        with pytest.raises(ValueError, match="not the number of batches of a step"):
            trainer.train()


def test_the_batches_of_a_step_add_up_to_its_mean(shards: Path, tmp_path: Path) -> None:
    runs = [
        make_trainer(shards, tmp_path / str(number), batches_of_a_step=number)
        for number in (1, 2, 4)
    ]
    for run in runs:
        run.args.max_steps = 5
        run.train()
    for run in runs[1:]:
        assert losses(run) == pytest.approx(losses(runs[0]), rel=1e-4)
    (batch,) = [next(iter(logitshards.batches(shards, batch_sequences=8)))]
    model = make_trainer(shards, tmp_path / "fresh").model
    states = model.base_model(input_ids=batch.input_ids).last_hidden_state
    loss = logitshards.DistillationLoss(model.lm_head, OBJECTIVE)(states, batch)
    assert losses(runs[0])[0] == pytest.approx(loss.total.item() / batch.num_valid, rel=1e-4)
