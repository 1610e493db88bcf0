"""The experts in vLLM's kernel on its CUDA platform; skipped where vLLM 0.33 is not installed."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

if not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)
pytest.importorskip("vllm", exc_type=ImportError)

from vllm.model_executor.layers.fused_moe.expert_map_manager import determine_expert_map
from vllm.v1.worker import workspace

from moe_runtime import FP8BlockWeights, MoEConfig, Parallel
from moe_runtime.executors.base import MoEProblem
from moe_runtime.ops import LayerCalls
from moe_runtime.reference import reference_layer, relative_error
from tests.gpu.test_layer import CONFIGS, LAYER_BOUND, tokens
from tests.vllm_support import PrepareQuantised, ep, kernel, offered, run  # noqa: F401

pytestmark = pytest.mark.usefixtures("offered")


@pytest.fixture(autouse=True)
def manager() -> Iterator[None]:
    """vLLM's own memory for workspaces."""
    workspace.init_workspace_manager(torch.device("cuda", torch.cuda.current_device()))
    yield
    workspace.reset_workspace_manager()


def layer(config: MoEConfig, size: int = 1, rank: int = 0) -> tuple[MoEProblem, FP8BlockWeights]:
    problem = MoEProblem(config, Parallel("ep", size, rank))
    return problem, FP8BlockWeights.random(config, problem.num_local_experts, seed=7, device="cuda")


def routing(config: MoEConfig, count: int) -> tuple[Tensor, Tensor]:
    scores = torch.rand(count, config.num_experts, device="cuda")
    return scores.topk(config.top_k).indices.to(torch.int32), torch.rand(count, config.top_k, device="cuda")


@pytest.fixture
def given_workspaces(monkeypatch: pytest.MonkeyPatch) -> list[Tensor | None]:
    seen: list[Tensor | None] = []
    run_call = LayerCalls.run

    def spy(self: LayerCalls, weights: Any, inputs: Any, output: Tensor, workspace: Tensor | None) -> Tensor:
        seen.append(workspace)
        return run_call(self, weights, inputs, output, workspace)

    monkeypatch.setattr(LayerCalls, "run", spy)
    return seen


@pytest.mark.parametrize("name", CONFIGS)
def test_kernel(name: str, given_workspaces: list[Tensor | None]) -> None:
    config = CONFIGS[name]
    problem, weights = layer(config)
    built = kernel(config, weights)
    for count in (1000, 300, 129, 32, 7, 1):  # a locked workspace serves whatever is smaller than the first
        x, (ids, topk) = tokens(config, count), routing(config, count)
        output = run(built, config, weights, x, ids, topk)
        assert relative_error(output, reference_layer(problem, weights, x, ids, topk)) <= LAYER_BOUND
        workspace.lock_workspace()
    assert all(given is not None for given in given_workspaces)


@pytest.mark.parametrize("placement", ["linear", "round_robin"])
@pytest.mark.parametrize("rank", [0, 3])
def test_expert_map(rank: int, placement: Any) -> None:
    config = CONFIGS["deepseek"]
    _, expert_map, _ = determine_expert_map(4, rank, 64, placement)
    assert expert_map is not None
    expert_map = expert_map.cuda()
    problem, weights = layer(config, 4, rank)
    built = kernel(config, weights, ep(4, rank))
    x, (ids, topk) = tokens(config, 200), routing(config, 200)
    ids[3] = -1
    local = torch.where(ids >= 0, expert_map[ids], -1)
    placed = torch.where(local >= 0, local + problem.local_expert_offset, -1).to(torch.int32)
    for _ in range(2):
        output = run(built, config, weights, x, ids, topk, expert_map=expert_map)
        assert relative_error(output, reference_layer(problem, weights, x, placed, topk)) <= LAYER_BOUND


def test_quantised_rows_of_a_dispatch() -> None:
    config = CONFIGS["renormalise"]
    problem, weights = layer(config, 2, 1)
    _, expert_map, _ = determine_expert_map(2, 1, 64)
    assert expert_map is not None
    built = kernel(config, weights, ep(2, 1, dp_size=2, dp_rank=1), PrepareQuantised())
    x, (ids, topk) = tokens(config, 77), routing(config, 77)
    output = run(built, config, weights, x, ids, topk, expert_map=expert_map.cuda())
    assert relative_error(output, reference_layer(problem, weights, x, ids, topk)) <= LAYER_BOUND


def test_router_weight_on_input() -> None:
    config = dataclasses.replace(CONFIGS["renormalise"], top_k=1)
    problem, weights = layer(config)
    x, (ids, topk) = tokens(config, 40), routing(config, 40)
    output = run(kernel(config, weights), config, weights, x, ids, topk, apply_router_weight_on_input=True)
    expected = reference_layer(problem, weights, x * topk.bfloat16(), ids, torch.ones_like(topk))
    assert relative_error(output, expected) <= LAYER_BOUND


@pytest.mark.parametrize("seen_before", [True, False])
def test_cuda_graph(seen_before: bool) -> None:
    """Also where a map comes up for the first time while a graph is captured."""
    config = CONFIGS["deepseek"]
    problem, weights = layer(config, 4, 1)
    expert_map = determine_expert_map(4, 1, 64)[1]
    assert expert_map is not None
    expert_map = expert_map.cuda()
    built = kernel(config, weights, ep(4, 1))
    x, (ids, topk) = tokens(config, 64), routing(config, 64)
    run(built, config, weights, x, ids, topk, expert_map=expert_map if seen_before else expert_map.clone())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = run(built, config, weights, x, ids, topk, expert_map=expert_map)
    x.normal_()
    ids.copy_(routing(config, 64)[0])
    graph.replay()
    assert relative_error(output, reference_layer(problem, weights, x, ids, topk)) <= LAYER_BOUND
