"""Each mixed variant that activates gate_up, called by itself, against float64 and the formats' own rounding."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from moe_runtime.formats import Tokens, WeightLayout
from moe_runtime.formats.tokens import round_rows
from tests.gpu.grouped_gemm import Activation, prepare, run
from tests.gpu.test_mixed_gemm import CANNOT_IMPLEMENT, ENCODINGS, GUARD, MIXED, RAGGED, as_rows, random_weights

VARIANTS = {name: variant for name, variant in MIXED.items() if variant.swiglu}
# Kernels of e4m3 tokens have one encoding, those of bf16 any that is stored as such.
CASES = [
    pytest.param(name, tokens, id=f"{name}-{tokens.name}")
    for name, variant in VARIANTS.items()
    for tokens in (Tokens.BF16, Tokens.FP8, Tokens.MXFP8, Tokens.NVFP4)
    if tokens == Tokens.FP8 or not WeightLayout(variant.weights).multiplies_e4m3
]
# Products added in another order move a value that lies beside the middle of two codes to the other one: allowed is
# what a value that is off by SLACK of its size becomes.
SLACK = 2.0**-9
BEYOND = 1e-3  # of the norm
SAME_CODES = 0.9  # of the values: a rounding that is not to the nearest moves half of them


def of_experts(generator: torch.Generator, experts: int, low: float, high: float) -> Tensor:
    return low + (high - low) * torch.rand(experts, generator=generator, device="cuda")


def make_activation(encoding: Tokens, gate_first: bool, given: str, experts: int) -> Activation:
    activation = Activation(encoding, gate_first)
    if given == "limit":
        return dataclasses.replace(activation, clamp_limit=0.7)
    if given == "all":
        generator = torch.Generator("cuda").manual_seed(3)
        ranges = {"alpha": (0.5, 2), "beta": (-1, 1), "clamp": (0.5, 3), "multiplier": (0.3, 3)}
        factors: dict[str, Any] = {name: of_experts(generator, experts, *bounds) for name, bounds in ranges.items()}
        # Which the experts' own clamp is before.
        return dataclasses.replace(activation, clamp_limit=0.1, **factors)
    return activation


def activated(sums: Tensor, activation: Activation, expert: int) -> Tensor:
    """sums float64 [rows, n] of one expert, gate and up in the layer's order -> [rows, n/2] before they are rounded."""

    def of_expert(values: Tensor | None, neutral: float) -> Tensor | float:
        return neutral if values is None else values[expert].double()

    halves = sums.chunk(2, 1)
    gate, up = halves if activation.gate_first else halves[::-1]
    limit = torch.as_tensor(of_expert(activation.clamp, activation.clamp_limit or torch.inf), device=sums.device)
    gate, up = torch.minimum(gate, limit), torch.maximum(torch.minimum(up, limit), -limit)
    swish = gate / (1 + torch.exp(-of_expert(activation.alpha, 1) * gate))
    return swish * (up + of_expert(activation.beta, 0)) * of_expert(activation.multiplier, 1)


