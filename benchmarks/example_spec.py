"""The description of a dataset that a benchmark makes, where only a few parts of it matter."""

from __future__ import annotations

from shards.keep import Keep
from shards.layout import Layout
from shards.spec import DatasetSpec, Documents, Model, Tokenizer


def example_spec(
    *,
    keep: Keep,
    layout: Layout,
    vocab_size: int,
    sequence_length: int = 512,
    seed: int = 0,
    entropies: bool = True,
) -> DatasetSpec:
    """Joined documents of an imaginary teacher."""
    return DatasetSpec(
        teacher=Model(
            config_sha256="",
            weights_sha256="example",
            revision=None,
            dtype="bfloat16",
            head_dtype="float32",
            entropies=entropies,
        ),
        tokenizer=Tokenizer(sha256="", vocab_size=vocab_size),
        documents=Documents(
            joined=True,
            bos="none",
            bos_token_id=None,
            eos_token_id=0,
            held_out=0.0,
            masked=False,
        ),
        keep=keep,
        layout=layout,
        sequence_length=sequence_length,
        seed=seed,
        tokens_sha256=str(seed),
    )
