"""The front door: `import logitshards` is light, and a row says what its shard holds."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import logitshards
from logitshards.row import Ragged
from shards.keep import Draws, TopPK
from shards.reader import ShardReader
from student_train.objective.kept_entries import KeptEntries
from tests.kept_entries import all_padded
from tests.strategies import assert_rows_equal, example_row, make_spec, write_dataset
from tests.tiny_dataset import VOCAB_SIZE, make_dataset, teacher_logprobs

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("python") / "dataset"
    write_dataset(path, make_spec(sequences_per_shard=8), train=20, validation=3)
    return path


@pytest.fixture
def train(folder):
    with logitshards.open(folder) as dataset:
        yield dataset["train"]


@pytest.fixture
def reads(monkeypatch):
    """The row groups that are decoded, in order."""
    made = []
    read = ShardReader.read_row_group

    def counted(self, i, *args, **kwargs):
        made.append((self.path.name, i))
        return read(self, i, *args, **kwargs)

    monkeypatch.setattr(ShardReader, "read_row_group", counted)
    return made


def python(code):
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return result.stdout.split()


# The package


def test_importing_loads_nothing_heavy():
    found = python(
        "import sys, logitshards; dir(logitshards); logitshards.__version__;"
        "print(*{name.split('.')[0] for name in sys.modules})"
    )
    assert "logitshards" in found
    assert not {"torch", "pyarrow", "numpy", "transformers", "click", "shards"} & set(found)


def test_reading_loads_no_torch(folder):
    found = python(
        f"import sys, logitshards; logitshards.open({str(folder)!r})['train'][0].dense(0);"
        "print(*{name.split('.')[0] for name in sys.modules})"
    )
    assert "pyarrow" in found
    assert not {"torch", "transformers", "tokenizers"} & set(found)


def test_every_public_name_is_there_and_listed():
    assert set(logitshards.__all__) <= set(dir(logitshards))
    for name in logitshards.__all__:
        assert getattr(logitshards, name) is not None
    assert sorted(logitshards.__all__) == sorted([*logitshards._MODULES, "__version__"])
    with pytest.raises(AttributeError, match="'logitshards' has no attribute 'opne'"):
        logitshards.opne  # noqa: B018


def test_the_version_of_a_folder_that_is_not_installed(monkeypatch):
    from importlib import metadata

    def missing(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", missing)
    assert logitshards.__version__ == "0+unknown"


@pytest.mark.slow
def test_the_types_of_the_public_names_hold_for_a_user():
    # With the cache of the whole project: torch alone takes a minute.
    result = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", "tests/typed_user.py"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    (wrong,) = [line for line in result.stdout.splitlines() if "error:" in line]
    assert wrong.endswith('error: Module has no attribute "opne"  [attr-defined]')


# Datasets and splits


def test_a_dataset_is_a_mapping_of_its_splits(folder):
    with logitshards.open(str(folder)) as dataset:
        assert dataset.path == folder
        assert dataset.spec == make_spec(sequences_per_shard=8)
        assert dataset.splits == ("train", "validation")
        assert list(dataset) == ["train", "validation"]
        assert len(dataset) == 2
        assert dataset.sizes["train"].sequences == 20
        assert dataset.sizes["train"].positions == dataset["train"].num_positions == 320
        assert "test" not in dataset
        assert dataset.get("test") is None
        assert dataset["train"] is dataset["train"]
        with pytest.raises(KeyError, match=r"no split 'test' in .*; there is train, validation"):
            dataset["test"]
        for text in ("top-p-k", "151,936 ids", "train 20, validation 3", str(folder)):
            assert text in repr(dataset)
        assert "'train': 20 sequences, 320 labelled positions" in repr(dataset["train"])


def test_a_folder_that_is_no_dataset_is_a_shard_error(tmp_path):
    with pytest.raises(logitshards.ShardError, match="not a dataset"):
        logitshards.open(tmp_path)


@given(i=st.integers(-25, 25))
def test_an_index_is_that_of_a_list(folder, i):
    numbers = list(range(20))
    with logitshards.open(folder) as dataset:
        train = dataset["train"]
        if -20 <= i < 20:
            assert_rows_equal(train[i].stored, example_row(numbers[i]))
            assert train[np.int64(i)].sequence == numbers[i]
        else:
            with pytest.raises(IndexError, match=f"row {i} of 20 in split train"):
                train[i]


bounds = st.none() | st.integers(-25, 25)
slices = st.builds(slice, bounds, bounds, bounds.filter(lambda step: step != 0))


@given(first=slices, second=slices, i=st.integers(-25, 25))
def test_a_slice_is_that_of_a_list(folder, first, second, i):
    expected = list(range(20))[first]
    with logitshards.open(folder) as dataset:
        view = dataset["train"][first]
        assert len(view) == len(expected)
        assert [row.sequence for row in view] == expected
        assert [row.sequence for row in view[second]] == expected[second]
        if -len(expected) <= i < len(expected):
            assert view[i].sequence == expected[i]
        else:
            with pytest.raises(IndexError):
                view[i]


def test_other_indices_are_type_errors(train):
    for index in ("0", 0.5, None):
        with pytest.raises(TypeError):
            train[index]
        with pytest.raises(TypeError):
            train[:3][index]
        with pytest.raises(TypeError):
            train[0].ids[index]


def test_a_slice_reads_nothing(train, reads):
    view = train[2:19][::2]
    assert len(view) == 9
    assert "9 sequences" in repr(view)
    assert reads == []


def test_each_row_group_is_decoded_once_for_neighbours(train, reads):
    assert [row.sequence for row in train] == list(range(20))
    assert len(reads) == len(set(reads)) == 8  # 3 + 3 + 2 sequences in each of two shards, 3 + 1
    reads.clear()
    for i in (0, 1, 2, 1, 0, -20):
        assert train[i].sequence == i % 20
    assert reads == [("shard-000000.parquet", 0)]
    train[3]
    train[0]
    assert len(reads) == 3


def test_after_closing_rows_stay_and_the_next_read_opens_again(folder):
    with logitshards.open(folder) as dataset:
        row = dataset["train"][5]
    assert_rows_equal(row.stored, example_row(5))
    with dataset["train"] as train:
        assert train[6].sequence == 6


# Rows


@pytest.mark.parametrize("has_mask", [False, True])
def test_a_row_gives_each_position_its_own_entries(tmp_path, has_mask):
    write_dataset(tmp_path / "dataset", make_spec(has_mask=has_mask), train=3)
    row = logitshards.open(tmp_path / "dataset")["train"][2]
    flat = example_row(2, has_mask=has_mask)
    assert (row.sequence, len(row)) == (2, 16)
    for name in ("tokens", "segments", "label_logprobs", "tail_logmass", "entropies", "loss_mask"):
        np.testing.assert_array_equal(getattr(row, name), getattr(flat, name))
    ends = np.cumsum(flat.counts)
    assert len(row.ids) == len(row.logprobs) == 16
    for t, (ids, logprobs) in enumerate(zip(row.ids, row.logprobs, strict=True)):
        part = slice(ends[t] - flat.counts[t], ends[t])
        np.testing.assert_array_equal(ids, flat.ids[part])
        np.testing.assert_array_equal(logprobs, flat.logprobs[part])
        assert row.ids[t - 16].tobytes() == row.ids[t].tobytes() == ids.tobytes()
        assert np.shares_memory(ids, row.stored.ids) or not len(ids)
    assert f"<Row 2: 16 labelled positions, {len(flat.ids)} entries>" == repr(row)
    for t in (16, -17):
        with pytest.raises(IndexError, match=f"position {t} of 16"):
            row.ids[t]
        with pytest.raises(IndexError, match=f"position {t} of 16"):
            row.dense(t)


@given(lengths=st.lists(st.integers(0, 4), max_size=6), part=slices, again=slices)
def test_ragged_slices_are_those_of_a_list(lengths, part, again):
    stops = np.cumsum(lengths, dtype=np.int64)
    values = np.arange(sum(lengths), dtype=np.int32)
    ragged = Ragged(values, stops - lengths, stops)
    expected = [
        list(range(stop - n, stop)) for n, stop in zip(lengths, stops.tolist(), strict=True)
    ]
    assert ragged.flat.tolist() == values.tolist()
    for slice_ in (part, again):
        ragged, expected = ragged[slice_], expected[slice_]
        assert [array.tolist() for array in ragged] == expected
        assert ragged.counts.tolist() == [len(values) for values in expected]
        assert ragged.flat.tolist() == [value for values in expected for value in values]
        assert ragged.flat.dtype == np.int32
        assert repr(ragged).startswith(f"<Ragged int32: {len(expected)} positions")


def test_arrays_cannot_be_written_to(tmp_path):
    # A row is a view of the row group that the next row is read from.
    row = logitshards.open(make_dataset(tmp_path / "dataset", masked=True))["train"][0]
    arrays = [row.tokens, row.segments, row.loss_mask, row.ids[0], row.logprobs[0], row.ids.flat]
    arrays += [row.label_logprobs, row.tail_logmass, row.entropies]
    for array in arrays:
        with pytest.raises(ValueError, match="read-only"):
            array[:] = 0


def test_dense_rows_of_a_truncating_method_are_the_teacher_up_to_rounding(tmp_path):
    train = logitshards.open(make_dataset(tmp_path / "dataset"))["train"]
    table = np.exp(teacher_logprobs())
    for row in train[:4]:
        for t, token in enumerate(row.tokens[:-1]):
            dense = row.dense(t)
            ids = row.ids[t]
            assert dense.dtype == np.float64
            assert dense.shape == (VOCAB_SIZE,)
            assert abs(np.log(dense.sum())) <= 1 / 32 + 1e-6
            assert np.abs(np.log(dense[ids] / table[token, ids])).max() <= 1 / 32 + 1e-6
            others = np.delete(dense, ids)
            expected = np.exp(np.float64(row.tail_logmass[t])) / (VOCAB_SIZE - len(ids))
            np.testing.assert_array_equal(others, expected)


def test_dense_rows_when_everything_is_kept():
    spec = make_spec(vocab_size=9)
    row = logitshards.Row(example_row(0, vocab_size=9), spec)
    t = int(np.argmax(row.ids.counts))
    assert row.ids.counts[t] == 9
    np.testing.assert_array_equal(row.dense(t)[row.ids[t]], np.exp(np.float64(row.logprobs[t])))


def test_dense_rows_of_a_sampling_method_are_its_weights():
    spec = make_spec(vocab_size=50, keep=Draws())
    row = logitshards.Row(example_row(1, vocab_size=50, has_tail=False), spec)
    for t in range(-len(row), len(row)):
        dense = row.dense(t)
        np.testing.assert_array_equal(dense[row.ids[t]], np.exp(np.float64(row.logprobs[t])))
        assert np.delete(dense, row.ids[t]).sum() == 0
    assert row.tail_logmass is None


def test_dense_rows_are_0_where_the_mask_leaves_a_position_out():
    spec = make_spec(vocab_size=50, has_mask=True, keep=TopPK())
    row = logitshards.Row(example_row(1, vocab_size=50, has_mask=True), spec)
    for t, counted in enumerate(row.loss_mask):
        assert (row.dense(t).sum() > 0) == counted


def test_a_padded_vocabulary_adds_zeros_and_a_smaller_one_is_an_error():
    row = logitshards.Row(example_row(1, vocab_size=50), make_spec(vocab_size=50))
    wide = row.dense(3, vocab_size=64)
    assert wide.shape == (64,)
    np.testing.assert_array_equal(wide[:50], row.dense(3))
    assert not wide[50:].any()
    with pytest.raises(ValueError, match="vocab_size 49: the dataset's tokenizer has 50 ids"):
        row.dense(3, 49)


def test_a_dataset_of_tokens_alone_says_what_it_does_not_have(tmp_path):
    row = logitshards.open(make_dataset(tmp_path / "dataset", tokens_only=True))["train"][0]
    assert len(row) == len(row.tokens) - 1
    assert "entries" not in repr(row)
    for name in ("ids", "logprobs", "label_logprobs", "tail_logmass", "entropies"):
        with pytest.raises(logitshards.ShardError, match=f"no {name}: .* tokens alone"):
            getattr(row, name)
    with pytest.raises(logitshards.ShardError, match="tokens alone"):
        row.dense(0)
    with pytest.raises(logitshards.ShardError, match="tokens alone"):
        logitshards.labels_and_targets(row)


# Losses


@pytest.mark.parametrize("sampled", [False, True])
def test_labels_and_targets_are_those_of_the_rows(tmp_path, sampled):
    train = logitshards.open(make_dataset(tmp_path / "dataset", masked=True, sampled=sampled))[
        "train"
    ]
    rows = train[4:7]
    labels, targets = logitshards.labels_and_targets(rows)
    expected = np.concatenate([np.where(row.loss_mask, row.tokens[1:], -100) for row in rows])
    assert labels.dtype == torch.int64
    np.testing.assert_array_equal(labels.numpy(), expected)
    assert isinstance(targets.entries, KeptEntries)
    ids, logprobs = all_padded(targets.entries)
    positions = [position for row in rows for position in zip(row.ids, row.logprobs, strict=True)]
    assert len(ids) == len(positions) == len(labels)
    for t, (row_ids, row_logprobs) in enumerate(positions):
        kept = logprobs[t] > -torch.inf
        np.testing.assert_array_equal(ids[t][kept].numpy(), row_ids)
        np.testing.assert_array_equal(logprobs[t][kept].numpy(), row_logprobs)
    assert (targets.tail_logmass is None) == sampled
    assert targets.entropies.shape == labels.shape
    with pytest.raises(ValueError, match="no rows"):
        logitshards.labels_and_targets([])


def test_the_loss_against_the_dense_target(tmp_path):
    row = logitshards.open(make_dataset(tmp_path / "dataset"))["train"][0]
    labels, targets = logitshards.labels_and_targets(row)
    torch.manual_seed(0)
    hidden = torch.randn(len(row), 8, dtype=torch.float64)
    weight = torch.randn(VOCAB_SIZE, 8, dtype=torch.float64)
    objective = logitshards.Objective(kind="nll", alpha=1.0, temperature=1.0)
    loss = logitshards.distillation_loss(hidden, weight, labels, targets, objective)
    logs = torch.log_softmax(hidden @ weight.T, 1).numpy()
    expected = 0.0
    for t in range(len(row)):
        probabilities = np.exp(np.float64(row.logprobs[t]))
        expected -= probabilities @ logs[t][row.ids[t]] / probabilities.sum()
    assert loss.kd.item() == pytest.approx(expected, rel=1e-6)
