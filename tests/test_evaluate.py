"""Evaluation figures against their definitions, position by position in float64."""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from shards.dataset import Dataset
from shards.keep import TopPK
from shards.row_group import Totals
from shards.rows import Row
from student_train.evaluation import evaluate as figures
from student_train.evaluation.evaluate import evaluate, predict
from student_train.processes.world import World
from tests.strategies import make_spec
from tests.tiny_dataset import LOG_THRESHOLD, VOCAB_SIZE, make_dataset

CPU = torch.device("cpu")


def position_sums(logits: Tensor, *others: Tensor | None) -> Tensor:
    return figures.position_sums(logits, predict(logits), *others)  # type: ignore[arg-type]


@pytest.fixture
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        initializer_range=0.5,
    )
    return LlamaForCausalLM(config)


def reference(model: LlamaForCausalLM, rows: list[Row]) -> dict[str, float]:
    """The definitions of docs/evaluation.md, one position at a time."""
    nll = teacher_nll = kl_kept = kl_bound = agreed = 0.0
    tokens = 0
    bins: dict[int, list[tuple[float, bool]]] = {}
    for row in rows:
        with torch.no_grad():
            inputs = torch.tensor(row.tokens[:-1].tolist())[None]
            q = torch.log_softmax(model(inputs).logits[0].double(), 1).exp().numpy()
        ends = np.cumsum(row.counts)
        teacher_nll += row.teacher_nll
        for t in range(len(row.tokens) - 1):
            if row.loss_mask is not None and not row.loss_mask[t]:
                continue
            tokens += 1
            nll -= math.log(q[t, row.tokens[t + 1]])
            kept = slice(ends[t] - row.counts[t], ends[t])
            ids, p = row.ids[kept], np.exp(row.logprobs[kept].astype(float))
            agreed += q[t].argmax() in ids[p == p.max()]
            w = p / p.sum()
            kl_kept += (w * np.log(w / q[t, ids])).sum()
            assert row.tail_logmass is not None
            total = p.sum() + math.exp(row.tail_logmass[t])
            p, tail = p / total, math.exp(row.tail_logmass[t]) / total
            rest = np.delete(q[t], ids).sum()
            kl_bound += (p * np.log(p / q[t, ids])).sum() + tail * math.log(tail / rest)
            confidence = float(q[t].max())
            hit = bool(q[t].argmax() == row.tokens[t + 1])
            bins.setdefault(min(14, int(confidence * 15)), []).append((confidence, hit))
    gaps = [
        abs(np.mean(found, 0)[0] - np.mean(found, 0)[1]) * len(found) for found in bins.values()
    ]
    return {
        "calibration_error": float(sum(gaps)) / tokens,
        "tokens": tokens,
        "cross_entropy": nll / tokens,
        "perplexity": math.exp(nll / tokens),
        "teacher_cross_entropy": teacher_nll / tokens,
        "kl_kept": kl_kept / tokens,
        "kl_bound": kl_bound / tokens,
        "top1_agreement": agreed / tokens,
    }


@pytest.mark.parametrize("masked", [False, True])
def test_the_figures_of_sampled_shards_equal_their_definitions(
    model: LlamaForCausalLM, tmp_path: Path, masked: bool
) -> None:
    path = make_dataset(tmp_path / "dataset", validation=9, masked=masked, sampled=True)
    dataset = Dataset.open(path)
    cross = entropy = 0.0
    agreed = known = tokens = 0
    for row in dataset.split("validation").rows():
        with torch.no_grad():
            logits = model(torch.tensor(row.tokens[:-1].tolist())[None]).logits[0].double()
        q = torch.log_softmax(logits, 1).numpy()
        ends = np.cumsum(row.counts)
        entropy += row.teacher_entropy
        for t, end in enumerate(ends):
            kept = slice(end - row.counts[t], end)
            ids, weights = row.ids[kept], np.exp(row.logprobs[kept].astype(float))
            cross -= (weights * q[t, ids]).sum()
            tokens += row.loss_mask is None or bool(row.loss_mask[t])
            if len(ids) and row.logprobs[kept][0] > LOG_THRESHOLD:
                known += 1
                agreed += q[t].argmax() in ids[weights == weights.max()]
    found = evaluate(
        model,
        dataset.split("validation"),
        batch_sequences=4,
        world=World(device=CPU),
        autocast=nullcontext(),
    )
    assert found["kl_unbiased"] == pytest.approx((cross - entropy) / tokens, rel=1e-5)
    assert found["top1_agreement"] == pytest.approx(agreed / known, rel=1e-5)
    assert found["tokens"] == tokens
    assert not {"kl_kept", "kl_bound"} & found.keys()


