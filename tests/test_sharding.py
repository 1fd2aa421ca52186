"""A student that several processes share has the gradients of one process, for every loss."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch.distributed.tensor import DTensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from shards.dataset import Dataset
from student_train import checkpoint
from student_train.checkpoint import Progress
from student_train.data.batches import TAIL_COLUMNS, Batch, sequential_batches
from student_train.model.blocks import decoder_blocks
from student_train.model.model import hidden_states
from student_train.objective.distillation import Objective
from student_train.objective.loss import IGNORE_INDEX
from student_train.processes.sharding import (
    Sharded,
    in_forward,
    precision_for,
    shard,
    whole_weights,
)
from student_train.processes.world import World, joined
from student_train.step import StepResult, autocast_for, batch_loss, optimizer_step
from tests.ranks import run_ranks
from tests.tiny_dataset import VOCAB_SIZE, make_dataset

CPU = torch.device("cpu")
Outcome = tuple[StepResult, dict[str, torch.Tensor]]

OBJECTIVES = {
    "lm": Objective(kind="kld", alpha=0.0, temperature=1.0),
    "kld": Objective(kind="kld", alpha=0.7, temperature=1.0),
    "nll": Objective(kind="nll", alpha=1.0, temperature=2.0),
    "mse": Objective(kind="mse", alpha=0.5, temperature=1.0),
    "bucket": Objective(kind="kld", alpha=0.9, temperature=1.0, bucket=True),
    "student temperature": Objective(
        kind="kld", alpha=0.5, temperature=1.0, student_temperature=2.0
    ),
    "normkd": Objective(kind="kld", alpha=0.9, temperature=1.0, adaptive_temperature="normkd"),
}
SAMPLED = Objective(kind="kld", alpha=0.9, temperature=1.0, sampled=True)
# (dataset, tied, objective, dtype). Seven rows are four micro batches: some ranks have one more.
CASES = {
    **{f"joined, {name}": ("joined", True, name, "float32") for name in OBJECTIVES},
    "untied": ("joined", False, "kld", "float32"),
    "masked": ("masked", True, "kld", "float32"),
    "packed": ("separate", True, "kld", "float32"),
    "sampled": ("sampled", False, "sampled", "float32"),
    "bfloat16": ("joined", True, "kld", "bfloat16"),
    "bfloat16, as on a GPU": ("joined", True, "kld", "bfloat16"),
    "bfloat16, as on a GPU, untied": ("joined", False, "kld", "bfloat16"),
}


@pytest.fixture(scope="module")
def datasets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sharding")
    make_dataset(folder / "joined", train=7, validation=1)
    make_dataset(folder / "masked", train=7, validation=1, masked=True)
    make_dataset(folder / "separate", train=7, validation=1, separate=True)
    make_dataset(folder / "sampled", train=7, validation=1, sampled=True)
    return folder


def make_model(tied: bool) -> PreTrainedModel:
    torch.manual_seed(3)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCAB_SIZE + 3,
            hidden_size=24,
            intermediate_size=40,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            tie_word_embeddings=tied,
        )
    )


def batches_of(folder: Path, world: World) -> list[Batch]:
    """A rank's part of a dataset in micro batches of two lines, then empty ones for the others."""
    split = Dataset.open(folder).split("train")
    everything = list(sequential_batches(split, batch_lines=2, columns=TAIL_COLUMNS))
    own = everything[world.rank :: world.size]
    first = everything[0]
    ignored = torch.full_like(first.labels, IGNORE_INDEX)
    empty = replace(first, labels=ignored, num_valid=0, num_sequences=(0,))
    return own + [empty] * (world.largest(len(own)) - len(own))


def step_of(case: str, folder: Path, world: World) -> Outcome:
    """What a step of plain gradient descent says, and the weights after it."""
    dataset, tied, name, dtype = CASES[case]
    model = make_model(tied)
    if not world.is_first:  # the weights are those of the first process
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(torch.nan)
    on_gpu = "as on a GPU" in case and world.size > 1
    device = torch.device("cuda") if on_gpu else CPU
    student = shard(model, decoder_blocks(model), world, precision_for(dtype, device))
    if world.size > 1:
        assert isinstance(student, Sharded)
        assert all(isinstance(p, DTensor) for p in student.parameters())
    objective = SAMPLED if name == "sampled" else OBJECTIVES[name]
    result = optimizer_step(
        student,
        torch.optim.SGD(student.parameters(), lr=1.0),
        batches_of(folder / dataset, world),
        partial(batch_loss, objective=objective),
        gradient_clip=0.2,
        autocast=autocast_for(dtype, device, sharded=on_gpu),
        world=world,
    )
    return result, {name: t.clone() for name, t in whole_weights(model, world).items()}


