"""Test where the beginning-of-sequence (BOS) token must go for this teacher.

Some teachers are useless without BOS at position 0: Gemma 3 270M has a cross-entropy of 4.44 nats
per token of real text without it and 2.20 with it, at a sequence length of 128. So the teacher
scores a sample both ways before the run tokenises the corpus.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from shards.errors import RunError
from shards.options import OptionError
from shards.spec import BOS_BOTH, BOS_DOCUMENT, BOS_NONE, BOS_SEQUENCE
from teacher_dump.config import BOS_AUTO, DumpConfig
from teacher_dump.corpus.documents import Document
from teacher_dump.engines.interface import TeacherEngine
from teacher_dump.prepare import Prepared
from teacher_dump.sample import read_documents_of_sample, sample_of
from teacher_dump.tokens.sequences import SplitSequences

logger = logging.getLogger(__name__)

PROBED_POSITIONS = 4096
WORSE_BY_NATS = 0.1
TRUSTED_POSITIONS = 256  # over fewer positions a difference may be noise, so the run only warns
_PROBED_CHARACTERS = 1 << 17


@dataclass(frozen=True, kw_only=True)
class BosProbe:
    """The teacher's cross-entropy on a sample, nats per token, by BOS mode.

    `chosen` is the mode of this run; `positions` counts what was scored with each mode.
    """

    chosen: str
    cross_entropies: Mapping[str, float]
    positions: Mapping[str, int]

    @property
    def best(self) -> str:
        """The mode with the lowest cross-entropy."""
        return min(self.cross_entropies, key=lambda mode: self.cross_entropies[mode])

    @property
    def is_worse(self) -> bool:
        """Whether another mode is better than the chosen one."""
        nats = self.cross_entropies
        return nats[self.chosen] - nats[self.best] > WORSE_BY_NATS

    def to_json(self) -> dict[str, object]:
        """For the manifest's record."""
        return {
            "positions": dict(self.positions),
            "cross_entropies": dict(self.cross_entropies),
        }

    def text(self) -> str:
        """One line for a person."""
        parts = [f"{value:.3f} with --bos {mode}" for mode, value in self.cross_entropies.items()]
        return f"teacher cross-entropy, nats per token: {', '.join(parts)}"


@dataclass(frozen=True)
class ProbeSample:
    """Documents to probe with, read before an engine starts; none if there is no BOS to choose."""

    documents: Sequence[Document]


def read_probe_sample(ready: Prepared) -> ProbeSample:
    """The documents that `probe` scores; none for a tokenizer or a teacher without BOS."""
    bos = ready.tokenizer.bos_token_id
    if bos is None or bos >= ready.rules.num_ids:
        return ProbeSample([])
    return ProbeSample(read_documents_of_sample(ready, _PROBED_CHARACTERS))


def probe(
    config: DumpConfig, ready: Prepared, sample: ProbeSample, engine: TeacherEngine
) -> BosProbe | None:
    """Score the sample with the chosen mode and others; None if there is nothing to compare.

    If the chosen mode is worse: OptionError if `auto` chose it, a warning if the user did.
    RunError for a teacher that returns NaN or infinity.
    """
    chosen = ready.documents.bos
    nats: dict[str, float] = {}
    positions: dict[str, int] = {}
    # A sequence of one token cannot have another one before it.
    both = [BOS_BOTH] if config.sequence_length > 1 else []
    for mode in dict.fromkeys((chosen, BOS_NONE, *both)):
        split = _sequences(config, ready, sample, mode)
        if not len(split):
            return None
        nll, positions[mode] = _score(split, engine, mode)
        if not positions[mode]:
            return None
        if not math.isfinite(nll):
            raise RunError(
                f"{config.teacher}: the teacher's negative log-likelihood of the corpus is {nll};"
                " check its weights and --dtype"
            )
        nats[mode] = nll / positions[mode]
    result = BosProbe(chosen=chosen, cross_entropies=nats, positions=positions)
    logger.info("%s", result.text())
    if result.is_worse:
        text = (
            f" {chosen}: the teacher's cross-entropy on a sample is {nats[chosen]:.2f} nats per"
            f" token, but {nats[result.best]:.2f} with --bos {result.best}"
        )
        few = min(positions.values()) < TRUSTED_POSITIONS
        if config.bos == BOS_AUTO and not few:
            raise OptionError("bos", f"{text}; give --bos {result.best}")
        logger.warning("warning: --bos%s%s", text, " (measured on few tokens)" if few else "")
    return result


def _sequences(
    config: DumpConfig, ready: Prepared, sample: ProbeSample, mode: str
) -> SplitSequences:
    bos = ready.tokenizer.bos_token_id
    rules = replace(ready.rules, bos_token_id=bos if mode in (BOS_DOCUMENT, BOS_BOTH) else None)
    tokens = sample_of(sample.documents, ready, rules)
    return tokens.sequences(config, bos if mode in (BOS_SEQUENCE, BOS_BOTH) else None)


def _score(split: SplitSequences, engine: TeacherEngine, mode: str) -> tuple[float, int]:
    """Sum of negative log-probabilities, nats, and number of labels.

    This leaves out a label that has only BOS before it: without BOS, other tokens precede it.
    """
    nll, positions = 0.0, 0
    after_bos = mode in (BOS_SEQUENCE, BOS_BOTH)
    num = min(len(split), split.sequences_within(PROBED_POSITIONS) + 1)
    for sequence, selected in engine.score(split[n] for n in range(num)):
        labels = selected.label_logprobs
        mask = sequence.loss_mask
        counted = np.ones(len(labels), np.bool_) if mask is None else mask.copy()
        if after_bos:
            counted[0] = False
        nll -= float(labels[counted].sum(dtype=np.float64))
        positions += int(counted.sum())
    return nll, positions
