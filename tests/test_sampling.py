"""Draws and threshold sampling: expectations read back from disk, and bounds of every position.

A mean over N independent positions is compared with its exact value within Bernstein's bound: a
correct sampler exceeds it with a probability below ERROR_RATE, over everything that is compared in
a test together. So a failure means a wrong sampler, and a rerun of the same test gives the same.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shards.keep import Draws, Threshold
from shards.reader import ShardReader
from shards.rows import Row
from teacher_dump.keep import sampling
from teacher_dump.keep.packed import Selected, unpack
from teacher_dump.keep.packed_size import Selection
from teacher_dump.keep.random_keys import position_keys, sequence_key, uniforms
from teacher_dump.keep.rows import TokenSequence, make_row
from teacher_dump.keep.selection import select_in_blocks, selector_of
from tests.strategies import make_spec, write_shard

ERROR_RATE = 1e-9
STEP = 1 / 16
VOCAB = 301
NUM_POSITIONS = 20_000

# Flat, peaked, with ties, one-hot but for 1e-9, and a long tail beside two leading entries.
RANDOM = torch.Generator().manual_seed(0)
LOGITS = {
    "uniform": torch.zeros(VOCAB),
    "normal": 2.5 * torch.randn(VOCAB, generator=RANDOM),
    "ties": torch.randint(0, 3, (VOCAB,), generator=RANDOM).float(),
    "one-hot": torch.where(torch.arange(VOCAB) == 17, 20.0, 0.0),
    "tail": torch.where(torch.arange(VOCAB) < 2, 6.0, torch.randn(VOCAB, generator=RANDOM)),
}


def draws(num: int = 50, *, temperature: float = 1.0, vocab_size: int = VOCAB) -> Selection:
    keep = Draws(draws=num, temperature=temperature, logprob_step=STEP)
    return Selection(keep, vocab_size)


def threshold(steps: int = 48, *, temperature: float = 1.0, vocab_size: int = VOCAB) -> Selection:
    t = math.exp(-steps * STEP)
    return Selection(Threshold(threshold=t, temperature=temperature, logprob_step=STEP), vocab_size)


def keys_of(number: int, count: int, *, seed: int = 0, split: str = "train") -> torch.Tensor:
    return torch.from_numpy(position_keys(sequence_key(seed, split, number), 0, count))


def select(
    keep: Selection, logits: torch.Tensor, keys: torch.Tensor, block: int = 1000
) -> Selected:
    """As an engine does it, block by block; labels are 0."""
    labels = torch.zeros(len(logits), dtype=torch.int64)
    packed = select_in_blocks(selector_of(keep), logits, labels, keys, block)
    return unpack(packed.numpy(), keep)


def positions(counts: np.ndarray, *columns: np.ndarray) -> Iterator[tuple[np.ndarray, ...]]:
    borders = np.concatenate([[0], np.cumsum(counts)])
    for start, stop in itertools.pairwise(borders):
        yield tuple(column[start:stop] for column in columns)


def probabilities(logits: torch.Tensor, temperature: float = 1.0) -> np.ndarray:
    return torch.softmax(logits.double() / temperature, -1).numpy()


def stored(keep: Selection, logits: torch.Tensor, folder: Path) -> Row:
    """What a shard gives back of one sequence of NUM_POSITIONS positions with the same logits."""
    selected = select(keep, logits.expand(NUM_POSITIONS, -1), keys_of(5, NUM_POSITIONS))
    tokens = np.zeros(NUM_POSITIONS + 1, np.int32)
    sequence = TokenSequence(split="train", number=0, tokens=tokens, segments=tokens)
    spec = make_spec(vocab_size=VOCAB, keep=keep.keep)
    path = write_shard(folder / "train", [make_row(sequence, selected, STEP)], spec)
    with ShardReader(path) as reader:
        return reader.row(0)


def bernstein(p: np.ndarray, num_trials: int) -> np.ndarray:
    """How far from p [N] chance does not take the rates of so many independent trials."""
    log = math.log(2 * len(p) / ERROR_RATE)
    return np.sqrt(2 * p * (1 - p) * log / num_trials) + 2 * log / (3 * num_trials)


def mean_weights(row: Row) -> np.ndarray:
    weights = np.exp(row.logprobs.astype(np.float64))
    return np.bincount(row.ids, weights, minlength=VOCAB) / NUM_POSITIONS


@pytest.mark.parametrize(
    ("name", "temperature"), [*((name, 1.0) for name in LOGITS), ("normal", 2.0), ("tail", 2.0)]
)
def test_threshold_weights_read_from_disk_have_the_probabilities_as_means(
    name: str, temperature: float, tmp_path: Path
) -> None:
    keep = threshold(temperature=temperature)
    row = stored(keep, LOGITS[name], tmp_path)
    p, t = probabilities(LOGITS[name], temperature), keep.keep.threshold
    assert row.tail_logmass is None
    included = np.bincount(row.ids, minlength=VOCAB) / NUM_POSITIONS
    inclusion = np.minimum(1, p / t)
    sampled = p < t
    bound = bernstein(inclusion, NUM_POSITIONS)
    assert (np.abs(included - inclusion)[sampled] <= bound[sampled]).all()
    # the smaller ones have the weight t itself, so their means follow
    weights = np.exp(row.logprobs.astype(np.float64))
    assert np.allclose(weights[sampled[row.ids]], t, rtol=1e-6)
    # the others are there always, and right to half a step
    assert (included[~sampled] == 1).all()
    exact = ~sampled[row.ids]
    assert np.abs(row.logprobs[exact] - np.log(p[row.ids[exact]])).max(initial=0) < STEP / 2 + 1e-5
    # a position's number of entries is one of two neighbours, and right on average
    expected = inclusion.sum()
    assert row.counts.min() >= math.floor(expected - 1e-5)
    assert row.counts.max() <= math.ceil(expected + 1e-5) <= 1 / t + 1
    share = np.array([expected - math.floor(expected)])
    assert abs(row.counts.mean() - expected) <= bernstein(share, NUM_POSITIONS) + 1e-5


def largest_excess(p: np.ndarray, means: np.ndarray) -> float:
    """By how much mean weights of 50 draws exceed the bound: of each entry, and of all rarer ones.

    A small bias of every rare entry hides in each of them and shows in their sum.
    """
    rising = np.argsort(p)
    exact = np.minimum(np.append(p, p[rising].cumsum()), 1)
    found = np.append(means, means[rising].cumsum())
    return float((np.abs(found - exact) - bernstein(exact, 50 * NUM_POSITIONS) - 1e-7).max())


@pytest.mark.parametrize(
    ("name", "temperature"), [*((name, 1.0) for name in LOGITS), ("normal", 0.5), ("tail", 0.5)]
)
def test_draws_read_from_disk_have_the_probabilities_as_means(
    name: str, temperature: float, tmp_path: Path
) -> None:
    row = stored(draws(temperature=temperature), LOGITS[name], tmp_path)
    p = probabilities(LOGITS[name], temperature)
    assert largest_excess(p, mean_weights(row)) <= 0
    # independent draws: each misses an entry with 1 - p, which a stratified sample does not
    inclusion = 1 - (1 - p) ** 50
    included = np.bincount(row.ids, minlength=VOCAB) / NUM_POSITIONS
    assert (np.abs(included - inclusion) <= bernstein(inclusion, NUM_POSITIONS) + 1e-6).all()
    for (logprobs,) in itertools.islice(positions(row.counts, row.logprobs), 1000):
        assert np.exp(logprobs.astype(np.float64)).sum() == pytest.approx(1, abs=1e-5)
    assert row.counts.max() <= 50


def test_the_bound_is_tight_enough_to_notice_what_rounding_the_weights_would_do(
    tmp_path: Path,
) -> None:
    row = stored(draws(), LOGITS["normal"], tmp_path)
    p = probabilities(LOGITS["normal"])
    weights = np.exp(np.rint(row.logprobs.astype(np.float64) / STEP) * STEP)
    means = np.bincount(row.ids, weights, minlength=VOCAB) / NUM_POSITIONS
    assert largest_excess(p, means) > 0


@st.composite
def blocks(draw: st.DrawFn) -> torch.Tensor:
    """Logits [T, V] of all the shapes that break samplers, with padded columns that would win."""
    vocab = draw(st.sampled_from([1, 2, 63, 64, 65, 300, 4099]))
    random = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    kinds = {
        "uniform": lambda: torch.zeros(vocab),
        "normal": lambda: torch.randn(vocab, generator=random) * 3,
        "ties": lambda: torch.randint(0, 2, (vocab,), generator=random).float() * 3,
        "one-hot": lambda: torch.where(torch.arange(vocab) == vocab // 2, 80.0, 0.0),
        "tiny tail": lambda: torch.where(torch.arange(vocab) == vocab - 1, 17.0, 0.0),
        "wide": lambda: torch.randn(vocab, generator=random) * 40,
    }
    rows = [kinds[kind]() for kind in draw(st.lists(st.sampled_from(list(kinds)), min_size=1))]
    return torch.stack(rows)


@settings(max_examples=150, deadline=None)
@given(
    logits=blocks(),
    padding=st.integers(0, 70),
    steps=st.integers(0, 110),
    temperature=st.sampled_from([0.3, 1.0, 3.0, 100.0]),
    number=st.integers(0, 2**40),
)
def test_threshold_keeps_what_is_large_and_stays_within_its_bound(
    logits: torch.Tensor, padding: int, steps: int, temperature: float, number: int
) -> None:
    num_rows, vocab = logits.shape
    keep = threshold(steps, temperature=temperature, vocab_size=vocab)
    padded = torch.cat([logits, torch.full((num_rows, padding), 90.0)], 1)
    selected = select(keep, padded, keys_of(number, num_rows))
    p, t = probabilities(logits, temperature), keep.keep.threshold
    for r, (ids, logprobs) in enumerate(
        positions(selected.counts, selected.ids, selected.logprobs)
    ):
        assert 1 <= len(ids) <= 1 / t * (1 + 1e-5) + 1
        assert ids.max() < vocab
        assert len(np.unique(ids)) == len(ids)
        assert (p[r, ids] > 0).all()
        assert set(np.flatnonzero(p[r] >= t * (1 + 1e-5))) <= set(ids)
        large = p[r, ids] >= t
        assert np.abs(logprobs - np.log(np.maximum(p[r, ids], t))).max() <= STEP / 2 + 1e-4
        assert (logprobs[~large] <= keep.keep.log_threshold + 1e-6).all()
        order = list(zip(-logprobs, ids, strict=True))
        assert order == sorted(order)
    exact = torch.log_softmax(logits.double(), -1)
    assert selected.label_logprobs == pytest.approx(exact[:, 0].numpy(), abs=1e-3, rel=1e-5)
    entropy = -(exact.exp() * exact).sum(-1)
    assert selected.entropy == pytest.approx(entropy.numpy(), abs=1e-3, rel=1e-4)


@settings(max_examples=100, deadline=None)
@given(
    logits=blocks(),
    padding=st.integers(0, 70),
    num=st.integers(1, 130),
    temperature=st.sampled_from([0.3, 1.0, 3.0, 100.0]),
    number=st.integers(0, 2**40),
)
def test_draws_are_as_many_as_asked_for_and_of_what_has_probability(
    logits: torch.Tensor, padding: int, num: int, temperature: float, number: int
) -> None:
    num_rows, vocab = logits.shape
    keep = draws(num, temperature=temperature, vocab_size=vocab)
    padded = torch.cat([logits, torch.full((num_rows, padding), 90.0)], 1)
    selected = select(keep, padded, keys_of(number, num_rows))
    p = probabilities(logits, temperature)
    for r, (ids, logprobs) in enumerate(
        positions(selected.counts, selected.ids, selected.logprobs)
    ):
        assert ids.max() < vocab
        assert len(np.unique(ids)) == len(ids) <= min(num, vocab)
        assert (p[r, ids] > 0).all()
        times = np.exp(logprobs.astype(np.float64)) * num
        assert np.abs(times - np.rint(times)).max() < 1e-3
        assert np.rint(times).sum() == num
        order = list(zip(-logprobs, ids, strict=True))
        assert order == sorted(order)


def test_the_last_of_all_draws_hits_what_has_probability(monkeypatch: pytest.MonkeyPatch) -> None:
    """Masses in float32 do not sum up to a round number; the last point lies just below the sum."""
    vocab = 49_152
    logits = torch.randn(200, vocab, generator=torch.Generator().manual_seed(0))
    logits[:, vocab - 200 :] = -1e4
    last = torch.full((200, 3), 1 - 2.0**-52, dtype=torch.float64)
    monkeypatch.setattr(sampling, "uniforms", lambda keys, num: last)
    selected = select(draws(3, vocab_size=vocab), logits, keys_of(1, 200))
    assert selected.ids.tolist() == [vocab - 201] * 200


@pytest.mark.parametrize("keep", [draws(), threshold()])
def test_blocks_do_not_change_what_is_kept_and_keys_do(keep: Selection) -> None:
    logits = LOGITS["normal"].expand(200, -1)
    whole = select(keep, logits, keys_of(1, 200), block=200)
    parts = select(keep, logits, keys_of(1, 200), block=7)
    assert np.array_equal(whole.ids, parts.ids)
    assert np.array_equal(whole.logprobs, parts.logprobs)
    late = select(keep, logits[:50], keys_of(1, 200)[150:])
    assert np.array_equal(late.ids, whole.ids[-len(late.ids) :])
    for other in (keys_of(2, 200), keys_of(1, 200, seed=1), keys_of(1, 200, split="validation")):
        assert not np.array_equal(select(keep, logits, other).ids, whole.ids)


def test_random_numbers_are_uniform_and_independent_of_their_neighbours() -> None:
    keys = torch.cat([keys_of(number, 250) for number in range(400)])
    assert len(torch.unique(keys)) == len(keys)
    numbers = uniforms(keys, 5).numpy()
    assert 0 <= numbers.min() < 1e-4
    assert 1 - 1e-4 < numbers.max() < 1
    cells, bins = numbers.size, 256
    squares = (np.bincount((numbers * bins).astype(int).ravel()) - cells / bins) ** 2
    chi_square = squares.sum() / (cells / bins)
    assert abs(chi_square - (bins - 1)) < 6.5 * math.sqrt(2 * (bins - 1))  # 1e-10 of a normal
    centred = (numbers - 0.5) * math.sqrt(12)
    for here, there in (
        (centred[1:, 0], centred[:-1, 0]),  # the next position
        (centred[250:, 0], centred[:-250, 0]),  # the next sequence
        (centred[:, 0], centred[:, 1]),  # the next draw
    ):
        assert abs((here * there).sum()) < 6.5 * math.sqrt(len(here))


def split_mix(seed: int, number: int) -> int:
    """Output `number` of SplitMix64 from a state, as the paper writes it."""
    z = (seed + (number + 1) * 0x9E3779B97F4A7C15) % 2**64
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
    return z ^ (z >> 31)


def test_the_numbers_of_a_position_are_what_the_definition_says() -> None:
    text = hashlib.sha256(b"7 train 12345").digest()[:8]
    key = int.from_bytes(text, "little")
    numbers = uniforms(keys_of(12345, 3, seed=7), 4).tolist()
    for position, drawn in enumerate(numbers):
        for number, value in enumerate(drawn):
            bits = split_mix(split_mix(key, position), number)
            assert value == (bits >> 12) / 2**52
    # of a piece in the middle too
    (found,) = position_keys(sequence_key(7, "train", 12345), 2, 1).tolist()
    assert found % 2**64 == split_mix(key, 2)


@pytest.mark.parametrize("keep", [draws(), threshold()])
def test_a_method_survives_the_way_to_another_process(keep: Selection) -> None:
    assert Selection.from_json(json.loads(json.dumps(keep.to_json()))) == keep


def test_sampled_weights_are_told_from_exact_ones_at_every_step() -> None:
    for step in np.arange(1, 1001) / 1000:
        steps = round(-math.log(0.05) / step)
        keep = Threshold(threshold=0.05, logprob_step=float(step))
        above = keep.exact_above
        assert keep.threshold_steps == steps
        assert above is not None
        # As `sampling` makes them: the weight t, and the least exact entry that is stored above it.
        sampled, exact = torch.tensor([steps, steps - 1]).to(torch.float32) * -keep.logprob_step
        assert sampled <= above < exact
