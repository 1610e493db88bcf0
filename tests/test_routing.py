from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moe_runtime.config import MoEConfig, RoutingMethod
from moe_runtime.routing import route
from tests import reference

RENORMALISE = MoEConfig("renormalise", 128, 128, 16, 4)
DEEPSEEK = MoEConfig("deepseek", 128, 128, 16, 4, RoutingMethod.DeepSeekV3, 4, 2, 2.5)
UNGROUPED = MoEConfig("ungrouped", 128, 128, 12, 5, RoutingMethod.DeepSeekV3, 1, 1, 2.827)
OTHERS = {
    method: MoEConfig(method.name, 128, 128, 16, 1 if method == RoutingMethod.Llama4 else 4, method)
    for method in RoutingMethod
    if method not in (RoutingMethod.Renormalize, RoutingMethod.DeepSeekV3)
}
CONFIGS = [RENORMALISE, DEEPSEEK, UNGROUPED, *OTHERS.values()]


def check(config: MoEConfig, logits: torch.Tensor, bias: torch.Tensor | None = None) -> None:
    ids, weights = route(config, logits, bias)
    expected_ids, expected_weights = reference.route(config, logits, bias)
    assert (ids.dtype, weights.dtype) == (torch.int32, torch.float32)
    assert ids.tolist() == expected_ids
    np.testing.assert_allclose(weights.numpy(), expected_weights, rtol=2e-6, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.name)
def test_random_logits(config: MoEConfig, with_bias: bool, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(200, config.num_experts, generator=generator).to(dtype)
    is_biased = with_bias and config.routing_method.reads_bias
    bias = torch.randn(config.num_experts, generator=generator).to(dtype) if is_biased else None
    check(config, logits, bias)


@given(st.data(), st.sampled_from(CONFIGS), st.integers(0, 5))
def test_ties_prefer_the_lower_id(data: st.DataObject, config: MoEConfig, num_tokens: int) -> None:
    size = num_tokens * config.num_experts
    coarse = data.draw(st.lists(st.integers(-2, 2), min_size=size, max_size=size))
    check(config, torch.tensor(coarse, dtype=torch.float32).view(num_tokens, config.num_experts))


def with_shared(config: MoEConfig, shared: int) -> MoEConfig:
    """The layer with as many experts more, which every token has."""
    return dataclasses.replace(
        config,
        num_experts=config.num_experts + shared,
        top_k=config.top_k + shared,
        num_fused_shared_experts=shared,
    )


@st.composite
def layers(draw: st.DrawFn) -> MoEConfig:
    """Any method at any size that it takes."""
    method = draw(st.sampled_from(RoutingMethod))
    shared = 0 if method == RoutingMethod.Llama4 else draw(st.integers(0, 2))
    if method != RoutingMethod.DeepSeekV3:
        experts = draw(st.integers(1, 70))
        top_k = 1 if method == RoutingMethod.Llama4 else draw(st.integers(1, min(experts, 32)))
        config = MoEConfig("drawn", 128, 128, experts, top_k, method)
        return with_shared(config, shared)
    groups, size = draw(st.integers(1, 8)), draw(st.integers(2, 9))
    kept = draw(st.integers(1, groups))
    top_k = draw(st.integers(1, kept * size))
    config = MoEConfig("drawn", 128, 128, groups * size, top_k, method, groups, kept, draw(st.floats(0.5, 4)))
    return with_shared(config, shared)


@given(layers(), st.integers(0, 2**32 - 1), st.booleans())
def test_any_size(config: MoEConfig, seed: int, with_bias: bool) -> None:
    """Logits of few values, so that ties come among others."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randint(-40, 40, (3, config.num_routed_experts), generator=generator) / 8
    is_biased = with_bias and config.routing_method.reads_bias
    bias = torch.randint(-2, 3, (config.num_routed_experts,), generator=generator) / 4 if is_biased else None
    check(config, logits, bias)


def test_softmax_before_or_after_the_choice() -> None:
    """Default keeps what its choice has of the whole; the others share the whole among the chosen."""
    logits = torch.randn(9, 16, generator=torch.Generator().manual_seed(0))
    whole, weights = route(OTHERS[RoutingMethod.Default], logits)[1], route(RENORMALISE, logits)[1]
    assert (whole.sum(-1) < 0.9).all()
    torch.testing.assert_close(whole / whole.sum(-1, keepdim=True), weights)
    torch.testing.assert_close(weights.sum(-1), torch.ones(9))
    torch.testing.assert_close(route(OTHERS[RoutingMethod.RenormalizeNaive], logits)[1], weights)


def test_methods_that_are_deepseek_s_without_groups() -> None:
    logits = torch.randn(9, 16, generator=torch.Generator().manual_seed(0))
    bias = torch.randn(16, generator=torch.Generator().manual_seed(1))
    plain = dataclasses.replace(DEEPSEEK, n_group=1, topk_group=1, routed_scaling_factor=1.0)
    for method, given_bias in ((RoutingMethod.SigmoidRenorm, None), (RoutingMethod.MiniMax2, bias)):
        for found, expected in zip(
            route(OTHERS[method], logits, given_bias), route(plain, logits, given_bias), strict=True
        ):
            assert torch.equal(found, expected)


def test_shared_experts_follow_with_weight_1() -> None:
    logits = torch.randn(5, 16, generator=torch.Generator().manual_seed(0))
    ids, weights = route(with_shared(DEEPSEEK, 2), logits)
    routed_ids, routed_weights = route(DEEPSEEK, logits)
    assert torch.equal(ids[:, :4], routed_ids) and torch.equal(weights[:, :4], routed_weights)
    assert ids[:, 4:].tolist() == [[16, 17]] * 5 and weights[:, 4:].tolist() == [[1.0, 1.0]] * 5


def test_llama4_weighs_by_one_sigmoid() -> None:
    logits = torch.full((2, 16), -3.0)
    logits[0, 7], logits[1, [2, 9]] = 0.0, 1.0
    ids, weights = route(OTHERS[RoutingMethod.Llama4], logits)
    assert ids.tolist() == [[7], [2]]
    torch.testing.assert_close(weights, torch.tensor([[0.5], [0.7310586]]))


def test_equal_logits_choose_the_first_experts() -> None:
    ids, weights = route(RENORMALISE, torch.zeros(1, 16))
    assert ids.tolist() == [[0, 1, 2, 3]]
    assert weights.tolist() == [[0.25] * 4]


def test_bias_chooses_but_does_not_weigh() -> None:
    bias = torch.zeros(16)
    bias[8:12] = 10.0
    ids, weights = route(DEEPSEEK, torch.zeros(1, 16), bias)
    assert ids.tolist() == [[8, 9, 10, 11]]
    torch.testing.assert_close(weights, torch.full((1, 4), 2.5 / 4))


def test_groups_limit_the_choice() -> None:
    logits = torch.full((1, 16), -4.0)
    logits[0, [0, 4, 8, 9, 12, 13]] = torch.tensor([3.0, 2.9, 1.0, 1.0, 1.0, 1.0])
    # Groups 2 and 3 have the best pairs, so the two best single experts, 0 and 4, are out.
    assert route(DEEPSEEK, logits)[0].tolist() == [[8, 9, 12, 13]]