def check(name: str, sizes: tuple[int, ...], n: int, k: int, encoding: Tokens, gate_first: bool, given: str) -> None:
    variant, experts, rows = VARIANTS[name], len(sizes), sum(sizes)
    weights = random_weights(ENCODINGS[variant.weights], experts, n, k, gate_first)
    generator = torch.Generator("cuda").manual_seed(1)
    tokens = torch.randn(rows + GUARD, k, generator=generator, device="cuda")
    tokens[rows:] = torch.nan
    tokens = as_rows(variant, tokens)
    offsets = torch.tensor([0, *sizes]).cumsum(0).to("cuda", torch.int32)
    # So that gate and up are about 1, where SwiGLU bends, and e4m3 without a factor holds the activations.
    scale = (of_experts(generator, experts, 0.5, 1.5) / (weights.values.std((1, 2)) * k**0.5)).float()
    bias = torch.randn(experts, n, generator=generator, device="cuda") if given == "all" else None
    activation = make_activation(encoding, gate_first, given, experts)
    output = torch.empty(rows + GUARD, n // 2, dtype=tokens.dtype, device="cuda")
    gemm = prepare(tokens, weights.packed, offsets, output, scale, bias, activation=activation)

    def results() -> Tensor:
        output.view(torch.uint8).fill_(0xFF)  # a NaN of e4m3, and of bf16
        assert run(variant, gemm) == 0
        torch.cuda.synchronize()
        return output.float()

    found = results()
    assert found[rows:].isnan().all() and not found[:rows].isnan().any()
    assert torch.equal(results()[:rows], found[:rows])
    if not rows:
        return
    exact = torch.empty(rows, n // 2, dtype=torch.float64, device="cuda")
    for expert, (first, end) in enumerate(zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True)):
        sums = tokens[first:end].float().double() @ weights.values[expert].T * scale[expert].double()
        if bias is not None:
            sums = sums + bias[expert].double()
        exact[first:end] = activated(sums, activation, expert)
    near = torch.stack([round_rows(encoding, (exact * (1 + slack)).float()).float() for slack in (-SLACK, 0.0, SLACK)])
    low, high = near.aminmax(dim=0)
    values = found[:rows]
    beyond = (low - values).clamp(min=0) + (values - high).clamp(min=0)
    assert beyond.norm() <= BEYOND * exact.norm()
    assert (values == near[1]).float().mean() >= SAME_CODES


@pytest.mark.parametrize("given", ["bare", "limit", "all"])
@pytest.mark.parametrize("gate_first", [True, False], ids=["gate_first", "up_first"])
@pytest.mark.parametrize(("n", "k"), [(2880, 2880), (1536, 4096), (192, 32)])
@pytest.mark.parametrize(("variant", "encoding"), CASES)
def test_ragged_groups(variant: str, n: int, k: int, gate_first: bool, encoding: Tokens, given: str) -> None:
    """Of the first and the last shape n/2 is 32 modulo 64, so that the last tile of weights is half empty."""
    check(variant, RAGGED, n, k, encoding, gate_first, given)


@pytest.mark.parametrize(
    "sizes", [(0,), (0, 1), (1,), (513, 0, 0, 0), (0,) * 130 + (5,)], ids=lambda sizes: str(sizes[-4:])
)
@pytest.mark.parametrize(("variant", "encoding"), CASES)
def test_sparse_groups(variant: str, sizes: tuple[int, ...], encoding: Tokens) -> None:
    check(variant, sizes, 320, 384, encoding, gate_first=True, given="bare")


@pytest.mark.parametrize(("variant", "encoding"), CASES)
def test_activations_of_zero_are_zero(variant: str, encoding: Tokens) -> None:
    """Blocks whose largest magnitude is 0 have no factor to divide by."""
    weights = random_weights(ENCODINGS[VARIANTS[variant].weights], 1, 320, 384, True)
    tokens = as_rows(VARIANTS[variant], torch.zeros(40, 384, device="cuda"))
    offsets = torch.tensor([0, 40], device="cuda", dtype=torch.int32)
    output = torch.full((40, 160), torch.nan, device="cuda").to(tokens.dtype)
    gemm = prepare(tokens, weights.packed, offsets, output, activation=Activation(encoding))
    assert run(VARIANTS[variant], gemm) == 0
    assert (output.float() == 0).all()


@pytest.mark.parametrize("variant", VARIANTS)
def test_refuses_rows_that_no_block_divides(variant: str) -> None:
    tokens = torch.zeros(1, 64, dtype=torch.bfloat16, device="cuda")
    packed = torch.zeros(1 << 16, dtype=torch.uint8, device="cuda")
    offsets = torch.tensor([0, 1], device="cuda", dtype=torch.int32)
    output = torch.zeros(1, 24, dtype=torch.bfloat16, device="cuda")
    gemm = prepare(tokens, packed, offsets, output, activation=Activation(Tokens.BF16))
    assert run(VARIANTS[variant], gemm) == CANNOT_IMPLEMENT
