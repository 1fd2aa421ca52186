"""The LM head in a wider dtype than the model's: bf16 logits tie heavily, float32 ones do not.

Letters: T positions, D hidden, V vocabulary.

A bfloat16 model has bfloat16 hidden states and a bfloat16 head. Their products are exact in
float32, so that rounding the float32 factors to bfloat16 and summing up in float32 loses nothing.
oneDNN does that when it is allowed to, where the processor has such instructions, in about half the
time: on 2 cores of an AMD EPYC with D = 576 and V = 49,152, 64 rows at a time, a row takes 330 us
instead of 630. It rounds the weight anew at each call, and fresh memory for the logits costs page
faults: on 2 cores of an Intel Xeon a row takes 250 us by 128 rows and 195 by 512 into a buffer.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import nn

# Logits of a block. On a CPU the head is fastest with 512 rows of a vocabulary of 49,152 or more. A
# GPU wants full tiles.
CPU_BLOCK_BYTES = 128 << 20
GPU_BLOCK_BYTES = 1 << 30


def block_rows(device: torch.device, vocab_size: int) -> int:
    """Rows whose float32 logits fill one block, as many as a matrix product likes.

    On 2 cores of an Intel Xeon 682 rows of a vocabulary of 49,152 take a third more time each than
    512, and 640 take 5 % more.
    """
    block_bytes = CPU_BLOCK_BYTES if device.type == "cpu" else GPU_BLOCK_BYTES
    rows = max(1, block_bytes // (4 * vocab_size))
    for multiple, at_least in ((256, 512), (64, 64)):
        if rows >= at_least:
            return rows // multiple * multiple
    return rows


class WideHead(nn.Module):
    """weight [V, D], bias [V]: a head that runs in another dtype, cast once, not at each call."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None, dtype: torch.dtype) -> None:
        super().__init__()
        self._exact_in_bfloat16 = weight.dtype == torch.bfloat16 and dtype == torch.float32
        self.weight = _frozen(weight, dtype)
        self.bias = None if bias is None else _frozen(bias, dtype)

    def forward(self, hidden: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """hidden [..., D] -> logits [..., V] of the head's dtype.

        `out` [>= T, V] holds those of hidden [T, D], if it is given.
        """
        wide = hidden.to(self.weight.dtype)
        exact = self._exact_in_bfloat16 and hidden.dtype == torch.bfloat16
        with _bfloat16_factors() if exact else nullcontext():
            if out is None:
                return nn.functional.linear(wide, self.weight, self.bias)
            logits = torch.mm(wide, self.weight.T, out=out[: len(hidden)])
        return logits if self.bias is None else logits.add_(self.bias)


class GpuHead(nn.Module):
    """weight [V, D], bias [V] of bfloat16 or float16: float32 logits of hidden states like these.

    CUDA multiplies narrow factors, in their own speed, and adds up and stores in float32. The cast
    weight of `WideHead` would take twice the memory and several times the time.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        super().__init__()
        self.weight = _frozen(weight, weight.dtype)
        self.bias = None if bias is None else _frozen(bias, torch.float32)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden [..., D] on a GPU -> logits [..., V] float32."""
        if hidden.dtype != self.weight.dtype:  # of a model that ends in a wider dtype than its own
            return nn.functional.linear(hidden.float(), self.weight.float(), self.bias)
        flat = hidden.reshape(-1, hidden.shape[-1])
        logits = torch.mm(flat, self.weight.T, out_dtype=torch.float32)
        logits = logits if self.bias is None else logits.add_(self.bias)
        return logits.view(*hidden.shape[:-1], -1)


def make_head(
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    *,
    model_dtype: torch.dtype,
    dtype: torch.dtype,
    device: torch.device,
) -> nn.Module:
    """The head of a model of `model_dtype` that is going to run on a device, in another dtype."""
    narrow = weight.dtype == model_dtype and model_dtype in (torch.bfloat16, torch.float16)
    if device.type == "cuda" and narrow and dtype == torch.float32:
        return GpuHead(weight, bias)
    return WideHead(weight, bias, dtype)


def _frozen(parameter: torch.Tensor, dtype: torch.dtype) -> nn.Parameter:
    return nn.Parameter(parameter.detach().to(dtype), requires_grad=False)


@contextmanager
def _bfloat16_factors() -> Iterator[None]:
    """Let oneDNN round the factors of float32 matrix products; GPUs are not affected."""
    settings = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = settings.fp32_precision
    settings.fp32_precision = "bf16"
    try:
        yield
    finally:
        settings.fp32_precision = before
