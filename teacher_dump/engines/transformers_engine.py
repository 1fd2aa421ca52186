"""Engine `transformers`: the reference for tests, and for models that vLLM lacks.

One sequence at a time through the model's own forward, so that soft-capping, scaling and whatever
else a model does to its logits is included (`logit_blocks`). The head runs in `head_dtype`, as in
the vLLM engine, a block of positions at a time.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers.utils.logging import disable_progress_bar

from shards.errors import InputError, RunError
from shards.rows import Int32Array
from teacher_dump.engines.architectures import CAUSAL_SUFFIXES, rope_parameters
from teacher_dump.engines.head import block_rows, make_head
from teacher_dump.engines.logit_blocks import LogitBlocks
from teacher_dump.engines.options import EngineOptions
from teacher_dump.keep.packed import Selected, unpack
from teacher_dump.keep.random_keys import position_keys, sequence_key
from teacher_dump.keep.rows import TokenSequence
from teacher_dump.keep.selection import select_in_blocks, selector_of

# Ends of names of weights that belong to quantised ones.
_SCALES = ("weight_scale", "weight_scale_inv", "qweight")


def check(options: EngineOptions) -> None:
    """InputError for an architecture that is no causal language model of transformers."""
    find_model_class(options.teacher_folder, trust_remote_code=options.trust_remote_code)


def find_model_class(folder: Path, *, trust_remote_code: bool) -> tuple[Any, Any]:
    """The class that config.json names, or its own code, and the configuration.

    Never the nearest class that fits the type: `AutoModelForCausalLM` gives a classifier a random
    head. Raises InputError for what is no causal language model.
    """
    import transformers

    try:
        config = transformers.AutoConfig.from_pretrained(
            folder, trust_remote_code=trust_remote_code
        )
    except Exception as error:
        raise _not_loaded(folder, error) from error
    architecture = config.architectures[0]
    if "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {}):
        return transformers.AutoModelForCausalLM, config
    model_class = getattr(transformers, architecture, None)
    one_way = getattr(config, "is_decoder", True)  # BERT and its kin say so if they are
    if model_class is None or not architecture.endswith(CAUSAL_SUFFIXES) or not one_way:
        raise InputError(f"transformers has no causal LM {architecture}")
    return model_class, config


def _check_loaded(folder: Path, loaded: Mapping[str, Iterable[object]]) -> None:
    """InputError for weights that transformers made up, or took without their scales."""
    missing = sorted(map(str, (*loaded["missing_keys"], *loaded["mismatched_keys"])))
    if missing:
        raise InputError(
            f"{folder}: {len(missing)} weights are missing or of another shape, such as"
            f" {missing[0]}"
        )
    unused = [str(name) for name in loaded["unexpected_keys"] if str(name).endswith(_SCALES)]
    if unused:
        raise InputError(
            f"{folder}: transformers does not use {min(unused)}, so it would read quantised weights"
            " as plain ones"
        )


def _attention(config: Any) -> str | None:
    """PyTorch's attention, the default, leaves out the soft-capping of attention logits."""
    capped = getattr(config.get_text_config(), "attn_logit_softcapping", None)
    return None if capped is None else "eager"


def _prefixes_agree(config: Any) -> bool:
    """Whether positions are scaled alike in sequences of any length; a model's own code may not."""
    types = [part.get("rope_type", "") for part in rope_parameters(config.get_text_config())]
    of_length = any(kind == "longrope" or "dynamic" in kind for kind in types)
    return not (of_length or getattr(config, "auto_map", None))


def _not_loaded(folder: Path, error: Exception) -> InputError:
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return InputError(f"transformers does not load {folder}: {reason}")


def start(options: EngineOptions) -> TransformersEngine:
    """Load the teacher. InputError for what the engine does not take."""
    return TransformersEngine(options)


class TransformersEngine:
    """A Hugging Face causal LM, unmodified but for the dtype of its head."""

    def __init__(self, options: EngineOptions) -> None:
        disable_progress_bar()  # of loading weights, between the lines of the command
        folder, trusted = options.teacher_folder, options.trust_remote_code
        model_class, config = find_model_class(folder, trust_remote_code=trusted)
        try:
            model: Any
            model, loaded = model_class.from_pretrained(
                folder,
                config=config,
                dtype=getattr(torch, options.dtype),
                attn_implementation=_attention(config),
                trust_remote_code=trusted,
                output_loading_info=True,
            )
        except Exception as error:
            raise _not_loaded(folder, error) from error
        _check_loaded(folder, loaded)
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        if options.head_dtype not in ("model", options.dtype):
            head = model.get_output_embeddings()
            if head is None:
                raise InputError(f"transformers finds no LM head in {type(model).__name__}")
            wide = make_head(
                head.weight,
                getattr(head, "bias", None),
                model_dtype=getattr(torch, options.dtype),
                dtype=getattr(torch, options.head_dtype),
                device=self._device,
            )
            model.set_output_embeddings(wide)
        self.prefixes_agree = _prefixes_agree(config)
        self._model = model.to(self._device).eval()
        self._selection, self._seed = options.selection, options.seed
        self._select = selector_of(options.selection)
        rows = block_rows(self._device, options.selection.vocab_size)
        self._blocks = LogitBlocks(self._model, rows)

    @torch.inference_mode()
    def logits(self, tokens: Int32Array) -> Iterator[torch.Tensor]:
        """tokens [T] -> logits [R, V] float32 by blocks, on the engine's device, with padding."""
        yield from self._blocks(torch.from_numpy(tokens).to(self._device, torch.int64))

    @torch.inference_mode()
    def score(self, sequences: Iterable[TokenSequence]) -> Iterator[tuple[TokenSequence, Selected]]:
        """See `TeacherEngine.score`."""
        for sequence in sequences:
            labels = torch.from_numpy(sequence.tokens[1:]).to(self._device, torch.int64)
            key = sequence_key(self._seed, sequence.split, sequence.number)
            keys = torch.from_numpy(position_keys(key, 0, len(labels))).to(self._device)
            try:
                packed = self._packed(sequence.tokens[:-1], labels, keys).cpu()
            except Exception as error:
                raise RunError(f"the engine stopped: {type(error).__name__}: {error}") from error
            yield sequence, unpack(packed.numpy(), self._selection)

    def _packed(self, tokens: Int32Array, labels: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        """tokens, labels, keys [T] -> what the selector makes of their positions, [T, W]."""
        packed: list[torch.Tensor] = []
        done = 0
        for logits in self.logits(tokens):
            part = slice(done, done + len(logits))
            packed.append(select_in_blocks(self._select, logits, labels[part], keys[part]))
            done = part.stop
        return torch.cat(packed)
