"""What a GPU is spared, as far as operations show it: passes over the logits, and waiting for it.

The paths of a GPU run here on meta tensors, which have no values, and on a CPU that is lent the
products that only a GPU has.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM

from shards.dataset import Dataset
from student_train.data.batches import TAIL_COLUMNS, sequential_batches
from student_train.evaluation.evaluate import evaluate
from student_train.objective import products
from student_train.objective.distillation import Objective
from student_train.objective.loss import _Blocks, distillation_loss
from student_train.objective.products import add_product, softmax_in_place, tensor_float32
from student_train.processes.world import World
from student_train.step import batch_loss
from tests.kept_entries import make_targets
from tests.tiny_dataset import VOCAB_SIZE, make_dataset

KLD = Objective(kind="kld", alpha=0.5, temperature=1.0)
ROWS, WIDTH, VOCAB = 48, 8, 96
# Operations for which a GPU has to be waited for: a number or a size comes from its memory.
WAITING = {"_local_scalar_dense", "nonzero", "masked_select", "_unique2", "is_nonzero"}


class Recorder(TorchDispatchMode):
    """The names of all operations, with the shapes and dtypes of their results."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.results: list[tuple[str, tuple[int, ...], torch.dtype]] = []
        self.precisions: dict[tuple[int, ...], str] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        self.names.append(name)
        for value in result if isinstance(result, tuple | list) else (result,):
            if isinstance(value, Tensor):
                self.results.append((str(func), tuple(value.shape), value.dtype))
                if name == "mm":
                    self.precisions[tuple(value.shape)] = torch.backends.cuda.matmul.fp32_precision
        return result


