"""Text of a dataset's tokens, by the tokenizer that it carries."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from shards.errors import InputError
from shards.tokenizer.files import TOKENIZER


def token_decoder(path: Path) -> Callable[[int], str]:
    """The text of a token id, for a dataset folder or one of its shards.

    InputError without a tokenizer, or with one that cannot be read.
    """
    from tokenizers import Tokenizer

    folder = path if path.is_dir() else path.absolute().parent.parent
    file = folder / TOKENIZER / "tokenizer.json"
    if not file.is_file():
        raise InputError(f"{file}: missing, --row needs the dataset's tokenizer")
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # tokenizers raises no other kind
        raise InputError(f"{file}: not a tokenizer that can be read ({error})") from error

    def text_of(*tokens: int) -> str:
        text: str = tokenizer.decode(list(tokens), skip_special_tokens=False)
        return text

    if tokenizer.decoder is None:  # tokens are words, and a space is put between any two
        return text_of
    # Decoders drop a space at the start of a text: so a word comes first, and is cut off again.
    tokens = range(tokenizer.get_vocab_size())
    word = next((token for token in tokens if text_of(token).isalnum()), None)
    if word is None:
        return text_of
    before = text_of(word)

    def decode(token: int) -> str:
        text = text_of(word, token)
        return text.removeprefix(before) if text.startswith(before) else text_of(token)

    return decode
