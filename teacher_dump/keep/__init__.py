"""Logits -> what is kept of each position -> rows; the trainer may use it, too."""
