"""How good a student is on held-out sequences, and how close to its teacher.

Letters: K kept entries, V vocabulary, D hidden, R rows of a block. q is the student's full
softmax at temperature 1, p the kept probabilities, or weights, as they were stored.
`docs/evaluation.md` defines the figures:

- cross_entropy: mean of -log q(label), nats; perplexity: its exponential
- bits_per_byte: the sum of -log2 q(label), divided by the bytes of text of the labels; where the
  tokenizer tells them
- calibration_error: the probability of the most likely token against how often it is the label, in
  15 bins of probability (the expected calibration error of Guo et al. 2017, arXiv 1706.04599)
- teacher_cross_entropy: the cross-entropy of the teacher, from the exact sums in the sidecars
- kl_kept: KL(w || q), w = p renormalised over the kept entries; for truncating keep methods
- kl_bound: KL between both distributions with all that was not kept merged into one entry. By the
  log-sum inequality merging entries never raises a KL, so this is a lower bound of the full one;
  for truncating keep methods
- kl_unbiased: mean of sum_k p_k * -log q_k, minus the teacher's entropy from the exact sums in the
  sidecars: an unbiased estimate of the KL of the full distributions; for sampling keep methods at
  temperature 1
- top1_agreement: how often the student's most likely token is the teacher's, where that is known;
  not for draws, where all entries are random. If several entries have the largest stored value, any
  of them may have been the teacher's, and each counts

Sums are float64 over float32 logits, in blocks as in `loss.py`; each labelled position counts once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

import torch
from torch import Tensor
from transformers import PreTrainedModel

from shards.dataset import Split
from shards.errors import InputError, RunError
from shards.row_group import Totals
from shards.spec import DatasetSpec
from student_train.data.batches import (
    TAIL_COLUMNS,
    Batch,
    empty_batch,
    for_device,
    sequential_batches,
)
from student_train.data.lines import packed_length
from student_train.data.read_ahead import ReadAhead
from student_train.evaluation.sums import (
    NUM_BINS,
    NUM_SUMS,
    calibration_bins,
    position_sums,
    predict,
)
from student_train.model.model import head_weight, hidden_states
from student_train.objective.kept_entries import KeptEntries
from student_train.objective.loss import IGNORE_INDEX, split_evenly
from student_train.objective.products import tensor_float32
from student_train.processes.sharding import Sharded, in_forward, reshard
from student_train.processes.world import World

# Size of a block's float32 logits; a few copies of it exist. The best size for a GPU is not
# measured.
_CPU_BLOCK_BYTES = 32 << 20
_GPU_BLOCK_BYTES = 256 << 20
_READ_AHEAD_BATCHES = 2


def evaluate(
    student: PreTrainedModel | Sharded,
    split: Split,
    *,
    batch_sequences: int,
    autocast: AbstractContextManager[object],
    world: World,
    bytes_of_tokens: Tensor | None = None,
    asked_to_end: Callable[[], bool] = lambda: False,
) -> dict[str, float] | None:
    """The figures above over a whole split, and `tokens`; leaves the model's mode as it was.

    bytes_of_tokens [V] int64 is that of `token_bytes.py`. `autocast` surrounds the model without
    its head, whose logits are always float32; on a GPU its products are TF32 if the hidden states
    are bfloat16. The processes of `world` evaluate a part of the row groups each, and all return
    the figures of the whole. None if any was `asked_to_end` before the end.

    InputError if no position of the split counts, RunError for a student that returns NaN or
    infinity.
    """
    spec = split.spec
    totals = world.together(lambda: counted_totals(split))
    sums = torch.zeros(NUM_SUMS, dtype=torch.float64, device=world.device)
    bins = torch.zeros((3, NUM_BINS), dtype=torch.float64, device=world.device)
    num_bytes = 0

    def add(model: PreTrainedModel, batch: Batch) -> None:
        with autocast:
            hidden = hidden_states(model, batch.input_ids, batch.position_ids)
        _add_batch(sums, bins, hidden, head_weight(model), batch, spec)

    empty = empty_batch((), packed=packed_length(spec))
    was_training = student.training
    student.eval()
    batches = sequential_batches(
        split,
        batch_lines=batch_sequences,
        columns=TAIL_COLUMNS,
        rank=world.rank,
        world_size=world.size,
    )
    try:
        with (
            torch.no_grad(),
            ReadAhead(for_device(batches, world.device), _READ_AHEAD_BATCHES) as ahead,
        ):
            for batch in _until_all_end(ahead, empty, world, asked_to_end):
                if bytes_of_tokens is not None:
                    counted = batch.labels[batch.labels != IGNORE_INDEX]
                    num_bytes += int(bytes_of_tokens[counted].sum())
                in_forward(student, add, batch.to(world.device))
    finally:
        reshard(student)
        student.train(was_training)
    if world.largest(asked_to_end()):
        return None
    (num_bytes,) = world.sum_counts([num_bytes])
    try:
        return _figures(world.add(sums), world.add(bins), totals, num_bytes, spec)
    except RunError as error:
        world.fail(error)


def _until_all_end(
    batches: Iterator[Batch], empty: Batch, world: World, asked_to_end: Callable[[], bool]
) -> Iterator[Batch]:
    """The batches of this process, then `empty` while another process has some. Collective.

    A sharded model runs on all processes at once. Ends for all when one was `asked_to_end`.
    """
    while True:
        batch = world.together(lambda: next(batches, None))
        state = world.largest(2 if asked_to_end() else int(batch is not None))
        if state != 1:
            return
        yield empty if batch is None else batch


def counted_totals(split: Split) -> Totals:
    """Sums over a split from its sidecars. InputError if none of its positions counts."""
    check_counted(split)
    return sum((sidecar.totals for sidecar in split.sidecars()), Totals())


def check_counted(split: Split) -> None:
    """InputError if none of a split's positions counts. Reads sidecars until one has some."""
    if not any(sidecar.tokens for sidecar in split.sidecars()):
        raise InputError(
            f"{split.path}: no position counts as a label, so there is nothing to learn or to"
            " evaluate"
        )


