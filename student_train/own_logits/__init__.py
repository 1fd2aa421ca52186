"""A dataset of the student's own distributions, written while it trains (`--save-logits`)."""
