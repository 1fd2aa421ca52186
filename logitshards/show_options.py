"""Options of commands that only show something: a plan, a dataset, runs side by side."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from shards.names import SPLITS
from shards.options import OptionError, check, check_choices, option


@dataclass(frozen=True, kw_only=True)
class PlanOptions:
    """Options of `dump-logits --plan`."""

    plan: bool = option(
        "Measure briefly and print what the dump would cost, without writing anything.",
        default=False,
    )
    tokens: float | None = option(
        "With --plan: number of tokens of the whole corpus, such as 1e12, if --corpus is only a "
        "sample of it.",
        default=None,
        metavar="TOKENS",
        shown_default="those of --corpus",
    )

    def __post_init__(self) -> None:
        if self.tokens is not None:
            check(1 <= self.tokens < 1e18, "tokens", self.tokens, "a number from 1 to 1e18")
            if not self.plan:
                raise OptionError("tokens", f" {self.tokens:g}: needs --plan")


@dataclass(frozen=True, kw_only=True)
class InspectOptions:
    """Options of `inspect-shards`."""

    row: int | None = option(
        "Show this sequence, position by position.", default=None, metavar="NUMBER"
    )
    split: str | None = option(
        "Split of --row.", default=None, choices=SPLITS, shown_default=SPLITS[0]
    )
    verify: bool = option(
        "Read and check everything; the exit code is 1 if there is a problem.", default=False
    )
    json: bool = option("Print one JSON object.", default=False)

    def __post_init__(self) -> None:
        check_choices(self)
        if self.row is not None and (self.verify or self.json):
            raise OptionError("row", f" {self.row}: does not go with --verify or --json")
        if self.row is None and self.split is not None:
            raise OptionError("split", f" {self.split}: needs --row")


@dataclass(frozen=True, kw_only=True)
class ReportOptions:
    """Options of `train-student report`."""

    out: Path = option(
        "Output file, one HTML page. An existing file is overwritten.",
        default=Path("report.html"),
        metavar="FILE",
    )
