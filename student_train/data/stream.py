"""The batches of several splits mixed by their shares, from where a run stands."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass

from shards.dataset import Split
from student_train.data.batches import Batch, training_batches
from student_train.data.lines import Source
from student_train.data.mixture import choices, order_seed
from student_train.data.order import Position


def shares_of(weights: Sequence[float], splits: Sequence[Split]) -> list[float]:
    """The part of a batch's lines that each split gives, together 1; no weights: by their sizes."""
    values = weights or [split.num_positions for split in splits]
    scaled = [value / max(values) for value in values]
    return [value / sum(scaled) for value in scaled]


@dataclass(frozen=True, kw_only=True)
class Stream:
    """Which lines come in which order: `step_lines` of all ranks a step, from splits by shares."""

    splits: Sequence[Split]
    shares: Sequence[float]
    seed: int
    window_row_groups: int
    step_lines: int

    def batches(
        self,
        positions: Sequence[Position],
        *,
        lines_done: int,
        micro_batch_lines: int,
        columns: Sequence[str],
        rank: int,
        world_size: int,
    ) -> Generator[Batch]:
        """`training_batches` from where the splits are after `lines_done` lines of all of them."""
        sources = [
            Source.of(
                split,
                seed=order_seed(self.seed, number),
                window_row_groups=self.window_row_groups,
                start=position,
            )
            for number, (split, position) in enumerate(zip(self.splits, positions, strict=True))
        ]
        return training_batches(
            sources,
            choices(self.shares, seed=self.seed, first_line=lines_done),
            step_lines=self.step_lines,
            micro_batch_lines=micro_batch_lines,
            columns=columns,
            rank=rank,
            world_size=world_size,
        )