def save_steps(folder: Path, out: Path) -> None:
    """What each of several processes does."""
    with joined(CPU) as world:
        outcomes = {case: step_of(case, folder, world) for case in CASES}
        results = world.from_all({case: result for case, (result, _) in outcomes.items()})
        assert all(result == results[0] for result in results)
        if world.is_first:
            torch.save(outcomes, out)


@pytest.fixture(scope="module", params=[2, 3])
def sharded(
    request: pytest.FixtureRequest, datasets: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Outcome]:
    out = tmp_path_factory.mktemp("outcomes") / "steps.pt"
    run_ranks(save_steps, request.param, datasets, out)
    outcomes: dict[str, Outcome] = torch.load(out, weights_only=False)
    return outcomes


@pytest.mark.parametrize("case", CASES)
def test_a_step_of_several_processes_is_the_step_of_one(
    case: str, sharded: dict[str, Outcome], datasets: Path
) -> None:
    expected, weights = step_of(case, datasets, World(device=CPU))
    result, found = sharded[case]
    rel = 0.02 if "bfloat16" in case else 1e-5
    assert result.num_tokens == expected.num_tokens
    assert result.num_sequences == expected.num_sequences
    for name in ("loss", "lm", "kd", "gradient_norm"):
        assert getattr(result, name) == pytest.approx(getattr(expected, name), rel=rel), name
    before = make_model(CASES[case][1]).state_dict()
    for name, weight in weights.items():
        moved = (weight - before[name]).abs().max()
        assert moved > 0
        assert (found[name] - weight).abs().max() < max(10 * rel, 1e-4) * moved, name


def agree_on_the_slowest() -> None:
    """What each of two processes does: it gives figures of its own, and gets those of all."""
    with joined(CPU) as world:
        own = {"data_wait": 0.5 * world.rank, "peak_memory_bytes": (1 << 40) - world.rank}
        found = world.largest_of_each(own)
        assert found == {"data_wait": 0.5, "peak_memory_bytes": 1 << 40}


def test_a_figure_that_limits_a_run_is_that_of_the_process_with_the_most() -> None:
    run_ranks(agree_on_the_slowest, 2)


def save_after_a_failure(folder: Path) -> None:
    """What each of several processes does: a forward pass fails, and the weights are saved."""
    with joined(CPU) as world:
        policy = precision_for("bfloat16", torch.device("cuda"))
        model = make_model(tied=True)
        expected = {name: weight.clone() for name, weight in model.state_dict().items()}
        student = shard(model, decoder_blocks(model), world, policy)
        optimizer = torch.optim.AdamW(student.parameters())

        def fail(model: PreTrainedModel) -> None:
            hidden_states(model, torch.zeros((1, 4), dtype=torch.int64))
            raise torch.OutOfMemoryError("CUDA out of memory")

        with pytest.raises(torch.OutOfMemoryError):
            in_forward(student, fail)
        progress = Progress(step=1, tokens=1, sequences=[1], positions=[])
        checkpoint.save(folder, model, optimizer, progress, world)
        other = make_model(tied=True)
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.zero_()
        loaded = shard(other, decoder_blocks(other), world, policy)
        path = world.from_first(checkpoint.find_newest(folder) if world.is_first else None)
        assert path is not None
        optimizer = torch.optim.AdamW(loaded.parameters())
        assert checkpoint.load(path, other, optimizer, world) == progress
        for name, weight in whole_weights(other, world).items():
            assert torch.equal(weight, expected[name]), name


def test_weights_that_a_failed_forward_pass_left_gathered_are_saved_unrounded(
    tmp_path: Path,
) -> None:
    run_ranks(save_after_a_failure, 2, tmp_path)
