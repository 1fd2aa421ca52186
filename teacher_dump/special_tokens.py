"""Which tokens begin and end documents and sequences, and whether the tokenizer has them.

The tokenizer of an instruct model often ends turns of a chat with its EOS token, such as
`<|im_end|>`. Pre-training text never had this token between documents.
"""

from __future__ import annotations

import logging

from shards.options import OptionError
from shards.spec import BOS_BOTH, BOS_NONE, BOS_SEQUENCE, Documents
from teacher_dump.config import BOS_AUTO, DumpConfig
from teacher_dump.tokenizer import TeacherTokenizer

logger = logging.getLogger(__name__)

# Names under which tokenizers have a token that ends documents of pre-training text.
_ENDS_OF_DOCUMENTS = (
    *("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|eos|>", "[EOS]"),
    "<\uff5cend\u2581of\u2581sentence\uff5c>",  # as DeepSeek writes it
)


def make_documents(
    config: DumpConfig, tokenizer: TeacherTokenizer, known_ids: int | None
) -> Documents:
    """How documents become sequences. OptionError for tokens that the tokenizer does not have.

    Also for tokens beyond the teacher's vocabulary of `known_ids` (None: any).
    """
    mode = config.bos
    if mode == BOS_AUTO:
        mode = BOS_BOTH if tokenizer.adds_bos and tokenizer.bos_token_id is not None else BOS_NONE
    if mode != BOS_NONE and tokenizer.bos_token_id is None:
        raise OptionError("bos", f" {mode}: the tokenizer has no beginning-of-sequence token")
    if mode in (BOS_SEQUENCE, BOS_BOTH) and config.sequence_length < 2:
        raise OptionError("sequence_length", f" 1: expected at least 2 with --bos {mode}")
    documents = Documents(
        joined=config.joined,
        bos=mode,
        bos_token_id=None if mode == BOS_NONE else tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id if config.eos else None,
        held_out=config.held_out,
        masked=config.mask_key is not None or mode != BOS_NONE,
    )
    for name, index in (
        ("bos", documents.bos_token_id),
        ("eos_token", documents.eos_token_id),
    ):
        if index is not None and known_ids is not None and index >= known_ids:
            token = tokenizer.backend.id_to_token(index)
            raise OptionError(
                name, f" {token}: has the id {index}, but the teacher has only {known_ids} ids"
            )
    return documents


def warn_of_turn_ends(config: DumpConfig, tokenizer: TeacherTokenizer) -> None:
    """Warn if the token that ends documents also ends turns of a chat."""
    if not config.eos or config.eos_token is not None:
        return
    eos = tokenizer.backend.id_to_token(tokenizer.eos_token_id)
    others = [token for token in end_tokens(tokenizer) if token != eos]
    if eos in (tokenizer.chat_template or "") and others:
        logger.warning(
            "warning: each document ends with %s, which the chat template uses to end turns; if"
            " pre-training had another token between documents, give --eos-token %s",
            eos,
            " or ".join(others),
        )


def end_tokens(tokenizer: TeacherTokenizer) -> list[str]:
    """Tokens of a tokenizer that may end documents, by their names."""
    return [t for t in _ENDS_OF_DOCUMENTS if tokenizer.backend.token_to_id(t) is not None]
