"""Layers whose tokens DeepEP moves, with a stand-in for its package: what they give, and what they refuse."""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from moe_runtime import InvalidArgument, MoEConfig, Parallel, ParallelMoE
from moe_runtime.config import RoutingMethod
from moe_runtime.errors import Unsupported
from moe_runtime.executors.base import LayerInputs, MoEProblem
from moe_runtime.parallel import deepep
from moe_runtime.parallel.dispatch import Dispatcher, make_dispatcher
from moe_runtime.parallel.groups import RankGroup, RankGroups
from moe_runtime.parallel.packing import TorchPacking
from moe_runtime.reference import relative_error
from moe_runtime.weights import FP8BlockWeights

from . import fake_deep_ep
from .parallel_worker import HIDDEN, Case, Seen, alone, run
from .test_parallel_layers import BOUND, SIZE, UNEQUAL, Ranks

CASES = {
    "equal": Case("dep4", (6, 6, 6, 6), "deepep"),
    "unequal and none": Case("dep4", UNEQUAL, "deepep"),
    "one token in all": Case("dep4", (0, 0, 1, 0), "deepep"),
    "no token at all": Case("dep4", (0, 0, 0, 0), "deepep"),
    "all to one rank": Case("dep4", UNEQUAL, "deepep", only_first=True),
    "ready ids": Case("dep4", UNEQUAL, "deepep", ids=True),
    "bf16": Case("dep4", UNEQUAL, "deepep", format="bf16"),
    "bf16_mxfp4": Case("dep4", UNEQUAL, "deepep", format="bf16_mxfp4"),
    "weighs the input": Case("dep4", UNEQUAL, "deepep", method=RoutingMethod.Llama4),
    "chunks": Case("dep4", UNEQUAL, "deepep", max_num_tokens=4),
    "chunks, inference mode": Case("dep4", (9, 0, 2, 5), "deepep", max_num_tokens=2, inference_mode=True),
    "slices": Case("dep2tp2", (0, 9), "deepep", max_num_tokens=4),
}
FIXED = {
    "fixed": Case("dep4", UNEQUAL, "deepep", capacity=16),
    "fixed and exact": Case("dep4", (3, 3, 3, 3), "deepep", capacity=3, ids=True),
    "fixed, bf16": Case("dep4", UNEQUAL, "deepep", capacity=16, format="bf16"),
    "fixed chunks": Case("dep4", UNEQUAL, "deepep", max_num_tokens=5, capacity=12),
    "fixed, slices": Case("dep2tp2", (3, 8), "deepep", capacity=8),
}


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    started = Ranks()
    yield started
    started.stop()


def run_with_fake(case: Case, nvlink_ranks: int, rank: int) -> Seen:
    fake_deep_ep.install(nvlink_ranks)
    return run(case, rank)


def seen_by_ranks(ranks: Ranks, case: Case, nvlink_ranks: int = 8) -> list[Seen]:
    answers = ranks(functools.partial(run_with_fake, case, nvlink_ranks))
    assert not any(error for _, error in answers), answers
    return [seen for seen, _ in answers]


def check_equals_one_rank(case: Case, answers: list[Seen]) -> None:
    for rank, seen in enumerate(answers):
        expected = alone(case, rank)
        assert seen.output.shape == expected.shape
        assert relative_error(torch.from_numpy(seen.output), torch.from_numpy(expected)) <= BOUND
        assert seen.again
        assert seen.dtype == ("torch.float8_e4m3fn" if case.format == "fp8_block" else "torch.bfloat16")


@pytest.mark.parametrize("name", CASES | FIXED)
def test_equals_one_rank(ranks: Ranks, name: str) -> None:
    case = (CASES | FIXED)[name]
    check_equals_one_rank(case, seen_by_ranks(ranks, case))


@pytest.mark.parametrize("name", ["unequal and none", "no token at all", "ready ids", "bf16", "chunks"])
def test_equals_one_rank_over_nodes(ranks: Ranks, name: str) -> None:
    """Of two ranks each."""
    check_equals_one_rank(CASES[name], seen_by_ranks(ranks, CASES[name], nvlink_ranks=2))


@pytest.mark.parametrize(
    ("name", "nvlink_ranks", "rows"),
    [
        ("unequal and none", 8, [18]),
        ("unequal and none", 2, [18]),
        ("chunks", 8, [9, 5, 4]),
        ("chunks", 2, [9, 5, 4]),
        ("fixed", 8, [64]),
        ("fixed chunks", 8, [20, 20, 8]),
        ("slices", 8, [4, 4, 1]),
    ],
)
def test_rows_that_a_plan_is_looked_up_by(ranks: Ranks, name: str, nvlink_ranks: int, rows: list[int]) -> None:
    """All ranks' tokens, as after our own all-to-all; R times the capacity with one."""
    for seen in seen_by_ranks(ranks, (CASES | FIXED)[name], nvlink_ranks):
        assert seen.kernel_rows == rows


