from __future__ import annotations

import dataclasses

import pytest
import torch

from moe_runtime.config import MoEConfig
from moe_runtime.errors import InvalidArgument
from moe_runtime.formats import FORMATS, Extra, fp8_block
from moe_runtime.formats.weights import dequantise_weights
from moe_runtime.weights import FP8BlockWeights, PackedWeights, deinterleave
from tests import reference

CONFIG = MoEConfig("small", 256, 128, 8, 2)


def test_random_is_finite_and_repeatable() -> None:
    weights = FP8BlockWeights.random(CONFIG, 4, seed=3)
    weights.check(CONFIG, 4)
    assert weights.gate_up.float().isfinite().all()
    assert len(weights.gate_up.view(torch.uint8).unique()) == 254
    again = FP8BlockWeights.random(CONFIG, 4, seed=3)
    other = FP8BlockWeights.random(CONFIG, 4, seed=4)
    assert torch.equal(again.down.view(torch.uint8), weights.down.view(torch.uint8))
    assert torch.equal(again.down_scale, weights.down_scale)
    assert not torch.equal(other.down.view(torch.uint8), weights.down.view(torch.uint8))


def test_random_keeps_the_variance_of_a_row() -> None:
    weights = FP8BlockWeights.random(CONFIG, 4, seed=0)
    x = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
    out = x @ fp8_block.dequantise_blocks(weights.gate_up[0], weights.gate_up_scale[0]).T
    assert 0.5 < out.std() < 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_quantise_bf16(dtype: torch.dtype) -> None:
    gate_up, down = torch.randn(3, 256, 256).to(dtype), torch.randn(3, 256, 128).to(dtype)
    weights = FP8BlockWeights.quantise_bf16(gate_up, down)
    weights.check(CONFIG, 3)
    back = fp8_block.dequantise_blocks(weights.gate_up, weights.gate_up_scale)
    assert reference.relative_error(back, gate_up) < 0.03
    assert reference.relative_error(fp8_block.dequantise_blocks(weights.down, weights.down_scale), down) < 0.03


def test_quantise_rejects_other_types() -> None:
    with pytest.raises(InvalidArgument, match=r"down: got torch.float16"):
        FP8BlockWeights.quantise_bf16(torch.zeros(1, 256, 256), torch.zeros(1, 256, 128, dtype=torch.float16))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("gate_up", torch.zeros(4, 256, 256)),
        ("gate_up", torch.zeros(4, 128, 256, dtype=torch.float8_e4m3fn)),
        ("gate_up_scale", torch.zeros(4, 1, 2)),
        ("down", torch.zeros(4, 128, 256, dtype=torch.float8_e4m3fn).mT),
        ("down", torch.zeros(5, 256, 128, dtype=torch.float8_e4m3fn)),
        ("down_scale", torch.zeros(4, 2, 1, dtype=torch.float64)),
        ("down_scale", torch.zeros(4, 2, 1, device="meta")),
    ],
)
def test_check_names_the_tensor(field: str, value: torch.Tensor) -> None:
    weights = dataclasses.replace(FP8BlockWeights.random(CONFIG, 4), **{field: value})
    with pytest.raises(InvalidArgument) as error:
        weights.check(CONFIG, 4)
    assert error.value.argument == field


def test_to_moves_every_tensor() -> None:
    weights = dataclasses.replace(FP8BlockWeights.random(CONFIG, 2), gate_first=False)
    moved = weights.to("meta")
    moved.check(CONFIG, 2)
    assert moved.device.type == "meta" and moved.gate_first is False


PACKED = [name for name in FORMATS if name != "fp8_block"]


def packed_config(format: str, activation: str = "swiglu") -> MoEConfig:
    return MoEConfig("packed", 96, 160, 8, 2, format=format, activation=activation)


@pytest.mark.parametrize("activation", ["swiglu", "relu2"])
@pytest.mark.parametrize("extras", [False, True])
@pytest.mark.parametrize("format", PACKED)
def test_random_packed_weights(format: str, extras: bool, activation: str) -> None:
    config = packed_config(format, activation)
    weights = PackedWeights.random(config, 4, seed=1, tp_size=5, extras=extras)
    weights.check(config, 4, tp_size=5)
    again = PackedWeights.random(config, 4, seed=1, tp_size=5, extras=extras)
    assert all(torch.equal(*pair) for pair in zip(tensors(weights), tensors(again), strict=True))
    assert not torch.equal(PackedWeights.random(config, 4, seed=2, tp_size=5).down, weights.down)
    moved = weights.to("meta")
    moved.check(config, 4, tp_size=5)
    assert moved.device.type == "meta" and len(tensors(moved)) == len(tensors(weights))
    operands = weights.operands
    x = torch.randn(64, 96, generator=torch.Generator().manual_seed(0))
    matrix = dequantise_weights(config.number_format.weights, operands.gate_up, operands.gate_up_scale)[0]
    out = x @ matrix.T * (1 if operands.gemm1_scale is None else operands.gemm1_scale[0])
    assert 0.3 < out.std() < 3
    takes = FORMATS[format].extras
    assert (weights.gate_up_bias is not None) == (extras and Extra.BIAS in takes)
    assert (weights.clamp is not None) == (extras and Extra.CLAMP in takes and config.is_gated)


