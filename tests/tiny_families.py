"""Tiny random teachers of many architectures, with the tokenizer of `tiny_teacher`, and GPTQ."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file

from tests.tiny_teacher import MODEL_VOCABULARY, TOKENIZER_LENGTH, make_tokenizer

TEXT: dict[str, Any] = {
    "vocab_size": MODEL_VOCABULARY,
    "hidden_size": 128,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
    "initializer_range": 0.1,  # attention that is not flat, experts that differ
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "image_size": 28,
    "patch_size": 14,
}
GEMMA = {**TEXT, "head_dim": 64, "query_pre_attn_scalar": 64, "tie_word_embeddings": True}

# architecture -> arguments of its configuration class
FAMILIES: dict[str, dict[str, Any]] = {
    "Qwen3ForCausalLM": {**TEXT, "head_dim": 64},
    "PhiForCausalLM": {**TEXT, "num_key_value_heads": 2},
    "GPT2LMHeadModel": {
        **{key: TEXT[key] for key in ("vocab_size", "bos_token_id", "eos_token_id")},
        **{"n_embd": 128, "n_layer": 2, "n_head": 2, "n_positions": 64},
    },
    "Gemma2ForCausalLM": {
        **GEMMA,
        "sliding_window": 16,
        "final_logit_softcapping": 4.0,
        "attn_logit_softcapping": 1.0,
    },
    "CohereForCausalLM": {**TEXT, "logit_scale": 0.5, "tie_word_embeddings": True},
    "GraniteForCausalLM": {**TEXT, "logits_scaling": 2.0, "residual_multiplier": 0.5},
    "OlmoeForCausalLM": {**TEXT, **EXPERTS},
    "Qwen3MoeForCausalLM": {**TEXT, **EXPERTS, "head_dim": 64, "moe_intermediate_size": 64},
    "MixtralForCausalLM": {**TEXT, "num_local_experts": 4, "num_experts_per_tok": 2},
    "Gemma3ForConditionalGeneration": {
        "text_config": {**GEMMA, "sliding_window": 16},
        "vision_config": VISION,
        "mm_tokens_per_image": 4,
        "image_token_index": 300,
        "boi_token_index": 299,
        "eoi_token_index": 298,
    },
    "SmolVLMForConditionalGeneration": {
        "text_config": {**TEXT, "model_type": "llama"},
        "vision_config": VISION,
        "image_token_id": 300,
        "scale_factor": 2,
        "vocab_size": MODEL_VOCABULARY,
        "tie_word_embeddings": False,
        "pad_token_id": 0,
    },
}


def make_family(architecture: str, folder: Path) -> Path:
    """A random teacher whose padded vocabulary rows would win every softmax."""
    make_tokenizer(folder)
    torch.manual_seed(0)
    model_class = getattr(transformers, architecture)
    model = model_class(model_class.config_class(**FAMILIES[architecture]))
    with torch.no_grad():
        head = model.get_output_embeddings().weight
        head.normal_(0, 0.25)
        head[TOKENIZER_LENGTH:] = 3.0 * head[:19].abs()
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):  # zero in a fresh model
                parameter.normal_(0, 0.2)
    model.save_pretrained(folder)
    return folder


GROUP = 32  # weights that share a scale


def quantise(source: Path, folder: Path, unpacked: Path) -> None:
    """A GPTQ checkpoint of a teacher, and one of plain floats with the very weights it packs."""
    packed, plain = {}, {}
    for name, weight in load_file(source / "model.safetensors").items():
        if "_proj." not in name:
            packed[name] = plain[name] = weight
            continue
        layer = name.removesuffix("weight")
        whole, scales = _to_4_bits(weight)
        shifts = 4 * torch.arange(8).view(1, 8, 1)
        words = (whole.view(-1, 8, len(weight)) << shifts).sum(1)
        packed[layer + "qweight"] = words.to(torch.uint32).view(torch.int32)
        packed[layer + "scales"] = scales
        packed[layer + "qzeros"] = torch.full((len(scales), len(weight) // 8), 0x77777777).int()
        packed[layer + "g_idx"] = (torch.arange(len(whole)) // GROUP).int()
        steps = scales.float().repeat_interleave(GROUP, 0)
        plain[name] = ((whole - 8) * steps).T.contiguous()
    for where, tensors in ((folder, packed), (unpacked, plain)):
        shutil.copytree(source, where)
        save_file(tensors, where / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["quantization_config"] = {
        **{"quant_method": "gptq", "checkpoint_format": "gptq", "bits": 4, "group_size": GROUP},
        **{"desc_act": False, "sym": True, "lm_head": False},
    }
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")


def _to_4_bits(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """weight [N, K] -> whole numbers 0 to 15 [K, N], of which 8 is zero; scales [K / 32, N]."""
    grouped = weight.T.reshape(-1, GROUP, len(weight))
    scales = (grouped.abs().amax(1) / 7).half()
    whole = (grouped / scales[:, None].float()).round().add(8).clamp(0, 15)
    return whole.to(torch.int64).flatten(0, 1), scales
