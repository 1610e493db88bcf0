"""CUDA graphs of whole buckets, and the MoE block in torch.compile's own."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from benchmarks.common import pinned
from moe_runtime import FusedMoE, GraphedMoE
from moe_runtime.executors.base import MoEProblem, able_tactics
from moe_runtime.executors.cuda import CudaExecutor
from moe_runtime.kernels import LayerArguments
from moe_runtime.workload import make_workload
from tests.gpu import support
from tests.gpu.test_layer import small, tokens

SIZES = (1, 2, 4, 8, 16, 32, 64)


def routing(problem: MoEProblem, count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    ids = make_workload(problem.config, problem.parallel, count, "random", seed).topk_ids.cuda()
    return ids, torch.rand(ids.shape, device="cuda", generator=torch.Generator("cuda").manual_seed(seed))


@pytest.mark.parametrize("name", ["renormalise", "deepseek"])
def test_decode_loop(name: str) -> None:
    problem, _, layer = small(name, "ep2", 1, deterministic=True)
    graphed = GraphedMoE(layer, SIZES)
    for step, count in enumerate((64, 63, 33, 17, 5, 1, 8, 2, 40, 0, 3)):
        x, (ids, weights) = tokens(problem.config, count, step), routing(problem, max(count, 1), step)
        ids, weights = ids[:count], weights[:count]
        expected = layer(x, topk_ids=ids, topk_weights=weights)
        # Buckets may run other kernels than the call's own size does.
        torch.testing.assert_close(graphed(x, ids, weights), expected, rtol=2e-2, atol=2e-2)
        if count in SIZES:
            assert torch.equal(graphed(x, ids, weights), expected)


def test_replays_need_neither_the_layer_nor_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    problem, _, layer = small("renormalise", "ep1", 0, deterministic=True)
    graphed = GraphedMoE(layer, SIZES)
    x, (ids, weights) = tokens(problem.config, 20), routing(problem, 20)
    expected = graphed(x, ids, weights).clone()
    monkeypatch.setattr(CudaExecutor, "launch", lambda *_: pytest.fail("a replay called the executor"))
    torch.cuda.synchronize()
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    again = graphed(x, ids, weights)
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before
    assert torch.equal(again, expected)


def test_the_plan_is_frozen_at_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers with two plans, captured in turn: neither changes what the other's graphs run."""
    problem, weights, _ = small("renormalise", "ep1", 0)
    executor = support.executor()
    able = set(able_tactics(executor, problem, "gemm1")) & set(able_tactics(executor, problem, "gemm2"))
    plain = sorted(name for name in able if executor.variants[name].stores_rows)
    plans = [pinned(problem, executor, (name, name)) for name in (plain[0], plain[-1])]
    launched: list[tuple[str, str]] = []
    launch, names = CudaExecutor.launch, list(executor.variants)

    def spy(self: CudaExecutor, args: LayerArguments, stages: int) -> None:
        launched.append((names[args.gemm1_variant], names[args.gemm2_variant]))
        launch(self, args, stages)

    monkeypatch.setattr(CudaExecutor, "launch", spy)
    x, (ids, topk_weights) = tokens(problem.config, 30), routing(problem, 30)
    results, graphs = [], []
    for plan in plans:
        launched.clear()
        layer = FusedMoE(problem.config, problem.parallel, weights, plan)
        graphs.append(GraphedMoE(layer, (32,)))
        assert set(launched) == {plan.entries[0].pair}
        results.append(graphs[-1](x, ids, topk_weights).clone())
    launched.clear()
    for graph, result in zip(graphs, results, strict=True):
        assert torch.equal(graph(x, ids, topk_weights), result)
    assert not launched


def test_layers_share_a_pool() -> None:
    problem, _, first = small("renormalise", "ep1", 0, deterministic=True)
    _, _, second = small("renormalise", "ep1", 0, deterministic=True)
    pool = torch.cuda.graph_pool_handle()
    graphs = [GraphedMoE(layer, SIZES, pool) for layer in (first, second)]
    x, (ids, weights) = tokens(problem.config, 64), routing(problem, 64)
    expected = first(x, topk_ids=ids, topk_weights=weights)
    for _ in range(3):
        for graph in graphs:
            assert torch.equal(graph(x, ids, weights), expected)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
@torch.no_grad()
def test_compiled_block(mode: str) -> None:
    """inductor, with and without its own CUDA graphs, of router, experts and residual."""
    torch._dynamo.reset()
    problem, _, layer = small("renormalise", "ep1", 0, deterministic=True)
    router = torch.randn(problem.config.num_experts, problem.config.hidden_size, device="cuda", dtype=torch.bfloat16)

    def block(x: Tensor) -> Tensor:
        return x + layer(x, x @ router.T)

    compiled = torch.compile(block, fullgraph=True, mode=mode, dynamic=mode == "default" or None)
    for count in (16, 24, 16, 24):
        x = tokens(problem.config, count, count)
        for _ in range(3):
            torch.testing.assert_close(compiled(x), block(x), rtol=2e-2, atol=2e-2)
