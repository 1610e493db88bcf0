from __future__ import annotations

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
CONFIGS = [RENORMALISE, DEEPSEEK, UNGROUPED]


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
    is_biased = with_bias and config.routing_method == RoutingMethod.DeepSeekV3
    bias = torch.randn(config.num_experts, generator=generator).to(dtype) if is_biased else None
    check(config, logits, bias)


@given(st.data(), st.sampled_from(CONFIGS), st.integers(0, 5))
def test_ties_prefer_the_lower_id(data: st.DataObject, config: MoEConfig, num_tokens: int) -> None:
    size = num_tokens * config.num_experts
    coarse = data.draw(st.lists(st.integers(-2, 2), min_size=size, max_size=size))
    check(config, torch.tensor(coarse, dtype=torch.float32).view(num_tokens, config.num_experts))


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
