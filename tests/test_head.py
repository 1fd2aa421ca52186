"""The wide head: what bfloat16 factors hold exactly is not lost, and nothing else changes."""

from __future__ import annotations

import pytest
import torch

from teacher_dump.engines.head import WideHead, block_rows


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


@pytest.mark.parametrize(
    ("vocab", "rows"), [(49_152, 512), (66_000, 448), (151_936, 192), (10**6, 33), (10**9, 1)]
)
def test_blocks_have_as_many_rows_as_a_matrix_product_likes(vocab: int, rows: int) -> None:
    assert block_rows(torch.device("cpu"), vocab) == rows
