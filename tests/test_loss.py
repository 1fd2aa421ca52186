"""The fused loss against a dense float64 reference written from the definition, with autograd."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from student_train.objective.distillation import Objective, Targets
from student_train.objective.loss import Loss, distillation_loss
from tests.kept_entries import all_padded, make_targets, with_dtype

SIZES = [(1, 1, 3, 1), (7, 5, 13, 4), (33, 16, 101, 17), (64, 24, 257, 100)]  # T, D, V, K


def make_case(
    size: tuple[int, int, int, int], *, dtype: torch.dtype = torch.float64, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor, Targets]:
    """Random hidden, weight, labels with every fifth ignored, targets with ragged kept entries."""
    num_tokens, width, vocab_size, num_kept = size
    random = torch.Generator().manual_seed(seed)
    hidden = torch.randn(num_tokens, width, generator=random, dtype=torch.float64)
    weight = torch.randn(vocab_size, width, generator=random, dtype=torch.float64)
    labels = torch.randint(vocab_size, (num_tokens,), generator=random)
    labels[4::5] = -100
    most = min(num_kept, vocab_size)
    scores = torch.randn(num_tokens, vocab_size, generator=random, dtype=torch.float64)
    logprobs, ids = torch.log_softmax(2 * scores, 1).topk(most)
    counts = torch.randint(most + 1, (num_tokens,), generator=random)
    padding = torch.arange(most) >= counts[:, None]
    kept = logprobs.masked_fill(padding, float("-inf"))
    # What was not kept, with an error as rounding makes it; at some positions all was kept.
    tail = (1 - kept.exp().sum(1)).clamp(min=0).log() + 0.03 * scores[:, 0]
    return (
        hidden.to(dtype).requires_grad_(),
        weight.to(dtype).requires_grad_(),
        labels,
        make_targets(ids, kept.to(dtype), tail.to(dtype)),
    )


def dense_reference(
    hidden: Tensor, weight: Tensor, labels: Tensor, targets: Targets, objective: Objective
) -> Loss:
    """The definition, position by position, over the logits of the whole batch."""
    logs = torch.log_softmax(hidden @ weight.T, 1)
    lm, kd = logs.new_zeros(()), logs.new_zeros(())
    all_ids, all_logprobs = all_padded(targets.entries)
    for t in range(len(labels)):
        if labels[t] == -100:
            continue
        lm = lm - logs[t, labels[t]]
        kept = all_logprobs[t] > float("-inf")
        ids, logprobs = all_ids[t][kept], all_logprobs[t][kept]
        if objective.kind == "mse":
            if kept.any():
                student = logs[t, ids] - logs[t, ids].mean()
                teacher = logprobs / objective.temperature
                kd = kd + (student - (teacher - teacher.mean())).square().mean()
        elif objective.bucket:
            assert targets.tail_logmass is not None
            both = torch.cat([logprobs, targets.tail_logmass[t : t + 1]]).exp()
            both = both / both.sum()
            out = torch.ones_like(logs[t], dtype=torch.bool)
            out[ids] = False
            student = logs[t, ids]
            if both[-1] > 0:
                student = torch.cat([student, logs[t][out].logsumexp(0)[None]])
            both = both[: len(student)]
            kd = kd - (both * student).sum()
            if objective.kind == "kld":
                kd = kd + (both * both.log()).sum()
        elif kept.any():
            target = torch.softmax(logprobs / objective.temperature, 0)
            if objective.sampled:
                target = logprobs.exp()
            kd = kd - (target * logs[t, ids]).sum()
            if objective.kind == "kld" and not objective.sampled:
                kd = kd + (target * target.log()).sum()
    return Loss((1 - objective.alpha) * lm + objective.alpha * kd, lm, kd)


def gradients(loss: Loss, hidden: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    """Gradients of the total for hidden and weight."""
    return torch.autograd.grad(loss.total, (hidden, weight))


@pytest.mark.parametrize("kind", ["kld", "nll"])
@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
@pytest.mark.parametrize(("temperature", "sampled"), [(0.5, False), (1.0, False), (2.0, False),
                                                      (2.0, True)])  # fmt: skip
def test_values_and_gradients_equal_the_dense_reference(
    kind: str, alpha: float, temperature: float, sampled: bool
) -> None:
    check(Objective(kind=kind, alpha=alpha, temperature=temperature, sampled=sampled))


@pytest.mark.parametrize("kind", ["kld", "nll"])
@pytest.mark.parametrize("alpha", [0.3, 1.0])
def test_the_bucket_equals_the_dense_reference(kind: str, alpha: float) -> None:
    check(Objective(kind=kind, alpha=alpha, temperature=1.0, bucket=True))


@pytest.mark.parametrize("alpha", [0.3, 1.0])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_mean_squared_error_equals_the_dense_reference(alpha: float, temperature: float) -> None:
    check(Objective(kind="mse", alpha=alpha, temperature=temperature))


def check(objective: Objective) -> None:
    """Values and gradients against the dense reference, for several sizes and blocks."""
    alpha = objective.alpha
    for size, rows_per_block in itertools.product(SIZES, (1, 3, 1000)):
        hidden, weight, labels, targets = make_case(size)
        expected = dense_reference(hidden, weight, labels, targets, objective)
        found = distillation_loss(
            hidden,
            weight,
            labels,
            targets if alpha else None,
            objective,
            block_bytes=rows_per_block * len(weight) * 8,
        )
        torch.testing.assert_close(found.total, expected.total)
        torch.testing.assert_close(found.lm, expected.lm)
        torch.testing.assert_close(found.kd, expected.kd if alpha else torch.zeros_like(found.kd))
        torch.testing.assert_close(
            gradients(found, hidden, weight), gradients(expected, hidden, weight)
        )


def test_a_scaled_loss_has_scaled_gradients() -> None:
    hidden, weight, labels, targets = make_case(SIZES[1])
    objective = Objective(kind="kld", alpha=0.5, temperature=1.0)

    def loss() -> Tensor:
        return distillation_loss(hidden, weight, labels, targets, objective).total

    plain = torch.autograd.grad(loss(), (hidden, weight))
    scaled = torch.autograd.grad(loss() / 7, (hidden, weight))
    torch.testing.assert_close(scaled, tuple(gradient / 7 for gradient in plain))


def test_kld_and_nll_differ_by_the_entropy_of_the_target_and_not_in_gradient() -> None:
    hidden, weight, labels, targets = make_case(SIZES[2])
    results = {
        kind: distillation_loss(
            hidden,
            weight,
            labels,
            targets,
            Objective(kind=kind, alpha=0.7, temperature=0.5),
        )
        for kind in ("kld", "nll")
    }
    assert results["nll"].kd > results["kld"].kd
    of_kld, of_nll = (gradients(results[kind], hidden, weight) for kind in ("kld", "nll"))
    torch.testing.assert_close(of_kld, of_nll, rtol=0, atol=0)


def test_kld_is_zero_for_a_student_that_equals_the_target() -> None:
    logprobs = torch.log_softmax(torch.randn(5, 11, dtype=torch.float64), 1)
    hidden = logprobs.clone().requires_grad_()
    weight = torch.eye(11, dtype=torch.float64).requires_grad_()
    targets = make_targets(torch.arange(11).expand(5, 11), logprobs)
    objective = Objective(kind="kld", alpha=1.0, temperature=1.0)
    found = distillation_loss(hidden, weight, torch.zeros(5, dtype=torch.int64), targets, objective)
    torch.testing.assert_close(found.kd, torch.zeros_like(found.kd))
    torch.testing.assert_close(gradients(found, hidden, weight)[0], torch.zeros(5, 11).double())


@pytest.mark.parametrize("kind", ["kld", "nll"])
def test_probability_outside_the_kept_entries_costs_something(kind: str) -> None:
    """Nll is kld and the entropy of the target."""
    weight = torch.eye(6, dtype=torch.float64).requires_grad_()
    target = torch.tensor([[0.6, 0.4]]).double()
    targets = make_targets(torch.tensor([[0, 1]]), target.log())
    objective = Objective(kind=kind, alpha=1.0, temperature=1.0)
    least = 0.0 if kind == "kld" else -(target * target.log()).sum().item()

    def kd(outside: float) -> float:
        kept = torch.tensor([0.6, 0.4]) * (1 - outside)
        probabilities = torch.cat([kept, torch.full((4,), outside / 4)])
        hidden = probabilities.double().log()[None].requires_grad_()
        label = torch.zeros(1, dtype=torch.int64)
        return distillation_loss(hidden, weight, label, targets, objective).kd.item()

    assert kd(1e-9) == pytest.approx(least, abs=1e-6)
    assert kd(0.5) == pytest.approx(least + torch.tensor(2.0).log().item(), rel=1e-5)


def test_positions_without_kept_entries_have_only_the_language_model_part() -> None:
    hidden, weight, labels, _ = make_case(SIZES[2])
    shape = (len(labels), SIZES[2][3])
    nothing = make_targets(torch.zeros(shape), torch.full(shape, float("-inf")))
    mixed = Objective(kind="kld", alpha=0.25, temperature=1.0)
    found = distillation_loss(hidden, weight, labels, nothing, mixed)
    assert found.kd == 0
    torch.testing.assert_close(found.total, 0.75 * found.lm)
    only_kd = Objective(kind="kld", alpha=1.0, temperature=1.0)
    found = distillation_loss(hidden, weight, labels, nothing, only_kd)
    assert found.total == 0
    assert all(not gradient.any() for gradient in gradients(found, hidden, weight))


def test_no_valid_label_gives_zero_and_no_nan() -> None:
    hidden, weight, labels, targets = make_case(SIZES[1])
    found = distillation_loss(
        hidden,
        weight,
        torch.full_like(labels, -100),
        targets,
        Objective(kind="kld", alpha=0.5, temperature=1.0),
    )
    assert [value.item() for value in found] == [0, 0, 0]
    assert all(not gradient.any() for gradient in gradients(found, hidden, weight))


def test_ignored_rows_may_hold_anything() -> None:
    hidden, weight, labels, targets = make_case(SIZES[1])
    objective = Objective(kind="nll", alpha=0.5, temperature=1.0)
    expected = distillation_loss(hidden, weight, labels, targets, objective)
    ignored = labels == -100
    wild = hidden.detach().clone()
    wild[ignored] = float("nan")
    wild.requires_grad_()
    found = distillation_loss(wild, weight, labels, targets, objective)
    torch.testing.assert_close(found.total, expected.total, rtol=0, atol=0)
    assert not gradients(found, wild, weight)[0][ignored].any()


@pytest.mark.parametrize("scale", [1.0, 300.0])
def test_extreme_logits_stay_finite_and_right(scale: float) -> None:
    hidden, weight, labels, targets = make_case(SIZES[2])
    objective = Objective(kind="kld", alpha=0.5, temperature=1.0)
    large = (hidden.detach() * scale).requires_grad_()
    expected = dense_reference(large, weight, labels, targets, objective)
    narrow = large.detach().float().requires_grad_()
    found = distillation_loss(
        narrow, weight.float(), labels, with_dtype(targets, torch.float32), objective
    )
    torch.testing.assert_close(found.total, expected.total.float(), rtol=1e-4, atol=0)


def test_sums_and_weight_gradient_are_float32_under_bfloat16_autocast() -> None:
    size = (1024, 8, 64, 8)
    hidden, weight, labels, targets = make_case(size, dtype=torch.float32)
    hidden = (hidden.detach() * 0.1).requires_grad_()
    objective = Objective(kind="nll", alpha=0.5, temperature=1.0)
    exact = dense_reference(hidden.double(), weight.double(), labels, targets, objective)
    with torch.autocast("cpu", torch.bfloat16):
        found = distillation_loss(
            hidden, weight, labels, targets, objective, block_bytes=16 * 64 * 4
        )
    assert {value.dtype for value in found} == {torch.float32}
    # A bfloat16 sum stops growing at 256 terms of this size; rounding of logits averages out.
    torch.testing.assert_close(found.total, exact.total.float(), rtol=1e-3, atol=0)
    of_hidden, of_weight = gradients(found, hidden, weight)
    assert of_hidden.dtype == of_weight.dtype == torch.float32
    expected = torch.autograd.grad(exact.total, weight)[0]
    assert (of_weight - expected).norm() < 0.02 * expected.norm()


class _LargestResult(TorchDispatchMode):
    """Remembers the most elements that the memory behind any result of an operation holds."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, tuple | list) else (result,):
            if isinstance(value, Tensor):
                size = value.untyped_storage().nbytes() // value.element_size()
                self.largest = max(self.largest, size)
        return result


