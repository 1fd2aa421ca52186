"""What `dump-logits` was asked for: one frozen object, checked before anything is read."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from shards.errors import InputError
from shards.layout import Layout

TARGET_SHARD_TOKENS = 2 << 20  # about 256 MiB at 120 bytes per token
TARGET_ROW_GROUP_TOKENS = 128 << 10

# The options of each keep method with what they are if not given.
KEEP_OPTIONS: dict[str, dict[str, float]] = {
    "top-p-k": {"top_p": 0.95, "top_k": 100},
    "draws": {"draws": 50, "temperature": 1.0},
    "threshold": {"threshold": 0.05, "temperature": 1.0},
}
TOKEN_DTYPES = ("uint16", "uint32", "int32", "int64")  # of flat .bin files
ENGINES = ("vllm", "vllm-logprobs", "transformers")
MIN_THRESHOLD = 1e-3  # a thousand entries per position; below it sampling has nothing to save


@dataclass(frozen=True, kw_only=True)
class DumpConfig:
    """Options of `dump-logits`, one field each; raises InputError for values that cannot be meant.

    `max_tokens` counts labelled positions of both splits together; None is the whole corpus.
    `sequences_per_shard` None is about 2 million tokens. `logprob_step` is in nats. Of the options
    of a keep method, None is the default in `KEEP_OPTIONS`; those of another one must be None.
    `corpus_weight` are as many as `corpus`, or none: all 1. `bos`, `eos`: whether each document is
    begun and closed with these tokens, unless it is already.
    """

    teacher: str
    corpus: tuple[Path, ...]
    out: Path
    teacher_revision: str | None = None
    trust_remote_code: bool = False
    sequence_length: int = 2048
    keep: str = "top-p-k"
    top_p: float | None = None
    top_k: int | None = None
    draws: int | None = None
    threshold: float | None = None
    temperature: float | None = None
    logprob_step: float = 1 / 16
    held_out: float = 0.01
    engine: str = "vllm"
    engine_arg: Mapping[str, object] = field(default_factory=dict)
    dtype: str = "auto"
    text_key: str = "text"
    corpus_weight: tuple[float, ...] = ()
    token_key: str | None = None
    mask_key: str | None = None
    token_dtype: str | None = None
    documents: str = "pack"
    bos: bool = False
    eos: bool = True
    sequences_per_shard: int | None = None
    max_tokens: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.corpus:
            raise InputError("--corpus: give at least one file or folder")
        self._check_keep()
        self._check_corpus()
        self._check_engine()
        if self.dtype not in ("auto", "bfloat16", "float32"):
            raise InputError(f"--dtype {self.dtype}: expected auto, bfloat16 or float32")
        if not 0 < self.logprob_step <= 1:
            raise InputError(f"--logprob-step {self.logprob_step}: expected nats in (0, 1]")
        if not 0 <= self.held_out < 1:
            raise InputError(f"--held-out {self.held_out}: expected a fraction in [0, 1)")
        for option, value in (
            ("--top-k", self.top_k),
            ("--draws", self.draws),
            ("--sequence-length", self.sequence_length),
            ("--sequences-per-shard", self.sequences_per_shard),
            ("--max-tokens", self.max_tokens),
        ):
            if value is not None and value < 1:
                raise InputError(f"{option} {value}: expected at least 1")

    def _check_corpus(self) -> None:
        if self.corpus_weight and len(self.corpus_weight) != len(self.corpus):
            raise InputError(
                f"--corpus-weight: {len(self.corpus_weight)} of them for {len(self.corpus)} corpora"
            )
        for weight in self.corpus_weight:
            if not 0 < weight <= 1000:
                raise InputError(f"--corpus-weight {weight}: expected a value in (0, 1000]")
        if self.mask_key is not None and self.token_key is None:
            raise InputError("--mask-key: says which tokens of --token-key count, which is missing")
        if self.documents not in ("pack", "separate"):
            raise InputError(f"--documents {self.documents}: expected pack or separate")
        if self.token_dtype not in (None, *TOKEN_DTYPES):
            expected = ", ".join(TOKEN_DTYPES)
            raise InputError(f"--token-dtype {self.token_dtype}: expected {expected}")

    def _check_engine(self) -> None:
        if self.engine not in ENGINES:
            raise InputError(f"--engine {self.engine}: expected {', '.join(ENGINES)}")
        if self.engine_arg and self.engine == "transformers":
            raise InputError("--engine-arg is for the engines on vLLM; transformers takes none")
        if self.keep != "top-p-k" and not self.has_entropy:
            raise InputError(
                f"--engine {self.engine} sees the largest entries alone, and --keep {self.keep} "
                "needs the whole distribution: use --keep top-p-k, --engine vllm or "
                "--engine transformers"
            )

    def _check_keep(self) -> None:
        if self.keep not in KEEP_OPTIONS:
            raise InputError(f"--keep {self.keep}: expected {', '.join(KEEP_OPTIONS)}")
        for option in itertools.chain(*KEEP_OPTIONS.values()):
            if getattr(self, option) is None or option in KEEP_OPTIONS[self.keep]:
                continue
            reason = f"not an option of --keep {self.keep}"
            if option == "temperature":
                reason += ", whose probabilities are stored at 1: train-student applies it"
            raise InputError(f"--{option.replace('_', '-')}: {reason}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise InputError(f"--top-p {self.top_p}: expected a value in (0, 1]")
        if self.threshold is not None and not MIN_THRESHOLD <= self.threshold <= 1:
            raise InputError(
                f"--threshold {self.threshold}: expected a value in [{MIN_THRESHOLD}, 1]"
            )
        if self.temperature is not None and not 0.01 <= self.temperature <= 100:
            raise InputError(f"--temperature {self.temperature}: expected a value in [0.01, 100]")

    @property
    def has_entropy(self) -> bool:
        """Whether the engine sees the whole distribution, and so its entropy."""
        return self.engine != "vllm-logprobs"

    @property
    def keep_options(self) -> dict[str, Any]:
        """The options of the keep method, as given or by default."""
        return {
            name: default if getattr(self, name) is None else getattr(self, name)
            for name, default in KEEP_OPTIONS[self.keep].items()
        }

    @property
    def resolved_dtype(self) -> str:
        """`auto` is bfloat16, the engine's speed, whatever dtype the checkpoint was saved in."""
        return "bfloat16" if self.dtype == "auto" else self.dtype

    @property
    def joined(self) -> bool:
        """Whether sequences go on over the ends of documents."""
        return self.documents == "pack"

    def layout(self, mean_positions: int) -> Layout:
        """Row groups of about 128k tokens and shards of 2 million, for sequences of this length."""
        per_shard = self.sequences_per_shard or max(1, TARGET_SHARD_TOKENS // mean_positions)
        per_group = max(1, TARGET_ROW_GROUP_TOKENS // mean_positions)
        return Layout(
            sequences_per_shard=per_shard, sequences_per_row_group=min(per_group, per_shard)
        )
