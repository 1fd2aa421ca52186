"""A keep method takes what can be meant, and is the same after it was written down."""

import json
import math
from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shards.errors import ShardFormatError
from shards.keep import (
    KEEP_METHODS,
    MAX_DRAWS,
    MIN_LOGPROB_STEP,
    MIN_THRESHOLD,
    Draws,
    Keep,
    Threshold,
    Tokens,
    TopPK,
)
from shards.options import OptionError, check, option
from shards.spec import DatasetSpec, keep_from_json, keep_to_json
from tests.strategies import make_spec

NAN = float("nan")


def again(keep):
    """A method after it was written to a file and read."""
    return keep_from_json(json.loads(json.dumps(keep_to_json(keep), allow_nan=False)))


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (TopPK, {"top_p": 0.0}, "top_p 0.0: expected a value in (0, 1]"),
        (TopPK, {"top_p": -0.5}, "top_p -0.5: expected"),
        (TopPK, {"top_p": 1.0001}, "top_p 1.0001: expected"),
        (TopPK, {"top_p": NAN}, "top_p nan: expected"),
        (TopPK, {"top_k": 0}, "top_k 0: expected at least 1"),
        (TopPK, {"top_k": -3}, "top_k -3: expected at least 1"),
        (TopPK, {"logprob_step": 0.0}, "logprob_step 0.0: expected nats in [0.0001, 1]"),
        (TopPK, {"logprob_step": -0.1}, "logprob_step -0.1: expected"),
        (TopPK, {"logprob_step": 0.00009}, "logprob_step 9e-05: expected"),
        (TopPK, {"logprob_step": 1.5}, "logprob_step 1.5: expected"),
        (TopPK, {"logprob_step": NAN}, "logprob_step nan: expected"),
        (Draws, {"draws": 0}, "draws 0: expected a number from 1 to 65536"),
        (Draws, {"draws": MAX_DRAWS + 1}, "draws 65537: expected"),
        (Draws, {"temperature": 0.0}, "temperature 0.0: expected a value in [0.01, 100]"),
        (Draws, {"temperature": 0.009}, "temperature 0.009: expected"),
        (Draws, {"temperature": 101.0}, "temperature 101.0: expected"),
        (Draws, {"temperature": NAN}, "temperature nan: expected"),
        (Draws, {"logprob_step": 2.0}, "logprob_step 2.0: expected"),
        (Threshold, {"threshold": 0.0}, "threshold 0.0: expected a value in [0.001, 1]"),
        (Threshold, {"threshold": -1.0}, "threshold -1.0: expected"),
        (Threshold, {"threshold": 0.0005}, "threshold 0.0005: expected"),
        (Threshold, {"threshold": 1.01}, "threshold 1.01: expected"),
        (Threshold, {"threshold": math.inf}, "threshold inf: expected"),
        (Threshold, {"threshold": NAN}, "threshold nan: expected"),
        (Threshold, {"temperature": -1.0}, "temperature -1.0: expected"),
        (Threshold, {"logprob_step": 0.0}, "logprob_step 0.0: expected"),
    ],
)
def test_a_value_that_cannot_be_meant_is_an_error_of_its_option(kind, options, message):
    with pytest.raises(OptionError) as caught:
        kind(**options)
    (name,) = options
    assert caught.value.name == name
    assert str(caught.value).startswith(message)
    flag = f"--{name.replace('_', '-')}"
    assert caught.value.as_flag() == flag + str(caught.value).removeprefix(name)


@pytest.mark.parametrize(
    "keep",
    [
        TopPK(top_p=1.0, top_k=1, logprob_step=1.0),
        TopPK(top_p=1e-9, top_k=10**6),
        Draws(draws=1, temperature=0.01),
        Draws(draws=MAX_DRAWS, temperature=100.0),
        Threshold(threshold=1.0),
        Threshold(threshold=MIN_THRESHOLD),
        Tokens(),
    ],
    ids=repr,
)
def test_values_at_the_limits_are_taken_and_written_down(keep):
    assert again(keep) == keep
    spec = make_spec()
    spec = replace(spec, keep=keep, teacher=None if isinstance(keep, Tokens) else spec.teacher)
    text = json.dumps(spec.to_json(), allow_nan=False)
    assert DatasetSpec.from_json(json.loads(text), "spec") == spec


STEPS = [1.0, 0.9854, 0.5, 0.3, 0.1, 1 / 16, 1 / 48, 0.01, 0.001, MIN_LOGPROB_STEP]