def test_no_tensor_is_as_large_as_the_logits_of_the_batch() -> None:
    size = (512, 4, 1000, 10)
    hidden, weight, labels, targets = make_case(size, dtype=torch.float32)
    objective = Objective(kind="kld", alpha=0.5, temperature=1.0)
    rows_per_block = 16
    with _LargestResult() as results:
        loss = distillation_loss(
            hidden, weight, labels, targets, objective, block_bytes=rows_per_block * 1000 * 4
        )
        loss.total.backward()
    assert results.largest == rows_per_block * 1000
    assert hidden.grad is not None


def test_positions_that_do_not_belong_together_are_refused() -> None:
    hidden, weight, labels, targets = make_case(SIZES[1])
    objective = Objective(kind="kld", alpha=0.5, temperature=1.0)
    more = torch.cat([hidden, hidden[:1]])
    for other in (more, hidden[1:]):
        with pytest.raises(ValueError, match="numbers of positions differ: hidden"):
            distillation_loss(other, weight, labels, targets, objective)
    with pytest.raises(ValueError, match=f"targets {len(labels)}"):
        distillation_loss(more, weight, torch.cat([labels, labels[:1]]), targets, objective)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"kind": "MSE"}, "kind 'MSE': expected kld, nll, mse"),
        ({"adaptive_temperature": "adakd"}, "adaptive_temperature 'adakd': expected None, normkd"),
        ({"sampled": True, "kind": "mse"}, "sampled does not go with mse"),
        ({"sampled": True, "adaptive_temperature": "normkd"}, "sampled does not go with adaptive"),
        ({"sampled": True, "bucket": True}, "sampled does not go with bucket"),
        ({"bucket": True, "temperature": 2.0}, "bucket does not go with temperature"),
        ({"bucket": True, "student_temperature": 2.0}, "bucket does not go with student_temp"),
        ({"kind": "mse", "student_temperature": 2.0}, "mse does not go with student_temperature"),
    ],
)
def test_an_objective_that_would_ignore_an_option_is_refused(
    options: dict[str, Any], match: str
) -> None:
    plain: dict[str, Any] = {"kind": "kld", "alpha": 0.5, "temperature": 1.0}
    with pytest.raises(ValueError, match=match):
        Objective(**plain | options)
    if "'" not in match:
        Objective(**plain | options | {"alpha": 0.0})  # without KD nothing of it is used


