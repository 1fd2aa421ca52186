"""A function is compiled once it has had enough to do, and goes on as it was where that fails."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch

from teacher_dump.keep.compiling import CompiledLater, Function, uncompiled


def double(values: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return values * 2, values.sum(-1)


class Compiler:
    """In place of torch.compile: what it gives back counts its calls, and fails if told so."""

    def __init__(self, error: Exception | None = None) -> None:
        self.calls = 0
        self._error = error

    def __call__(self, function: Function, **options: Any) -> Callable[..., Any]:
        def compiled(values: torch.Tensor) -> tuple[torch.Tensor, ...]:
            self.calls += 1
            if self._error is not None:
                raise self._error
            return function(values)

        return compiled


def test_it_is_compiled_after_so_many_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = Compiler()
    monkeypatch.setattr(torch, "compile", compiler)
    later = CompiledLater(double, double, after_bytes=100)
    values = torch.arange(16.0).view(4, 4)  # 64 bytes
    for expected in (0, 0, 1, 2):
        doubled, sums = later(values)
        assert compiler.calls == expected
        assert torch.equal(doubled, values * 2)
        assert torch.equal(sums, values.sum(-1))


def test_nothing_is_compiled_in_a_block_that_wants_the_same_bits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    compiler = Compiler()
    monkeypatch.setattr(torch, "compile", compiler)
    later = CompiledLater(double, double, after_bytes=0)
    for expected in (0, 1):
        with uncompiled():
            assert torch.equal(later(torch.ones(3, 2))[0], torch.full((3, 2), 2.0))
        assert compiler.calls == expected
        later(torch.ones(3, 2))


def test_what_cannot_be_compiled_goes_on_and_says_so_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    compiler = Compiler(RuntimeError("no C++ compiler\nand a long trace"))
    monkeypatch.setattr(torch, "compile", compiler)
    later = CompiledLater(double, double, after_bytes=0)
    values = torch.ones(3, 2)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            assert torch.equal(later(values)[0], values * 2)
    assert compiler.calls == 1
    assert [record.getMessage() for record in caplog.records] == [
        "the pass over the logits stays uncompiled and slower: no C++ compiler"
    ]


def test_a_device_without_memory_is_not_taken_for_one_without_a_compiler(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch, "compile", Compiler(torch.OutOfMemoryError("full")))
    with pytest.raises(torch.OutOfMemoryError):
        CompiledLater(double, double, after_bytes=0)(torch.ones(3, 2))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch.compile warns within
def test_rows_may_be_as_many_as_they_like_after_it_is_compiled() -> None:
    later = CompiledLater(double, _refuse, after_bytes=0)
    for num_rows in (5, 3, 1, 17):
        values = torch.randn(num_rows, 6)
        doubled, sums = later(values)
        assert torch.equal(doubled, values * 2)
        torch.testing.assert_close(sums, values.sum(-1))


def _refuse(values: torch.Tensor) -> tuple[torch.Tensor, ...]:
    raise AssertionError("it was not compiled")
