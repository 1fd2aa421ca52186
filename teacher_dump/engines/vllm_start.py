"""How both vLLM engines start: environment, version, arguments; what vLLM refuses, as one line.

On a machine without a GPU vLLM runs in this process and eagerly: compiling costs over 100 s of
start there (measured), which a short run never earns back; `--engine-arg enforce_eager=false` turns
that round. On a GPU vLLM's own defaults stand, but for CUDA graphs. Prefix caching is always off:
cached positions would have nothing to score.
"""

from __future__ import annotations

import logging
import os
import time
import warnings
from collections.abc import Mapping
from typing import Any, NamedTuple

from shards.errors import InputError
from shards.process.children import engine_children
from shards.process.progress import duration
from teacher_dump.engines import vllm_worker
from teacher_dump.engines.architectures import longrope_lengths
from teacher_dump.engines.interface import num_ranks
from teacher_dump.engines.options import CONFIG_FORMAT, EngineOptions
from teacher_dump.engines.vllm_errors import ErrorLog, not_started
from teacher_dump.engines.vllm_parallel import cores_of_ranks

logger = logging.getLogger(__name__)

SUPPORTED_VLLM = (0, 32)
_OWNED = ("model", "runner", "enable_prefix_caching", "skip_tokenizer_init", "dtype",
          "hf_overrides", "additional_config", "max_model_len", "model_class_overrides",
          "language_model_only", "trust_remote_code", "max_logprobs", "logprobs_mode",
          "worker_extension_cls", "enable_batch_sharded_sampling",
          "swa_bounded_replay", "tensor_parallel_size", "hf_config_path",
          "model_weights")  # fmt: skip

# Arguments that give positions in the middle of a prompt other rows than theirs, and the values
# that do not.
_WRONG_ROWS = {"kv_sharing_fast_prefill": False, "prefill_context_parallel_size": 1}


def check_arguments(engine_args: Mapping[str, object]) -> None:
    """InputError for an `--engine-arg` that is not the user's to set, or makes targets wrong."""
    for name, value in engine_args.items():
        if name in _OWNED:
            by = "--tensor-parallel" if name == "tensor_parallel_size" else "the pass itself"
            raise InputError(f"--engine-arg {name}: set by {by}")
        if value != _WRONG_ROWS.get(name, value):
            raise InputError(
                f"--engine-arg {name}={value}: vLLM then gives wrong results for positions before"
                " the end of a prompt"
            )


def check_lengths(options: EngineOptions) -> None:
    """InputError for documents whose positions vLLM would rotate as if they were longer."""
    if options.joined:
        return
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(
            options.teacher_folder, trust_remote_code=options.trust_remote_code
        ).get_text_config()
    except Exception:  # whatever reading a configuration may raise; vLLM may read it otherwise
        return
    original = min(longrope_lengths(config), default=options.sequence_length)
    if options.sequence_length > original:
        raise InputError(
            f"--documents separate: with --sequence-length {options.sequence_length}, vLLM rotates"
            f" the positions of short documents as those of more than {original}; use --engine"
            f" transformers, or at most {original}"
        )


def prepare_environment() -> None:
    """vLLM reads these when it is imported; what the user has set stands."""
    level = os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    logging.getLogger("vllm").setLevel(level.upper())  # which vLLM does when an engine starts
    # As vLLM does when it is imported: looking for a GPU must not start CUDA here, or no engine
    # can be forked from this process.
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    import torch

    # What vLLM meets in the libraries it uses is not for the user, who cannot change it.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"vllm\.")
    logging.getLogger("torch._library.triton").setLevel(logging.ERROR)  # there is none on a CPU
    if torch.cuda.is_available():
        return
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")


def installed_version(engine: str) -> tuple[str, tuple[int, ...]]:
    """The installed vLLM's version, as text and its first two numbers; InputError without one."""
    try:
        import vllm
    except ImportError as error:
        raise InputError(
            f"--engine {engine}: {error}; run make setup, or use --engine transformers"
        ) from error
    found = str(vllm.__version__)
    numbers = tuple(int(part) for part in found.split(".")[:2] if part.isdigit())
    return found, numbers


class Started(NamedTuple):
    """vLLM's `LLM`, and what goes wrong in its processes."""

    llm: Any
    errors: ErrorLog


def start_llm(options: EngineOptions, arguments: Mapping[str, object], fallback: str) -> Started:
    """An `LLM` of the options and an engine's own arguments; the user's win over vLLM's defaults.

    InputError for a model or arguments that it refuses: one line, naming `fallback`.
    """
    import torch
    from vllm import LLM
    from vllm.engine.arg_utils import EngineArgs

    ranks = num_ranks(options.tensor_parallel, options.engine_args)
    errors = ErrorLog()
    started = time.monotonic()
    logger.info("starting vLLM ...")
    try:
        with engine_children(), errors.collecting(), cores_of_ranks(ranks):
            llm = LLM(
                **{
                    "model": str(options.teacher_folder),
                    "dtype": options.dtype,
                    "trust_remote_code": options.trust_remote_code,
                    "hf_overrides": {"head_dtype": options.head_dtype},
                    "enable_prefix_caching": False,
                    "skip_tokenizer_init": True,
                    "language_model_only": True,
                    "use_tqdm_on_load": False,
                    "tensor_parallel_size": options.tensor_parallel,
                    "load_format": "hf",
                    "config_format": CONFIG_FORMAT,
                    "worker_extension_cls": vllm_worker.NAME,
                    **_every_row(EngineArgs),
                    **defaults(ranks, on_gpu=torch.cuda.is_available()),
                    **arguments,
                    **options.engine_args,
                }
            )
    except Exception as error:  # a kernel's missing package, a weight with another name, ...
        raise not_started(options.architecture, errors.cause_of(error), fallback) from error
    if ranks > 1:
        llm.collective_rpc("forget_shared_memory")
    logger.info("vLLM started in %s", duration(time.monotonic() - started))
    return Started(llm, errors)


def defaults(ranks: int, *, on_gpu: bool) -> dict[str, object]:
    """Arguments that the user may override.

    Steps of full prompts are larger than any that vLLM captures a CUDA graph of: capturing only
    takes time and memory. Eager steps are for a CPU, see above.
    """
    arguments: dict[str, object] = {"enforce_eager": True}
    if on_gpu:
        arguments = {"compilation_config": {"cudagraph_mode": "NONE"}}
    if ranks > 1:
        arguments["distributed_executor_backend"] = "mp"  # vLLM's own choice may be Ray's
    return arguments


def _every_row(known: Any) -> dict[str, object]:
    """What makes models run every position of a prompt, where this vLLM knows it."""
    return {"swa_bounded_replay": False} if hasattr(known, "swa_bounded_replay") else {}
