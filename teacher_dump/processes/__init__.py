"""Several processes write one dataset: ranks, Ray workers, and what each of them takes."""