def test_targets_are_given_exactly_if_alpha_needs_them() -> None:
    hidden, weight, labels, targets = make_case(SIZES[1])
    with pytest.raises(ValueError, match="alpha"):
        distillation_loss(
            hidden, weight, labels, targets, Objective(kind="kld", alpha=0.0, temperature=1.0)
        )
    with pytest.raises(ValueError, match="alpha"):
        distillation_loss(
            hidden, weight, labels, None, Objective(kind="kld", alpha=0.5, temperature=1.0)
        )


def test_a_second_differentiation_is_refused() -> None:
    hidden, weight, labels, targets = make_case(SIZES[1])
    objective = Objective(kind="kld", alpha=0.5, temperature=1.0)
    total = distillation_loss(hidden, weight, labels, targets, objective).total
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="twice"):
        total.backward()


def test_the_mean_gradient_over_many_samples_is_that_of_the_full_distribution() -> None:
    """With weights that sum to 1 only on average; dividing by their sum fails this by far."""
    random = torch.Generator().manual_seed(0)
    width, vocab_size, threshold, repeats = 5, 30, 0.2, 20_000
    p = torch.softmax(1.5 * torch.randn(vocab_size, generator=random).double(), 0)
    weight = torch.randn(vocab_size, width, generator=random).double().requires_grad_()
    state = torch.randn(1, width, generator=random).double()
    label = torch.zeros(1, dtype=torch.int64)

    def gradient(ids: Tensor, logprobs: Tensor, *, sampled: bool) -> Tensor:
        hidden = state.expand(len(ids), -1).clone().requires_grad_()
        objective = Objective(kind="kld", alpha=1.0, temperature=1.0, sampled=sampled)
        loss = distillation_loss(
            hidden, weight, label.expand(len(ids)), make_targets(ids, logprobs), objective
        )
        return torch.autograd.grad(loss.total, weight)[0] / len(ids)

    every = torch.arange(vocab_size).int()
    exact = gradient(every[None], p.log()[None], sampled=False)
    kept = torch.rand(repeats, vocab_size, generator=random).double() < p / threshold
    logprobs = torch.where(kept, p.clamp(min=threshold).log(), float("-inf"))
    ids = every.expand(repeats, -1)
    found = gradient(ids, logprobs, sampled=True)
    renormalised = gradient(ids, logprobs, sampled=False)
    # The standard error of an element is at most |state| * threshold / 2 / sqrt(repeats).
    bound = 6.5 * state.abs().max() * threshold / 2 / repeats**0.5
    assert (found - exact).abs().max() < bound
    assert (renormalised - exact).abs().max() > 3 * bound


