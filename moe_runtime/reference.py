"""The layer again, written out plainly per expert in float64: what demo and `moe-runtime run` compare with.

Shares no arithmetic with the executors. On purpose slow; give it a sample of tokens where there are many.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .executors.base import MoEProblem
from .weights import FP8BlockWeights


def reference_layer(
    problem: MoEProblem,
    weights: FP8BlockWeights,
    hidden_states: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    quantise: bool = True,
) -> Tensor:
    """hidden_states [T, H] bf16, topk_ids [T, k] int32, topk_weights [T, k] f32 -> [T, H] float64.

    quantise: round rows and activations to e4m3, and the GEMMs' results to bf16, where the kernels do, so that what is
    left is the kernels' own error; False gives the layer on unrounded activations, and so what the format costs.
    """
    rounded, stored = (_through_e4m3, _through_bf16) if quantise else (torch.Tensor.double, torch.Tensor.double)
    clamp = problem.config.clamp_limit
    tokens = rounded(hidden_states.double())
    output = torch.zeros_like(tokens)
    for expert in range(problem.num_local_experts):
        token, slot = (topk_ids == problem.local_expert_offset + expert).nonzero(as_tuple=True)
        if token.numel() == 0:
            continue
        gate_up = stored(tokens[token] @ _weight(weights.gate_up, weights.gate_up_scale, expert).T)
        first, second = gate_up.chunk(2, dim=1)
        gate, up = (first, second) if weights.gate_first else (second, first)
        if clamp is not None:
            gate, up = gate.clamp(max=clamp), up.clamp(-clamp, clamp)
        activation = rounded(gate * gate.sigmoid() * up)
        rows = stored(activation @ _weight(weights.down, weights.down_scale, expert).T)
        output.index_add_(0, token, rows * topk_weights[token, slot, None].double())
    return output


def relative_error(result: Tensor, reference: Tensor) -> float:
    """||result - reference|| / ||reference||; the norm itself where the reference is zero."""
    norm = reference.double().norm()
    difference = (result.double() - reference.double()).norm()
    return float(difference / norm if norm > 0 else difference)


def _weight(values: Tensor, scale: Tensor, expert: int) -> Tensor:
    blocks = scale[expert].double().repeat_interleave(128, 0).repeat_interleave(128, 1)
    return values[expert].double() * blocks


def _through_e4m3(x: Tensor) -> Tensor:
    blocks = x.unflatten(-1, (-1, 128))
    scale = blocks.abs().amax(-1, keepdim=True).clamp(min=1e-10) / 448
    return ((blocks / scale).to(torch.float8_e4m3fn).double() * scale).flatten(-2)


def _through_bf16(x: Tensor) -> Tensor:
    return x.to(torch.bfloat16).double()
