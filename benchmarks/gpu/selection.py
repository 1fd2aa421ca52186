"""The selection of every keep method: what it takes, compiled and not, and whether it is right."""

from __future__ import annotations

import logging
import statistics
from pathlib import Path

import numpy as np
import torch

from benchmarks.gpu.check import Figures, expect, find_device, peak_bytes
from benchmarks.plain_selection import PlainSelector
from benchmarks.selection_speed import (
    METHODS,
    figures_of,
    make_logits,
    make_selectors,
    measure,
    seconds_of,
    variants,
)
from shards.keep import TopPK
from shards.process.allocator import keep_freed_tensors
from teacher_dump.keep.packed import Selected, unpack
from teacher_dump.keep.random_keys import position_keys
from teacher_dump.keep.selection import Selector, make_selector, select_in_blocks

FULL_SIZE, SMALL_SIZE = (2048, 151_936), (512, 49_152)
COMPARED = 128  # positions
BLOCK_BYTES = (64 << 20, 256 << 20, 1 << 30)
ROUNDS = 3

# Rounding to the grid may go either way where the exact value is in the middle.
SAME = 0.99  # of the positions have the same entries
LABEL_ERROR, ENTROPY_ERROR, TAIL_ERROR = 1e-4, 1e-3, 1e-2  # nats; the tail's is relative


class _Warnings(logging.Handler):
    """Collects what the project warns of, such as a pass that does not compile."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


def selection(folder: Path, small: bool) -> Figures:
    """Microseconds per position and copies of every variant, and how results compare."""
    keep_freed_tensors()
    warnings = _Warnings()
    logging.getLogger("teacher_dump").addHandler(warnings)
    num_rows, vocab_size = SMALL_SIZE if small else FULL_SIZE
    logits = make_logits(num_rows, vocab_size, find_device())
    selectors = make_selectors(vocab_size)
    timed = variants(logits, selectors)
    plain = {name: timed[name] for name in ("copy", *METHODS)}
    uncompiled = measure(plain, logits, ROUNDS, compiled=False)
    compiled = measure(timed, logits, ROUNDS, compiled=True)
    expect(not warnings.messages, "; ".join(warnings.messages))
    return {
        "compiled": figures_of(compiled, num_rows),
        "uncompiled": figures_of(uncompiled, num_rows),
        "us_per_position_by_block_bytes": _by_block_bytes(selectors["top-p-k"], logits),
        "same_entries": {name: _compare(selectors[name], logits) for name in METHODS},
        "peak_bytes": peak_bytes(),
    }


def _by_block_bytes(select: Selector, logits: torch.Tensor) -> dict[str, float]:
    """With the rows at once whose logits have these many bytes."""
    num_rows, vocab_size = logits.shape
    labels = torch.zeros(num_rows, dtype=torch.int64, device=logits.device)
    figures = {}
    for block_bytes in BLOCK_BYTES:
        rows = max(1, block_bytes // (4 * vocab_size))

        def run(rows: int = rows) -> None:
            select_in_blocks(select, logits, labels, labels, rows)

        run()
        seconds = statistics.median(seconds_of(run, logits.device) for _ in range(ROUNDS))
        figures[str(block_bytes)] = seconds / num_rows * 1e6
    return figures


def _compare(select: Selector, logits: torch.Tensor) -> float:
    """The part of the positions that have the same entries as a reference.

    For top-p-k that is the plain selection in float64, for the others their own on the CPU.
    CheckFailedError if too few have, or if labels' log-probabilities, entropies or tails differ.
    """
    keep, vocab_size = select.selection.keep, select.selection.vocab_size
    method = keep.method
    part = logits[:COMPARED]
    random = torch.Generator().manual_seed(2)
    labels = torch.randint(vocab_size, (len(part),), generator=random)
    keys = torch.from_numpy(position_keys(7, 0, len(part)))
    found = _select(select, part, labels, keys)
    if isinstance(keep, TopPK):
        expected = _select(PlainSelector(keep, vocab_size), part.double(), labels, keys)
    else:
        expected = _select(make_selector(keep, vocab_size), part.cpu(), labels, keys)
    worst = np.abs(found.label_logprobs - expected.label_logprobs).max()
    expect(worst < LABEL_ERROR, f"{method}: log-probabilities of labels off by {worst:.1e}")
    assert found.entropy is not None
    assert expected.entropy is not None
    worst = np.abs(found.entropy - expected.entropy).max()
    expect(worst < ENTROPY_ERROR, f"{method}: entropies off by {worst:.1e}")
    if found.tail_logmass is not None and expected.tail_logmass is not None:
        worst = np.abs(found.tail_logmass - expected.tail_logmass).max()
        expect(worst < TAIL_ERROR, f"{method}: masses not kept off by {worst:.1e}")
    same = float(np.mean(_same_entries(found, expected)))
    expect(same >= SAME, f"{method}: only {same:.1%} of the positions have the same entries")
    return same


def _select(
    select: Selector, logits: torch.Tensor, labels: torch.Tensor, keys: torch.Tensor
) -> Selected:
    device = logits.device
    packed = select_in_blocks(select, logits, labels.to(device), keys.to(device))
    return unpack(packed.cpu().numpy(), select.selection)


def _same_entries(found: Selected, expected: Selected) -> list[bool]:
    """Of each position: whether ids and log-probabilities are the same."""
    entries = []
    for selected in (found, expected):
        borders = np.cumsum(selected.counts)[:-1]
        pairs = zip(
            np.split(selected.ids, borders), np.split(selected.logprobs, borders), strict=True
        )
        entries.append([(ids.tobytes(), values.tobytes()) for ids, values in pairs])
    return [a == b for a, b in zip(*entries, strict=True)]
