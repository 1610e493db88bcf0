"""The activation between the GEMMs, in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor


def swiglu(
    gate_up: Tensor,
    gate_first: bool,
    clamp: float | Tensor | None = None,
    alpha: Tensor | None = None,
    beta: Tensor | None = None,
) -> Tensor:
    """gate_up [..., 2I] -> gate * sigmoid(alpha * gate) * (up + beta), [..., I] f32.

    clamp: gate is cut above it, up on both sides. Tensors broadcast against [..., I]; None is 1 for alpha, 0 for beta.
    """
    first, second = gate_up.float().chunk(2, dim=-1)
    gate, up = (first, second) if gate_first else (second, first)
    if clamp is not None:
        limit = torch.as_tensor(clamp, dtype=torch.float32, device=gate.device)
        gate, up = gate.minimum(limit), up.clamp(-limit, limit)
    gated = torch.nn.functional.silu(gate) if alpha is None else gate * (alpha * gate).sigmoid()
    return gated * (up if beta is None else up + beta)


def relu2(x: Tensor) -> Tensor:
    """x [..., I] -> relu(x)^2, f32."""
    return x.float().relu().square()
