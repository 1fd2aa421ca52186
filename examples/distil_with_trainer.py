"""Distil with `transformers.Trainer`: its loop and checkpoints, the data and loss of logitshards.

    python examples/distil_with_trainer.py DATASET MODEL OUT --steps 1000

MODEL is the folder of a Hugging Face model whose tokenizer is the dataset's. The same command with
`--resume` continues from the newest checkpoint in OUT, with the data that comes next.

This is for one process and one GPU. Several need the loss inside the forward pass: see
docs/python.md.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import torch
from transformers import (
    AutoModelForCausalLM,
    PreTrainedModel,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_utils import get_last_checkpoint

import logitshards

DATA_STATE = "batches.json"


class Inputs:
    """Batches as what a Trainer takes for a data loader: an iterable of dictionaries."""

    def __init__(self, batches: logitshards.Batches) -> None:
        self._batches = batches

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for batch in self._batches:
            yield {"batch": batch}


class SaveData(TrainerCallback):
    """Writes where the data is into every checkpoint."""

    def __init__(self, batches: logitshards.Batches) -> None:
        self._batches = batches

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        (folder / DATA_STATE).write_text(json.dumps(self._batches.state_dict()))


class DistillationTrainer(Trainer):
    """A Trainer whose data are `batches`, and whose loss is that of an objective on them.

    `gradient_accumulation_steps` must be the batches of a step of `batches`.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        args: TrainingArguments,
        batches: logitshards.Batches,
        objective: logitshards.Objective,
    ) -> None:
        if args.n_gpu > 1:  # a Trainer would split its batches over them
            raise ValueError("this trainer uses one GPU: set CUDA_VISIBLE_DEVICES to one of them")
        args.ignore_data_skip = True  # the batches continue where they were
        super().__init__(model, args, callbacks=[SaveData(batches)])
        self.loss_is_scaled_for_ga = True  # divided by the labels of the whole step
        self._batches = batches
        self._loss = logitshards.DistillationLoss(model.get_output_embeddings(), objective)

    def train(self, resume_from_checkpoint: str | bool | None = None, **options: Any) -> Any:
        """As that of a Trainer; a checkpoint brings the data back to its place too."""
        if resume_from_checkpoint is True:
            resume_from_checkpoint = get_last_checkpoint(self.args.output_dir)
        if resume_from_checkpoint:
            state = (Path(resume_from_checkpoint) / DATA_STATE).read_text()
            self._batches.load_state_dict(json.loads(state))
        return super().train(resume_from_checkpoint=resume_from_checkpoint, **options)

    def get_train_dataloader(self) -> Any:
        return Inputs(self._batches)

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[dict[str, Any]], int]:
        """The batches of a step, and the labels that count in all of them."""
        samples = [next(epoch_iterator) for _ in range(num_batches)]
        last = [sample["batch"].positions is not None for sample in samples]
        if not last[-1] or any(last[:-1]):
            raise ValueError("gradient_accumulation_steps is not the number of batches of a step")
        return samples, sum(sample["batch"].num_valid for sample in samples)

    def compute_loss(
        self,
        model: PreTrainedModel,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: int | None = None,
    ) -> torch.Tensor:
        """The part of a batch in the mean loss of its step."""
        batch = inputs["batch"].to(self.args.device)
        states = model.base_model(
            input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False
        )
        return self._loss(states.last_hidden_state, batch).total / num_items_in_batch


@click.command()
@click.argument("dataset", type=click.Path(path_type=Path, exists=True))
@click.argument("model", type=click.Path(path_type=Path, exists=True))
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--steps", type=int, required=True)
@click.option("--batch-sequences", default=256, show_default=True)
@click.option("--micro-batch-sequences", default=8, show_default=True)
@click.option("--learning-rate", default=3e-4, show_default=True)
@click.option("--resume", is_flag=True)
def main(
    dataset: Path,
    model: Path,
    out: Path,
    steps: int,
    batch_sequences: int,
    micro_batch_sequences: int,
    learning_rate: float,
    resume: bool,
) -> None:
    """Train MODEL on the teacher's distributions in DATASET; write the result to OUT."""
    student = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    # The padding id is often the end token, which needs a gradient; padding here has no label.
    student.get_input_embeddings().padding_idx = None
    with logitshards.open(dataset) as shards:
        keep = shards.spec.keep
        objective = logitshards.Objective(
            kind="kld", alpha=0.9, temperature=keep.temperature, sampled=keep.is_sampled
        )
    trainer = DistillationTrainer(
        student,
        TrainingArguments(
            output_dir=str(out),
            max_steps=steps,
            gradient_accumulation_steps=-(-batch_sequences // micro_batch_sequences),
            learning_rate=learning_rate,
            logging_steps=10,
            save_steps=500,
            report_to=[],
        ),
        logitshards.batches(
            dataset,
            batch_sequences=batch_sequences,
            micro_batch_sequences=micro_batch_sequences,
        ),
        objective,
    )
    trainer.train(resume_from_checkpoint=resume or None)
    trainer.save_model(str(out / "model"))


if __name__ == "__main__":
    main()
