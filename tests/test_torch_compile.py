"""A model's MoE block under torch.compile: whole, once for all sizes, once for all layers."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from moe_runtime import FusedMoE, MoEConfig, Parallel
from moe_runtime.executors.base import MoEProblem
from moe_runtime.weights import random_weights
from tests.test_layer import CONFIGS, DEEPSEEK, RENORMALISE, make_layer, tokens
from tests.test_ops import make_plan, spy_on_tactics

SIZES = (5, 11, 64, 2, 7, 33)


class Block(nn.Module):
    """What follows attention in a decoder layer."""

    def __init__(self, experts: FusedMoE, seed: int = 0) -> None:
        super().__init__()
        config = experts.problem.config
        generator = torch.Generator().manual_seed(seed)
        self.norm = nn.RMSNorm(config.hidden_size, dtype=torch.bfloat16)
        self.router = nn.Linear(config.hidden_size, config.num_experts, bias=False, dtype=torch.bfloat16)
        self.router.weight.data.normal_(generator=generator)
        self.experts = experts

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        return x + self.experts(h, self.router(h))


@pytest.fixture
def counter() -> CompileCounterWithBackend:
    torch._dynamo.reset()
    return CompileCounterWithBackend("aot_eager")


def dynamic(x: Tensor) -> Tensor:
    torch._dynamo.mark_dynamic(x, 0)
    return x


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@torch.no_grad()
def test_one_compilation_serves_all_sizes(config: MoEConfig, counter: CompileCounterWithBackend) -> None:
    block = Block(make_layer(config, "ep2", 1))
    compiled = torch.compile(block, fullgraph=True, backend=counter)
    for size in SIZES:
        x = tokens(config, size, seed=size)
        assert torch.equal(compiled(dynamic(x)), block(x))
    assert counter.frame_count == 1


@torch.no_grad()
def test_dynamic_compiles_at_the_first_call_only(counter: CompileCounterWithBackend) -> None:
    block = Block(make_layer(RENORMALISE))
    compiled = torch.compile(block, fullgraph=True, backend=counter, dynamic=True)
    compiled(tokens(RENORMALISE, 5))
    first = counter.frame_count
    for size in SIZES:
        x = tokens(RENORMALISE, size, seed=size)
        assert torch.equal(compiled(x), block(x))
    assert counter.frame_count == first


@torch.no_grad()
def test_zero_and_one_token_are_compilations_of_their_own(counter: CompileCounterWithBackend) -> None:
    """torch holds sizes 0 and 1 for constants, whatever the op."""
    block = Block(make_layer(RENORMALISE))
    compiled = torch.compile(block, fullgraph=True, backend=counter)
    compiled(dynamic(tokens(RENORMALISE, 5)))
    for size, compilations in ((1, 2), (0, 3), (1, 3), (0, 3), (6, 3)):
        x = tokens(RENORMALISE, size)
        assert torch.equal(compiled(x), block(x))
        assert counter.frame_count == compilations


@torch.no_grad()
def test_layers_of_a_rank_share_a_compilation(counter: CompileCounterWithBackend) -> None:
    x = tokens(DEEPSEEK, 9)
    for seed in range(3):
        block = Block(make_layer(DEEPSEEK, "ep2", 1), seed)
        assert torch.equal(torch.compile(block, fullgraph=True, backend=counter)(dynamic(x)), block(x))
    assert counter.frame_count == 1


@torch.no_grad()
def test_another_plan_is_another_compilation(
    counter: CompileCounterWithBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compiled code holds its layer's plan, and a layer with another plan does not run in it."""
    block, x = Block(make_layer(RENORMALISE)), tokens(RENORMALISE, 6)
    compiled = torch.compile(block, fullgraph=True, backend=counter)
    expected = compiled(dynamic(x))
    block.experts = make_layer(RENORMALISE, plan=make_plan(block.experts.problem))
    seen = spy_on_tactics(monkeypatch)
    torch.testing.assert_close(compiled(x), expected)
    assert seen == [("padded_batch", "grouped_mm")] and counter.frame_count == 2
    compiled(dynamic(tokens(RENORMALISE, 12)))
    assert seen[1:] == seen[:1] and counter.frame_count == 2


@pytest.mark.parametrize("format", ["nvfp4", "bf16_mxfp4"])
@torch.no_grad()
def test_packed_weights(format: str, counter: CompileCounterWithBackend) -> None:
    config = dataclasses.replace(RENORMALISE, format=format)
    problem = MoEProblem(config, Parallel("ep", 1))
    block = Block(FusedMoE(config, problem.parallel, random_weights(problem)))
    compiled = torch.compile(block, fullgraph=True, backend=counter)
    for size in SIZES[:3]:
        x = tokens(config, size, seed=size)
        assert torch.equal(compiled(dynamic(x)), block(x))
    assert counter.frame_count == 1


@pytest.mark.slow
@torch.no_grad()
def test_inductor() -> None:
    torch._dynamo.reset()
    counter, block = CompileCounterWithBackend("inductor"), Block(make_layer(RENORMALISE, "ep2", 0))
    compiled = torch.compile(block, fullgraph=True, backend=counter)
    for size in SIZES:
        x = tokens(RENORMALISE, size, seed=size)
        torch.testing.assert_close(compiled(dynamic(x)), block(x), rtol=2e-2, atol=2e-2)
    assert counter.frame_count == 1
