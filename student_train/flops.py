"""How many tokens/s a GPU could train at its peak: what a measured speed is compared with.

The model FLOP utilisation is measured tokens/s over peak FLOP/s / FLOP per token, as in PaLM
(arXiv 2204.02311, appendix B). FLOP per token are 6 N + 12 L H T: a multiplication and an addition
per weight forwards and twice that backwards, and as much for the products of queries with keys and
of attention with values. Two things are to be known when figures are compared:

- N are the parameters beside the embedding, which is looked up and not multiplied with, plus the
  head, which is, also where it is tied to the embedding
- 12 L H T is attention to all T positions, as in the paper. Causal attention needs half of it, so
  that long sequences look somewhat better than they are (the 330M preset at T = 2048: 9 %)

Recomputed activations do not count, and neither does the optimizer.
"""

from __future__ import annotations

import re

import torch
from transformers import PreTrainedModel

from student_train.model.model import head_weight, num_parameters

# Dense bfloat16 FLOP/s at the boost clock, by what torch.cuda.get_device_name says, first match
# first. From NVIDIA's data sheets, which give twice as much from Hopper and Ada on: with sparsity.
_PEAKS = (
    (r"\bGB200\b", 2500e12),  # GB200 NVL72: 360 PFLOP/s of 72 GPUs
    (r"\bB[23]00\b", 2250e12),  # HGX B200 and B300: 36 PFLOP/s of 8 GPUs
    (r"\bH[12]00 NVL\b", 835.5e12),  # 1,671
    (r"\bH100 PCIe\b", 756.5e12),  # 1,513
    (r"\b(H100|H200|GH200)\b", 989.5e12),  # SXM: 1,979
    (r"\bL40S\b", 362.05e12),
    (r"\bL4\b", 121e12),  # 242
    (r"\bA100\b", 312e12),
    (r"\bA40\b", 149.7e12),
    (r"\bA10\b", 125e12),
)

# Mixtures of experts: a token uses only a few experts, so the parameters do not tell the FLOP.
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


def peak_flop_per_s(device_name: str) -> float | None:
    """Dense bfloat16 FLOP/s of a GPU by its name in CUDA; None if it is not known here."""
    for pattern, peak in _PEAKS:
        if re.search(pattern, device_name):
            return peak
    return None


def flop_per_token(
    *, num_parameters: int, num_layers: int, attention_width: int, sequence_length: int
) -> int:
    """Forward and backward pass, 6 N + 12 L H T; H is heads times their size."""
    return 6 * num_parameters + 12 * num_layers * attention_width * sequence_length


def model_flop_per_token(model: PreTrainedModel, sequence_length: int) -> int | None:
    """The same of a student; None where its configuration does not tell, and for experts."""
    config = model.config
    heads = getattr(config, "num_attention_heads", None)
    width = getattr(config, "hidden_size", None)
    layers = getattr(config, "num_hidden_layers", None)
    if not (heads and width and layers) or any(getattr(config, name, None) for name in _EXPERTS):
        return None
    return flop_per_token(
        num_parameters=num_parameters(model)[1] + head_weight(model).numel(),
        num_layers=layers,
        attention_width=heads * (getattr(config, "head_dim", None) or width // heads),
        sequence_length=sequence_length,
    )


def peak_tokens_per_s(
    model: PreTrainedModel, sequence_length: int, dtype: str, device: torch.device
) -> float | None:
    """Tokens/s of a device that did nothing but this model's FLOP, at its peak for bfloat16.

    None on a CPU, on an unknown GPU, for another dtype and for a model whose FLOP are not known.
    """
    if device.type != "cuda" or dtype != "bfloat16":
        return None
    peak = peak_flop_per_s(torch.cuda.get_device_name(device))
    flop = model_flop_per_token(model, sequence_length)
    return None if peak is None or flop is None else peak / flop
