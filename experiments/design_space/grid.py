"""The grid as data: the cells, and the order they run in.

A cell is one student. Its `question` says what it was added for; another question may read its row
too. A row of the results belongs to a cell by the hash of the cell's settings, so a changed setting
makes a new row and leaves the old one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace

from experiments.design_space.scales import (
    EARLY,
    LATE,
    LM,
    OFFLINE,
    TARGETS,
    Options,
    Scale,
    digest,
)

QUESTIONS = (1, 2, 3, 4, 5, 6, 7)
SEEDS = (0, 1, 2)
# Which question gets how many seeds before the next one runs; in the end all get all.
ORDER = ((1, 3), (7, 2), (2, 2), (3, 1), (6, 1), (4, 1), (3, 2), (5, 1))

BASE_TEACHER, BASE_STUDENT = "3.7M", "0.9M"
SAMPLED, TRUNCATED = "threshold 0.05", "top-p-k 0.95-100"  # what the other questions vary


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One student. The factors multiply the scale's tokens.

    `data` is the size of the dataset and `tokens` how long to train: with 0.25 and 1 the student
    sees its data four times.
    """

    question: int
    target: str
    logits: str = OFFLINE
    options: Options = field(default_factory=dict)
    student: str = BASE_STUDENT
    teacher: str = BASE_TEACHER
    data: float = 1
    tokens: float = 1

    @property
    def name(self) -> str:
        """What differs from a run of question 1."""
        changed = [f"{key} {value}" for key, value in self.options.items() if key != "alpha"]
        alpha = self.options.get("alpha")
        changed += [] if alpha is None else [f"alpha {alpha}"]
        changed += [f"student {self.student}"] if self.student != BASE_STUDENT else []
        changed += [f"teacher {self.teacher}"] if self.teacher != BASE_TEACHER else []
        changed += [f"{self.data:g} of the data"] if self.data != 1 else []
        changed += [f"{self.tokens:g} of the tokens"] if self.tokens != 1 else []
        online = [] if self.logits == OFFLINE else [f"online, {self.logits}"]
        return ", ".join([self.target, *online, *changed])

    def settings(self, scale: Scale) -> dict[str, object]:
        """Everything that decides the result, but for text, seed and code."""
        return {
            "vocab_size": scale.vocab_size,
            "teacher": None if self.target == LM else self._teacher_settings(scale),
            "dump": scale.layout | scale.dump_options(self.target, self.data),
            "student": asdict(scale.students[self.student]),
            "train": self.train_options(scale),
            "evaluation": {
                "teacher": scale.teacher_settings(BASE_TEACHER),
                "dump": scale.layout | scale.evaluation_options,
            },
        }

    def _teacher_settings(self, scale: Scale) -> dict[str, object]:
        return scale.teacher_settings(self.teacher, self.logits)

    def train_options(self, scale: Scale) -> Options:
        """The options of train-student, but for student, seed and paths."""
        tokens, alpha = int(self.tokens * scale.student_tokens), float(self.target != LM)
        return scale.train | {"tokens": tokens, "alpha": alpha} | self.options

    def hash(self, scale: Scale) -> str:
        """The identity of the settings in the results."""
        return digest(self.settings(scale))


def _targets() -> Iterator[Cell]:
    for target in TARGETS:
        yield Cell(question=1, target=target)


def _losses() -> Iterator[Cell]:
    # mse leaves all other logits free, so losses and temperatures keep a tenth of the labels' loss.
    for target in (TRUNCATED, "k = 12", "top-p-k 0.95-50"):
        yield Cell(question=2, target=target, options={"tail": "bucket"})
    yield Cell(question=2, target=TRUNCATED, options={"alpha": 0.9})
    yield Cell(question=2, target=TRUNCATED, options={"loss": "mse", "alpha": 0.9})