def test_the_bucket_is_zero_for_a_student_that_equals_the_teacher_and_not_below() -> None:
    random = torch.Generator().manual_seed(1)
    weight = torch.eye(12, dtype=torch.float64).requires_grad_()
    exact = torch.log_softmax(2 * torch.randn(9, 12, generator=random).double(), 1)
    logprobs, ids = exact.topk(4)
    tail = (1 - logprobs.exp().sum(1)).log()
    labels = torch.zeros(9, dtype=torch.int64)
    objective = Objective(kind="kld", alpha=1.0, temperature=1.0, bucket=True)

    def kd(student: Tensor) -> Loss:
        hidden = student.clone().requires_grad_()
        return distillation_loss(
            hidden, weight, labels, make_targets(ids, logprobs, tail), objective
        )

    same = kd(exact)
    assert same.kd.item() == pytest.approx(0, abs=1e-12)
    assert torch.autograd.grad(same.total, weight)[0].abs().max() < 1e-12
    for seed in range(20):
        other = torch.randn(9, 12, generator=torch.Generator().manual_seed(seed)).double()
        assert kd(exact + other).kd > 0


def test_a_student_sure_of_what_was_kept_has_a_finite_bucket() -> None:
    hidden = torch.zeros(1, 30)
    hidden[0, 0] = 200.0  # the softmax of all the others is 0 in float32
    hidden.requires_grad_()
    weight = torch.eye(30).requires_grad_()
    targets = make_targets(torch.tensor([[0]]), torch.tensor([[-0.5]]), torch.tensor([-0.9]))
    objective = Objective(kind="kld", alpha=1.0, temperature=1.0, bucket=True)
    loss = distillation_loss(hidden, weight, torch.tensor([3]), targets, objective)
    assert loss.total.isfinite()
    assert all(gradient.isfinite().all() for gradient in gradients(loss, hidden, weight))


