"""Whether an engine is right in the middle of a prompt, found out before the first shard.

Engines are built to generate: what they must get right is the end of a prompt. Some save work on
the positions before it, and then give rows that nobody asked for, without an error. So prefixes of
one full sequence of the pass are sent as requests of their own. At the end of a prefix stands what
the middle of the whole sequence must say, too. Another last token must change what stands there:
else the rows are those of the position before.

Only label log-probabilities are compared: every engine and every keep method has them exactly, and
no random key changes them.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import chain
from weakref import WeakSet

import numpy as np

from shards.errors import RunError
from shards.rows import BoolArray, Float32Array
from teacher_dump.config import DumpConfig
from teacher_dump.engines.interface import TeacherEngine
from teacher_dump.keep.packed import Selected
from teacher_dump.keep.rows import TokenSequence

logger = logging.getLogger(__name__)

# Where prefixes end, in a sequence of length 1: many, and short, 1.75 sequences' worth together.
PREFIX_ENDS = tuple(number / 32 for number in (1, 2, 3, 4, 6, 8, 12, 20))
COMPARED = 32  # positions at the end of a prefix
EXCHANGED = 3  # prefixes, the shortest, that are sent with another last token, too

# The check uses a sequence of full length, or the longest of this many sequences or tokens.
LOOKED_AT = 64
LOOKED_AT_TOKENS = 1 << 20

# Nats. Prompts of another length are computed in another order.
TOLERANCES = {"float32": 0.05, "bfloat16": 0.5}
LEAST_CHANGE = 0.02  # of a tolerance
# The share of positions that may differ: a mixture of experts may route single tokens differently.
MOST_DIFFERENT = 0.25


_checked: WeakSet[TeacherEngine] = WeakSet()


def score_checked(
    engine: TeacherEngine, sequences: Iterable[TokenSequence], config: DumpConfig
) -> Iterator[tuple[TokenSequence, Selected]]:
    """`engine.score`, but nothing comes out before one sequence agrees with prefixes of itself.

    Each engine is checked once. RunError if it disagrees with itself.
    """
    if engine in _checked or not engine.prefixes_agree:
        yield from engine.score(sequences)
        return
    _checked.add(engine)
    source = iter(sequences)
    head = _head(source, config.sequence_length)
    if not head:
        return
    checked = max(head, key=lambda sequence: len(sequence.tokens))
    head = [sequence for sequence in head if sequence is not checked]
    # It comes second: the first prompt of a batch is where a wrong offset does not show.
    head.insert(1, checked)
    check = _Check(engine, checked, config.engine, TOLERANCES[config.resolved_dtype])
    held: list[tuple[TokenSequence, Selected]] | None = []
    for sequence, selected in engine.score(chain(head, source)):
        if held is None:
            yield sequence, selected
            continue
        held.append((sequence, selected))
        if (sequence.split, sequence.number) == (checked.split, checked.number):
            check.compare(selected.label_logprobs)
            yield from held
            held = None


def _head(source: Iterator[TokenSequence], sequence_length: int) -> list[TokenSequence]:
    """The first sequences, two at least, up to one of full length."""
    head: list[TokenSequence] = []
    tokens = longest = 0
    while len(head) < 2 or (
        longest <= sequence_length and len(head) < LOOKED_AT and tokens < LOOKED_AT_TOKENS
    ):
        sequence = next(source, None)
        if sequence is None:
            break
        head.append(sequence)
        tokens += len(sequence.tokens)
        longest = max(longest, len(sequence.tokens))
    return head


class _Check:
    """What an engine says of the prefixes of a sequence of T positions."""

    def __init__(
        self, engine: TeacherEngine, sequence: TokenSequence, name: str, tolerance: float
    ) -> None:
        self._sequence, self._name, self._tolerance = sequence, name, tolerance
        num = len(sequence.tokens) - 1
        lengths = sorted({max(1, int(num * end)) for end in PREFIX_ENDS} - {num})
        prefixes = [_prefix(sequence, length) for length in lengths]
        exchanged = [_with_another_last_token(prefix) for prefix in prefixes[:EXCHANGED]]
        sent = [*prefixes, *(prefix for prefix in exchanged if prefix is not None)]
        sent = [replace(prefix, number=number) for number, prefix in enumerate(sent)]
        found = {prefix.number: said.label_logprobs for prefix, said in engine.score(sent)}
        said = [found[number] for number in range(len(sent))]
        self._prefixes, self._exchanged = said[: len(lengths)], said[len(lengths) :]

    def compare(self, whole: Float32Array) -> None:
        """`whole` [T] is what the engine says of the sequence. RunError if that is another."""
        if not self._prefixes:
            return
        largest = 0.0
        for said in self._prefixes:
            part = slice(max(0, len(said) - COMPARED), len(said))
            self._refuse(self._different(whole[part], said[part]), f"before position {part.stop}")
            largest = max(largest, _largest_difference(whole[part], said[part]))
        ends = np.array([len(said) - 1 for said in self._prefixes])
        last = np.array([said[-1] for said in self._prefixes], np.float32)
        self._refuse(self._different(whole[ends], last), "where the prompts end")
        self._check_last_tokens(last, largest)
        logger.info(
            "the engine says the same in the middle of a prompt as at its end (within %.2g nats)",
            largest,
        )

    def _different(self, these: Float32Array, those: Float32Array) -> BoolArray:
        """What is no number on both sides is no difference: other checks refuse it."""
        same = np.isclose(these, those, rtol=0, atol=self._tolerance, equal_nan=True)
        different: BoolArray = ~same
        return different

    def _refuse(self, different: BoolArray, where: str) -> None:
        num = int(different.sum())
        if num > max(1, MOST_DIFFERENT * different.size):
            raise RunError(
                f"{self._begins()}: {num} of {different.size} positions {where} differ by more"
                f" than {self._tolerance:g} nats from what a shorter prompt says"
                f"{self._instead()}"
            )

    def _check_last_tokens(self, last: Float32Array, noise: float) -> None:
        """RunError if no last token changes what stands there by more than noise.

        A teacher of little training looks hardly further back than its vocabulary's frequencies,
        so a change counts from well below the tolerance on.
        """
        if not self._exchanged:
            return
        changed = np.array([said[-1] for said in self._exchanged], np.float32)
        least = min(self._tolerance, max(LEAST_CHANGE * self._tolerance, 4 * noise))
        if not _largest_difference(changed, last[: len(changed)]) > least:
            raise RunError(
                f"{self._begins()}: what it says at a position does not depend on the token"
                f" there, as if rows were shifted{self._instead()}"
            )

    def _begins(self) -> str:
        sequence = self._sequence
        return (
            f"--engine {self._name} does not give this teacher's targets, in {sequence.split}"
            f" sequence {sequence.number}"
        )

    def _instead(self) -> str:
        return "" if self._name == "transformers" else "; use --engine transformers"


def _prefix(sequence: TokenSequence, length: int) -> TokenSequence:
    """The first positions of a sequence."""
    mask = sequence.loss_mask
    return replace(
        sequence,
        tokens=sequence.tokens[: length + 1],
        segments=sequence.segments[: length + 1],
        loss_mask=None if mask is None else mask[:length],
    )


def _with_another_last_token(prefix: TokenSequence) -> TokenSequence | None:
    """The last token that the teacher reads becomes another of the same text, if there is one."""
    others = prefix.tokens[prefix.tokens != prefix.tokens[-2]]
    if not len(others):
        return None
    tokens = prefix.tokens.copy()
    tokens[-2] = others[0]
    return replace(prefix, tokens=tokens)


def _largest_difference(these: Float32Array, those: Float32Array) -> float:
    numbers = np.isfinite(these) & np.isfinite(those)
    return float(np.abs(these[numbers] - those[numbers]).max(initial=0.0))
