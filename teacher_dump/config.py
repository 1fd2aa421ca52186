"""The options of `dump-logits`: one frozen object, checked before anything is read."""

from __future__ import annotations

import glob
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

from shards.keep import Keep, Threshold, Tokens
from shards.layout import Layout
from shards.names import BOS_MODES
from shards.options import OptionError, check, check_choices, option
from teacher_dump.engines.interface import ENGINES, num_ranks

TARGET_SHARD_TOKENS = 2 << 20  # 50 MiB at 25 bytes per token, 270 MiB at 134
TARGET_ROW_GROUP_TOKENS = 128 << 10
# The trainer packs separate documents into full sequences, one row group at a time. With this many
# sequences' worth of tokens in a row group, packing leaves about 2 % of a line empty.
PACKED_SEQUENCES = 32
MAX_ROW_GROUP_TOKENS = 1 << 20

BOS_AUTO = "auto"


@dataclass(frozen=True, kw_only=True)
class DumpConfig:
    """Options of `dump-logits`, one field each; OptionError for invalid values."""

    teacher: str | None = option(
        "Model folder, or name of a model on the Hugging Face hub.", default=None, metavar="MODEL"
    )
    teacher_revision: str | None = option("Revision of a hub model.", default=None)
    tokenizer: str | None = option(
        "Folder or hub name of a tokenizer. Only for --keep tokens, which needs no --teacher.",
        default=None,
        metavar="FOLDER",
    )
    trust_remote_code: bool = option(
        "Run the Python code that comes with the teacher.", default=False
    )
    corpus: Sequence[Path] = option(
        "File, folder or pattern to read. Text: JSON lines (.gz, .zst, .bz2, .xz), .parquet, "
        ".arrow, .txt, .md. Tokens: .npy, .bin (flat or Megatron-LM's), .parquet, .arrow. "
        "Repeatable.",
        metavar="PATH",
    )
    weights: Sequence[float] = option(
        "How often to take the documents of each --corpus. For example, 2,0.5 takes those of the "
        "first twice, and about half of the second. One per --corpus, in the same order.",
        default=(),
        shown_default="1 for each",
    )
    out: Path = option("Output folder of the dataset.", metavar="FOLDER")
    sequence_length: int = option(
        "Length of a sequence: how many tokens the teacher reads at once.",
        default=2048,
        metavar="TOKENS",
    )
    keep: Keep = option(
        "What to keep of the teacher's distribution at each position (docs/keep-methods.md). "
        "tokens keeps nothing and needs no teacher.",
        default=Threshold(),
    )
    held_out: float = option(
        "Fraction of documents for the validation split.", default=0.01, metavar="FRACTION"
    )
    engine: str = option(
        "Engine that runs the teacher (docs/engines.md).", default="vllm", choices=tuple(ENGINES)
    )
    engine_arg: Mapping[str, object] = option(
        "Argument for vLLM, such as max_num_batched_tokens=8192. Repeatable.",
        default_factory=dict,
        metavar="KEY=VALUE",
    )
    tensor_parallel: int = option(
        "GPUs of one machine that share the teacher; each holds a part of every layer.", default=1
    )
    dtype: str = option(
        "Dtype in which the teacher runs. auto: bfloat16, whatever dtype its files have.",
        default="auto",
        choices=("auto", "bfloat16", "float32"),
    )
    text_key: str = option(
        "Key or column of the text in JSON lines, Parquet and Arrow.", default="text"
    )
    token_key: str | None = option(
        "Column of token id lists in Parquet and Arrow, to read instead of text.", default=None
    )
    mask_key: str | None = option(
        "Column that says which tokens count as labels: lists of booleans, or of 0 and 1.",
        default=None,
    )
    token_dtype: str | None = option(
        "Integer type of the token ids in a flat .bin file.",
        default=None,
        choices=("uint16", "uint32", "int32", "int64"),
        shown_default="the narrowest that fits the vocabulary",
    )
    documents: str = option(
        "joined: sequences continue across the ends of documents. separate: each sequence comes "
        "from one document.",
        default="joined",
        choices=("joined", "separate"),
    )
    bos: str = option(
        "Where to insert the beginning-of-sequence token. auto: before each sequence and each "
        "document if the tokenizer adds it by itself, else nowhere.",
        default=BOS_AUTO,
        choices=(BOS_AUTO, *BOS_MODES),
    )
    eos: bool = option(
        "End each document with the end-of-document token, unless it already has it.",
        default=True,
    )
    eos_token: str | None = option(
        "Token that ends each document, such as <|endoftext|>.",
        default=None,
        metavar="TOKEN",
        shown_default="the tokenizer's own",
    )
    sequences_per_shard: int | None = option(
        "Sequences per shard. A kill loses at most the shards that are being written.",
        default=None,
        shown_default="about 2 million tokens",
    )
    max_tokens: int | None = option(
        "Maximum number of labelled positions in both splits together. A larger value extends an "
        "existing dataset.",
        default=None,
        shown_default="the whole corpus",
    )
    seed: int = option("Seed for choosing held-out documents and for sampling.", default=0)

    def __post_init__(self) -> None:
        check_choices(self)
        if not self.corpus:
            raise OptionError("corpus", ": expected at least one file or folder")
        self._check_teacher()
        self._check_corpus()
        self._check_engine()
        check(0 <= self.held_out < 1, "held_out", self.held_out, "a fraction in [0, 1)")
        for name in ("sequence_length", "sequences_per_shard", "max_tokens", "tensor_parallel"):
            value = getattr(self, name)
            if value is not None:
                check(value >= 1, name, value, "at least 1")

    def _check_teacher(self) -> None:
        if not isinstance(self.keep, Tokens):
            if self.teacher is None:
                raise OptionError("teacher", ": missing; only --keep tokens needs no teacher")
            if self.tokenizer is not None:
                raise OptionError("tokenizer", f" {self.tokenizer}: works only with --keep tokens")
            return
        if self.tokenizer is None:
            raise OptionError("tokenizer", ": missing; --keep tokens needs one")
        if self.teacher is not None:
            raise OptionError("teacher", f" {self.teacher}: --keep tokens uses no teacher")

    def _check_corpus(self) -> None:
        if self.weights and len(self.weights) != len(self.corpus):
            raise OptionError(
                "weights", f": {len(self.weights)} values for {len(self.corpus)} --corpus"
            )
        for weight in self.weights:
            check(0 < weight <= 1000, "weights", weight, "a value in (0, 1000]")
        if self.mask_key is not None and self.token_key is None:
            raise OptionError(
                "mask_key", ": needs --token-key, the column of the tokens that it masks"
            )
        if self.eos_token is not None and not self.eos:
            raise OptionError("eos_token", f" {self.eos_token}: contradicts --no-eos")

    def _check_engine(self) -> None:
        if self.engine_arg and not ENGINES[self.engine].takes_arguments:
            raise OptionError("engine_arg", f": --engine {self.engine} takes none")
        if self.tensor_parallel > 1 and not ENGINES[self.engine].parallel:
            raise OptionError(
                "tensor_parallel", f" {self.tensor_parallel}: --engine {self.engine} uses one GPU"
            )
        if self.keep.needs_distribution and not self.sees_distribution:
            others = [
                f"--engine {name}" for name, kind in ENGINES.items() if kind.sees_distribution
            ]
            raise OptionError(
                "engine",
                f" {self.engine}: sees only the largest entries, but --keep {self.keep.method}"
                f" needs the whole distribution; use {' or '.join(others)}, or --keep top-p-k",
            )

    @property
    def gpus(self) -> int:
        """GPUs that one engine takes, where there are any."""
        return num_ranks(self.tensor_parallel, self.engine_arg)

    @property
    def sees_distribution(self) -> bool:
        """Whether the engine sees the whole distribution, and so its entropy."""
        return ENGINES[self.engine].sees_distribution

    @property
    def resolved_dtype(self) -> str:
        """`auto` is bfloat16, the engine's speed, whatever dtype the checkpoint was saved in."""
        return "bfloat16" if self.dtype == "auto" else self.dtype

    def with_absolute_paths(self) -> Self:
        """The same options for a process with another working directory."""
        return replace(
            self,
            out=self.out.absolute(),
            corpus=[_absolute_corpus(path) for path in self.corpus],
            teacher=_absolute(self.teacher),
            tokenizer=_absolute(self.tokenizer),
        )

    @property
    def joined(self) -> bool:
        """Whether sequences continue across the ends of documents."""
        return self.documents == "joined"

    def layout(self, mean_positions: int) -> Layout:
        """Row groups of about 128k tokens and shards of 2 million, for sequences of this length.

        Row groups of separate documents are larger where that packs better.
        """
        group_tokens = TARGET_ROW_GROUP_TOKENS
        if not self.joined:
            wanted = min(PACKED_SEQUENCES * self.sequence_length, MAX_ROW_GROUP_TOKENS)
            group_tokens = max(group_tokens, wanted)
        per_shard = self.sequences_per_shard or max(1, TARGET_SHARD_TOKENS // mean_positions)
        per_group = max(1, group_tokens // mean_positions)
        return Layout(
            sequences_per_shard=per_shard, sequences_per_row_group=min(per_group, per_shard)
        )


def _absolute(model: str | None) -> str | None:
    """The path of a folder in full; a name on the hub stays."""
    return model if model is None or not Path(model).is_dir() else str(Path(model).absolute())


def _absolute_corpus(path: Path) -> Path:
    """A path or a pattern in full; a folder's name is no part of the pattern."""
    if path.is_absolute() or path.exists():
        return path.absolute()
    return Path(glob.escape(str(Path.cwd())), path)
