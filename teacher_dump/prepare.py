"""Find and check everything that a dump names, before it starts."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from shards.keep import Threshold, TopPK
from shards.options import OptionError
from shards.spec import Documents
from teacher_dump.config import DumpConfig
from teacher_dump.corpus.kinds import TABLES
from teacher_dump.corpus.listing import CorpusFile, list_corpus
from teacher_dump.corpus.rules import TokenisingRules
from teacher_dump.corpus.summary import CorpusSummary
from teacher_dump.engines.interface import ENGINES, TeacherEngine
from teacher_dump.engines.options import EngineOptions
from teacher_dump.keep.packed_size import Selection
from teacher_dump.special_tokens import make_documents, warn_of_turn_ends
from teacher_dump.teacher import Teacher, find_teacher, find_tokenizer_folder, head_dtype
from teacher_dump.tokenizer import TeacherTokenizer, load_tokenizer
from teacher_dump.weights import check_weights

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """Teacher, tokenizer, corpus files, and what follows from a configuration.

    `teacher` is None where tokens alone are stored. `tokenizer_files` are those of the dataset's
    copy, name -> text.
    """

    teacher: Teacher | None
    tokenizer: TeacherTokenizer
    tokenizer_files: Mapping[str, str]
    files: Sequence[CorpusFile]
    corpus: CorpusSummary
    documents: Documents
    rules: TokenisingRules

    @property
    def bos_before_sequences(self) -> int | None:
        """The token to insert before each sequence; None: no token."""
        documents = self.documents
        return documents.bos_token_id if documents.bos_before_sequences else None

    def engine_options(self, config: DumpConfig) -> EngineOptions:
        """What the engine is asked for."""
        teacher = self.teacher
        assert teacher is not None  # without one nothing asks for an engine
        return EngineOptions(
            teacher_folder=teacher.folder,
            architecture=teacher.architecture,
            dtype=config.resolved_dtype,
            head_dtype=head_dtype(teacher),
            sequence_length=config.sequence_length,
            selection=Selection(config.keep, self.tokenizer.vocab_size),
            seed=config.seed,
            engine_args=config.engine_arg,
            tensor_parallel=config.tensor_parallel,
            trust_remote_code=config.trust_remote_code,
            joined=self.documents.joined,
        )

    def start_engine(self, config: DumpConfig) -> TeacherEngine:
        """Load the teacher; InputError for an engine that does not take it."""
        return ENGINES[config.engine].load().start(self.engine_options(config))

    def check_engine(self, config: DumpConfig) -> None:
        """InputError for a teacher that the engine surely does not take; starts nothing."""
        if self.teacher is not None:
            ENGINES[config.engine].load().check(self.engine_options(config))


def prepare(config: DumpConfig) -> Prepared:
    """Find and check what a configuration names; InputError, before anything is written."""
    trust = config.trust_remote_code
    teacher = None
    if config.teacher is not None:
        teacher = find_teacher(config.teacher, config.teacher_revision, trust_remote_code=trust)
        folder = teacher.folder
    else:
        assert config.tokenizer is not None
        folder = find_tokenizer_folder(config.tokenizer)
    tokenizer = load_tokenizer(folder, trust_remote_code=trust, eos_token=config.eos_token)
    if teacher is not None:
        check_weights(teacher.folder)
    _check_lengths(config, teacher, tokenizer.vocab_size)
    warn_of_turn_ends(config, tokenizer)
    corpus = list_corpus(config.corpus, config.weights, config.out)
    if config.token_key is not None and not any(file.kind in TABLES for file in corpus.files):
        raise OptionError(
            "token_key",
            f" {config.token_key}: names a column of .parquet and .arrow files, but the corpus has"
            " none",
        )
    documents = make_documents(config, tokenizer, None if teacher is None else teacher.vocab_size)
    _say_threshold(config)
    return Prepared(
        teacher=teacher,
        tokenizer=tokenizer,
        tokenizer_files=tokenizer.files(),
        files=corpus.files,
        corpus=corpus.summary,
        documents=documents,
        rules=_rules(config, teacher, tokenizer, documents),
    )


def _rules(
    config: DumpConfig,
    teacher: Teacher | None,
    tokenizer: TeacherTokenizer,
    documents: Documents,
) -> TokenisingRules:
    known = None if teacher is None else teacher.vocab_size
    return TokenisingRules(
        tokenizer_sha256=tokenizer.sha256,
        vocab_size=tokenizer.vocab_size,
        eos_token_id=tokenizer.eos_token_id,
        text_key=config.text_key,
        held_out=config.held_out,
        seed=config.seed,
        token_key=config.token_key,
        mask_key=config.mask_key,
        token_dtype=config.token_dtype,
        bos_token_id=documents.bos_token_id if documents.bos_before_documents else None,
        close_documents=config.eos,
        teacher_vocab_size=known if known is not None and known < tokenizer.vocab_size else None,
    )


def _check_lengths(config: DumpConfig, teacher: Teacher | None, vocab_size: int) -> None:
    if isinstance(config.keep, TopPK) and config.keep.top_k > vocab_size:
        raise OptionError(
            "top_k", f" {config.keep.top_k}: the tokenizer has only {vocab_size} entries"
        )
    length = config.sequence_length
    if teacher is not None and teacher.max_length is not None and length > teacher.max_length:
        raise OptionError(
            "sequence_length",
            f" {length}: {teacher.name} takes at most {teacher.max_length} tokens",
        )


def _say_threshold(config: DumpConfig) -> None:
    keep = config.keep
    if isinstance(keep, Threshold):
        logger.info(
            "--threshold: using %.6g, whose logarithm is a multiple of --logprob-step",
            keep.threshold,
        )
