"""vLLM entry point: causal LMs of the engine become teachers that return packed targets.

`register` runs in every vLLM process of the environment (entry point `vllm.general_plugins`), so
it imports nothing heavy: it only remembers vLLM's own classes, by name. A teacher's engine puts
`Teacher<Arch>` in the place of `<Arch>` for itself, by `model_class_overrides`; the class is made
when the engine asks for it. The architecture keeps its name, since vLLM decides a good deal by it
(configuration of hybrid and state-space models, ALiBi, ...). The pooler lives in `vllm_pooler`.

Public points of vLLM used here: the entry point, `model_class_overrides`, `is_pooling_model`,
`compute_logits`. Reading stock classes out of the registry is not public, which is one reason why
vLLM is pinned to a minor version.
"""

from __future__ import annotations

from typing import Any

from shards.process.children import become_engine_child
from teacher_dump.engines.architectures import CAUSAL_SUFFIXES
from teacher_dump.engines.vllm_errors import collect_errors

PREFIX = "Teacher"

_stock: dict[str, Any] = {}


def register() -> None:
    """Remember the stock classes of every causal LM that this vLLM knows, not yet loaded.

    In a process of an engine of ours it also sees to it that this ends with its parent, and that
    its errors are read.
    """
    from vllm import ModelRegistry

    become_engine_child()
    collect_errors()
    for architecture, entry in ModelRegistry.models.items():
        ours = getattr(entry, "module_name", None) == __name__
        if architecture.endswith(CAUSAL_SUFFIXES) and not ours:
            _stock.setdefault(architecture, entry)


def inspect(architecture: str) -> bool:
    """Whether this vLLM has an architecture as a causal LM that can be made a teacher.

    Imports the model in another process, as vLLM itself does, and raises what that raises. vLLM
    keeps the result on disk, and asks the same again when it starts.
    """
    from vllm import ModelRegistry

    register()
    if architecture not in _stock:
        return False
    name = PREFIX + architecture
    ModelRegistry.register_model(name, f"{__name__}:{name}")
    info = ModelRegistry.models[name].inspect_model_cls()
    return bool(info.is_text_generation_model and info.attn_type == "decoder")


def overrides(architecture: str) -> dict[str, str]:
    """vLLM's `model_class_overrides` that make a teacher of an architecture."""
    return {architecture: f"{__name__}:{PREFIX}{architecture}"}


def __getattr__(name: str) -> Any:
    """`TeacherLlamaForCausalLM` and so on, made from the stock class on first use."""
    entry = _stock.get(name.removeprefix(PREFIX)) if name.startswith(PREFIX) else None
    if entry is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from teacher_dump.engines.vllm_pooler import TeacherPooler, teacher_class

    made = teacher_class(entry.load_model_cls(), TeacherPooler, name=name, module=__name__)
    globals()[name] = made
    return made
