"""The options of `train-student --save-logits`. Nothing heavy is imported here."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from shards.keep import Keep, Threshold, Tokens
from shards.options import OptionError, check, option


@dataclass(frozen=True, kw_only=True)
class SaveLogits:
    """Options of `train-student --save-logits`, one field each; OptionError for invalid values."""

    save_logits: Path | None = option(
        "Output folder of a dataset of the student's own distributions, saved while it trains.",
        default=None,
        metavar="FOLDER",
        shown_default="nothing is saved",
    )
    save_logits_from: int = option(
        "With --save-logits: first step whose distributions are saved.", default=1, metavar="STEP"
    )
    # The option --temperature is that of the loss, so samples are at temperature 1.
    keep: Keep = option(
        "With --save-logits: what to keep of a distribution (docs/keep-methods.md).",
        default=Threshold(),
        without=("temperature",),
    )
    sequences_per_shard: int | None = option(
        "With --save-logits: sequences per shard.",
        default=None,
        shown_default="about 500,000 tokens",
    )

    def __post_init__(self) -> None:
        check(self.save_logits_from >= 1, "save_logits_from", self.save_logits_from, "at least 1")
        size = self.sequences_per_shard
        if size is not None:
            check(size >= 1, "sequences_per_shard", size, "at least 1")
        if self.save_logits is None:
            for name, given in (
                ("save_logits_from", self.save_logits_from != 1),
                ("keep", self.keep != Threshold()),
                ("sequences_per_shard", size is not None),
            ):
                if given:
                    raise OptionError(name, ": works only with --save-logits")
        elif isinstance(self.keep, Tokens):
            raise OptionError("keep", " tokens: --save-logits saves distributions")
