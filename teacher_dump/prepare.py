"""What every command about a dump begins with: everything that was named is there and fits."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

from shards.errors import InputError
from teacher_dump.config import DumpConfig
from teacher_dump.corpus_kinds import TABLES
from teacher_dump.corpus_listing import CorpusFile, list_corpus
from teacher_dump.corpus_summary import CorpusSummary
from teacher_dump.engine_options import EngineOptions
from teacher_dump.engines import TeacherEngine, check_engine, start_engine
from teacher_dump.identity import head_dtype
from teacher_dump.keep import Keep, Threshold, make_keep
from teacher_dump.rules import TokenisingRules
from teacher_dump.teacher import Teacher, find_teacher
from teacher_dump.tokenizer import TeacherTokenizer, load_tokenizer, tokenizer_identity
from teacher_dump.weights import check_weights

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """Teacher, tokenizer, corpus files, and the rules that follow from a configuration."""

    teacher: Teacher
    tokenizer: TeacherTokenizer
    files: Sequence[CorpusFile]
    corpus: CorpusSummary
    rules: TokenisingRules
    keep: Keep

    def engine_options(self, config: DumpConfig) -> EngineOptions:
        """What the engine is asked for."""
        return EngineOptions(
            teacher_folder=self.teacher.folder,
            architecture=self.teacher.architecture,
            dtype=config.resolved_dtype,
            head_dtype=head_dtype(self.teacher),
            sequence_length=config.sequence_length,
            keep=self.keep,
            seed=config.seed,
            engine_args=config.engine_arg,
            trust_remote_code=config.trust_remote_code,
        )

    def start_engine(self, config: DumpConfig) -> TeacherEngine:
        """Load the teacher; InputError for an engine that does not take it."""
        return start_engine(config.engine, self.engine_options(config))

    def check_engine(self, config: DumpConfig) -> None:
        """InputError for a teacher that the engine surely does not take; starts nothing."""
        check_engine(config.engine, self.engine_options(config))


def prepare(config: DumpConfig) -> Prepared:
    """Find and check what a configuration names; InputError, before anything is written."""
    trust = config.trust_remote_code
    teacher = find_teacher(config.teacher, config.teacher_revision, trust_remote_code=trust)
    check_weights(teacher.folder)
    tokenizer = load_tokenizer(teacher.folder, trust_remote_code=trust)
    about_tokenizer = tokenizer_identity(tokenizer)
    _check_lengths(config, teacher, about_tokenizer["vocab_size"])
    corpus = list_corpus(config.corpus, config.corpus_weight, config.out)
    if config.token_key is not None and not any(file.kind in TABLES for file in corpus.files):
        raise InputError(
            f"--token-key {config.token_key}: a column of .parquet and .arrow files, of which"
            " the corpus has none"
        )
    if config.bos and tokenizer.bos_token_id is None:
        raise InputError("--bos: the tokenizer has no beginning-of-document (bos) token")
    rules = TokenisingRules(
        **about_tokenizer,
        eos_token_id=tokenizer.eos_token_id,
        text_key=config.text_key,
        held_out=config.held_out,
        seed=config.seed,
        token_key=config.token_key,
        mask_key=config.mask_key,
        token_dtype=config.token_dtype,
        bos_token_id=tokenizer.bos_token_id if config.bos else None,
        close_documents=config.eos,
        teacher_vocab_size=_fewer(teacher.vocab_size, about_tokenizer["vocab_size"]),
    )
    keep = make_keep(config, rules.vocab_size)
    _say_threshold(config, keep)
    return Prepared(
        teacher=teacher,
        tokenizer=tokenizer,
        files=corpus.files,
        corpus=corpus.summary,
        rules=rules,
        keep=keep,
    )


def _fewer(known: int | None, vocab_size: int) -> int | None:
    """A teacher's number of ids where its tokenizer has more of them, else None."""
    return known if known is not None and known < vocab_size else None


def _check_lengths(config: DumpConfig, teacher: Teacher, vocab_size: int) -> None:
    top_k = config.keep_options.get("top_k", 0)
    if top_k > vocab_size:
        raise InputError(f"--top-k {top_k}: the tokenizer has only {vocab_size} entries")
    if teacher.max_length is not None and config.sequence_length > teacher.max_length:
        raise InputError(
            f"--sequence-length {config.sequence_length}: {teacher.name} takes at most "
            f"{teacher.max_length} tokens"
        )


def _say_threshold(config: DumpConfig, keep: Keep) -> None:
    """A threshold is moved to the grid, so that the weight t is stored without rounding."""
    asked = config.keep_options.get("threshold")
    if isinstance(keep, Threshold) and asked != keep.threshold:
        logger.info(
            "--threshold %g: %.6g, whose logarithm is a multiple of --logprob-step, is taken",
            asked,
            keep.threshold,
        )
