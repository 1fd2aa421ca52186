"""Offline logits for pre-training distillation: read a dataset of teacher logits from Python.

    import logitshards

    dataset = logitshards.open("dataset")
    row = dataset["train"][0]
    row.tokens, row.ids[5], row.logprobs[5], row.dense(5)

`docs/python.md` is the guide. Names are imported when they are first used: `import logitshards`
itself loads neither torch nor pyarrow nor numpy.

The other modules of this package are shared by the commands.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from logitshards.losses import DistillationLoss as DistillationLoss
    from logitshards.losses import labels_and_targets as labels_and_targets
    from logitshards.reading import Dataset as Dataset
    from logitshards.reading import Rows as Rows
    from logitshards.reading import Split as Split
    from logitshards.reading import open as open
    from logitshards.row import Ragged as Ragged
    from logitshards.row import Row as Row
    from logitshards.stream import Batches as Batches
    from logitshards.stream import batches as batches
    from shards.errors import ShardError as ShardError
    from student_train.data.batches import Batch as Batch
    from student_train.objective.distillation import Objective as Objective
    from student_train.objective.distillation import Targets as Targets
    from student_train.objective.loss import distillation_loss as distillation_loss

    __version__: str

__all__ = [
    "Batch",
    "Batches",
    "Dataset",
    "DistillationLoss",
    "Objective",
    "Ragged",
    "Row",
    "Rows",
    "ShardError",
    "Split",
    "Targets",
    "__version__",
    "batches",
    "distillation_loss",
    "labels_and_targets",
    "open",
]

# The module that each public name comes from.
_MODULES = {
    "Batch": "student_train.data.batches",
    "Batches": "logitshards.stream",
    "Dataset": "logitshards.reading",
    "DistillationLoss": "logitshards.losses",
    "Objective": "student_train.objective.distillation",
    "Ragged": "logitshards.row",
    "Row": "logitshards.row",
    "Rows": "logitshards.reading",
    "ShardError": "shards.errors",
    "Split": "logitshards.reading",
    "Targets": "student_train.objective.distillation",
    "batches": "logitshards.stream",
    "distillation_loss": "student_train.objective.loss",
    "labels_and_targets": "logitshards.losses",
    "open": "logitshards.reading",
}

if not TYPE_CHECKING:  # a type checker that saw it would let every misspelt name pass

    def __getattr__(name: str) -> object:
        """Import a public name when it is first used."""
        if name == "__version__":
            return _installed_version()
        if name not in _MODULES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = getattr(import_module(_MODULES[name]), name)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _installed_version() -> str:
    """The version of the installed package; "0+unknown" in a folder that was not installed."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(__name__)
    except PackageNotFoundError:
        return "0+unknown"
