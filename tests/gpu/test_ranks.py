"""Layers over two GPUs, by NCCL, give what one GPU with all experts gives."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import pytest
import torch

from moe_runtime.reference import relative_error
from tests.parallel_worker import Case, alone, captured
from tests.test_parallel_layers import Ranks

pytestmark = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")

BOUND = 1e-2
"""The two GPUs' partial sums, rounded to bf16 on their way, and kernels of other numbers of rows."""


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    started = Ranks(2, "cuda")
    yield started
    started.stop()


CASES = {
    "dep2": Case("dep2", (6, 6)),
    "dep2, many": Case("dep2", (700, 1300), max_num_tokens=4096),
    "dep2, none": Case("dep2", (0, 5)),
    "dep2, no token at all": Case("dep2", (0, 0)),
    "dep2, ready ids": Case("dep2", (40, 3), ids=True),
    "dep2, bf16": Case("dep2", (40, 3), format="bf16"),
    "dep2, fixed": Case("dep2", (40, 3), capacity=48),
    "dep2, chunks": Case("dep2", (900, 300), max_num_tokens=256),
    "dep2, fixed chunks": Case("dep2", (900, 300), max_num_tokens=256, capacity=1000),
    "dep2, all-gather": Case("dep2", (40, 3), "allgather"),
    "dep2, all-gather, fixed": Case("dep2", (40, 3), "allgather", capacity=48),
    "ep2": Case("ep2", (33,)),
    "ep2, chunks": Case("ep2", (600,), max_num_tokens=256),
    "tp2": Case("tp2", (33,)),
}


@pytest.mark.parametrize("name", CASES)
def test_equals_one_gpu(ranks: Ranks, name: str) -> None:
    case = CASES[name]
    for seen, (expected, _) in zip(ranks.run(case), ranks(functools.partial(alone, case)), strict=True):
        assert relative_error(torch.from_numpy(seen.output), torch.from_numpy(expected)) <= BOUND
        assert seen.again


@pytest.mark.parametrize("dispatch", ["alltoall", "allgather"])
@pytest.mark.parametrize("max_num_tokens", [64, 16])
def test_one_graph_serves_all_numbers_of_tokens(ranks: Ranks, dispatch: str, max_num_tokens: int) -> None:
    """In chunks as well, whose exchange is captured on the side stream."""
    case = Case("dep2", (40, 40), dispatch, max_num_tokens, capacity=40)
    for differences, error in ranks(functools.partial(captured, case)):
        assert error is None and max(differences) <= BOUND
