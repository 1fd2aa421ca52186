"""What an engine is asked for: one frozen object, the same for all of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from teacher_dump.keep.packed_size import Selection

# Hugging Face's files are hashed, so vLLM must not take Mistral's, which may lie beside them.
CONFIG_FORMAT = "hf"

# Arguments of vLLM that change the teacher's distributions by more than rounding, or may (a backend
# can quantise activations): they belong to a dataset's identity. Others (memory, batches,
# parallelism) may differ between two runs.
_DECISIVE = ("quantization", "quantization_config", "kv_cache_dtype", "kv_cache_dtype_skip_layers",
             "load_format", "model_loader_extra_config", "ignore_patterns", "config_format",
             "model_impl", "disable_sliding_window", "mamba_cache_dtype", "mamba_ssm_cache_dtype",
             "enable_mamba_cache_stochastic_rounding", "mamba_config", "attention_config",
             "linear_backend", "moe_backend", "kernel_config", "enable_lora",
             "default_mm_loras")  # fmt: skip


def decisive(engine_args: Mapping[str, object]) -> dict[str, object]:
    """The arguments of an engine that make a dataset another one."""
    return {name: engine_args[name] for name in _DECISIVE if name in engine_args}


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """A teacher, how it is run, and what is kept of its distributions.

    `sequence_length` is in tokens that the teacher reads. `seed` decides, with a position's own
    place, over what is random in `selection`. `engine_args` go to vLLM. `tensor_parallel` devices
    share the teacher. `joined`: sequences are full; else each is a document of any length.
    """

    teacher_folder: Path
    architecture: str
    dtype: str
    head_dtype: str
    sequence_length: int
    selection: Selection
    seed: int = 0
    engine_args: Mapping[str, object] = field(default_factory=dict)
    tensor_parallel: int = 1
    trust_remote_code: bool = False
    joined: bool = True
