"""Products in float32, and a softmax, each with the fewest passes that a device needs.

Letters: N, M, R any lengths, V vocabulary.

A GPU multiplies bfloat16 or float16 factors and writes float32 at once (`mm.dtype_out` and
`addmm.dtype_out` of ATen, which have no kernel for a CPU). A CPU rounds the product to the dtype of
its factors, and another pass makes it wide.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


def product(left: Tensor, right: Tensor, narrow: Tensor, wide: Tensor) -> Tensor:
    """left [N, R] @ right [R, M] in `wide` [N, M]; `narrow` [N, M] may be used on the way.

    `narrow` has the dtype of the factors, and is `wide` itself if that is the same.
    """
    if wide.dtype == left.dtype:
        return torch.mm(left, right, out=wide)
    if writes_wide(wide.device):
        return torch.mm(left, right, out_dtype=wide.dtype, out=wide)
    return wide.copy_(torch.mm(left, right, out=narrow))


def add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total [N, M] += left [N, R] @ right [R, M]."""
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    elif writes_wide(total.device):
        torch.addmm(total, left, right, out_dtype=total.dtype, out=total)
    else:
        total.add_(left @ right)


def softmax_in_place(logits: Tensor) -> tuple[Tensor, Tensor]:
    """[R, V] -> its softmax in the same memory, and logsumexp [R, 1].

    torch.logsumexp would take six times as long as the softmax, which is one fused pass. It is told
    from the largest logit and the largest probability, 1 / sum(exp(z - max)), which cannot vanish.
    On a CPU, finding its place as well takes longer than looking for it again.
    """
    if logits.device.type == "cpu":
        largest = logits.amax(1, keepdim=True)
        probabilities = torch.softmax(logits, 1, out=logits)
        return probabilities, largest - probabilities.amax(1, keepdim=True).log()
    largest, place = logits.max(1, keepdim=True)
    probabilities = torch.softmax(logits, 1, out=logits)
    return probabilities, largest - probabilities.gather(1, place).log()


@contextmanager
def tensor_float32(allowed: bool) -> Iterator[None]:
    """Let a GPU round the factors of float32 products to 11 bits (TF32), several times as fast.

    bfloat16 values have 8 bits, so they lose nothing.
    """
    settings = torch.backends.cuda.matmul
    before = settings.fp32_precision
    if allowed:
        settings.fp32_precision = "tf32"
    try:
        yield
    finally:
        settings.fp32_precision = before


def writes_wide(device: torch.device) -> bool:
    """Whether a device has products of narrow factors in float32."""
    return device.type != "cpu"
