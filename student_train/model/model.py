"""The student: a preset, a Hugging Face config file, or a model folder to go on training.

The loss works from hidden states and the head's weight. So before training, a probe checks that the
model's logits are just their product, and rejects a model that caps, scales or shifts its logits.
Nothing here runs code from a folder or downloads anything.

A student fits a dataset by content, not by size: a folder's tokenizer must be the dataset's, while
a vocabulary that is padded to more rows is fine.
"""

from __future__ import annotations

import copy
import logging
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    PreTrainedModel,
)

from shards.dataset import Dataset
from shards.errors import InputError, one_line
from shards.tokenizer.files import TOKENIZER
from student_train.model.presets import PRESETS
from student_train.model.student_tokenizer import check_tokenizer

logger = logging.getLogger(__name__)

# What reading a model folder raises, depending on which part of it is wrong.
_LOAD_ERRORS = (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError)

# Attributes of a Hugging Face config behind logits that are not the plain product.
_LOGIT_ATTRIBUTES = (
    "final_logit_softcapping",
    "logits_scaling",
    "logit_scale",
    "lm_head_multiplier",
    "output_multiplier_scale",
)
_PROBE_TOKENS = 8
_PROBE_LOGIT = 100.0
_LEAK = 1e-3  # of a change at its own position; rounding is below, sight of it far above


def default_learning_rate(student: str) -> float:
    """The peak learning rate of a preset. InputError for any other student, which has none."""
    if student not in PRESETS:
        raise InputError(f"--learning-rate: missing; {student} is not a preset and has no default")
    return PRESETS[student].learning_rate


def make_student(
    student: str, dataset: Dataset, seed: int, *, with_weights: bool = True
) -> PreTrainedModel:
    """A float32 model that fits the dataset: fresh weights from the seed, or a folder's.

    Without weights its tensors hold anything and take no memory until somebody writes to them: for
    processes that get their weights from another one.

    InputError for what is no student or too small for the dataset, IdentityMismatchError for
    another tokenizer.
    """
    path = Path(student)
    is_folder = student not in PRESETS and path.is_dir()
    if is_folder:
        check_tokenizer(path, dataset)
    if is_folder and with_weights:
        model = load_model(path)
    else:
        model = _fresh(student, student_config(student, dataset), seed, with_weights)
    check_sizes(student, model, dataset)
    _train_every_embedding(model, fresh=with_weights and not is_folder)
    if with_weights:
        check_causal(student, model)
        _check_head(student, model)
    _warn_of_router(student, model)
    return model


def shallow_copy(model: PreTrainedModel) -> PreTrainedModel:
    """A fresh model like this one with few blocks, each of its kinds among them, on the CPU.

    It computes what the other would, so that what a model supports can be tried out in little
    memory.
    """
    config = copy.deepcopy(model.config)
    kinds = list(getattr(config, "layer_types", None) or ())
    num_blocks = max([2, *(kinds.index(kind) + 1 for kind in kinds)])
    config.num_hidden_layers = min(num_blocks, config.num_hidden_layers)
    if kinds:
        config.layer_types = kinds[: config.num_hidden_layers]
    with torch.random.fork_rng(devices=[]):
        copied: PreTrainedModel = type(model)._from_config(config, dtype=torch.float32)
    copied.set_attn_implementation(model.config._attn_implementation)
    return copied


def student_config(student: str, dataset: Dataset) -> Any:
    """The configuration of a student, of transformers. InputError if there is none."""
    if student in PRESETS:
        return LlamaConfig(**PRESETS[student].config_json(dataset.spec))
    if not Path(student).exists():
        names = ", ".join(PRESETS)
        raise InputError(
            f"--student {student}: expected a preset ({names}), a config.json or a model folder;"
            " there is no such file or folder"
        )
    return _read_config(Path(student))


def hidden_states(
    model: PreTrainedModel, input_ids: Tensor, position_ids: Tensor | None = None
) -> Tensor:
    """input_ids [B, L] -> what the head sees, [B, L, D].

    position_ids [B, L] begin again with every packed sequence; None: a line is one sequence.
    """
    positions = {} if position_ids is None else {"position_ids": position_ids}
    states: Tensor = model.base_model(
        input_ids=input_ids, use_cache=False, **positions
    ).last_hidden_state
    return states


