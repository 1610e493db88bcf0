"""Which of an experts module's gates the kernels can fuse."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...activation import relu2, swiglu

# What models call the constants of their gates.
_ALPHAS = ("alpha", "swiglu_alpha")
_LIMITS = ("limit", "swiglu_limit")

# From where every activation in use bends to where all are straight.
_MAGNITUDES = (0.03, 0.3, 1.0, 2.5, 6.0, 20.0)


@dataclass(frozen=True)
class Gate:
    """What lies between the GEMMs.

    activation: "swiglu" or "relu2". With "swiglu", alpha a and clamp c: g * sigmoid(a * g) * (u + 1) for
    g = min(gate, c), u = clip(up, -c, c), as gpt-oss has it; without alpha silu(g) * u.
    """

    activation: str
    alpha: float | None = None
    clamp: float | None = None

    def __call__(self, rows: Tensor) -> Tensor:
        """rows [..., 2I], [gate; up], or [..., I] for relu2 -> [..., I] f32."""
        if self.activation == "relu2":
            return relu2(rows)
        if self.alpha is None:
            return swiglu(rows, True, self.clamp)
        return swiglu(rows, True, self.clamp, torch.tensor(self.alpha), torch.tensor(1.0))


def recognise(module: torch.nn.Module, intermediate_size: int, device: torch.device) -> Gate | None:
    """The gate that gives what the module's own gives; None where there is none.

    A gate is known by what it does to a grid of values: the constants' names alone do not tell one that clamps before
    its activation from one that clamps after it.
    """
    experts: Any = module
    if not experts.has_gate:
        values = _grid(())[:, None].expand(-1, intermediate_size).to(device)
        return Gate("relu2") if _alike(experts.act_fn(values), relu2(values)) else None
    alphas, limits = _constants(module, _ALPHAS), _constants(module, _LIMITS)
    grid = _grid(limits)
    gate, up = (values[:, None].expand(-1, intermediate_size) for values in torch.cartesian_prod(grid, grid).unbind(1))
    rows = torch.cat([gate, up], 1).to(device)
    given = rows
    if not experts.is_concatenated:
        given = rows.unflatten(1, (2, -1)).mT.flatten(1)
    found = experts._apply_gate(given)
    for clamp in (None, *limits):
        for alpha in (None, *alphas):
            candidate = Gate("swiglu", alpha, clamp)
            if _alike(found, candidate(rows)):
                return candidate
    return None


def _constants(module: torch.nn.Module, names: tuple[str, ...]) -> list[float]:
    values = (getattr(module, name, None) for name in names)
    found = {float(value) for value in values if isinstance(value, int | float)}
    return sorted(value for value in found if value > 0 and math.isfinite(value))


def _grid(limits: list[float] | tuple[()]) -> Tensor:
    magnitudes = {*_MAGNITUDES, *(limit * factor for limit in limits for factor in (0.9, 1.1))}
    return torch.tensor([0.0, *(sign * value for value in sorted(magnitudes) for sign in (1, -1))])


def _alike(found: Tensor, expected: Tensor) -> bool:
    # Both compute in float32, on devices whose exp differs in the last places.
    return found.shape == expected.shape and torch.allclose(found.float(), expected, rtol=1e-4, atol=1e-6)