def buffers_of_layers(rank: int) -> list[int]:
    """Which Buffer each of three layers has: of the usual hidden size, of twice that, and of the usual one again."""
    fake_deep_ep.install()
    deepep._buffers.clear()
    fake_deep_ep.Buffer.made.clear()
    parallel = Parallel.parse("dep4", rank)

    def called(hidden: int) -> ParallelMoE:
        case = Case("dep4", (2, 0, 1, 3), "deepep", format="bf16")
        if hidden == HIDDEN:
            layer = case.layer(rank)
        else:
            wide = MoEConfig("wide", hidden, 128, 8, 3)
            layer = ParallelMoE(wide, parallel, FP8BlockWeights.random(wide, 2), dispatch="deepep")
        count = case.counts[rank]
        layer(torch.randn(count, hidden).bfloat16(), torch.randn(count, 8))
        return layer

    layers = [called(hidden) for hidden in (HIDDEN, 2 * HIDDEN, HIDDEN)]
    x, logits = torch.randn(4, HIDDEN).bfloat16(), torch.randn(4, 8)
    layers[0](x, logits)
    return [fake_deep_ep.Buffer.made.index(layer.dispatcher._buffer) for layer in layers]  # type: ignore[attr-defined]


def test_layers_share_a_buffer_that_grows(ranks: Ranks) -> None:
    """And one that has begun keeps its own."""
    assert ranks(buffers_of_layers) == [([0, 1, 1], None)] * SIZE


def fixed_over_nodes(rank: int) -> None:
    fake_deep_ep.install(nvlink_ranks=2)
    case = FIXED["fixed"]
    case.call(case.layer(rank))


def test_a_capacity_over_nodes_is_refused(ranks: Ranks) -> None:
    """And the group goes on afterwards."""
    for _, error in ranks(fixed_over_nodes):
        assert error is not None
        assert error[:2] == (
            "InvalidArgument",
            "capacity: got 16; accepted: None for 'deepep' over 4 ranks, more than the 2 of a node. It waits for "
            "counts between nodes. dispatch='alltoall' or 'allgather' take a capacity.",
        )
    seen_by_ranks(ranks, CASES["equal"])


# What needs no other process.


def made(text: str) -> Dispatcher:
    layout = Parallel.parse(text)
    problem = MoEProblem(MoEConfig("small", 256, 256, 24, 2), layout)
    group = RankGroup(SimpleNamespace(), layout.size, text)  # type: ignore[arg-type]
    return make_dispatcher(problem, RankGroups(group, group, None), TorchPacking(problem), "deepep")


@pytest.fixture
def package(monkeypatch: pytest.MonkeyPatch) -> Any:
    found: Any = SimpleNamespace(Buffer=fake_deep_ep.Buffer)
    monkeypatch.setitem(sys.modules, "deep_ep", found)
    return found


def test_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "deep_ep", None)
    with pytest.raises(
        Unsupported,
        match=r"^dispatch 'deepep' needs the package deep_ep, which cannot be imported \(.*\); build and install it "
        r"from https://github.com/deepseek-ai/DeepEP, .*, or use dispatch='alltoall'$",
    ):
        made("dep4")


def test_a_package_without_its_buffer(package: Any) -> None:
    del package.Buffer
    with pytest.raises(Unsupported, match=r"^dispatch 'deepep' needs deep_ep.Buffer; install deep_ep 1.1 to 2.1"):
        made("dep4")


def test_a_number_of_ranks_that_it_does_not_serve(package: Any) -> None:
    with pytest.raises(
        InvalidArgument, match=r"^dispatch: got 'deepep' over 3 ranks; accepted: a number of ranks that"
    ):
        made("dep3")


def test_tokens_on_the_cpu(package: Any) -> None:
    x, ids = torch.zeros(1, 256).bfloat16(), torch.zeros(1, 2, dtype=torch.int32)
    with pytest.raises(InvalidArgument, match=r"^dispatch: got 'deepep' for tokens on cpu; accepted: tokens on a GPU."):
        made("dep4").dispatch(LayerInputs(x, topk_ids=ids, topk_weights=torch.zeros(1, 2)), 0, None)


@pytest.mark.parametrize("text", ["ep4", "tp2", "dep1"])
def test_only_where_ranks_have_tokens_of_their_own(text: str, package: Any) -> None:
    with pytest.raises(InvalidArgument, match=r"^dispatch: got 'deepep'; accepted: allreduce under"):
        made(text)


def test_bytes_are_asked_for_rdma_only_between_nodes(package: Any) -> None:
    """A deep_ep without NVSHMEM answers that question with an error."""
    nvlink, rdma = deepep._buffer_sizes(package, 8, 512)
    assert nvlink > 0 and rdma == 0
    assert all(size > 0 for size in deepep._buffer_sizes(package, 16, 512))
