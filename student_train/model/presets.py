"""Students by name: Llama shapes (pre-norm, SwiGLU, rotary positions, grouped queries).

The five large ones are named as in pre-training distillation (arXiv 2410.16215), whose shapes are
not given there; these come within 2 % of the names with that paper's vocabulary of about 150k
(counted at 151,552). Up to 670M the embedding is tied to the head: untied it would be half of the
model. `demo` has 1M parameters beside the embedding and is for trying things out.

The learning rates are peaks for AdamW and places to start from, falling with the width as is usual
for such models (Llama 2 used 3e-4 at 7B, arXiv 2307.09288).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from shards.spec import DatasetSpec

# Vocabularies are padded to whole tiles of matrix units.
_VOCAB_MULTIPLE = 64
_LEAST_MAX_POSITIONS = 8192


@dataclass(frozen=True, kw_only=True)
class Preset:
    """The shape of a student and the peak learning rate to train it with."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    tie_word_embeddings: bool
    learning_rate: float

    def config_json(self, spec: DatasetSpec) -> dict[str, int | float | bool | None]:
        """The keyword arguments of a LlamaConfig for a dataset's tokenizer and sequences."""
        vocab_size, sequence_length = spec.tokenizer.vocab_size, spec.sequence_length
        return {
            "vocab_size": -(-vocab_size // _VOCAB_MULTIPLE) * _VOCAB_MULTIPLE,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_hidden_layers,
            "num_attention_heads": self.num_attention_heads,
            "num_key_value_heads": self.num_key_value_heads,
            "tie_word_embeddings": self.tie_word_embeddings,
            "max_position_embeddings": max(_LEAST_MAX_POSITIONS, sequence_length),
            "bos_token_id": spec.documents.bos_token_id,
            "eos_token_id": spec.documents.eos_token_id,
        }


PRESETS: Mapping[str, Preset] = MappingProxyType(
    {
        "demo": Preset(
            hidden_size=128,
            intermediate_size=384,
            num_hidden_layers=5,
            num_attention_heads=4,
            num_key_value_heads=4,
            tie_word_embeddings=True,
            learning_rate=3e-3,
        ),
        "330M": Preset(
            hidden_size=1024,
            intermediate_size=2560,
            num_hidden_layers=16,
            num_attention_heads=16,
            num_key_value_heads=8,
            tie_word_embeddings=True,
            learning_rate=6e-4,
        ),
        "670M": Preset(
            hidden_size=1536,
            intermediate_size=3840,
            num_hidden_layers=18,
            num_attention_heads=24,
            num_key_value_heads=8,
            tie_word_embeddings=True,
            learning_rate=5e-4,
        ),
        "1.9B": Preset(
            hidden_size=2048,
            intermediate_size=5376,
            num_hidden_layers=28,
            num_attention_heads=16,
            num_key_value_heads=8,
            tie_word_embeddings=False,
            learning_rate=4e-4,
        ),
        "3.8B": Preset(
            hidden_size=3072,
            intermediate_size=8192,
            num_hidden_layers=28,
            num_attention_heads=24,
            num_key_value_heads=8,
            tie_word_embeddings=False,
            learning_rate=3e-4,
        ),
        "6.8B": Preset(
            hidden_size=4096,
            intermediate_size=10752,
            num_hidden_layers=32,
            num_attention_heads=32,
            num_key_value_heads=8,
            tie_word_embeddings=False,
            learning_rate=3e-4,
        ),
    }
)
