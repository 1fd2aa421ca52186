"""The folder of a dataset: which shards are there, how one gets its names, how a dataset grows."""
