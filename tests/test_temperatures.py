"""Temperatures of the student and of every position, against their definitions in dense float64."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from student_train.objective.distillation import Objective, Targets
from student_train.objective.loss import Loss, distillation_loss
from student_train.objective.temperatures import adapt
from tests.kept_entries import all_padded, make_targets, with_dtype
from tests.test_loss import SIZES, gradients, make_case

STRATEGIES = ("normkd", "wttm", "adakd-sd", "adakd-h")
NOTHING = float("-inf")


def reference_target(
    logprobs: Tensor, objective: Objective, stored_entropy: float | None = None
) -> tuple[Tensor, float]:
    """Target and weight of one position with kept entries [n], from the definitions."""
    tau, weight = objective.temperature, 1.0
    p = logprobs.exp() / logprobs.exp().sum()
    deviation = logprobs.std().item() if len(p) > 1 else 0.0
    entropy = -(p * p.log()).sum().item() if stored_entropy is None else stored_entropy
    match objective.adaptive_temperature:
        case "normkd":
            tau *= deviation or 1.0
        case "wttm":
            weight = (p ** (1 / tau)).sum().item()
        case "adakd-sd":
            tau *= 2 ** ((deviation - 1) / (deviation + 1))
        case "adakd-h":
            tau *= 2 ** ((1 - entropy) / (1 + entropy))
    return torch.softmax(logprobs / tau, 0), weight


def dense_reference(
    hidden: Tensor, weight: Tensor, labels: Tensor, targets: Targets, objective: Objective
) -> Loss:
    """The loss, position by position, over the logits of the whole batch."""
    logits = hidden @ weight.T
    logs = torch.log_softmax(logits, 1)
    tau = objective.student_temperature
    tempered = torch.log_softmax(logits / tau, 1)
    lm, kd = logs.new_zeros(()), logs.new_zeros(())
    all_ids, all_logprobs = all_padded(targets.entries)
    for t in range(len(labels)):
        if labels[t] == -100:
            continue
        lm = lm - logs[t, labels[t]]
        kept = all_logprobs[t] > NOTHING
        if not kept.any():
            continue
        logprobs, student = all_logprobs[t][kept], tempered[t, all_ids[t][kept]]
        if objective.sampled:
            kd = kd - tau**2 * (logprobs.exp() * student).sum()
            continue
        stored = None if targets.entropies is None else targets.entropies[t].item()
        target, importance = reference_target(logprobs, objective, stored)
        distance = -(target * student).sum()
        if objective.kind == "kld":
            distance = distance + (target * target.log()).sum()
        kd = kd + tau**2 * importance * distance
    return Loss((1 - objective.alpha) * lm + objective.alpha * kd, lm, kd)


def check(objective: Objective, *, with_entropies: bool = False) -> None:
    """Values and gradients against the dense reference, for several sizes and blocks."""
    for size, rows_per_block in itertools.product(SIZES, (1, 3, 1000)):
        hidden, weight, labels, targets = make_case(size)
        if with_entropies:
            entropies = torch.linspace(0, 5, len(labels), dtype=torch.float64)
            targets = targets._replace(entropies=entropies)
        expected = dense_reference(hidden, weight, labels, targets, objective)
        block_bytes = rows_per_block * len(weight) * 8
        found = distillation_loss(
            hidden, weight, labels, targets, objective, block_bytes=block_bytes
        )
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(
            gradients(found, hidden, weight), gradients(expected, hidden, weight)
        )


@pytest.mark.parametrize("kind", ["kld", "nll"])
@pytest.mark.parametrize("alpha", [0.3, 1.0])
@pytest.mark.parametrize("student_temperature", [0.5, 3.0])
@pytest.mark.parametrize(("temperature", "sampled"), [(1.0, False), (2.0, False), (2.0, True)])
def test_a_student_temperature_equals_the_dense_reference(
    kind: str, alpha: float, student_temperature: float, temperature: float, sampled: bool
) -> None:
    check(
        Objective(
            kind=kind,
            alpha=alpha,
            temperature=temperature,
            sampled=sampled,
            student_temperature=student_temperature,
        )
    )


@pytest.mark.parametrize("kind", ["kld", "nll"])
@pytest.mark.parametrize("alpha", [0.3, 1.0])
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("student_temperature", [1.0, 2.0])
def test_adaptive_temperatures_equal_the_dense_reference(
    kind: str, alpha: float, strategy: str, student_temperature: float
) -> None:
    check(
        Objective(
            kind=kind,
            alpha=alpha,
            temperature=1.7,
            adaptive_temperature=strategy,
            student_temperature=student_temperature,
        )
    )


@pytest.mark.parametrize("student_temperature", [1.0, 2.0])
def test_the_teachers_own_entropies_decide_where_they_are_stored(
    student_temperature: float,
) -> None:
    objective = Objective(
        kind="kld",
        alpha=0.6,
        temperature=1.7,
        adaptive_temperature="adakd-h",
        student_temperature=student_temperature,
    )
    check(objective, with_entropies=True)
    temperature, _ = adapt(torch.zeros(1, 3), 2.0, "adakd-h", torch.tensor([[1.0]]))
    assert torch.as_tensor(temperature).item() == 2.0  # an entropy of 1 nat leaves it
    for strategy in ("normkd", "wttm", "adakd-sd"):
        here = adapt(torch.zeros(1, 3), 2.0, strategy, torch.tensor([[9.0]]))
        there = adapt(torch.zeros(1, 3), 2.0, strategy)
        assert torch.equal(torch.as_tensor(here[0]), torch.as_tensor(there[0]))


def test_a_student_that_equals_the_teacher_is_best_where_both_have_one_temperature() -> None:
    random = torch.Generator().manual_seed(0)
    logits = torch.randn(5, 11, generator=random).double()
    targets = make_targets(torch.arange(11).expand(5, 11), torch.log_softmax(logits, 1))
    objective = Objective(kind="kld", alpha=1.0, temperature=3.0, student_temperature=3.0)
    hidden, weight = logits.clone().requires_grad_(), torch.eye(11).double().requires_grad_()
    labels = torch.zeros(5, dtype=torch.int64)
    found = distillation_loss(hidden, weight, labels, targets, objective)
    assert found.kd.abs() < 1e-12
    assert gradients(found, hidden, weight)[0].abs().max() < 1e-12


def test_a_high_common_temperature_is_matching_of_centred_logits() -> None:
    """Hinton et al. 2015, section 2.1: the reason for the factor tau^2."""
    random = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 7, 11, generator=random).double()
    targets = make_targets(torch.arange(11).expand(7, 11), torch.log_softmax(teacher, 1))
    objective = Objective(kind="kld", alpha=1.0, temperature=1e4, student_temperature=1e4)
    hidden, weight = student.clone().requires_grad_(), torch.eye(11).double().requires_grad_()
    labels = torch.zeros(7, dtype=torch.int64)
    found = distillation_loss(hidden, weight, labels, targets, objective)
    difference = student - teacher
    centred = difference - difference.mean(1, keepdim=True)
    torch.testing.assert_close(
        gradients(found, hidden, weight)[0], centred / 11, rtol=1e-2, atol=1e-4
    )


@pytest.mark.parametrize("scale", [1.0, 300.0])
def test_extreme_logits_stay_finite_and_right_at_a_student_temperature(scale: float) -> None:
    hidden, weight, labels, targets = make_case(SIZES[2])
    objective = Objective(kind="kld", alpha=0.5, temperature=1.0, student_temperature=4.0)
    large = (hidden.detach() * scale).requires_grad_()
    expected = dense_reference(large, weight, labels, targets, objective)
    narrow, matrix = large.detach().float().requires_grad_(), weight.detach().float()
    kept = with_dtype(targets, torch.float32)
    found = distillation_loss(narrow, matrix, labels, kept, objective)
    torch.testing.assert_close(found.total, expected.total.float(), rtol=1e-4, atol=0)
    assert torch.autograd.grad(found.total, narrow)[0].isfinite().all()


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("width", [0, 3])
def test_positions_with_nothing_kept_have_only_the_language_model_part(
    strategy: str, width: int
) -> None:
    hidden, weight, labels, _ = make_case(SIZES[1])
    shape = (len(labels), width)
    targets = make_targets(
        torch.zeros(shape, dtype=torch.int32), torch.full(shape, NOTHING, dtype=torch.float64)
    )
    for student_temperature in (1.0, 2.0):
        objective = Objective(
            kind="kld",
            alpha=0.25,
            temperature=2.0,
            adaptive_temperature=strategy,
            student_temperature=student_temperature,
        )
        found = distillation_loss(hidden, weight, labels, targets, objective)
        assert found.kd == 0
        expected = gradients(dense_reference(hidden, weight, labels, targets, objective),
                             hidden, weight)  # fmt: skip
        torch.testing.assert_close(gradients(found, hidden, weight), expected)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_one_entry_is_a_hard_label_under_every_strategy(strategy: str) -> None:
    hidden, weight, labels, _ = make_case(SIZES[1])
    ids = torch.full((len(labels), 2), 3, dtype=torch.int32)
    targets = make_targets(ids, torch.tensor([-0.7, NOTHING]).double().expand(len(labels), 2))
    objective = Objective(kind="kld", alpha=1.0, temperature=2.0, adaptive_temperature=strategy)
    found = distillation_loss(hidden, weight, labels, targets, objective)
    plain = torch.log_softmax(hidden @ weight.T, 1)[labels != -100, 3]
    torch.testing.assert_close(found.kd, -plain.sum())
    torch.testing.assert_close(
        gradients(found, hidden, weight), torch.autograd.grad(-plain.sum(), (hidden, weight))
    )


def test_equal_entries_have_a_uniform_target_and_the_largest_weight() -> None:
    logprobs = torch.full((1, 4), -2.5)
    for strategy in STRATEGIES:
        temperature, _ = adapt(logprobs, 2.0, strategy)
        assert torch.equal(torch.softmax(logprobs / temperature, 1), torch.full((1, 4), 0.25))
    _, weight = adapt(logprobs, 2.0, "wttm")
    assert torch.as_tensor(weight).item() == pytest.approx(4**0.5)


def test_sure_positions_are_softened_and_unsure_ones_sharpened() -> None:
    sure, unsure = [-0.01, -5.0, -7.0], [-1.1, -1.2, -1.3]
    for strategy in ("normkd", "adakd-sd", "adakd-h"):
        temperature, _ = adapt(torch.tensor([sure, unsure]), 1.0, strategy)
        high, low = torch.as_tensor(temperature).flatten().tolist()
        assert low < 1 < high


def test_normkd_has_the_same_target_for_logits_that_differ_in_scale_and_offset() -> None:
    logits = torch.tensor([[2.0, 0.5, -1.0, -1.5]], dtype=torch.float64)
    targets = []
    for scaled in (logits, 3 * logits - 7):
        temperature, _ = adapt(scaled, 1.5, "normkd")
        targets.append(torch.softmax(scaled / temperature, 1))
    torch.testing.assert_close(*targets)


rows_of_entries = st.lists(
    st.lists(st.integers(-320, 0).map(lambda step: step / 16), max_size=6), min_size=1, max_size=5
)


@given(
    rows=rows_of_entries,
    temperature=st.floats(0.01, 100),
    strategy=st.sampled_from(STRATEGIES),
)
def test_temperatures_and_weights_are_within_their_bounds(
    rows: list[list[float]], temperature: float, strategy: str
) -> None:
    padded = [row + [NOTHING] * (6 - len(row)) for row in rows]
    taus, weights = adapt(torch.tensor(padded), temperature, strategy)
    for row, tau, weight in zip(
        rows,
        torch.as_tensor(taus).expand(len(rows), 1).flatten().tolist(),
        torch.as_tensor(weights).expand(len(rows), 1).flatten().tolist(),
        strict=True,
    ):
        assert math.isfinite(tau)
        assert tau > 0
        if strategy.startswith("adakd"):
            assert temperature / 2.0001 <= tau <= 2.0001 * temperature
        bound = max(1, len(row)) ** (1 - 1 / temperature) if strategy == "wttm" else 1.0
        assert min(1.0, bound) / 1.001 <= weight <= 1.001 * max(1.0, bound)
