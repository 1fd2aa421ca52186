"""A model that caps its attention logits, and what it computes with and without that."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from transformers import Gemma2Config, Gemma2ForCausalLM


def write_capped_model(folder: Path) -> None:
    """Save a Gemma 2 of 64 tokens whose cap shows: its attention is far from flat without it."""
    config = Gemma2Config(
        vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=1, head_dim=8,
        num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=64, pad_token_id=0,
        bos_token_id=0, eos_token_id=0, final_logit_softcapping=None, attn_logit_softcapping=0.01,
    )  # fmt: skip
    torch.manual_seed(0)
    model = Gemma2ForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "q_proj" in name or "k_proj" in name:
                parameter.mul_(100)
    model.save_pretrained(folder)


def assert_capped(logits: Tensor, folder: Path, tokens: Tensor) -> None:
    """The logits of `tokens` [B, L] are those of the folder's model with its cap."""
    found = logits.log_softmax(-1)
    width = found.shape[-1]
    references = []
    for attention in ("eager", "sdpa"):
        model = Gemma2ForCausalLM.from_pretrained(folder, attn_implementation=attention)
        with torch.no_grad():
            references.append(model(input_ids=tokens).logits[..., :width].log_softmax(-1))
    torch.testing.assert_close(found, references[0])
    assert (found - references[1]).abs().max() > 1e-3  # what the test would notice
