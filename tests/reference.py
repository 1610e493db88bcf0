"""The layer written a second time, from the definitions alone: numpy and float64, plain loops and sorts.

Shares no code with moe_runtime. `quantised` rounds where the executors round, e4m3 rows and activations, so that what
is left is the executors' own error; without it, the difference is what the format costs.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moe_runtime.config import MoEConfig, RoutingMethod
from moe_runtime.weights import FP8BlockWeights

Array = NDArray[np.float64]

# The 127 finite non-negative e4m3 values: 4 exponent bits of bias 7, 3 mantissa bits, subnormals of 2**-9.
E4M3_VALUES: Array = np.array(
    [code * 2.0**-9 if code < 8 else (8 + code % 8) * 2.0 ** (code // 8 - 10) for code in range(127)]
)


def encode_e4m3(x: NDArray[np.floating]) -> NDArray[np.uint8]:
    """Round to nearest, ties to even, saturating at 448."""
    magnitude = np.minimum(np.abs(x.astype(np.float64)), 448.0)
    above = np.searchsorted(E4M3_VALUES, magnitude)
    below = np.maximum(above - 1, 0)
    up, down = E4M3_VALUES[above] - magnitude, magnitude - E4M3_VALUES[below]
    code = np.where((up < down) | ((up == down) & (above % 2 == 0)), above, below)
    return (code + 128 * np.signbit(x)).astype(np.uint8)


def decode_e4m3(codes: NDArray[np.uint8]) -> Array:
    values: Array = np.where(codes < 128, 1.0, -1.0) * E4M3_VALUES[codes % 128]
    return values


def quantise(x: NDArray[np.float32]) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """One 1x128 scale at a time, each step rounded to float32: codes [T, K], scales [T, K/128]."""
    tokens, columns = x.shape
    codes = np.empty((tokens, columns), np.uint8)
    scales = np.empty((tokens, columns // 128), np.float32)
    for t in range(tokens):
        for block in range(columns // 128):
            part = x[t, 128 * block : 128 * (block + 1)]
            scale = max(np.abs(part).max(), np.float32(1e-10)) / np.float32(448)
            scales[t, block] = scale
            codes[t, 128 * block : 128 * (block + 1)] = encode_e4m3(part * (np.float32(1) / scale))
    return codes, scales


def route(config: MoEConfig, logits: Tensor, bias: Tensor | None = None) -> tuple[list[list[int]], Array]:
    """Ids and weights of each token; choices on float32 scores, weights in float64."""
    ids, weights = [], []
    method = config.routing_method
    by_sigmoid = method in (RoutingMethod.DeepSeekV3, RoutingMethod.SigmoidRenorm, RoutingMethod.MiniMax2)
    for row in logits.float():
        scores = (row.sigmoid() if by_sigmoid else row).numpy()
        choice = scores if bias is None else scores + bias.float().numpy()
        grouped = method == RoutingMethod.DeepSeekV3
        candidates = _best_groups(config, choice) if grouped else list(range(len(choice)))
        shared = list(range(len(choice), config.num_experts))
        chosen = sorted(candidates, key=lambda e: (-choice[e], e))[: config.top_k - len(shared)]
        ids.append(chosen + shared)
        exact = row.double().numpy()
        sigmoids, exponentials = 1 / (1 + np.exp(-exact)), np.exp(exact - exact.max())
        softmax = exponentials / exponentials.sum()
        match method:
            case RoutingMethod.Default:
                weights.append(softmax[chosen])
            case RoutingMethod.RenormalizeNaive:
                weights.append(softmax[chosen] / softmax[chosen].sum())
            case RoutingMethod.Renormalize:
                exponentials = np.exp(exact[chosen] - exact[chosen].max())
                weights.append(exponentials / exponentials.sum())
            case RoutingMethod.Llama4:
                weights.append(sigmoids[chosen])
            case RoutingMethod.SigmoidRenorm | RoutingMethod.MiniMax2:
                weights.append(sigmoids[chosen] / (sigmoids[chosen].sum() + 1e-20))
            case RoutingMethod.DeepSeekV3:
                weights.append(sigmoids[chosen] / (sigmoids[chosen].sum() + 1e-20) * config.routed_scaling_factor)
    routed = np.array(weights).reshape(len(ids), config.routed_top_k)
    return ids, np.pad(routed, ((0, 0), (0, config.num_fused_shared_experts)), constant_values=1.0)


def _best_groups(config: MoEConfig, choice: NDArray[np.float32]) -> list[int]:
    size = len(choice) // config.n_group
    groups = [list(range(g * size, (g + 1) * size)) for g in range(config.n_group)]
    score = []
    for group in groups:
        first, second = sorted((choice[e] for e in group), reverse=True)[:2]
        score.append(np.float32(first + second))
    kept = sorted(range(config.n_group), key=lambda g: (-score[g], g))[: config.topk_group]
    return [e for g in sorted(kept) for e in groups[g]]


def layer(
    config: MoEConfig,
    weights: FP8BlockWeights,
    first_expert: int,
    x: Tensor,
    ids: list[list[int]] | Tensor,
    topk_weights: Array | Tensor,
    *,
    quantised: bool,
) -> Tensor:
    """[T, H] float64: what experts first_expert ... first_expert + L - 1 add for x [T, H]."""
    gate_up = _dequantise_blocks(weights.gate_up, weights.gate_up_scale)
    down = _dequantise_blocks(weights.down, weights.down_scale)
    if isinstance(ids, Tensor):
        ids = ids.tolist()
    rows = x.float().numpy()
    tokens = _through_e4m3(rows) if quantised else rows.astype(np.float64)
    out = np.zeros(tokens.shape)
    for t, experts in enumerate(ids):
        for slot, expert in enumerate(experts):
            local = expert - first_expert
            if expert >= 0 and 0 <= local < len(gate_up):
                weight = float(topk_weights[t, slot])
                out[t] += weight * _expert(
                    config, weights.gate_first, tokens[t], gate_up[local], down[local], quantised
                )
    return torch.from_numpy(out)


def _expert(config: MoEConfig, gate_first: bool, token: Array, gate_up: Array, down: Array, quantised: bool) -> Array:
    product = gate_up @ token
    inter = config.intermediate_size
    gate, up = (product[:inter], product[inter:]) if gate_first else (product[inter:], product[:inter])
    if config.clamp_limit is not None:
        gate, up = np.minimum(gate, config.clamp_limit), np.clip(up, -config.clamp_limit, config.clamp_limit)
    activation = gate / (1 + np.exp(-gate)) * up
    if quantised:
        activation = _through_e4m3(activation[None].astype(np.float32))[0]
    result: Array = down @ activation
    return result


def _through_e4m3(x: NDArray[np.float32]) -> Array:
    codes, scales = quantise(x)
    return decode_e4m3(codes) * np.repeat(scales.astype(np.float64), 128, axis=1)


def _dequantise_blocks(values: Tensor, scale: Tensor) -> Array:
    expanded = np.repeat(np.repeat(scale.numpy().astype(np.float64), 128, axis=1), 128, axis=2)
    return decode_e4m3(values.view(torch.uint8).numpy()) * expanded


def relative_error(result: Tensor, expected: Tensor) -> float:
    return float((result.double() - expected.double()).norm() / expected.double().norm())
