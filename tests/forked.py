"""Processes that start at once: forked from one that has imported what tests of kills need."""

from __future__ import annotations

import multiprocessing

FORKED = multiprocessing.get_context("forkserver")
# pandas, if it is there, is imported by Arrow: half a second in each process otherwise.
FORKED.set_forkserver_preload(["tests.test_publication", "tests.test_train_kill", "pandas"])
