"""The activation between the GEMMs, in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor


def swiglu(gate_up: Tensor, gate_first: bool, clamp_limit: float | None) -> Tensor:
    """gate_up [..., 2I] -> silu(gate) * up [..., I] f32; with a clamp_limit, gate is cut above it, up on both sides."""
    first, second = gate_up.float().chunk(2, dim=-1)
    gate, up = (first, second) if gate_first else (second, first)
    if clamp_limit is not None:
        gate, up = gate.clamp(max=clamp_limit), up.clamp(-clamp_limit, clamp_limit)
    return torch.nn.functional.silu(gate) * up
