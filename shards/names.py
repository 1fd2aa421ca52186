"""Names that a dataset's description, its folders and the command line share; imports nothing."""

from __future__ import annotations

from typing import Final

TRAIN: Final = "train"
VALIDATION: Final = "validation"
SPLITS: Final = (TRAIN, VALIDATION)

# Where the beginning-of-sequence token (BOS) is put: nowhere, before each document, before each
# sequence, or before both.
BOS_NONE: Final = "none"
BOS_DOCUMENT: Final = "document"
BOS_SEQUENCE: Final = "sequence"
BOS_BOTH: Final = "sequence+document"
BOS_MODES: Final = (BOS_NONE, BOS_DOCUMENT, BOS_SEQUENCE, BOS_BOTH)