def check_on_the_grid(threshold, step):
    keep = Threshold(threshold=threshold, logprob_step=step)
    assert keep.log_threshold == -keep.threshold_steps * step
    assert keep.threshold == math.exp(keep.log_threshold) <= 1
    assert abs(math.log(keep.threshold) - math.log(threshold)) <= step / 2 + 1e-9
    written = again(keep)
    assert (written, written.threshold_steps) == (keep, keep.threshold_steps)
    assert written.threshold.hex() == keep.threshold.hex()
    return keep


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("threshold", [1.0, 0.99, 0.5, 0.05, 0.03, 0.0011, MIN_THRESHOLD])
def test_a_threshold_that_was_rounded_to_the_grid_stays_where_it_is(threshold, step):
    check_on_the_grid(threshold, step)


@given(
    st.floats(MIN_THRESHOLD, 1.0),
    st.floats(MIN_LOGPROB_STEP, 1.0) | st.sampled_from(STEPS),
)
def test_any_threshold_that_is_taken_is_taken_again(threshold, step):
    check_on_the_grid(threshold, step)


@given(st.floats(1e-4, MIN_THRESHOLD), st.floats(MIN_LOGPROB_STEP, 1.0) | st.sampled_from(STEPS))
def test_a_threshold_below_the_least_is_refused_or_taken_again(threshold, step):
    """Half a step of slack is for values that were rounded; it must not let others through."""
    try:
        Threshold(threshold=threshold, logprob_step=step)
    except OptionError:
        return
    check_on_the_grid(threshold, step)


@pytest.mark.parametrize("vocab_size", [1, 7, 49_152])
def test_no_position_has_more_entries_than_the_method_can_keep(vocab_size):
    assert TopPK(top_k=100).max_entries(vocab_size) == min(100, vocab_size)
    assert Draws(draws=50).max_entries(vocab_size) == min(50, vocab_size)
    assert Threshold(threshold=0.5, logprob_step=1e-4).max_entries(vocab_size) == min(vocab_size, 3)
    assert Tokens().max_entries(vocab_size) == 0


def test_what_readers_ask_of_a_method_follows_from_it():
    asked = {
        method: (kind.is_sampled, kind.has_tail, kind.needs_distribution)
        for method, kind in KEEP_METHODS.items()
        if kind.__module__ == "shards.keep"
    }
    assert asked == {
        "top-p-k": (False, True, False),
        "draws": (True, False, True),
        "threshold": (True, False, True),
        "tokens": (False, False, False),
    }
    assert TopPK().exact_above == -math.inf
    assert Draws().exact_above is None
    threshold = Threshold(threshold=math.exp(-2), logprob_step=0.25)
    assert threshold.exact_above == -2 + 0.125
    assert TopPK().temperature == Tokens().temperature == 1.0
    assert Draws(temperature=2.0).temperature == 2.0


@dataclass(frozen=True, kw_only=True)
class EveryNth(Keep):
    """A method that somebody else might add."""

    method: ClassVar[str] = "every-nth"
    has_tail: ClassVar[bool] = True

    nth: int = option("Keep every nth entry.", default=2)

    def __post_init__(self) -> None:
        check(self.nth >= 1, "nth", self.nth, "at least 1")

    def max_entries(self, vocab_size: int) -> int:
        return vocab_size // self.nth


def test_a_method_that_is_defined_elsewhere_is_part_of_a_spec_like_any_other():
    spec = make_spec(keep=EveryNth(nth=5))
    content = spec.to_json()
    assert content["keep"] == {"method": "every-nth", "nth": 5}
    assert DatasetSpec.from_json(json.loads(json.dumps(content)), "spec") == spec
    assert "tail_logmass" in spec.columns
    for options, message in (
        ({"nth": 0}, "spec: nth 0: expected at least 1"),
        ({"nth": "5"}, "spec: key 'keep.nth': expected int, found '5'"),
        ({"mth": 5}, "spec: unknown key 'keep.mth'"),
    ):
        content["keep"] = {"method": "every-nth", **options}
        with pytest.raises(ShardFormatError) as caught:
            DatasetSpec.from_json(content, "spec")
        assert str(caught.value) == message


def test_a_method_that_is_not_defined_here_is_refused_by_name():
    with pytest.raises(ValueError, match=r"unknown method 'nucleus', this release knows top-p-k, "):
        keep_from_json({"method": "nucleus"})
