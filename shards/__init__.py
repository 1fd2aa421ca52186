"""Shards of teacher log-probabilities: the format, its writer and its reader. Free of torch."""