@pytest.mark.parametrize("masked", [False, True])
def test_all_figures_equal_their_definitions(
    model: LlamaForCausalLM, tmp_path: Path, masked: bool
) -> None:
    dataset = Dataset.open(make_dataset(tmp_path / "dataset", validation=9, masked=masked))
    expected = reference(model, list(dataset.split("validation").rows()))
    for batch_sequences in (1, 4, 100):
        found = evaluate(
            model.train(),
            dataset.split("validation"),
            batch_sequences=batch_sequences,
            world=World(device=CPU),
            autocast=nullcontext(),
        )
        assert found == pytest.approx(expected, rel=1e-5)
        assert model.training


def test_it_leaves_no_gradient_and_the_same_random_numbers(
    model: LlamaForCausalLM, tmp_path: Path
) -> None:
    dataset = Dataset.open(make_dataset(tmp_path / "dataset"))
    before = torch.get_rng_state()
    evaluate(
        model,
        dataset.split("validation"),
        batch_sequences=2,
        world=World(device=CPU),
        autocast=nullcontext(),
    )
    assert torch.equal(torch.get_rng_state(), before)
    assert all(parameter.grad is None for parameter in model.parameters())


def entries(*rows: list[float]) -> tuple[Tensor, Tensor]:
    """ids 0, 1, ... with these probabilities, padded."""
    width = max(map(len, rows))
    ids = torch.zeros(len(rows), width, dtype=torch.int64)
    logprobs = torch.full((len(rows), width), -math.inf)
    for r, row in enumerate(rows):
        ids[r, : len(row)] = torch.arange(len(row))
        logprobs[r, : len(row)] = torch.tensor(row).log()
    return ids, logprobs


def test_a_student_that_equals_the_teacher_has_a_bound_of_zero() -> None:
    p = torch.softmax(torch.randn(VOCAB_SIZE), 0).sort(descending=True).values
    ids, logprobs = entries(p[:5].tolist())
    tail = p[5:].sum().log()[None]
    _, kl_kept, kl_bound, _, agreed, num = position_sums(
        p.log()[None], torch.zeros(1, dtype=torch.int64), ids, logprobs, tail
    ).tolist()
    assert kl_bound == pytest.approx(0, abs=1e-6)
    assert kl_kept == pytest.approx(-math.log(p[:5].sum()), rel=1e-4)
    assert agreed == num == 1


@pytest.mark.parametrize(
    ("stored", "most_likely", "agrees"),
    [
        ([0.4, 0.4, 0.2], 0, True),
        ([0.4, 0.4, 0.2], 1, True),
        ([0.4, 0.4, 0.2], 2, False),
        ([0.4, 0.3, 0.3], 1, False),
        ([0.4, 0.4, 0.2], 7, False),
        ([0.5], 0, True),
    ],
)
def test_of_entries_that_are_stored_as_equally_large_each_may_be_the_teachers(
    stored: list[float], most_likely: int, agrees: bool
) -> None:
    ids, logprobs = entries(stored, [0.3, 0.3, 0.3, 0.1])
    logits = torch.zeros(1, 9)
    logits[0, most_likely] = 3.0
    labels = torch.zeros(1, dtype=torch.int64)
    *_, agreed, known = position_sums(logits, labels, ids[:1], logprobs[:1], None).tolist()
    assert (agreed, known) == (agrees, 1)


def test_the_bound_is_never_above_the_divergence_of_the_full_distributions() -> None:
    random = torch.Generator().manual_seed(0)
    p = torch.softmax(2 * torch.randn(200, 30, generator=random).double(), 1)
    logits = 2 * torch.randn(200, 30, generator=random)
    full = (p * (p.log() - torch.log_softmax(logits.double(), 1))).sum(1)
    kept, ids = p.topk(6)
    tail = (1 - kept.sum(1)).log().float()
    for r in range(200):
        sums = position_sums(
            logits[r : r + 1].clone(),
            ids[r, :1],
            ids[r : r + 1],
            kept[r : r + 1].log().float(),
            tail[r : r + 1],
        )
        assert 0 <= sums[2] <= full[r] + 1e-6


