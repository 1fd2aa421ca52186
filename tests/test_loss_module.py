"""`logitshards.DistillationLoss` in models of other people, alone and under their FSDP2."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

import logitshards
from logitshards import Batch
from student_train.data.batches import step_batches
from tests.ranks import run_ranks
from tests.tiny_dataset import VOCAB_SIZE, make_dataset

WIDTH = 16
OBJECTIVE = logitshards.Objective(kind="kld", alpha=0.7, temperature=1.0)


class Block(nn.Module):
    """What a model of other people is made of."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(WIDTH, WIDTH)

    def forward(self, states: Tensor) -> Tensor:
        mixed = states.cumsum(1) / torch.arange(1, states.shape[1] + 1)[:, None]
        return states + torch.tanh(self.inner(mixed))


class Model(nn.Module):
    """A model that returns its loss."""

    def __init__(self, *, tied: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(VOCAB_SIZE, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.head = nn.Linear(WIDTH, VOCAB_SIZE, bias=False)
        if tied:
            self.head.weight = self.embedding.weight
        self.loss = logitshards.DistillationLoss(self.head, OBJECTIVE)

    def forward(self, batch: Batch) -> Tensor:
        states = self.embedding(batch.input_ids)
        for block in self.blocks:
            states = block(states)
        loss: Tensor = self.loss(states, batch).total
        return loss


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("module") / "dataset", train=30, masked=True)


def gradients(
    model: nn.Module, shards: Path, rank: int, world_size: int, total: Callable[[int], int]
) -> dict[str, Tensor]:
    """Those of the first step's mean loss, summed over ranks."""
    batches = logitshards.batches(
        shards, batch_sequences=7, micro_batch_sequences=2, rank=rank, world_size=world_size
    )
    with closing(iter(batches)) as iterator:  # type: ignore[type-var]
        step = list(step_batches(iterator))
    num_labels = total(sum(batch.num_valid for batch in step))
    for batch in step:
        (model(batch) / num_labels).backward()
    return {
        name: p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad
        for name, p in model.named_parameters()
        if p.grad is not None
    }


def sharded(shards: Path, tied: bool, out: Path) -> None:
    """What a user does on every rank."""
    torch.set_num_threads(1)
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group("gloo")
    model = Model(tied=tied)
    for block in model.blocks:
        fully_shard(block)
    fully_shard(model)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_force_sum_reduction_for_comms(True)
            module.set_gradient_divide_factor(1.0)

    def total(count: int) -> int:
        counts = torch.tensor(count)
        dist.all_reduce(counts)
        return int(counts)

    found = gradients(model, shards, rank, world_size, total)
    if rank == 0:
        torch.save(found, out)
    with pytest.raises(ValueError, match="the weight of the head is sharded here"):
        model.loss(torch.zeros(1, 2, WIDTH), None)
    dist.destroy_process_group()


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("tied", [True, False])
def test_gradients_of_a_sharded_model_are_those_of_one_process(
    shards: Path, tmp_path: Path, tied: bool, world_size: int
) -> None:
    model = Model(tied=tied)
    expected = gradients(model, shards, 0, 1, lambda count: count)
    assert len(expected) == (5 if tied else 6)
    run_ranks(sharded, world_size, shards, tied, tmp_path / "gradients")
    found = torch.load(tmp_path / "gradients")
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-7)


def test_it_adds_nothing_to_the_model() -> None:
    model = Model(tied=False)
    assert {name.split(".")[0] for name in model.state_dict()} == {"embedding", "blocks", "head"}
    assert not list(model.loss.parameters())


def test_it_follows_a_weight_that_is_replaced(shards: Path) -> None:
    model = Model(tied=False)
    batch = next(iter(logitshards.batches(shards, batch_sequences=3)))
    before = model(batch)
    model.head.weight = nn.Parameter(torch.zeros_like(model.head.weight))
    assert not torch.equal(model(batch), before)
    model(batch).backward()
    assert model.head.weight.grad is not None


def test_hidden_states_of_other_positions_are_refused(shards: Path) -> None:
    batch = next(iter(logitshards.batches(shards, batch_sequences=3)))
    loss = logitshards.DistillationLoss(nn.Linear(8, VOCAB_SIZE, bias=False), OBJECTIVE)
    lines, length = batch.labels.shape
    with pytest.raises(ValueError, match="do not belong to labels"):
        loss(torch.zeros(lines, length + 1, 8), batch)


def test_a_head_with_a_bias_is_refused() -> None:
    with pytest.raises(ValueError, match="has a bias"):
        logitshards.DistillationLoss(nn.Linear(4, 4), OBJECTIVE)
