"""Layers over two and over four GPUs, by NCCL, give what one GPU with all experts gives."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import pytest
import torch

from moe_runtime import Parallel
from moe_runtime.reference import relative_error
from tests.parallel_worker import Case, alone, captured
from tests.test_parallel_layers import Ranks

pytestmark = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")

BOUND = 1e-2
"""The GPUs' partial sums, rounded to bf16 on their way, and kernels of other numbers of rows."""

Starter = Callable[[int], Ranks]


@pytest.fixture(scope="module")
def started() -> Iterator[Starter]:
    """Processes by their number, each with a GPU of its own; skips where GPUs are fewer."""
    ranks: dict[int, Ranks] = {}

    def of(size: int) -> Ranks:
        if torch.cuda.device_count() < size:
            pytest.skip(f"needs {size} GPUs")
        if size not in ranks:
            ranks[size] = Ranks(size, "cuda")
        return ranks[size]

    yield of
    for each in ranks.values():
        each.stop()


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
    "dep4": Case("dep4", (6, 40, 0, 3)),
    "dep4, many": Case("dep4", (700, 1300, 5, 900), max_num_tokens=4096),
    "dep4, fixed": Case("dep4", (40, 3, 0, 7), capacity=48),
    "dep4, chunks": Case("dep4", (900, 300, 0, 500), max_num_tokens=256),
    "dep4, all-gather": Case("dep4", (40, 3, 0, 7), "allgather"),
    "ep4": Case("ep4", (33,)),
    "dep2tp2": Case("dep2tp2", (40, 3)),
    "ep2tp2": Case("ep2tp2", (33,)),
}


def size_of(case: Case) -> int:
    return Parallel.parse(case.layout).world_size


@pytest.mark.parametrize("name", CASES)
def test_equals_one_gpu(started: Starter, name: str) -> None:
    case = CASES[name]
    ranks = started(size_of(case))
    for seen, (expected, _) in zip(ranks.run(case), ranks(functools.partial(alone, case)), strict=True):
        assert relative_error(torch.from_numpy(seen.output), torch.from_numpy(expected)) <= BOUND
        assert seen.again


@pytest.mark.parametrize("dispatch", ["alltoall", "allgather"])
@pytest.mark.parametrize("max_num_tokens", [64, 16])
@pytest.mark.parametrize("size", [2, 4])
def test_one_graph_serves_all_numbers_of_tokens(
    started: Starter, size: int, dispatch: str, max_num_tokens: int
) -> None:
    """In chunks as well, whose exchange is captured on the side stream."""
    case = Case(f"dep{size}", (40,) * size, dispatch, max_num_tokens, capacity=40)
    for differences, error in started(size)(functools.partial(captured, case)):
        assert error is None and max(differences) <= BOUND