def tensors(weights: PackedWeights) -> list[torch.Tensor]:
    found = [value for value in vars(weights).values() if isinstance(value, torch.Tensor)]
    return [value.view(torch.uint8) if value.dtype == torch.float8_e4m3fn else value for value in found]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("format", PACKED)
def test_quantise_bf16_to_any_format(format: str, dtype: torch.dtype) -> None:
    config, generator = packed_config(format), torch.Generator().manual_seed(0)
    gate_up = torch.randn(3, 320, 96, generator=generator).to(dtype)
    down = (torch.randn(3, 96, 160, generator=generator) * torch.tensor([1e-3, 1, 50])[:, None, None]).to(dtype)
    weights = PackedWeights.quantise_bf16(format, gate_up, down, gate_first=False, intermediate_scale=1.0)
    weights.check(config, 3)
    assert weights.gate_first is False
    operands, encoding = weights.operands, config.number_format.weights
    for values, scale, factor, exact in (
        (operands.gate_up, operands.gate_up_scale, operands.gemm1_scale, gate_up),
        (operands.down, operands.down_scale, operands.gemm2_scale, down),
    ):
        whole = dequantise_weights(encoding, values, scale)
        if factor is not None:
            whole = whole * factor[:, None, None]
        for expert in range(3):
            assert reference.relative_error(whole[expert], exact[expert]) < 0.15
    with pytest.raises(InvalidArgument, match=r"down: got torch.float16"):
        PackedWeights.quantise_bf16(format, gate_up, down.half())


@pytest.mark.parametrize(
    ("field", "value", "reason"),
    [
        ("gate_up", torch.zeros(4, 320, 96, dtype=torch.uint8), r"shape \[4, 320, 48\]"),
        ("gate_up", torch.zeros(4, 320, 48, dtype=torch.int8), "torch.uint8"),
        ("gate_up_scale", torch.zeros(4, 320, 5, dtype=torch.float8_e4m3fn), r"shape \[4, 320, 6\]"),
        ("gate_up_scale", torch.zeros(4, 320, 6, dtype=torch.uint8), "float8_e4m3fn"),
        ("gate_up_scale", None, r"torch.float8_e4m3fn of shape \[4, 320, 6\] for nvfp4"),
        ("down_scale", torch.full((4, 96, 10), 0xFF, dtype=torch.uint8).view(torch.float8_e4m3fn), "no NaN"),
        ("down_global", torch.ones(3), r"shape \[4\]"),
        ("down_bias", torch.ones(4, 95), r"shape \[4, 96\]"),
        ("gate_up_bias", torch.ones(4, 320).bfloat16(), "torch.float32"),
        ("alpha", torch.ones(4, device="meta"), "a tensor on cpu"),
        ("clamp", torch.ones(8)[::2], "a contiguous tensor"),
        ("intermediate_scale", torch.ones(1), r"shape \[4\]"),
        ("input_scale", 0.0, "a positive number"),
        ("input_scale", float("inf"), "a positive number"),
    ],
)
def test_check_of_packed_weights_names_the_field(field: str, value: object, reason: str) -> None:
    config = packed_config("nvfp4")
    weights = dataclasses.replace(PackedWeights.random(config, 4), **{field: value})
    with pytest.raises(InvalidArgument, match=f"accepted: .*{reason}") as error:
        weights.check(config, 4)
    assert error.value.argument == field
    with pytest.raises(InvalidArgument) as error:
        weights.check(config, 4, {field: "what the caller calls it"})
    assert error.value.argument in (field, "what the caller calls it")


def test_scales_belong_to_formats_that_have_them() -> None:
    weights = PackedWeights.random(packed_config("bf16"), 4)
    for changes in ({"input_scale": 2.0}, {"intermediate_scale": 2.0}, {"intermediate_scale": torch.ones(4)}):
        with pytest.raises(InvalidArgument, match=f"{next(iter(changes))}: got a scale; accepted: 1: bf16 tokens"):
            dataclasses.replace(weights, **changes).check(packed_config("bf16"), 4)
    with pytest.raises(InvalidArgument, match="gate_up_scale: got a tensor; accepted: None for bf16"):
        dataclasses.replace(weights, gate_up_scale=torch.ones(4, 320, 3)).check(packed_config("bf16"), 4)
    gated = PackedWeights.random(packed_config("bf16", "relu2"), 4)
    with pytest.raises(InvalidArgument, match="alpha: got a tensor; accepted: None: relu2 reads none"):
        dataclasses.replace(gated, alpha=torch.ones(4)).check(packed_config("bf16", "relu2"), 4)


def test_deinterleave() -> None:
    rows = torch.arange(8).view(1, 8, 1)
    assert deinterleave(rows).flatten().tolist() == [0, 2, 4, 6, 1, 3, 5, 7]
