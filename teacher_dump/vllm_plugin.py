"""vLLM entry point: every causal LM of the engine becomes a teacher that returns packed targets.

`register` runs in every vLLM process of the environment (entry point `vllm.general_plugins`), so
it imports nothing heavy: architectures are registered by name, and a class is made when the engine
asks for it. The pooler itself lives in `vllm_pooler`.

Public points of vLLM used here: the entry point, `ModelRegistry.register_model`,
`is_pooling_model`, `compute_logits`. Reading a stock class out of the registry is not public,
which is one reason why vLLM is pinned to a minor version.
"""

from __future__ import annotations

from typing import Any

PREFIX = "Teacher"
SUFFIX = "ForCausalLM"


def register() -> None:
    """Register `Teacher<Arch>ForCausalLM` for every causal LM that this vLLM knows."""
    from vllm import ModelRegistry

    known = set(ModelRegistry.get_supported_archs())
    for architecture in known:
        if architecture.endswith(SUFFIX) and not architecture.startswith(PREFIX):
            name = PREFIX + architecture
            if name not in known:
                ModelRegistry.register_model(name, f"{__name__}:{name}")


def __getattr__(name: str) -> Any:
    """`TeacherLlamaForCausalLM` and so on, made from the stock class on first use."""
    if not (name.startswith(PREFIX) and name.endswith(SUFFIX)):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from vllm.model_executor.models.registry import ModelRegistry

    from teacher_dump.vllm_pooler import TeacherPooler, teacher_class

    base = ModelRegistry._try_load_model_cls(name.removeprefix(PREFIX))
    if base is None:
        raise AttributeError(f"vLLM cannot load {name.removeprefix(PREFIX)!r}")
    made = teacher_class(base, TeacherPooler, name=name, module=__name__)
    globals()[name] = made
    return made
