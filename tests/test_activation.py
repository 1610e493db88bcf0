"""Activations in torch against their formulas in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from moe_runtime.activation import relu2, swiglu


def exact(gate: np.ndarray, up: np.ndarray, clamp_limit: float | None) -> np.ndarray:
    if clamp_limit is not None:
        gate, up = np.minimum(gate, clamp_limit), np.clip(up, -clamp_limit, clamp_limit)
    return gate / (1 + np.exp(-gate)) * up


@pytest.mark.parametrize("clamp_limit", [None, 1.5, 7.0])
@pytest.mark.parametrize("gate_first", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_against_float64(dtype: torch.dtype, gate_first: bool, clamp_limit: float | None) -> None:
    rows = (6 * torch.randn(2, 5, 256, generator=torch.Generator().manual_seed(0))).to(dtype)
    first, second = rows.double().numpy()[..., :128], rows.double().numpy()[..., 128:]
    gate, up = (first, second) if gate_first else (second, first)
    found = swiglu(rows, gate_first, clamp_limit)
    assert (found.shape, found.dtype) == ((2, 5, 128), torch.float32)
    np.testing.assert_allclose(found.double().numpy(), exact(gate, up, clamp_limit), rtol=1e-5, atol=1e-6)


def test_a_gate_is_cut_above_and_up_on_both_sides() -> None:
    """silu(2) = 1.7616 and silu(-50) = -0: a gate far below the limit shuts, and is not lifted to it."""
    gate_up = torch.tensor([[9.0, -50.0, 2.0, 9.0, 3.0, -9.0]])
    torch.testing.assert_close(swiglu(gate_up, True, 2.0), 1.7615942 * torch.tensor([[2.0, 0.0, -2.0]]))
    assert swiglu(gate_up, True, None)[0, 0] == pytest.approx(81, rel=1e-3)


def test_factors_of_a_row() -> None:
    """gpt-oss gives them the same for all experts, but they need not be."""
    generator = torch.Generator().manual_seed(0)
    rows = 4 * torch.randn(5, 64, generator=generator)
    alpha, beta, clamp = (0.5 + torch.rand(5, 1, generator=generator) for _ in range(3))
    gate, up = rows.double().numpy()[:, :32], rows.double().numpy()[:, 32:]
    a, b, c = (factor.double().numpy() for factor in (alpha, beta, clamp))
    gate, up = np.minimum(gate, c), np.clip(up, -c, c)
    found = swiglu(rows, True, clamp, alpha, beta)
    np.testing.assert_allclose(found.double().numpy(), gate / (1 + np.exp(-a * gate)) * (up + b), rtol=1e-5, atol=1e-6)
    assert torch.equal(swiglu(rows, False, 2.0), swiglu(rows, False, torch.full((5, 1), 2.0)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_relu2(dtype: torch.dtype) -> None:
    found = relu2(torch.tensor([[-3.0, -0.0, 0.5, 3.0]], dtype=dtype))
    assert found.dtype == torch.float32 and found.tolist() == [[0.0, 0.0, 0.25, 9.0]]
