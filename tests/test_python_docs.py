"""docs/python.md: its blocks run one after another, on datasets of every kind that it names."""

import re
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest

import logitshards
from logitshards import Row
from tests.tiny_dataset import VOCAB_SIZE, make_dataset

PAGE = (Path(__file__).parent.parent / "docs" / "python.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("sampled", [False, True])
def test_every_block_runs(tmp_path, monkeypatch, capsys, sampled, masked):
    make_dataset(tmp_path / "dataset", sampled=sampled, masked=masked)
    monkeypatch.chdir(tmp_path)
    names = {}
    for block in BLOCKS:
        exec(compile(block, "docs/python.md", "exec"), names)
    printed = capsys.readouterr().out
    keep = names["dataset"].spec.keep
    assert "<Dataset 'dataset': " in printed
    assert str(keep) in printed
    assert "22 sequences; the first has 16 labelled positions" in printed
    assert f"({VOCAB_SIZE},)" in printed
    row = names["train"][0]
    for token, logprob in zip(row.ids[3], row.logprobs[3], strict=True):
        assert f"\n  {token}: {logprob:.4f}\n" in printed
    assert np.isfinite(names["loss"].total.item())
    assert names["hidden"].grad.abs().sum() > 0


def test_the_table_names_every_array_of_a_row():
    cells = re.findall(r"^\| (`.*?) \|", PAGE, re.MULTILINE)
    named = {name for cell in cells for name in re.findall(r"`(\w+)", cell)}
    public = {name for name in vars(Row) if not name.startswith("_")} | {"stored", "spec"}
    assert named == public - {"dense", "stored", "spec"}


def test_the_page_names_every_public_function_and_class_that_a_reader_meets():
    for name in logitshards.__all__:
        if name[0].islower() or name in ("Objective", "ShardError"):
            assert f"logitshards.{name}" in PAGE or f"`{name}`" in PAGE


def test_the_table_of_a_batch_names_its_attributes():
    table = PAGE.split("| attribute of a batch |")[1].split("\n\n")[0]
    cells = re.findall(r"^\| (.*?) \|", table, re.MULTILINE)
    named = {name for cell in cells for name in re.findall(r"\w+", cell)} - {"---"}
    assert named == {field.name for field in fields(logitshards.Batch)} - {"num_sequences", "lines"}
