"""What a GPU computes is what the CPU computes, where the project has code of its own for it."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from shards.dataset import Dataset
from student_train import checkpoint
from student_train.checkpoint import Progress
from student_train.data.batches import TAIL_COLUMNS, for_device, sequential_batches
from student_train.data.order import START
from student_train.evaluation.evaluate import evaluate
from student_train.objective.distillation import Objective, Targets
from student_train.objective.loss import distillation_loss
from student_train.processes.world import World
from student_train.speed import StepClock
from student_train.step import autocast_for, batch_loss, make_optimizer, optimizer_step
from teacher_dump.engines.head import WideHead
from tests.kept_entries import make_targets
from tests.tiny_dataset import VOCAB_SIZE, make_dataset
from tests.tiny_runs import make_config

pytestmark = pytest.mark.gpu

CPU, GPU = torch.device("cpu"), torch.device("cuda")
KLD = Objective(kind="kld", alpha=0.7, temperature=1.0)
OBJECTIVES = {
    "labels": Objective(kind="kld", alpha=0.0, temperature=1.0),
    "kld": KLD,
    "bucket": Objective(kind="kld", alpha=0.7, temperature=1.0, bucket=True),
    "mse": Objective(kind="mse", alpha=0.7, temperature=2.0),
    "sampled": Objective(kind="nll", alpha=0.7, temperature=1.0, sampled=True),
    "tempered": Objective(kind="kld", alpha=0.7, temperature=2.0, student_temperature=2.0),
    "adaptive": Objective(kind="kld", alpha=0.7, temperature=1.0, adaptive_temperature="adakd-h"),
}
NUM_TOKENS, WIDTH, NUM_LOGITS, NUM_KEPT = 300, 64, 5000, 20


@pytest.fixture(autouse=True)
def no_tf32() -> None:
    """What PyTorch starts with, and what every comparison here needs."""
    assert torch.get_float32_matmul_precision() == "highest"


def on(device: torch.device, targets: Targets) -> Targets:
    """The same targets there."""
    entries, *others = targets
    moved = (part.to(device) if isinstance(part, Tensor) else part for part in entries)
    return Targets(
        type(entries)(*moved), *(None if other is None else other.to(device) for other in others)
    )


def loss_and_gradients(
    objective: Objective, device: torch.device, dtype: str = "float32"
) -> tuple[Tensor, ...]:
    """total, lm, kd, and the total's gradients for hidden states and weight, on the CPU."""
    random = torch.Generator().manual_seed(0)
    hidden = torch.randn(NUM_TOKENS, WIDTH, generator=random)
    weight = torch.randn(NUM_LOGITS, WIDTH, generator=random) / 8
    labels = torch.randint(NUM_LOGITS, (NUM_TOKENS,), generator=random)
    labels[4::5] = -100
    scores = torch.randn(NUM_TOKENS, NUM_LOGITS, generator=random)
    logprobs, ids = torch.log_softmax(2 * scores, 1).topk(NUM_KEPT)
    counts = torch.randint(1, NUM_KEPT + 1, (NUM_TOKENS,), generator=random)
    logprobs.masked_fill_(torch.arange(NUM_KEPT) >= counts[:, None], -torch.inf)
    tail = (1 - logprobs.exp().sum(1)).log()
    targets = make_targets(ids, logprobs, tail, scores[:, 0].abs()) if objective.alpha else None
    leaves = [hidden.to(device).requires_grad_(), weight.to(device).requires_grad_()]
    with autocast_for(dtype, device):
        loss = distillation_loss(
            *leaves,
            labels.to(device),
            None if targets is None else on(device, targets),
            objective,
            block_bytes=1 << 20,  # several blocks
        )
    gradients = torch.autograd.grad(loss.total, leaves)
    return tuple(value.detach().cpu() for value in (*loss, *gradients))


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_loss_and_its_gradients_are_those_of_the_cpu(name: str) -> None:
    expected = loss_and_gradients(OBJECTIVES[name], CPU)
    found = loss_and_gradients(OBJECTIVES[name], GPU)
    for value, exact in zip(found, expected, strict=True):
        torch.testing.assert_close(value, exact, rtol=1e-4, atol=1e-4 * float(exact.abs().max()))


@pytest.mark.parametrize("name", OBJECTIVES)
def test_in_bfloat16_the_loss_is_off_by_rounding_alone(name: str) -> None:
    expected = loss_and_gradients(OBJECTIVES[name], CPU)
    found = loss_and_gradients(OBJECTIVES[name], GPU, "bfloat16")
    for value, exact in zip(found, expected, strict=True):
        assert torch.linalg.vector_norm(value - exact) <= 0.02 * torch.linalg.vector_norm(exact)


def test_a_wide_head_is_as_exact_as_float32_sums_are() -> None:
    random = torch.Generator().manual_seed(0)
    hidden = torch.randn(512, 1024, generator=random).bfloat16()
    weight = torch.randn(4096, 1024, generator=random).bfloat16()
    head = WideHead(weight.to(GPU), None, torch.float32)
    exact = hidden.double() @ weight.double().T
    out = torch.empty((600, 4096), device=GPU)
    for logits in (head(hidden.to(GPU)), head(hidden.to(GPU), out=out)):
        assert logits.dtype == torch.float32
        assert (logits.cpu() - exact).abs().max() < 1e-3


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return Dataset.open(make_dataset(tmp_path_factory.mktemp("datasets") / "dataset"))


@pytest.fixture
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        initializer_range=0.3,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config)


def test_an_evaluation_gives_the_figures_of_the_cpu(
    dataset: Dataset, model: LlamaForCausalLM
) -> None:
    found, expected = (
        evaluate(
            model.to(device),
            dataset.split("validation"),
            batch_sequences=2,
            world=World(device=device),
            autocast=nullcontext(),
        )
        for device in (GPU, CPU)
    )
    assert found == pytest.approx(expected, rel=1e-4)


def test_a_run_goes_on_without_its_gpu(
    dataset: Dataset, model: LlamaForCausalLM, tmp_path: Path
) -> None:
    config = make_config(dataset.path, "", tmp_path)
    model.to(GPU)
    optimizer = make_optimizer(model, config)
    clock = StepClock(GPU, None)
    batches = sequential_batches(dataset.split("train"), batch_lines=4, columns=TAIL_COLUMNS)
    first, *later = for_device(batches, GPU)
    assert first.labels.is_pinned()

    def step(batch: object) -> float:
        return optimizer_step(
            model,
            optimizer,
            clock.waiting(iter([batch])),  # type: ignore[list-item]
            lambda model, batch: batch_loss(model, batch, objective=KLD),
            gradient_clip=1.0,
            autocast=nullcontext(),
        ).loss

    step(first)
    assert clock.step_done(1)["peak_cuda_memory_bytes"] > 0
    progress = Progress(step=1, tokens=1, sequences=[4], positions=[START])
    checkpoint.save(tmp_path, model, optimizer, progress, World(device=GPU))
    on_gpu = [step(batch) for batch in later]
    model.to(CPU)
    optimizer = make_optimizer(model, config)
    newest = checkpoint.find_newest(tmp_path)
    assert newest is not None
    assert checkpoint.load(newest, model, optimizer, World(device=CPU)) == progress
    assert [step(batch) for batch in later] == pytest.approx(on_gpu, rel=1e-4)