def head_weight(model: PreTrainedModel) -> Tensor:
    """The head's weight, [V, D]; the embedding's own where they are tied."""
    weight: Tensor = model.get_output_embeddings().weight
    return weight


def num_parameters(model: PreTrainedModel) -> tuple[int, int]:
    """All parameters, tied ones once, and those beside embedding and head."""
    shared = {model.get_input_embeddings().weight, model.get_output_embeddings().weight}
    total = sum(parameter.numel() for parameter in model.parameters())
    return total, total - sum(weight.numel() for weight in shared)


def export(
    model: PreTrainedModel,
    dataset: Dataset,
    folder: Path,
    weights: Mapping[str, Tensor] | None = None,
) -> None:
    """Write a Hugging Face folder: config, float32 safetensors, and the dataset's tokenizer.

    `weights` are those of a model that holds only its part of them.
    The tokens that begin and end documents are those of the dataset, in every file.
    """
    documents = dataset.spec.documents
    kinds = {"bos_token_id": documents.bos_token_id, "eos_token_id": documents.eos_token_id}
    with _attributes(model.config, kinds), _attributes(model.generation_config, kinds):
        model.save_pretrained(folder, state_dict=weights)
    shutil.copytree(dataset.path / TOKENIZER, folder, dirs_exist_ok=True)


@contextmanager
def _attributes(owner: Any, values: Mapping[str, Any]) -> Iterator[None]:
    """Give an object other values for a while; a None leaves its own, an owner of None is none."""
    before = {name: getattr(owner, name, None) for name, value in values.items()}
    changed = {name for name, value in values.items() if owner is not None and value is not None}
    for name in changed:
        if before[name] not in (None, values[name]):
            logger.info(
                "%s %s: exporting the dataset's, %s, instead", name, before[name], values[name]
            )
        setattr(owner, name, values[name])
    try:
        yield
    finally:
        for name in changed:
            setattr(owner, name, before[name])


def _fresh(student: str, config: Any, seed: int, with_weights: bool) -> PreTrainedModel:
    torch.manual_seed(seed)
    try:
        with nullcontext() if with_weights else torch.device("meta"):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(
                config, dtype=torch.float32, trust_remote_code=False
            )
    except _LOAD_ERRORS as error:
        raise InputError(
            f"--student {student}: not a causal language model: {_reason(error)}"
        ) from error
    if not with_weights:
        model.to_empty(device="cpu")
        model.tie_weights()  # moving off the meta device has torn them apart
    cap_attention(model)
    return model


def cap_attention(model: PreTrainedModel) -> None:
    """Make a model cap its attention logits, if its configuration says so.

    PyTorch's attention, which transformers takes by default, leaves that out.
    """
    if getattr(model.config.get_text_config(), "attn_logit_softcapping", None) is not None:
        model.set_attn_implementation("eager")


def _reason(error: Exception) -> str:
    """One line, without the list of all models that transformers knows."""
    return one_line(error).partition(" Model type should be one of ")[0]


def _read_config(path: Path) -> Any:
    try:
        return AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except _LOAD_ERRORS as error:
        raise InputError(
            f"--student {path}: not a Hugging Face config file: {one_line(error)}"
        ) from error


def load_model(folder: Path, *, option: str = "--student") -> PreTrainedModel:
    """A float32 model from its folder, with all its weights. InputError if that fails."""
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=torch.float32,
            output_loading_info=True,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
        )
    except _LOAD_ERRORS as error:
        raise InputError(f"{option} {folder}: cannot be loaded: {_reason(error)}") from error
    wrong = sorted({*map(str, info["missing_keys"]), *map(str, info["mismatched_keys"])})
    if wrong:
        raise InputError(
            f"{option} {folder}: {len(wrong)} weights are missing or of another shape,"
            f" such as {wrong[0]}"
        )
    loaded: PreTrainedModel = model
    cap_attention(loaded)
    return loaded


