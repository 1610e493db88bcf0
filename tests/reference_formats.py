"""Every number format a second time, in numpy and from the definitions alone; shares no code with moe_runtime.

Rows are rounded in float32, step by step as the definitions have them, so that codes can be compared bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moe_runtime.config import MoEConfig, RoutingMethod
from moe_runtime.weights import LayerWeights, Operands
from tests.reference import decode_e4m3, encode_e4m3, quantise

Array = NDArray[np.float64]
Bytes = NDArray[np.uint8]

E2M1_VALUES: Array = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])


def encode_e2m1(x: NDArray[np.floating]) -> Bytes:
    """Round to nearest, ties to even, saturating at 6; by comparing with all values."""
    distance = np.abs(np.minimum(np.abs(x.astype(np.float64)), 6.0)[..., None] - E2M1_VALUES)
    nearest = distance == distance.min(-1, keepdims=True)
    even_first = np.array([0, 2, 4, 6, 1, 3, 5, 7])
    code = even_first[nearest[..., even_first].argmax(-1)]
    return (code + 8 * np.signbit(x)).astype(np.uint8)


def decode_e2m1(packed: Bytes) -> Array:
    """Bytes [..., K/2] -> values [..., K]; the low nibble first."""
    codes = np.stack([packed & 15, packed >> 4], -1).reshape(*packed.shape[:-1], -1)
    values: Array = np.where(codes < 8, 1.0, -1.0) * E2M1_VALUES[codes % 8]
    return values


def decode_ue8m0(codes: Bytes) -> Array:
    values: Array = np.exp2(codes.astype(np.float64) - 127)
    return values


def exponent_of(amax: NDArray[np.float32]) -> NDArray[np.int64]:
    """floor(log2), from the bits of float64; -1000 for zero."""
    bits = amax.astype(np.float64).view(np.int64)
    exponents: NDArray[np.int64] = np.where(amax > 0, (bits >> 52) - 1023, -1000)
    return exponents


def round_rows(tokens: str, x: NDArray[np.float32], inverse_scale: float | NDArray[np.float32] = 1.0) -> Array:
    """x [T, K] float32 times inverse_scale, through an encoding's codes -> their values in float64."""
    y = (x * np.float32(inverse_scale)).astype(np.float32)
    if tokens == "bf16":
        return torch.from_numpy(y).bfloat16().double().numpy()
    if tokens == "fp8":
        return decode_e4m3(encode_e4m3(y))
    if tokens == "fp8_block":
        codes, scales = quantise(y)
        return decode_e4m3(codes) * np.repeat(scales.astype(np.float64), 128, axis=1)
    block = {"mxfp8": 32, "nvfp4": 16}[tokens]
    blocks = y.reshape(*y.shape[:-1], y.shape[-1] // block, block)
    amax = np.abs(blocks).max(-1, keepdims=True)
    if tokens == "mxfp8":
        factor = np.exp2(np.clip(exponent_of(amax) - 8, -127, 127).astype(np.float64))
        values = decode_e4m3(encode_e4m3(blocks.astype(np.float64) / factor)) * factor
    else:
        factor = decode_e4m3(encode_e4m3(amax / np.float32(6)))
        ratio = np.divide(blocks, factor.astype(np.float32), out=np.zeros_like(blocks), where=factor > 0)
        codes = encode_e2m1(ratio)
        values = np.where(codes < 8, 1.0, -1.0) * E2M1_VALUES[codes % 8] * factor
    return values.reshape(y.shape)


def dequantise_weights(weights: str, values: Tensor, scale: Tensor | None) -> Array:
    """[..., N, K] float64, without global scales."""
    if weights == "bf16":
        return values.double().numpy()
    assert scale is not None
    factors = scale.view(torch.uint8).numpy() if scale.element_size() == 1 else scale.numpy().astype(np.float64)
    if weights == "fp8_block":
        return decode_e4m3(values.view(torch.uint8).numpy()) * factors.repeat(128, -2).repeat(128, -1)
    if weights == "mxfp4":
        return decode_e2m1(values.numpy()) * decode_ue8m0(factors).repeat(32, -1)
    return decode_e2m1(values.numpy()) * decode_e4m3(factors).repeat(16, -1)


def layer(
    config: MoEConfig,
    weights: LayerWeights,
    first_expert: int,
    x: Tensor,
    ids: Tensor,
    topk_weights: Tensor,
    *,
    quantised: bool = True,
) -> Tensor:
    """[T, H] float64: what the local experts add for x [T, H] bf16, in any format; one slot after the other."""
    operands, tokens_as = weights.operands, config.number_format.tokens.name.lower()
    weights_as = config.number_format.weights.name.lower()
    matrices = (
        dequantise_weights(weights_as, operands.gate_up, operands.gate_up_scale),
        dequantise_weights(weights_as, operands.down, operands.down_scale),
    )

    def through(rows: Array) -> Array:
        return round_rows(tokens_as, rows.astype(np.float32)) if quantised else rows

    weighs_input = config.routing_method == RoutingMethod.Llama4
    out = np.zeros(x.shape)
    for t, chosen in enumerate(ids.tolist()):
        for slot, expert in enumerate(chosen):
            local = expert - first_expert
            if expert < 0 or not 0 <= local < len(matrices[0]):
                continue
            weight = float(topk_weights[t, slot])
            row = x[t : t + 1].double().numpy() / operands.input_scale
            if weighs_input and tokens_as == "fp8_block":
                row = through(row) * weight
            else:
                row = through(row * weight if weighs_input else row)
            result = _expert(config, operands, local, row, matrices, through, quantised)[0]
            out[t] += result if weighs_input else weight * result
    return torch.from_numpy(out)


def _expert(
    config: MoEConfig,
    operands: Operands,
    local: int,
    row: Array,
    matrices: tuple[Array, Array],
    through: Callable[[Array], Array],
    quantised: bool,
) -> Array:
    def of(values: Tensor | None, neutral: float) -> Array:
        return np.asarray(neutral if values is None else values[local].double().numpy())

    def stored(values: Array) -> Array:
        return torch.from_numpy(values).bfloat16().double().numpy() if quantised else values

    hidden = of(operands.gemm1_scale, 1) * (row @ matrices[0][local].T) + of(operands.gemm1_bias, 0)
    if config.activation == "relu2":
        activation = np.maximum(stored(hidden), 0) ** 2
    else:
        halves = np.split(hidden, 2, axis=1)
        gate, up = halves if operands.gate_first else halves[::-1]
        clamp = of(operands.clamp, config.clamp_limit or np.inf)
        gate, up = np.minimum(gate, clamp), np.clip(up, -clamp, clamp)
        activation = gate / (1 + np.exp(-of(operands.alpha, 1) * gate)) * (up + of(operands.beta, 0))
    activation = through(activation * of(operands.activation_multiplier, 1))
    return stored(of(operands.gemm2_scale, 1) * (activation @ matrices[1][local].T) + of(operands.gemm2_bias, 0))