@pytest.fixture
def lent_products(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Give the CPU what CUDA has, by its definition, and let the loss use it."""

    def mm(left: Tensor, right: Tensor, dtype: torch.dtype, *, out: Tensor) -> Tensor:
        return torch.mm(left.to(dtype), right.to(dtype), out=out)

    def addmm(
        total: Tensor, left: Tensor, right: Tensor, dtype: torch.dtype, *, out: Tensor, **_: Any
    ) -> Tensor:
        return torch.addmm(total, left.to(dtype), right.to(dtype), out=out)

    library = torch.library.Library("aten", "IMPL")
    library.impl("mm.dtype_out", mm, "CPU")
    library.impl("addmm.dtype_out", addmm, "CPU")
    monkeypatch.setattr(products, "writes_wide", lambda device: True)
    yield
    library._destroy()


def test_wide_products_of_narrow_factors_give_the_same_loss_with_less_rounding(
    lent_products: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    random = torch.Generator().manual_seed(0)
    hidden = torch.randn(200, WIDTH, generator=random).bfloat16()
    weight = torch.randn(VOCAB, WIDTH, generator=random).bfloat16()
    labels = torch.randint(VOCAB, (200,), generator=random)
    logprobs, ids = torch.log_softmax(torch.randn(200, VOCAB, generator=random), 1).topk(12)
    targets = make_targets(ids, logprobs)

    def run(dtype: torch.dtype) -> list[Tensor]:
        leaves = [t.to(dtype).requires_grad_() for t in (hidden, weight)]
        row_bytes = 4 * VOCAB
        loss = distillation_loss(*leaves, labels, targets, KLD, block_bytes=ROWS * row_bytes)
        gradients = torch.autograd.grad(loss.total, leaves)
        return [loss.total.detach(), *gradients]

    exact = run(torch.float64)
    direct = run(torch.bfloat16)
    monkeypatch.setattr(products, "writes_wide", lambda device: False)
    rounded = run(torch.bfloat16)
    errors = [
        [float((a.double() - b).norm() / b.norm()) for a, b in zip(found, exact, strict=True)]
        for found in (direct, rounded)
    ]
    assert errors[0][0] < 1e-6 < 1e-5 < errors[1][0]  # logits of bfloat16 factors are exact
    for less, more in zip(*errors, strict=True):
        assert less <= 1.05 * more
    assert max(errors[0]) < 0.01


def test_on_a_gpu_a_block_passes_over_its_logits_as_few_times_as_it_can() -> None:
    hidden = torch.empty(ROWS, WIDTH, dtype=torch.bfloat16, device="meta")
    weight = torch.empty(VOCAB, WIDTH, dtype=torch.bfloat16, device="meta")
    labels = torch.empty(ROWS, dtype=torch.int64, device="meta")
    objective = Objective(kind="kld", alpha=0.0, temperature=1.0)
    blocks = _Blocks(hidden, weight, objective)
    blocks.add(labels, labels, None)  # makes the buffers
    with Recorder() as found:
        blocks.add(labels, labels, None)
    large = [name for name, shape, _ in found.results if shape == (ROWS, VOCAB)]
    views = {"aten.slice.Tensor", "aten.t.default", "aten.detach.default"}
    assert [name for name in large if name not in views] == [
        "aten.mm.dtype_out",  # logits, float32 at once
        "aten.softmax.int_out",
        "aten.scatter_add_.default",
        "aten.copy_.default",  # their gradient, bfloat16 for two products
    ]
    assert found.names.count("max") == 1
    assert "amax" not in found.names
    of_weight = [name for name, shape, _ in found.results if shape == (VOCAB, WIDTH)]
    assert [name for name in of_weight if name not in views] == ["aten.addmm.dtype_out"]


@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_the_log_sum_is_the_same_from_the_place_of_the_largest_logit(
    scale: float,
) -> None:
    logits = scale * torch.randn(64, 500, generator=torch.Generator().manual_seed(0))
    place = logits.argmax(1, keepdim=True)
    expected = logits.logsumexp(1, keepdim=True)
    largest = logits.gather(1, place)
    probabilities, logsumexp = softmax_in_place(logits)
    torch.testing.assert_close(logsumexp, expected, rtol=1e-6, atol=1e-6)
    assert torch.equal(largest - probabilities.gather(1, place).log(), logsumexp)


def test_products_of_equal_dtypes_are_added_in_place() -> None:
    total, left, right = torch.ones(3, 4), torch.ones(3, 5), torch.ones(5, 4)
    add_product(total, left, right)
    assert torch.equal(total, torch.full((3, 4), 6.0))


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return Dataset.open(make_dataset(tmp_path_factory.mktemp("datasets") / "dataset", masked=True))


@pytest.fixture
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    return LlamaForCausalLM(config)


@pytest.mark.parametrize("alpha", [0.0, 0.5])
def test_no_micro_batch_waits_for_a_gpu_outside_the_model(
    alpha: float, dataset: Dataset, model: LlamaForCausalLM
) -> None:
    batches = sequential_batches(dataset.split("train"), batch_lines=4, columns=TAIL_COLUMNS)
    batch = next(iter(batches))
    assert batch.num_valid == int((batch.labels != -100).sum()) < batch.labels.numel()
    with Recorder() as of_model:
        model.base_model(input_ids=batch.input_ids, use_cache=False)
    objective = Objective(kind="kld", alpha=alpha, temperature=1.0)
    with Recorder() as found:
        loss = batch_loss(model, batch, objective=objective)
        loss.total.backward()
    waits = [[name for name in record.names if name in WAITING] for record in (found, of_model)]
    assert waits[0] == waits[1]
    assert len(waits[0]) <= 1  # transformers looks for packed sequences


def test_an_evaluation_of_bfloat16_states_may_round_its_head_and_no_other(
    dataset: Dataset, model: LlamaForCausalLM
) -> None:
    for dtype, expected in ((torch.bfloat16, "tf32"), (torch.float32, "none")):
        with Recorder() as found:
            evaluate(
                model.to(dtype),
                dataset.split("validation"),
                batch_sequences=2,
                world=World(device=torch.device("cpu")),
                autocast=nullcontext(),
            )
        of_head = {value for shape, value in found.precisions.items() if shape[1] == VOCAB_SIZE}
        assert of_head == {expected}
        assert torch.backends.cuda.matmul.fp32_precision == "none"
        assert torch.get_float32_matmul_precision() == "highest"


def test_a_precision_is_put_back_after_an_error() -> None:
    with pytest.raises(KeyError), tensor_float32(True):
        raise KeyError
    assert torch.backends.cuda.matmul.fp32_precision == "none"