def check_sizes(
    student: str, model: PreTrainedModel, dataset: Dataset, *, option: str = "--student"
) -> None:
    """InputError unless a model has the vocabulary and the positions that a dataset needs."""
    if model.get_output_embeddings() is None:
        raise InputError(f"{option} {student}: {type(model).__name__} has no LM head")
    num_rows = len(head_weight(model))
    vocab_size = dataset.spec.tokenizer.vocab_size
    if num_rows < vocab_size:
        raise InputError(
            f"{option} {student}: has a vocabulary of {num_rows}, but {dataset.path} needs"
            f" {vocab_size}"
        )
    limit = getattr(model.config, "max_position_embeddings", None)
    length = dataset.spec.sequence_length
    if limit is not None and limit < length:
        raise InputError(
            f"{option} {student}: takes at most {limit} positions, but the sequences of"
            f" {dataset.path} have {length}"
        )


def check_causal(student: str, model: PreTrainedModel, *, option: str = "--student") -> None:
    """InputError for a model that sees the tokens after a position, such as its label."""
    vocab_size = len(model.get_input_embeddings().weight)
    tokens = torch.arange(_PROBE_TOKENS, device=model.device)[None] % vocab_size
    changed = tokens.clone()
    changed[0, -1] = _PROBE_TOKENS % vocab_size
    was_training = model.training
    model.eval()
    with torch.no_grad():
        change = (hidden_states(model, changed) - hidden_states(model, tokens)).abs().amax(-1)[0]
    model.train(was_training)
    if change[:-1].max() > _LEAK * change[-1]:
        raise InputError(
            f"{option} {student}: {type(model).__name__} sees the tokens after a position, so it"
            " would read its labels; give a causal model"
        )


def _train_every_embedding(model: PreTrainedModel, *, fresh: bool) -> None:
    """Make the padding id a token like others, which it is here: often the end token.

    transformers makes it the `padding_idx` of the embedding: zero in fresh weights, and without a
    gradient.
    """
    embedding = model.get_input_embeddings()
    if isinstance(embedding, nn.Embedding) and embedding.padding_idx is not None:
        if fresh:
            weight = embedding.weight.detach()
            weight[embedding.padding_idx].normal_(std=weight.std().item())
        embedding.padding_idx = None


def _warn_of_router(student: str, model: PreTrainedModel) -> None:
    config = model.config.get_text_config()
    weight = getattr(config, "router_aux_loss_coef", None)
    if getattr(config, "output_router_logits", False) and weight:
        logger.warning(
            "%s: router_aux_loss_coef %s has no effect: the trainer leaves out the loss that"
            " balances experts",
            student, weight,
        )  # fmt: skip


def _check_head(student: str, model: PreTrainedModel) -> None:
    """InputError unless the logits are hidden states times the head's weight, whatever their size.

    The hidden states are magnified on their way into the head, by a power of two: the logits of
    fresh weights are so small that a cap on them would not show.
    """
    head = model.get_output_embeddings()
    tokens = torch.arange(_PROBE_TOKENS)[None] % len(head.weight)
    was_training = model.training
    model.eval()
    with torch.no_grad():
        hidden = hidden_states(model, tokens)
        plain = hidden @ head.weight.T
        exponent = (_PROBE_LOGIT / plain.abs().max().clamp(min=1e-30)).log2().ceil()
        factor = torch.exp2(exponent)
        hook = head.register_forward_pre_hook(lambda _, given: (given[0] * factor,))
        try:
            logits = model(input_ids=tokens, use_cache=False).logits.float()
        finally:
            hook.remove()
    model.train(was_training)
    has_bias = getattr(head, "bias", None) is not None  # zero in a fresh model, and not trained
    same = torch.allclose(logits, plain * factor, rtol=1e-3, atol=1e-3 * _PROBE_LOGIT)
    if has_bias or not same:
        causes = ["a bias of the head"] if has_bias else []
        for name in _LOGIT_ATTRIBUTES:
            if getattr(model.config, name, None) is not None:
                causes.append(f"{name} {getattr(model.config, name)}")
        raise InputError(
            f"--student {student}: the logits of {type(model).__name__} are not its hidden states"
            f" times its head's weight ({' and '.join(causes) or 'unknown cause'}); the trainer"
            " cannot train such a student"
        )