def test_on_samples_the_divergence_is_right_on_average() -> None:
    random = torch.Generator().manual_seed(0)
    p = torch.softmax(2 * torch.randn(30, generator=random).double(), 0)
    logits = 2 * torch.randn(30, generator=random)
    full = (p * (p.log() - torch.log_softmax(logits.double(), 0))).sum()
    repeats, threshold = 40_000, 0.1
    kept = torch.rand(repeats, 30, generator=random).double() < p / threshold
    logprobs = torch.where(kept, p.clamp(min=threshold).log(), -math.inf).float()
    ids = torch.arange(30).expand(repeats, -1)
    labels = torch.zeros(repeats, dtype=torch.int64)
    weighted = position_sums(logits.repeat(repeats, 1), labels, ids, logprobs, None)[3]
    found = weighted / repeats + (p * p.log()).sum()
    student = -torch.log_softmax(logits.double(), 0)
    sampled = p < threshold
    variance = (student**2 * p * (threshold - p))[sampled].sum()
    assert abs(found - full) < 6.5 * (variance / repeats).sqrt()


def test_a_confident_student_and_an_exact_tail_give_finite_figures() -> None:
    ids, logprobs = entries([0.5, 0.4], [0.7, 0.3], [1.0])
    logits = torch.zeros(3, 40)
    logits[:, 0] = 80.0
    tail = torch.tensor([0.1, 0.0, 0.0]).log()
    sums = position_sums(logits, torch.zeros(3, dtype=torch.int64), ids, logprobs, tail)
    assert sums.isfinite().all()
    expected = 0.1 * (math.log(0.1) + 80 - math.log(38))
    expected += 0.5 * math.log(0.5) + 0.4 * (math.log(0.4) + 80)
    expected += 0.7 * math.log(0.7) + 0.3 * (math.log(0.3) + 80)
    assert sums[2].item() == pytest.approx(expected, rel=1e-6)


def test_positions_of_which_nothing_was_kept_count_only_for_the_cross_entropy() -> None:
    ids, logprobs = entries([0.5, 0.4], [])
    labels = torch.zeros(2, dtype=torch.int64)
    logits = torch.randn(2, 7)
    tail = torch.tensor([0.1, 1.0]).log()
    both = position_sums(logits.clone(), labels, ids, logprobs, tail)
    first = position_sums(logits[:1].clone(), labels[:1], ids[:1], logprobs[:1], tail[:1])
    torch.testing.assert_close(both[1:], first[1:])
    nll = torch.nn.functional.cross_entropy(logits, labels, reduction="sum")
    assert both[0].item() == pytest.approx(nll.item(), rel=1e-6)


def test_a_perplexity_that_no_float_holds_is_infinite(
    model: LlamaForCausalLM, tmp_path: Path
) -> None:
    split = Dataset.open(make_dataset(tmp_path / "dataset")).split("validation")
    with torch.no_grad():
        model.lm_head.weight.mul_(1e6)
    found = evaluate(
        model, split, batch_sequences=4, world=World(device=CPU), autocast=nullcontext()
    )
    assert 709 < found["cross_entropy"] < math.inf == found["perplexity"]


class WithoutTail(TopPK):
    """Somebody's method."""

    has_tail = False


def test_without_a_tail_there_is_no_bound() -> None:
    ids, logprobs = entries([0.5, 0.4])
    sums = position_sums(torch.randn(1, 7), torch.zeros(1, dtype=torch.int64), ids, logprobs, None)
    assert sums[2] == 0
    assert sums[1] > 0
    found = figures._figures(
        torch.ones(6),
        torch.zeros(3, 10),
        Totals(tokens=1),
        0,
        replace(make_spec(), keep=WithoutTail()),
    )
    assert "kl_kept" in found
    assert "kl_bound" not in found


def test_where_no_first_choice_of_the_teacher_is_known_there_is_no_agreement() -> None:
    for known, expected in ((4.0, 0.25), (0.0, None)):
        sums = torch.tensor([1.0, 1, 1, 1, known and 1, known])
        found = figures._figures(sums, torch.zeros(3, 10), Totals(tokens=4), 0, make_spec())
        assert found.get("top1_agreement") == expected


def test_bits_per_byte_are_of_the_bytes_of_the_labels(
    model: LlamaForCausalLM, tmp_path: Path
) -> None:
    dataset = Dataset.open(make_dataset(tmp_path / "dataset", validation=9, masked=True))
    split = dataset.split("validation")
    table = torch.arange(VOCAB_SIZE)
    found = evaluate(
        model,
        split,
        batch_sequences=4,
        world=World(device=CPU),
        autocast=nullcontext(),
        bytes_of_tokens=table,
    )
    labels = np.concatenate([row.tokens[1:][row.loss_mask] for row in split.rows()])
    bits = found["cross_entropy"] * found["tokens"] / math.log(2)
    assert found["bits_per_byte"] == pytest.approx(bits / labels.sum())