def _alphas() -> Iterator[Cell]:
    for alpha in (0.9, 0.5, 0.7, 0.3, 0.1):
        for target in (SAMPLED, TRUNCATED):
            yield Cell(question=3, target=target, options={"alpha": alpha})
    for rate in ("wsd", "cosine"):
        if rate != "wsd":
            yield Cell(question=3, target=LM, options={"lr-schedule": rate})
            yield Cell(question=3, target=SAMPLED, options={"lr-schedule": rate})
        for schedule in ("wsd", "linear-decrease", "linear-increase", "period"):
            options: Options = {"alpha-schedule": schedule}
            options |= {"lr-schedule": rate} if rate != "wsd" else {}
            yield Cell(question=3, target=SAMPLED, options=options)


def _temperatures() -> Iterator[Cell]:
    for temperature in (0.5, 2, 0.2, 5, 10):
        options: Options = {"temperature": temperature}
        yield Cell(question=4, target=TRUNCATED, options=options | {"alpha": 0.9})
    for strategy in ("adakd-h", "adakd-sd", "normkd", "wttm"):
        options = {"adaptive-temperature": strategy}
        options |= {"temperature": 2} if strategy == "wttm" else {}  # it needs one above 1
        yield Cell(question=4, target=TRUNCATED, options=options | {"alpha": 0.9})


def _sizes() -> Iterator[Cell]:
    for student in ("0.3M", "1.9M"):
        for target in (LM, SAMPLED):
            yield Cell(question=5, target=target, student=student)
    for teacher in ("1.6M", "8.2M"):
        yield Cell(question=5, target=SAMPLED, teacher=teacher)


def _corpora() -> Iterator[Cell]:
    for data, tokens in ((0.25, 1.0), (0.5, 0.5), (2.0, 2.0)):
        for target in (LM, SAMPLED):
            yield Cell(question=6, target=target, data=data, tokens=tokens)


def _online() -> Iterator[Cell]:
    alphas: tuple[Options, ...] = ({}, {"alpha": 0.1})
    for logits in (LATE, EARLY):
        for options in alphas:
            yield Cell(question=7, target=SAMPLED, logits=logits, options=options)


def cells() -> list[Cell]:
    """All cells, question by question, the most informative of each first."""
    parts = (_targets, _losses, _alphas, _temperatures, _sizes, _corpora, _online)
    return [cell for part in parts for cell in part()]


def runs(questions: Sequence[int] = ()) -> list[tuple[Cell, int]]:
    """Cells with seeds in the order to run them: a question is done seed by seed.

    A cell that two questions have comes once. No questions: all.
    """
    pairs: dict[tuple[str, int], tuple[Cell, int]] = {}
    for question, number in (*ORDER, *((question, len(SEEDS)) for question in QUESTIONS)):
        for seed in SEEDS[:number]:
            for cell in cells():
                if cell.question == question in (questions or QUESTIONS):
                    pairs.setdefault((cell.name, seed), (cell, seed))
    return list(pairs.values())


def labels_alone(cell: Cell) -> Cell:
    """The cell that a gain is measured against: the same run without a teacher."""
    rate = {key: value for key, value in cell.options.items() if key == "lr-schedule"}
    return replace(cell, target=LM, logits=OFFLINE, options=rate, teacher=BASE_TEACHER)


def shown(question: int) -> list[Cell]:
    """The cells of a question as its table shows them, with those of others to compare with."""
    own = [cell for cell in cells() if cell.question == question]
    plain = Cell(question=1, target=LM)
    sampled, truncated = (Cell(question=1, target=name) for name in (SAMPLED, TRUNCATED))
    if question == 2:
        others = [
            Cell(question=1, target=name) for name in (TRUNCATED, "k = 12", "top-p-k 0.95-50")
        ]
        return [plain, *others, *own]
    if question == 4:
        return [
            plain,
            Cell(question=2, target=TRUNCATED, options={"alpha": 0.9}),
            *own,
        ]
    if question == 7:
        return [plain, sampled, Cell(question=3, target=SAMPLED, options={"alpha": 0.1}), *own]
    if question == 1:
        return own
    return [plain, sampled, *([truncated] if question == 3 else []), *own]
