"""A tokenizer's content and a dataset's copy of it."""
