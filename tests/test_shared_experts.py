"""Experts that every token has beside those that the router chooses, from configuration to output."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from moe_runtime import FP8BlockWeights, FusedMoE, InvalidArgument, MoEConfig, Parallel
from moe_runtime.config import RoutingMethod
from moe_runtime.executors.base import MoEProblem
from moe_runtime.flashinfer import fp8_block_scale_moe
from moe_runtime.tuning.plan import PlanKey, routing_name
from moe_runtime.tuning.plan_tools import config_of
from moe_runtime.workload import DISPATCHES, expected_rows, hit_probability, make_workload
from tests import reference

ROUTED = MoEConfig("routed", 256, 128, 8, 3, RoutingMethod.DeepSeekV3, 4, 2, 2.5)
CONFIG = MoEConfig("shared", 256, 128, 10, 5, RoutingMethod.DeepSeekV3, 4, 2, 2.5, num_fused_shared_experts=2)
WEIGHTS = FP8BlockWeights.random(CONFIG, 10, seed=1)
PARTS = WEIGHTS.gate_up, WEIGHTS.gate_up_scale, WEIGHTS.down, WEIGHTS.down_scale


def inputs(num_tokens: int = 12) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(num_tokens)
    x = torch.randn(num_tokens, 256, generator=generator).bfloat16()
    return x, torch.randn(num_tokens, 8, generator=generator)


def expected(x: Tensor, logits: Tensor, weights: FP8BlockWeights = WEIGHTS) -> Tensor:
    """The routed experts' sum, and both shared ones in full."""
    ids, topk_weights = reference.route(ROUTED, logits)
    routed = reference.layer(ROUTED, weights, 0, x, ids, topk_weights, quantised=True)
    both, ones = torch.tensor([[8, 9]] * len(x)), torch.ones(len(x), 2)
    return routed + reference.layer(CONFIG, weights, 0, x, both, ones, quantised=True)


def test_a_layer() -> None:
    x, logits = inputs()
    result = FusedMoE(CONFIG, Parallel.parse("ep1"), WEIGHTS)(x, logits)
    assert reference.relative_error(result, expected(x, logits)) < 1e-2
    compiled = torch.compile(FusedMoE(CONFIG, Parallel.parse("ep1"), WEIGHTS).__call__, backend="eager", fullgraph=True)
    assert torch.equal(compiled(x, logits), result)


def test_the_last_shard_holds_them() -> None:
    x, logits = inputs()
    total = torch.zeros(x.shape, dtype=torch.float64)
    for rank in range(2):
        weights = FP8BlockWeights(*(part[5 * rank : 5 * rank + 5] for part in PARTS))
        total += FusedMoE(CONFIG, Parallel.parse("ep2", rank), weights)(x, logits).double()
    assert reference.relative_error(total, expected(x, logits)) < 1e-2


def test_logits_are_of_routed_experts() -> None:
    layer = FusedMoE(CONFIG, Parallel.parse("ep1"), WEIGHTS)
    with pytest.raises(InvalidArgument, match=r"routing_logits: got shape \[12, 10\]; accepted: shape \[12, 8\]"):
        layer(inputs()[0], torch.zeros(12, 10))


def test_flashinfer_counts_routed_experts() -> None:
    x, logits = inputs()
    routing = (8, 3, 4, 2, 128)  # num_experts, top_k, n_group, topk_group, intermediate_size
    arguments = (logits, None, x, None, *PARTS, *routing)
    result = fp8_block_scale_moe(*arguments, 0, 8, 2.5, 2, num_fused_shared_experts=2)
    assert isinstance(result, Tensor)
    turned = FP8BlockWeights(*PARTS, gate_first=False)  # FlashInfer's rows are [up; gate]
    assert reference.relative_error(result, expected(x, logits, turned)) < 1e-2
    with pytest.raises(InvalidArgument, match="num_fused_shared_experts: got 2"):
        fp8_block_scale_moe(*arguments, 4, 4, 2.5, 2, num_fused_shared_experts=2)


def test_a_plan_s_key_names_them() -> None:
    key = PlanKey.of(MoEProblem(CONFIG, Parallel.parse("ep2")), "balanced", 64, "cpu", "hash")
    assert key.routing == routing_name(CONFIG) == "DeepSeekV3+2:2/4"
    assert config_of(key).num_fused_shared_experts == 2
    assert routing_name(ROUTED) == "DeepSeekV3:2/4"


@pytest.mark.parametrize("distribution", ["balanced", "random", "zipf:1.0"])
@pytest.mark.parametrize("dispatch", DISPATCHES)
@pytest.mark.parametrize("regime", ["ep", "dep"])
def test_each_token_has_them_once(regime: str, dispatch: str, distribution: str) -> None:
    tokens = 40
    for rank in range(2):
        workload = make_workload(CONFIG, Parallel.parse(f"{regime}2", rank), tokens, distribution, 0, dispatch)
        every = tokens * (2 if regime == "dep" else 1)
        rows = workload.rows_per_expert.tolist()
        assert rows[3:] == [every, every] if rank else max(rows) < every


@pytest.mark.parametrize("dispatch", DISPATCHES)
def test_expected_rows_are_the_mean(dispatch: str) -> None:
    config = MoEConfig("even", 256, 128, 9, 3, num_fused_shared_experts=1)
    for rank in range(3):
        parallel = Parallel.parse("dep3", rank)
        rows = [make_workload(config, parallel, 300, "random", seed, dispatch).num_rows for seed in range(8)]
        # Compact rows hold an expert once each, so the fullest expert of a shard may need some more.
        assert sum(rows) / 8 == pytest.approx(expected_rows(config, parallel, 300, dispatch), rel=0.08)


def test_hit_probability_by_counting_subsets() -> None:
    config = MoEConfig("even", 256, 128, 9, 3, num_fused_shared_experts=1)
    subsets = [(*subset, 8) for subset in itertools.combinations(range(8), 2)]
    for rank in range(3):
        parallel = Parallel.parse("dep3", rank)
        hits = sum(any(expert in parallel.shard(9) for expert in subset) for subset in subsets)
        assert hit_probability(config, parallel) == pytest.approx(hits / len(subsets))
