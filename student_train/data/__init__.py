"""Shards -> batches, in an order that a number decides."""
