"""Ranks: real processes over gloo whose values, gradients, weights, histories and ledgers are those of one process.

nccl needs a GPU for each rank and is not tested here.
"""

from __future__ import annotations

import functools

import pytest

import distributed_cases
from spawning import run_cases, run_ranks


@functools.cache
def outcome(size):
    return run_ranks(run_cases, size, "distributed_cases", limit=300)


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("name", distributed_cases.CASES)
def test_ranks_are_one_process(name, size):
    folder, codes = outcome(size)
    for rank in range(size):
        said = folder / f"{name}.{rank}"
        assert said.exists(), f"rank {rank} did not get to this case; the processes ended with {codes}"
        assert said.read_text() == "passed", f"rank {rank}: {said.read_text()}"
