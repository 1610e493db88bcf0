"""The layer again, written out plainly per expert in float64: what demo and `moe-runtime run` compare with.

Shares no arithmetic with the executors. On purpose slow; give it a sample of tokens where there are many.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .config import MoEConfig, RoutingMethod
from .executors.base import MoEProblem
from .formats import Tokens, Weights
from .weights import LayerWeights, Operands


def reference_layer(
    problem: MoEProblem,
    weights: LayerWeights,
    hidden_states: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    quantise: bool = True,
) -> Tensor:
    """hidden_states [T, H] bf16, topk_ids [T, k] int32, topk_weights [T, k] f32 -> [T, H] float64.

    quantise: round rows and activations through the format's encoding of tokens, and the GEMMs' results to bf16, where
    the kernels do, so that what is left is the kernels' own error. gate_up's are not rounded, as kernels that activate
    in place do not; those of fp8_block that leave rows do, which moves some values to a neighbour. False gives the
    layer on unrounded activations, and so what the format costs.
    """
    config, operands = problem.config, weights.operands
    encodings = config.number_format
    weighs_input = RoutingMethod(config.routing_method).weighs_input

    def rounded(x: Tensor) -> Tensor:
        return _through(encodings.tokens, x) if quantise else x

    def stored(x: Tensor) -> Tensor:
        return _through_bf16(x) if quantise else x

    tokens = hidden_states.double()
    if weighs_input and encodings.tokens != Tokens.FP8_BLOCK:
        tokens = tokens * topk_weights.double()
    tokens = rounded(tokens / operands.input_scale)
    if weighs_input and encodings.tokens == Tokens.FP8_BLOCK:
        tokens = tokens * topk_weights.double()
    output = torch.zeros(hidden_states.shape, dtype=torch.float64, device=hidden_states.device)
    for expert in range(problem.num_local_experts):
        token, slot = (topk_ids == problem.local_expert_offset + expert).nonzero(as_tuple=True)
        if token.numel() == 0:
            continue
        first = _weight(encodings.weights, operands.gate_up[expert], operands.gate_up_scale, expert)
        sums = _of(operands.gemm1_scale, expert, 1.0) * (tokens[token] @ first.T)
        sums = sums + _of(operands.gemm1_bias, expert, 0.0)
        activation = _activation(config, operands, sums if config.is_gated else stored(sums), expert)
        second = _weight(encodings.weights, operands.down[expert], operands.down_scale, expert)
        activation = rounded(activation * _of(operands.activation_multiplier, expert, 1.0))
        sums = _of(operands.gemm2_scale, expert, 1.0) * (activation @ second.T)
        rows = stored(sums + _of(operands.gemm2_bias, expert, 0.0))
        output.index_add_(0, token, rows if weighs_input else rows * topk_weights[token, slot, None].double())
    return output


def relative_error(result: Tensor, reference: Tensor) -> float:
    """||result - reference|| / ||reference||; the norm itself where the reference is zero."""
    norm = reference.double().norm()
    difference = (result.double() - reference.double()).norm()
    return float(difference / norm if norm > 0 else difference)


def _of(values: Tensor | None, expert: int, neutral: float) -> Tensor | float:
    return neutral if values is None else values[expert].double()


def _activation(config: MoEConfig, operands: Operands, rows: Tensor, expert: int) -> Tensor:
    if config.activation == "relu2":
        return rows.clamp(min=0) ** 2
    first, second = rows.chunk(2, dim=1)
    gate, up = (first, second) if operands.gate_first else (second, first)
    clamp = torch.as_tensor(_of(operands.clamp, expert, config.clamp_limit or torch.inf), device=rows.device)
    gate, up = torch.minimum(gate, clamp), torch.maximum(torch.minimum(up, clamp), -clamp)
    return gate / (1 + torch.exp(-_of(operands.alpha, expert, 1.0) * gate)) * (up + _of(operands.beta, expert, 0.0))


_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def _weight(encoding: Weights, values: Tensor, scale: Tensor | None, expert: int) -> Tensor:
    """An expert's weights [N, K] in float64, without its fp32 scale."""
    if scale is None:
        return values.double()
    scale = scale[expert]
    if encoding == Weights.FP8_BLOCK:
        return values.double() * scale.double().repeat_interleave(128, 0).repeat_interleave(128, 1)
    table = torch.tensor([*_E2M1, *(-value for value in _E2M1)], dtype=torch.float64, device=values.device)
    codes = torch.stack([values % 16, values // 16], dim=2).flatten(1)
    if encoding == Weights.MXFP4:
        factors, block = _power_of_two(scale.long() - 127), 32
    else:
        factors, block = scale.double(), 16
    return table[codes.long()] * factors.repeat_interleave(block, 1)


def _through(encoding: Tokens, x: Tensor) -> Tensor:
    """x [..., K] float64, rounded through an encoding and back."""
    if encoding == Tokens.BF16:
        return _through_bf16(x)
    if encoding == Tokens.FP8:
        return _through_e4m3(x)
    block = {Tokens.FP8_BLOCK: 128, Tokens.MXFP8: 32, Tokens.NVFP4: 16}[encoding]
    blocks = x.unflatten(-1, (-1, block))
    amax = blocks.abs().amax(-1, keepdim=True)
    if encoding == Tokens.FP8_BLOCK:
        scale = amax.clamp(min=1e-10) / 448
        return (_through_e4m3(blocks / scale) * scale).flatten(-2)
    if encoding == Tokens.MXFP8:
        # Of the float32 that kernels see: a float64 just below a power of two becomes it.
        scale = _power_of_two((torch.frexp(amax.float()).exponent.long() - 9).clamp(-127, 127))
        return (_through_e4m3(blocks / scale) * scale).flatten(-2)
    scale = _through_e4m3(amax / 6)
    return (_through_e2m1(blocks / scale.masked_fill(scale == 0, torch.inf)) * scale).flatten(-2)


def _power_of_two(exponent: Tensor) -> Tensor:
    """int64 -> float64 by its bits: a GPU's pow may be off in the last, and rows often lie halfway between codes."""
    return ((exponent + 1023) << 52).view(torch.float64)


def _through_e4m3(x: Tensor) -> Tensor:
    return x.clamp(-448, 448).to(torch.float8_e4m3fn).double()


def _through_e2m1(x: Tensor) -> Tensor:
    """To the nearest multiple of e2m1's step, which is 1/2 up to 2, 1 up to 4 and 2 up to 6; ties to even multiples."""
    magnitude = x.abs().clamp(max=6)
    step = torch.where(magnitude < 2, 0.5, torch.where(magnitude < 4, 1.0, 2.0))
    return (magnitude / step).round() * step * x.sign()


def _through_bf16(x: Tensor) -> Tensor:
    return x.to(torch.bfloat16).double()
