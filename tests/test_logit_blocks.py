"""Logits by blocks are the model's own, whatever it does to them, and never whole in memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers

from teacher_dump.engines.logit_blocks import LogitBlocks
from tests.tiny_families import FAMILIES

ROWS = 5
TOKENS = torch.arange(3, 26)  # 23: the last block is shorter


def tiny_model(architecture: str) -> Any:
    torch.manual_seed(0)
    model_class = getattr(transformers, architecture)
    model = model_class(model_class.config_class(**FAMILIES[architecture])).eval()
    with torch.no_grad():
        model.get_output_embeddings().weight.normal_(0, 0.25)
    return model


def blocks_of(model: Any) -> tuple[torch.Tensor, list[int], int]:
    """All logits, how many rows the head made at a time, and how often the layers ran."""
    blocks = LogitBlocks(model, ROWS)
    rows: list[int] = []
    runs: list[None] = []
    layers = next(m for m in model.modules() if isinstance(m, torch.nn.ModuleList))
    hooks = [
        model.get_output_embeddings().register_forward_hook(
            lambda _, __, logits: rows.append(logits.shape[-2])
        ),
        layers[0].register_forward_hook(lambda *_: runs.append(None)),
    ]
    with torch.inference_mode():
        found = torch.cat(list(blocks(TOKENS)))
    for hook in hooks:
        hook.remove()
    return found, rows, len(runs)


@pytest.mark.parametrize(
    "architecture", [name for name in FAMILIES if name != "Gemma3ForConditionalGeneration"]
)
def test_blocks_are_the_models_own_logits_with_the_layers_run_once(architecture: str) -> None:
    model = tiny_model(architecture)
    found, rows, runs = blocks_of(model)
    with torch.inference_mode():
        whole = model(TOKENS[None], use_cache=False).logits[0]
    assert (found - whole).abs().max() < 1e-5
    assert rows == [5, 5, 5, 5, 3]
    if architecture != "SmolVLMForConditionalGeneration":  # its first layers are those of images
        assert runs == 1


class _Looks(transformers.LlamaForCausalLM):  # type: ignore[misc]
    """A model that wants as many hidden states as tokens."""

    def forward(self, input_ids: torch.Tensor, **options: Any) -> Any:
        hidden = self.model(input_ids, **options).last_hidden_state
        places = torch.linspace(0, 1, input_ids.shape[1])
        return transformers.modeling_outputs.CausalLMOutput(
            logits=self.lm_head(hidden) + places[None, :, None]
        )


def test_a_model_whose_logits_depend_on_their_place_is_computed_whole() -> None:
    torch.manual_seed(0)
    model = _Looks(transformers.LlamaConfig(**FAMILIES["Qwen3ForCausalLM"])).eval()
    found, rows, _ = blocks_of(model)
    assert rows == [len(TOKENS)]
    with torch.inference_mode():
        assert torch.equal(found, model(TOKENS[None], use_cache=False).logits[0])