def _figures(
    sums: Tensor, bins: Tensor, totals: Totals, num_bytes: int, spec: DatasetSpec
) -> dict[str, float]:
    """What the sums over a split come to; num_bytes 0: they are not known."""
    num_tokens = totals.tokens
    nll, kl_kept, kl_bound, weighted, num_agreed, num_known = sums.tolist()
    if not math.isfinite(nll):
        raise RunError(
            f"the student's negative log-likelihood of the validation split is {nll}; the run"
            " diverged, try a lower --learning-rate"
        )
    figures = {
        "tokens": num_tokens,
        "cross_entropy": nll / num_tokens,
        "perplexity": _exp(nll / num_tokens),
        "calibration_error": (bins[1] - bins[2]).abs().sum().item() / num_tokens,
    }
    if totals.teacher_nll is not None:
        figures["teacher_cross_entropy"] = totals.teacher_nll / num_tokens
    if num_bytes:
        figures["bits_per_byte"] = nll / math.log(2) / num_bytes
    if not spec.has_teacher:
        return figures
    method = spec.keep
    if not method.is_sampled:
        figures["kl_kept"] = kl_kept / num_tokens
        if method.has_tail:
            figures["kl_bound"] = kl_bound / num_tokens
    elif method.temperature == 1 and totals.teacher_entropy is not None:
        figures["kl_unbiased"] = (weighted - totals.teacher_entropy) / num_tokens
    if method.exact_above is not None and num_known:
        figures["top1_agreement"] = num_agreed / num_known
    return figures


def _exp(value: float) -> float:
    """The exponential, infinite where a float has no room for it."""
    try:
        return math.exp(value)
    except OverflowError:
        return math.inf


def _add_batch(
    sums: Tensor, bins: Tensor, hidden: Tensor, weight: Tensor, batch: Batch, spec: DatasetSpec
) -> None:
    """Add `position_sums` and `calibration_bins` of a batch's labelled positions, by blocks."""
    entries = (
        KeptEntries.gather([], batch.labels.numel()) if batch.entries is None else batch.entries
    )
    entries = entries.with_tensors(lambda tensor: tensor.to(hidden.device))
    exact_above = spec.keep.exact_above
    labels, hidden = batch.labels.flatten(), hidden.flatten(0, 1)
    tails = None if batch.tail_logmass is None else batch.tail_logmass.flatten()
    rows = (labels != IGNORE_INDEX).nonzero().squeeze(1)
    block_bytes = _CPU_BLOCK_BYTES if hidden.device.type == "cpu" else _GPU_BLOCK_BYTES
    blocks = split_evenly(rows, block_bytes // (4 * len(weight)))
    padded = entries.padded_blocks(blocks)
    wide, narrow_states = weight.float(), hidden.dtype == torch.bfloat16
    for block, (ids, logprobs) in zip(blocks, padded, strict=True):
        with tensor_float32(narrow_states):
            logits = hidden[block].float() @ wide.T
        prediction = predict(logits)
        bins += calibration_bins(prediction, labels[block])
        sums += position_sums(
            logits,
            prediction,
            labels[block],
            ids,
            logprobs,
            None if tails is None else tails[block],
            -math.inf if exact_above is None else exact_above,
        )
