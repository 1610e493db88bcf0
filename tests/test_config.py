from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from moe_runtime.config import PRESETS, MoEConfig, RoutingMethod
from moe_runtime.errors import InvalidArgument

DEEPSEEK = MoEConfig.preset("deepseek-r1")
QWEN = MoEConfig.preset("qwen3-235b")


@pytest.mark.parametrize(
    ("name", "hidden", "intermediate", "experts", "top_k"),
    [
        ("qwen3-235b", 4096, 1536, 128, 8),
        ("qwen3-30b", 2048, 768, 128, 8),
        ("deepseek-r1", 7168, 2048, 256, 8),
        ("kimi-k2", 7168, 2048, 384, 8),
        ("mixtral-8x7b", 4096, 14336, 8, 2),
    ],
)
def test_presets(name: str, hidden: int, intermediate: int, experts: int, top_k: int) -> None:
    config = MoEConfig.preset(name)
    assert config.name == name
    shape = (config.hidden_size, config.intermediate_size, config.num_experts, config.top_k)
    assert shape == (hidden, intermediate, experts, top_k)


def test_deepseek_routing() -> None:
    assert DEEPSEEK.routing_method == RoutingMethod.DeepSeekV3 == 2
    assert (DEEPSEEK.n_group, DEEPSEEK.topk_group, DEEPSEEK.routed_scaling_factor) == (8, 4, 2.5)
    assert MoEConfig.preset("deepseek-v3") == DEEPSEEK


def test_unknown_preset_lists_the_known_ones() -> None:
    with pytest.raises(InvalidArgument, match=r"preset: got 'qwen9'") as error:
        MoEConfig.preset("qwen9")
    assert all(name in str(error.value) for name in PRESETS)


@pytest.mark.parametrize(
    ("base", "argument", "value"),
    [
        (QWEN, "top_k", 129),
        (QWEN, "top_k", 0),
        (QWEN, "hidden_size", 4000),
        (QWEN, "intermediate_size", 2880),
        (QWEN, "num_experts", -1),
        (QWEN, "num_experts", 128.0),
        (QWEN, "format", "int3"),
        (QWEN, "clamp_limit", 0.0),
        (QWEN, "clamp_limit", float("nan")),
        (QWEN, "n_group", 8),
        (QWEN, "routed_scaling_factor", 2.5),
        (QWEN, "routing_method", 5),
        (QWEN, "num_fused_shared_experts", -1),
        (QWEN, "num_fused_shared_experts", 8),
        (dataclasses.replace(QWEN, top_k=1, routing_method=RoutingMethod.Llama4), "top_k", 2),
        (DEEPSEEK, "n_group", 7),
        (DEEPSEEK, "n_group", 256),
        (DEEPSEEK, "topk_group", 9),
        (DEEPSEEK, "top_k", 129),
    ],
)
def test_bad_value_names_the_argument(base: MoEConfig, argument: str, value: Any) -> None:
    with pytest.raises(InvalidArgument) as error:
        dataclasses.replace(base, **{argument: value})
    assert error.value.argument == argument
    assert str(error.value).startswith(f"{argument}: got ")
    assert isinstance(error.value, ValueError)


def test_scaled_changes_shapes_only() -> None:
    small = DEEPSEEK.scaled(hidden_size=256, intermediate_size=128, num_experts=32)
    assert (small.hidden_size, small.intermediate_size, small.num_experts) == (256, 128, 32)
    assert small.name == "deepseek-r1-scaled"
    assert (small.routing_method, small.n_group, small.top_k) == (DEEPSEEK.routing_method, 8, 8)
    with pytest.raises(InvalidArgument, match="hidden_size"):
        DEEPSEEK.scaled(hidden_size=200)
