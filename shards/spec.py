"""The spec of a dataset: one typed description that determines everything else about it.

The manifest holds the spec, and the footer of every shard repeats it. Two runs may share a folder
if and only if their specs are equal. The spec contains everything that changes what the shards
hold, and nothing else: the manifest records names, paths, engines and versions beside it
(`manifest.py`).

`from_json` rejects any key or name that it does not know. Otherwise it would misread a dataset of a
newer release.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar

from shards import schema
from shards.errors import ShardFormatError
from shards.files.json_text import Json, json_differences
from shards.files.typed_json import parse
from shards.keep import KEEP_METHODS, Keep, Tokens
from shards.layout import Layout
from shards.names import BOS_BOTH as BOS_BOTH
from shards.names import BOS_DOCUMENT as BOS_DOCUMENT
from shards.names import BOS_MODES as BOS_MODES
from shards.names import BOS_NONE as BOS_NONE
from shards.names import BOS_SEQUENCE as BOS_SEQUENCE
from shards.names import SPLITS as SPLITS
from shards.names import TRAIN as TRAIN
from shards.names import VALIDATION as VALIDATION
from shards.options import OptionError


@dataclass(frozen=True, kw_only=True)
class Model:
    """A finished model as the teacher: hashes of its files, and the dtypes it ran in.

    `engine_args` are arguments of the engine that change the distributions by more than rounding,
    `code_sha256` is of the model's own Python code. `entropies`: the engine saw the whole
    distribution, so its entropy is stored.
    """

    kind: ClassVar[str] = "model"

    config_sha256: str
    weights_sha256: str
    revision: str | None
    dtype: str
    head_dtype: str
    code_sha256: str | None = None
    engine_args: Mapping[str, Any] = field(default_factory=dict)
    entropies: bool = True


@dataclass(frozen=True, kw_only=True)
class TrainingRun:
    """A training run as the teacher: it saved logits while it ran.

    `run_sha256` is of the run's settings, `first_step` the first optimizer step that was saved.
    """

    kind: ClassVar[str] = "training-run"

    run_sha256: str
    first_step: int
    dtype: str
    head_dtype: str
    entropies: bool = True


@dataclass(frozen=True, kw_only=True)
class Tokenizer:
    """How text becomes ids: a hash over all that decides it, and a length above every id."""

    sha256: str
    vocab_size: int

    def __post_init__(self) -> None:
        if self.vocab_size < 1:
            raise ValueError(f"vocab_size {self.vocab_size}: expected at least 1")


@dataclass(frozen=True, kw_only=True)
class Documents:
    """How documents become sequences.

    `joined`: sequences continue across the ends of documents. `bos` is one of `BOS_MODES`, with the
    token's id unless it is "none". `eos_token_id` ends every document; None: no token does.
    `held_out` is the fraction of documents in the validation split. `masked`: some labels do not
    count.
    """

    joined: bool
    bos: str
    bos_token_id: int | None
    eos_token_id: int | None
    held_out: float
    masked: bool

    def __post_init__(self) -> None:
        if self.bos not in BOS_MODES:
            raise ValueError(f"bos {self.bos!r}: expected one of {', '.join(BOS_MODES)}")
        if (self.bos == BOS_NONE) != (self.bos_token_id is None):
            raise ValueError(f"bos {self.bos!r} with bos_token_id {self.bos_token_id}")
        if self.bos != BOS_NONE and not self.masked:
            raise ValueError(f"bos {self.bos!r} without a mask: an inserted token is no label")

    @property
    def bos_before_documents(self) -> bool:
        """Whether each document begins with the BOS token."""
        return self.bos in (BOS_DOCUMENT, BOS_BOTH)

    @property
    def bos_before_sequences(self) -> bool:
        """Whether each sequence begins with the BOS token."""
        return self.bos in (BOS_SEQUENCE, BOS_BOTH)


@dataclass(frozen=True, kw_only=True)
class DatasetSpec:
    """What a dataset is. ValueError for parts that do not fit together.

    `teacher` is None if only tokens are stored (`keep` is then `Tokens`). `sequence_length` L is
    the labelled positions of a full sequence. `seed` determines held-out documents and sampling.
    `tokens_sha256` is of the token store that the sequences are cut from.
    """

    teacher: Model | TrainingRun | None
    tokenizer: Tokenizer
    documents: Documents
    keep: Keep
    layout: Layout
    sequence_length: int
    seed: int
    tokens_sha256: str

    def __post_init__(self) -> None:
        if (self.teacher is None) != isinstance(self.keep, Tokens):
            teacher = "no teacher" if self.teacher is None else "a teacher"
            raise ValueError(f"keep method {self.keep.method!r} with {teacher}")
        if self.sequence_length < 1:
            raise ValueError(f"sequence_length {self.sequence_length}: expected at least 1")

    @property
    def has_teacher(self) -> bool:
        """Whether positions have a teacher's distribution."""
        return self.teacher is not None

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns of every shard of the dataset, in order."""
        names = [schema.SEQUENCE, schema.TOKENS]
        if self.teacher is not None:
            names += [schema.IDS, schema.LOGPROBS]
            names += [schema.TAIL_LOGMASS] if self.keep.has_tail else []
            names += [schema.LABEL_LOGPROBS]
            names += [schema.ENTROPIES] if self.teacher.entropies else []
        names += [schema.SEGMENTS]
        names += [schema.LOSS_MASK] if self.documents.masked else []
        names += [schema.POSITIONS]
        if self.teacher is not None:
            names += [schema.TEACHER_NLL]
            names += [schema.TEACHER_ENTROPY] if self.teacher.entropies else []
        return tuple(names)

    def to_json(self) -> dict[str, Json]:
        """Nested plain JSON, the inverse of `from_json`."""
        teacher = None if self.teacher is None else _tagged("kind", self.teacher.kind, self.teacher)
        return {
            "teacher": teacher,
            "tokenizer": asdict(self.tokenizer),
            "documents": asdict(self.documents),
            "keep": keep_to_json(self.keep),
            "layout": asdict(self.layout),
            "sequence_length": self.sequence_length,
            "seed": self.seed,
            "tokens_sha256": self.tokens_sha256,
        }

    @classmethod
    def from_json(cls, value: object, where: str) -> DatasetSpec:
        """A description as `to_json` wrote it; `where` begins every message.

        ShardFormatError naming the key for an unknown, missing or unfit one.
        """
        try:
            return parse(cls, value, {Keep: keep_from_json, Model | TrainingRun: _teacher})
        except (ValueError, OptionError) as error:
            raise ShardFormatError(f"{where}: {error}") from error


def differences(expected: DatasetSpec, actual: DatasetSpec) -> list[str]:
    """One text per differing key, dotted: "keep.top_k: 100 here, 50 there" (expected, actual)."""
    return json_differences(expected.to_json(), actual.to_json())


def keep_to_json(keep: Keep) -> dict[str, Json]:
    """A keep method with its options as plain JSON."""
    return _tagged("method", keep.method, keep)


def keep_from_json(value: object) -> Keep:
    """The inverse of `keep_to_json`. ValueError for a method that is not known."""
    keep: Keep = _of_kind("method", value, KEEP_METHODS)
    return keep


def _teacher(value: object) -> Model | TrainingRun:
    kinds: dict[str, type[Any]] = {kind.kind: kind for kind in (Model, TrainingRun)}
    teacher: Model | TrainingRun = _of_kind("kind", value, kinds)
    return teacher


def _tagged(tag: str, name: str, part: Any) -> dict[str, Json]:
    return {tag: name, **asdict(part)}


def _of_kind(tag: str, value: object, kinds: Mapping[str, type[Any]]) -> Any:
    """The dataclass that a tag names, from the other keys."""
    if not isinstance(value, Mapping) or tag not in value:
        raise ValueError(f"expected an object with the key {tag!r}")
    name = value[tag]
    if not isinstance(name, str) or name not in kinds:
        raise ValueError(f"unknown {tag} {name!r}, this release knows {', '.join(kinds)}")
    return parse(kinds[name], {key: part for key, part in value.items() if key != tag})
