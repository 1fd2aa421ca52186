"""Options of train-student that cannot be meant are refused in one line."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from shards.options import OptionError
from student_train.config import TrainConfig
from tests.command_runs import COMPLETE, parsed

GIVEN: dict[str, Any] = {
    "shards": [Path("shards")],
    "student": "demo",
    "out": Path("out"),
    "tokens": 1000,
}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("loss", "rmse"),
        ("tail", "drop"),
        ("alpha_schedule", "cosine"),
        ("alpha", -0.1),
        ("alpha", 1.1),
        ("alpha", float("nan")),
        ("adaptive_temperature", "adakd"),
        ("student_temperature", 0.0),
        ("student_temperature", float("nan")),
        ("temperature", 0.0),
        ("temperature", float("inf")),
        ("temperature", 101.0),
        ("student_temperature", 0.009),
        ("tokens", 0),
        ("batch_tokens", 0),
        ("micro_batch_sequences", 0),
        ("learning_rate", 0.0),
        ("learning_rate", 1e39),
        ("lr_schedule", "linear"),
        ("warmup_fraction", 2.0),
        ("decay_fraction", 2.0),
        ("min_learning_rate_ratio", -1.0),
        ("beta1", 1.0),
        ("beta2", -0.5),
        ("weight_decay", -1.0),
        ("weight_decay", 1e300),
        ("gradient_clip", -1.0),
        ("gradient_clip", float("inf")),
        ("save_every", 0),
        ("eval_every", 0),
        ("seed", -1),
        ("dtype", "float16"),
        ("device", "gpu"),
    ],
)
def test_a_value_that_cannot_be_meant_is_refused_by_its_option(name: str, value: object) -> None:
    with pytest.raises(OptionError) as caught:
        TrainConfig(**{**GIVEN, name: value})
    message = str(caught.value)
    assert message.startswith(f"{name} {value}")
    assert caught.value.as_flag() == f"--{name.replace('_', '-')}{message.removeprefix(name)}"
    assert "expected" in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("words", "expected"), [([], None), (["--compile"], True), (["--no-compile"], False)]
)
def test_compiling_is_asked_for_turned_off_or_left_to_the_device(
    words: list[str], expected: bool | None
) -> None:
    config = parsed("train-student", *COMPLETE["train-student"], *words)["TrainConfig"]
    assert isinstance(config, TrainConfig)
    assert config.compile is expected


def test_all_settings_are_plain_json() -> None:
    content = TrainConfig(**GIVEN, eval_shards=Path("other")).to_json()
    assert json.loads(json.dumps(content)) == content
    assert content["shards"] == ["shards"]
    assert content["eval_shards"] == "other"
    assert content["weights"] == []


@pytest.mark.parametrize("weights", [[1.0], [1.0, 2.0, 3.0], [1.0, 0.0], [1.0, float("nan")]])
def test_every_dataset_has_one_weight_above_0(weights: list[float]) -> None:
    changes = {"shards": [Path("one"), Path("other")], "weights": weights}
    with pytest.raises(OptionError, match=r"weights.*expected"):
        TrainConfig(**GIVEN | changes)


def test_a_clip_of_0_is_no_clip() -> None:
    assert TrainConfig(**GIVEN).gradient_clip == 1
    assert TrainConfig(**GIVEN, gradient_clip=0.0).gradient_clip == 0


@pytest.mark.parametrize("name", ["normkd", "wttm", "adakd-sd", "adakd-h"])
def test_every_strategy_of_adaptive_temperatures_is_accepted(name: str) -> None:
    config = TrainConfig(**GIVEN, adaptive_temperature=name, temperature=2.0, alpha=0.5)
    assert config.to_json()["adaptive_temperature"] == name


def test_entries_are_read_only_for_distillation() -> None:
    assert TrainConfig(**GIVEN).reads_entries
    assert not TrainConfig(**GIVEN, alpha=0.0).reads_entries


def test_the_configuration_imports_nothing_heavy() -> None:
    code = "import sys, student_train.config; print({'torch', 'pyarrow'} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.strip() == "set()", result.stderr


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"tail": "bucket", "temperature": 2.0}, "is known only at temperature 1, not 2.0"),
        ({"tail": "bucket", "loss": "mse"}, "--loss mse compares only the kept entries"),
        ({"tail": "bucket", "student_temperature": 2.0}, "not --student-temperature 2.0"),
        ({"tail": "bucket", "adaptive_temperature": "normkd"}, "those of --adaptive-temperature"),
        (
            {"loss": "mse", "temperature": 3.0, "student_temperature": 2.0},
            "student_temperature 2.0: .* --temperature 1.5 has the same effect",
        ),
        ({"loss": "mse", "adaptive_temperature": "adakd-h"}, "needs a softmax, but --loss mse"),
        ({"adaptive_temperature": "wttm"}, "needs a --temperature above 1, not 1.0"),
        (
            {"adaptive_temperature": "wttm", "temperature": 2.0, "student_temperature": 2.0},
            "needs the student at temperature 1, not --student-temperature 2.0",
        ),
        (
            {"alpha_schedule": "wsd", "lr_schedule": "cosine", "warmup_fraction": 0.9},
            "expected at most 1 together",
        ),
    ],
)
def test_options_that_contradict_each_other_are_refused(
    changes: dict[str, Any], match: str
) -> None:
    with pytest.raises(OptionError, match=match):
        TrainConfig(**{**GIVEN, **changes})
