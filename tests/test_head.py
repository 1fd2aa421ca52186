"""The wide head: what bfloat16 factors hold exactly is not lost, and nothing else changes."""

from __future__ import annotations

import pytest
import torch

from teacher_dump.engines.head import GpuHead, WideHead, block_rows, make_head


def products(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """hidden [T, D], weight [V, D] that the dtype holds exactly, and their product in float64."""
    random = torch.Generator().manual_seed(0)
    hidden = torch.randn(64, 576, generator=random).to(dtype)
    weight = torch.randn(1024, 576, generator=random).to(dtype)
    return hidden, weight, hidden.double() @ weight.double().T


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16])
@pytest.mark.parametrize("with_bias", [False, True])
def test_logits_are_as_exact_as_float32_sums_are(dtype: torch.dtype, with_bias: bool) -> None:
    hidden, weight, exact = products(dtype)
    bias = torch.arange(1024).to(dtype) / 64 if with_bias else None
    if bias is not None:
        exact = exact + bias.double()
    before = torch.backends.mkldnn.matmul.fp32_precision
    logits = WideHead(weight, bias, torch.float32)(hidden)
    assert torch.backends.mkldnn.matmul.fp32_precision == before
    assert logits.dtype == torch.float32
    assert (logits - exact).abs().max() < 2e-4
    out = torch.full((70, 1024), torch.nan)
    into = WideHead(weight, bias, torch.float32)(hidden, out=out)
    assert (into - exact).abs().max() < 2e-4
    assert torch.equal(out[:64], into)
    if dtype == torch.bfloat16:  # what the test must notice
        narrow = hidden @ weight.T
        assert (narrow.double() - (hidden.double() @ weight.double().T)).abs().max() > 0.1


def test_a_float32_head_of_bfloat16_states_is_not_rounded() -> None:
    hidden, _, _ = products(torch.bfloat16)
    _, weight, _ = products(torch.float32)
    logits = WideHead(weight, None, torch.float32)(hidden)
    assert (logits - hidden.double() @ weight.double().T).abs().max() < 2e-4


@pytest.mark.parametrize("with_bias", [False, True])
def test_a_head_on_a_gpu_keeps_its_narrow_weight_and_gives_float32(with_bias: bool) -> None:
    weight = torch.empty(1024, 576, dtype=torch.bfloat16, device="meta")
    head = GpuHead(weight, weight[:, 0] if with_bias else None)
    logits = head(torch.empty(1, 64, 576, dtype=torch.bfloat16, device="meta"))
    assert logits.shape == (1, 64, 1024)
    assert logits.dtype == torch.float32
    assert head.weight.dtype == torch.bfloat16


def test_states_that_are_wider_than_the_weight_are_not_rounded() -> None:
    hidden, _, _ = products(torch.float32)
    _, weight, _ = products(torch.bfloat16)
    logits = GpuHead(weight, None)(hidden)
    assert (logits - hidden.double() @ weight.double().T).abs().max() < 2e-4


@pytest.mark.parametrize(
    ("device", "weight", "model", "wanted", "kind"),
    [
        ("cuda", torch.bfloat16, torch.bfloat16, torch.float32, GpuHead),
        ("cuda", torch.float16, torch.float16, torch.float32, GpuHead),
        ("cpu", torch.bfloat16, torch.bfloat16, torch.float32, WideHead),
        ("cuda", torch.float32, torch.bfloat16, torch.float32, WideHead),  # nothing to round
        ("cuda", torch.bfloat16, torch.float32, torch.float32, WideHead),
        ("cuda", torch.float32, torch.float32, torch.float64, WideHead),
    ],
)
def test_a_gpu_multiplies_narrow_factors_where_both_are(
    device: str, weight: torch.dtype, model: torch.dtype, wanted: torch.dtype, kind: type
) -> None:
    made = make_head(
        torch.zeros(4, 2, dtype=weight), None,
        model_dtype=model, dtype=wanted, device=torch.device(device),
    )  # fmt: skip
    assert type(made) is kind


@pytest.mark.parametrize(
    ("vocab", "rows"), [(49_152, 512), (66_000, 448), (151_936, 192), (10**6, 33), (10**9, 1)]
)
def test_blocks_have_as_many_rows_as_a_matrix_product_likes(vocab: int, rows: int) -> None:
    assert block_rows(torch.device("cpu"), vocab) == rows
