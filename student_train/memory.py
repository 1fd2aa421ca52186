"""The memory that training takes on one GPU, by arithmetic, before anything is loaded.

Letters: N parameters, W ranks, T tokens of a micro batch, V vocabulary, D hidden, I intermediate,
A width of all query heads, K of all key heads, H query heads, b bytes of the compute dtype.

    weights      4 N / W float32, and what is gathered in the compute dtype: two blocks, one of them
                 ahead, and everything outside the blocks
    gradients    4 N / W
    moments      8 N / W
    activations  the most of all else at any time in a step

`activations` counts what autograd saves in a block of Llama's kind: each norm keeps its float32
input and both results of the scaling, attention its inputs, its result and H log-sums, the MLP
gate, activation, up and product. Compiled blocks compute the norms and the activation again, and
checkpointed ones everything but their input. To this come the batch, the blocks of logits of
`objective/loss.py`, the gradients of a block on their way into the shards, and one block's work.

Tests compare it with what a step allocates on a CPU; the difference is below `ERROR`. What CUDA's
libraries take for themselves is `_LIBRARIES`, a guess.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from typing import Any, Self

import torch
from transformers import AutoModelForCausalLM

from shards.dataset import Dataset
from shards.errors import InputError
from shards.spec import DatasetSpec
from student_train.config import TrainConfig
from student_train.data.lines import packed_length
from student_train.model.blocks import decoder_blocks
from student_train.model.model import student_config
from student_train.objective.loss import GPU_BLOCK_BYTES

logger = logging.getLogger(__name__)

ERROR = 0.1  # what the estimate may be off, as a fraction
_LIBRARIES = 1 << 29
_LONGEST_ENTRIES = 100  # of a position; ids and log-probabilities take 8 bytes each
_GPUS_OF_A_MACHINE = 8
_MOST_GPUS = 1024

# Models whose blocks are of Llama's kind. For others only the states are sure.
_COUNTED = ("llama", "mistral", "qwen2")
_NO_MODEL = (ValueError, KeyError, TypeError, RuntimeError)  # what a wrong configuration raises


@dataclass(frozen=True, kw_only=True)
class Shape:
    """The sizes of a student that its memory depends on; `counted`: its blocks are as above."""

    parameters: int
    block_parameters: int
    num_blocks: int
    vocab_size: int
    hidden: int
    intermediate: int
    heads: int
    query_width: int
    key_width: int
    counted: bool

    @classmethod
    def of(cls, model_config: Any) -> Self:
        """That of a configuration of transformers; nothing is allocated."""
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(model_config, trust_remote_code=False)
        blocks = [sum(p.numel() for p in block.parameters()) for block in decoder_blocks(model)]
        config = model_config.get_text_config()
        hidden = getattr(config, "hidden_size", 0)
        heads = getattr(config, "num_attention_heads", None) or 1
        size = getattr(config, "head_dim", None) or hidden // heads
        intermediate = getattr(config, "intermediate_size", None)
        return cls(
            parameters=sum(p.numel() for p in model.parameters()),
            block_parameters=max(blocks, default=0),
            num_blocks=len(blocks),
            vocab_size=config.vocab_size,
            hidden=hidden,
            intermediate=intermediate or 4 * hidden,
            heads=heads,
            query_width=heads * size,
            key_width=(getattr(config, "num_key_value_heads", None) or heads) * size,
            counted=config.model_type in _COUNTED,
        )

    @property
    def outside(self) -> int:
        """Parameters of embedding, head and last norm."""
        return self.parameters - self.num_blocks * self.block_parameters


@dataclass(frozen=True, kw_only=True)
class Setting:
    """How a step is computed; `sequences` are those of a micro batch of one rank."""

    sequences: int
    length: int
    world_size: int = 1
    bfloat16: bool = True
    checkpointing: bool = False
    compiled: bool = False
    packed: bool = False
    tempered: bool = False
    block_bytes: int = GPU_BLOCK_BYTES
    teacher_parameters: int = 0  # of a live teacher, none: 0
    teacher_vocab_size: int = 0

    @property
    def tokens(self) -> int:
        """Positions of a micro batch."""
        return self.sequences * self.length

    @property
    def itemsize(self) -> int:
        """Bytes of a value of the compute dtype."""
        return 2 if self.bfloat16 else 4


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes on one GPU."""

    weights: int
    gradients: int
    moments: int
    activations: int
    teacher: int = 0

    @property
    def states(self) -> int:
        """What does not depend on the batch."""
        return self.weights + self.gradients + self.moments

    @property
    def total(self) -> int:
        """All of it."""
        return self.states + self.activations + self.teacher

    def __str__(self) -> str:
        sizes = asdict(self)
        if not self.teacher:
            del sizes["teacher"]
        return ", ".join(f"{name} {_gib(size)}" for name, size in sizes.items())


