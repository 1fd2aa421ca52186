"""The spec of the dataset that a dump makes, and the record beside it."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from shards.layout import Layout
from shards.spec import DatasetSpec, Model, Tokenizer
from teacher_dump.config import DumpConfig
from teacher_dump.engines.interface import ENGINES
from teacher_dump.engines.options import decisive
from teacher_dump.prepare import Prepared
from teacher_dump.teacher import Teacher, head_dtype
from teacher_dump.weights import weights_sha256


def make_spec(
    config: DumpConfig, ready: Prepared, *, tokens_sha256: str, layout: Layout
) -> DatasetSpec:
    """The spec of the dataset that a configuration asks for."""
    return DatasetSpec(
        teacher=None if ready.teacher is None else _model(config, ready.teacher),
        tokenizer=Tokenizer(sha256=ready.tokenizer.sha256, vocab_size=ready.tokenizer.vocab_size),
        documents=ready.documents,
        keep=config.keep,
        layout=layout,
        sequence_length=config.sequence_length,
        seed=config.seed,
        tokens_sha256=tokens_sha256,
    )


def _model(config: DumpConfig, teacher: Teacher) -> Model:
    return Model(
        config_sha256=teacher.config_sha256,
        weights_sha256=weights_sha256(teacher.folder),
        revision=teacher.revision,
        dtype=config.resolved_dtype,
        head_dtype=head_dtype(teacher),
        code_sha256=teacher.code_sha256,
        engine_args=decisive(config.engine_arg),
        entropies=config.sees_distribution,
    )


def make_record(config: DumpConfig, ready: Prepared, **more: Any) -> Mapping[str, Any]:
    """The record: facts about a dataset that do not change what its shards hold."""
    teacher = ready.teacher
    return {
        **({} if teacher is None else _about(config, teacher)),
        "tokenizer": str(ready.tokenizer.folder),
        "corpus": [str(path) for path in config.corpus],
        "weights": list(config.weights),
        "corpus_files": ready.corpus.to_json(),
        "max_tokens": config.max_tokens,
        "versions": _versions(() if teacher is None else ENGINES[config.engine].packages),
        **more,
    }


def _about(config: DumpConfig, teacher: Teacher) -> dict[str, Any]:
    return {
        "teacher": teacher.name,
        "architecture": teacher.architecture,
        "engine": config.engine,
        "engine_args": dict(config.engine_arg),
        "tensor_parallel": config.tensor_parallel,
        "trust_remote_code": config.trust_remote_code,
    }


def _versions(packages: tuple[str, ...]) -> dict[str, str]:
    """Versions of the packages that compute."""
    versions = {}
    for name in ("torch", "transformers", "tokenizers", "pyarrow", *packages):
        with suppress(PackageNotFoundError):
            versions[name] = version(name)
    return versions