def test_mean_squared_error_does_not_see_a_constant_nor_what_was_not_kept() -> None:
    weight = torch.eye(6, dtype=torch.float64).requires_grad_()
    targets = make_targets(torch.tensor([[0, 1]]), torch.tensor([[0.6, 0.4]]).double().log())
    objective = Objective(kind="mse", alpha=1.0, temperature=1.0)

    def kd(logits: list[float]) -> float:
        hidden = torch.tensor([logits]).double().requires_grad_()
        label = torch.zeros(1, dtype=torch.int64)
        return distillation_loss(hidden, weight, label, targets, objective).kd.item()

    ratio = float(torch.tensor(1.5).log())
    assert kd([ratio, 0, 0, 0, 0, 0]) == pytest.approx(0, abs=1e-12)
    assert kd([ratio + 5, 5, 50, -3, 0, 9]) == pytest.approx(0, abs=1e-12)
    assert kd([0, 0, 0, 0, 0, 0]) == pytest.approx((ratio / 2) ** 2)


@pytest.mark.parametrize("kind", ["kld", "mse"])
@pytest.mark.parametrize("bucket", [False, True])
def test_a_batch_without_a_valid_label_gives_zero(kind: str, bucket: bool) -> None:
    hidden, weight, labels, targets = make_case(SIZES[1])
    objective = Objective(kind=kind, alpha=0.5, temperature=1.0, bucket=bucket and kind != "mse")
    loss = distillation_loss(hidden, weight, torch.full_like(labels, -100), targets, objective)
    assert [part.item() for part in loss] == [0, 0, 0]
    assert all(gradient.abs().max() == 0 for gradient in gradients(loss, hidden, weight))