def estimate(shape: Shape, setting: Setting) -> Memory:
    """The memory of a rank in the middle of training."""
    shard = 4 * -(-shape.parameters // setting.world_size)
    gathered = 0
    if setting.bfloat16 or setting.world_size > 1:
        gathered = setting.itemsize * (2 * shape.block_parameters + shape.outside)
    activations = _activations(shape, setting)
    return Memory(
        weights=shard + gathered,
        gradients=shard,
        moments=2 * shard,
        activations=activations,
        teacher=live_teacher_bytes(setting, activations),
    )


def live_teacher_bytes(setting: Setting, activations: int) -> int:
    """What `live_teacher.py` takes: its float32 weights, and the targets of a micro batch.

    An entry's id and log-probability take 8 bytes. Making them takes 8 more, before the student
    has any activations.
    """
    targets = 8 * setting.teacher_vocab_size * setting.tokens
    return 4 * setting.teacher_parameters + targets + max(0, targets - activations)


def saved_of_block(shape: Shape, setting: Setting) -> int:
    """Bytes per token that autograd keeps of a block between forward and backward pass."""
    b = setting.itemsize
    attention = b * (2 * shape.query_width + 2 * shape.key_width) + 4 * shape.heads
    if setting.packed:  # flex attention's result has another layout than what follows wants
        attention += b * shape.query_width
    if setting.compiled:
        return b * (4 * shape.hidden + 3 * shape.intermediate) + attention + 8
    norms = 2 * ((4 + 2 * b) * shape.hidden + 4)
    return norms + attention + b * 4 * shape.intermediate


def _activations(shape: Shape, setting: Setting) -> int:
    """The larger of what the loss and the first block of the backward pass need."""
    tokens, b = setting.tokens, setting.itemsize
    block = tokens * saved_of_block(shape, setting)
    kept = tokens * b * shape.hidden if setting.checkpointing else block
    last_norm = tokens * ((4 + 2 * b) * shape.hidden + 4)
    states = tokens * 2 * b * shape.hidden  # hidden states and their gradient
    batch = tokens * (24 + 8 * _LONGEST_ENTRIES)
    always = shape.num_blocks * kept + last_norm + states + batch + _LIBRARIES
    head_gradient = b * shape.vocab_size * shape.hidden
    # Gradients of two blocks: in the compute dtype, and in float32 on their way to the shards.
    arriving = (b + 2 * 4) * shape.block_parameters
    work = block if setting.checkpointing else 0
    work += tokens * b * (2 * shape.intermediate + 2 * shape.hidden)
    return always + max(_loss(shape, setting), head_gradient + arriving + work)


def _loss(shape: Shape, setting: Setting) -> int:
    """A block of logits, float32 and narrow, and the gradient of the head, float32 and narrow."""
    rows = min(setting.tokens, max(1, setting.block_bytes // (4 * shape.vocab_size)))
    narrow = 2 if setting.bfloat16 else 0
    of_row = 4 + narrow + (4 if setting.tempered else 0)
    return shape.vocab_size * (rows * of_row + shape.hidden * (4 + narrow))


def check_memory(
    config: TrainConfig, dataset: Dataset, world_size: int, device: torch.device
) -> None:
    """Log what training takes on a GPU; nothing on a CPU.

    InputError if it does not fit, with the options that make it fit, or if there is no such
    student; a warning if it hardly fits.
    """
    if device.type != "cuda":
        return
    model_config = student_config(config.student, dataset)
    try:
        shape = Shape.of(model_config)
    except _NO_MODEL:  # making the student names it
        return
    free, _ = torch.cuda.mem_get_info(device)
    setting = make_setting(config, dataset.spec, world_size)
    if config.teacher is not None:
        with suppress(InputError, *_NO_MODEL):  # loading the teacher names it
            teacher = Shape.of(student_config(config.teacher, dataset))
            setting = replace(
                setting,
                teacher_parameters=teacher.parameters,
                teacher_vocab_size=teacher.vocab_size,
            )
    check_fit(shape, setting, config.student, free)


def make_setting(config: TrainConfig, spec: DatasetSpec, world_size: int) -> Setting:
    """How a run computes its steps on GPUs."""
    of_rank = -(-(config.batch_tokens // spec.sequence_length) // world_size)
    return Setting(
        sequences=max(1, min(config.micro_batch_sequences, of_rank)),
        length=spec.sequence_length,
        world_size=world_size,
        bfloat16=config.dtype == "bfloat16",
        checkpointing=config.gradient_checkpointing,
        compiled=config.compile is not False,
        packed=packed_length(spec) is not None,
        tempered=config.student_temperature != 1,
    )


def check_fit(shape: Shape, setting: Setting, student: str, free: int) -> None:
    """`check_memory`, with this many bytes free."""
    memory = estimate(shape, setting)
    logger.info("memory per GPU: %s; GPU has %s free", memory, _gib(free))
    sure = memory.total * (1 - ERROR) if shape.counted else memory.states
    if sure > free:
        raise InputError(
            f"--student {student}: needs about {_gib(memory.total)} of memory per GPU ({memory}),"
            f" but the GPU has {_gib(free)} free; {_advice(shape, setting, free)}"
        )
    if memory.total * (1 + ERROR) > free:
        logger.warning(
            "warning: --student %s: may not fit into the GPU's memory (the estimate is within %d %%"
            " for Llama's kind); if it runs out, %s",
            student, 100 * ERROR, _advice(shape, setting, free),
        )  # fmt: skip


def fits(shape: Shape, setting: Setting, free: int) -> bool:
    """Whether it fits even if the estimate is too low by its error."""
    return estimate(shape, setting).total * (1 + ERROR) <= free


def remedies(shape: Shape, setting: Setting, free: int) -> Iterator[str]:
    """Options with which training fits, one GPU's first."""
    checkpointed = replace(setting, checkpointing=True)
    checkpointing = "" if setting.checkpointing else "--gradient-checkpointing"
    sequences = most_sequences(shape, setting, free)
    if sequences:
        yield f"--micro-batch-sequences {sequences}"
    fewer = most_sequences(shape, checkpointed, free)
    if checkpointing and fewer == setting.sequences:
        yield checkpointing
    elif checkpointing and fewer > sequences:
        yield f"{checkpointing} --micro-batch-sequences {fewer}"
    ranks, ranks_checkpointed = (_fewest_ranks(shape, s, free) for s in (setting, checkpointed))
    if checkpointing and setting.world_size < ranks_checkpointed < ranks:
        yield f"{ranks_checkpointed} GPUs with {checkpointing}: {_torchrun(ranks_checkpointed)}"
    if ranks <= _MOST_GPUS:
        yield f"{ranks} GPUs: {_torchrun(ranks)}"


def most_sequences(shape: Shape, setting: Setting, free: int) -> int:
    """The largest micro batch that fits, of those halved from the given one; 0 if none does."""
    sequences = setting.sequences
    while sequences and not fits(shape, replace(setting, sequences=sequences), free):
        sequences //= 2
    return sequences


def _fewest_ranks(shape: Shape, setting: Setting, free: int) -> int:
    """The least number of ranks that fits, doubled from the given one."""
    ranks = setting.world_size
    while ranks <= _MOST_GPUS and not fits(shape, replace(setting, world_size=ranks), free):
        ranks *= 2
    return ranks


def _torchrun(ranks: int) -> str:
    nodes = f"--nnodes {ranks // _GPUS_OF_A_MACHINE} " if ranks > _GPUS_OF_A_MACHINE else ""
    return f"torchrun {nodes}--nproc-per-node {min(ranks, _GPUS_OF_A_MACHINE)}"


def _advice(shape: Shape, setting: Setting, free: int) -> str:
    found = list(remedies(shape, setting, free))
    return f"try {', or '.join(found)}" if found else "it needs a smaller student"


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.1f} GiB"
