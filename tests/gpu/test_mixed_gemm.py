"""Each mixed variant that leaves products, called by itself, against float64 on weights dequantised from the formats'
definitions. Those that activate: test_mixed_swiglu."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from moe_runtime.formats import WeightLayout
from moe_runtime.formats.packing import pack_bf16, pack_fp8_mxfp4, pack_mxfp4, pack_nvfp4
from moe_runtime.kernels import VariantRecord, library_path
from moe_runtime.reference import relative_error
from tests.gpu.grouped_gemm import origins, prepare, run, variants

ENCODINGS = {layout: layout.name.lower() for layout in WeightLayout if layout != WeightLayout.FP8_BLOCK}
PATH = library_path("sm_90a") if torch.cuda.is_available() else None
MIXED = variants(PATH, {int(layout) for layout in ENCODINGS}) if PATH else {}
VARIANTS = {name: variant for name, variant in MIXED.items() if not variant.swiglu}
RAGGED = (0, 1, 3, 17, 128, 200, 513)
GUARD = 70  # rows behind the last: nothing may be written there, and what is read there must not matter
CANNOT_IMPLEMENT = -3

E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], dtype=torch.float64)


@dataclass(frozen=True)
class Weights:
    """packed: as the kernels read them. values: float64 [L, n, k], as they decode them, in the layer's order."""

    packed: Tensor
    values: Tensor


Order = slice | list[int]
"""Which row of the layer's lies at each place of the packed."""
SAME = slice(None)


def gate_beside_up(n: int, gate_first: bool) -> list[int]:
    """Eight rows of gate, the same eight of up, the next eight of gate, ..."""
    gate, up = (0, n // 2) if gate_first else (n // 2, 0)
    return [half + 8 * eight + row for eight in range(n // 16) for half in (gate, up) for row in range(8)]


def of_codes(encoding: str, codes: Tensor, factors: Tensor, order: Order = SAME) -> Weights:
    """Codes uint8 [L, n, k], factor codes uint8 [L, n, k/block], on the GPU."""
    nibbles, ordered = (codes[..., ::2] | codes[..., 1::2] << 4)[:, order], factors[:, order]
    if encoding in ("mxfp4", "fp8_mxfp4"):
        packed, scale = pack_mxfp4(nibbles, ordered) if encoding == "mxfp4" else (pack_fp8_mxfp4(nibbles, ordered), 1.0)
        scales, block = torch.ldexp(torch.ones_like(factors, dtype=torch.float64), factors.int() - 127) / scale, 32
    else:
        packed, block = pack_nvfp4(nibbles, ordered.view(torch.float8_e4m3fn)), 16
        scales = factors.view(torch.float8_e4m3fn).double()
    return Weights(packed, E2M1.cuda()[codes.long()] * scales.repeat_interleave(block, -1))


@functools.lru_cache(maxsize=1)
def random_weights(encoding: str, experts: int, n: int, k: int, gate_first: bool | None = None) -> Weights:
    """gate_first: given for gate_up, whose packed rows are those of gate and up in turns."""
    generator = torch.Generator("cuda").manual_seed(0)
    order = SAME if gate_first is None else gate_beside_up(n, gate_first)

    def integers(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=generator, device="cuda", dtype=torch.uint8)

    if encoding == "bf16":
        values = torch.randn(experts, n, k, generator=generator, device="cuda").bfloat16()
        return Weights(pack_bf16(values[:, order]), values.double())
    factors = integers(0, 100, experts, n, k // 16) if encoding == "nvfp4" else integers(118, 126, experts, n, k // 32)
    return of_codes(encoding, integers(0, 16, experts, n, k), factors, order)


def as_rows(variant: VariantRecord, values: Tensor) -> Tensor:
    """In the encoding that the variant multiplies."""
    return values.to(torch.float8_e4m3fn if WeightLayout(variant.weights).multiplies_e4m3 else torch.bfloat16)


def check(name: str, sizes: tuple[int, ...], n: int, k: int, affine: bool) -> None:
    variant = VARIANTS[name]
    weights = random_weights(ENCODINGS[variant.weights], len(sizes), n, k)
    generator = torch.Generator("cuda").manual_seed(1)
    rows = sum(sizes)
    tokens = torch.randn(rows + GUARD, k, generator=generator, device="cuda")
    tokens[rows:] = torch.nan
    tokens = as_rows(variant, tokens)
    offsets = torch.tensor([0, *sizes]).cumsum(0).to("cuda", torch.int32)
    token, weight, before = torch.arange(rows, device="cuda"), torch.ones(rows, device="cuda"), torch.nan
    if variant.combines:  # every row is another token's, in no order
        token, weight = token[torch.randperm(rows, generator=generator, device="cuda")], weight * 0.5
        weight += torch.rand(rows, generator=generator, device="cuda")
        before = 0.0
    row_origins = origins(token, weight)
    output = torch.full((rows + GUARD, n), before, dtype=torch.bfloat16, device="cuda")
    scale = bias = None
    if affine:
        scale = torch.rand(len(sizes), generator=generator, device="cuda") + 0.5
        bias = torch.randn(len(sizes), n, generator=generator, device="cuda") * k**0.5
    assert run(variant, prepare(tokens, weights.packed, offsets, output, scale, bias, row_origins)) == 0
    torch.cuda.synchronize()

    assert (output[rows:] == 0).all() if variant.combines else output[rows:].isnan().all()
    for expert, (first, end) in enumerate(zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True)):
        if first == end:
            continue
        reference = tokens[first:end].float().double() @ weights.values[expert].T
        if scale is not None and bias is not None:
            reference = reference * scale[expert].double() + bias[expert].double()
        reference = reference * weight[first:end, None].double()
        rows_of_expert = output[token[first:end]].double()
        assert relative_error(rows_of_expert, reference) <= 3e-3
        worst = ((rows_of_expert - reference).abs() / reference.abs().clamp(min=reference.std().item())).max()
        assert worst <= 2e-2


@pytest.mark.parametrize("affine", [False, True], ids=["plain", "affine"])
@pytest.mark.parametrize(("n", "k"), [(2880, 2880), (1536, 4096), (160, 32)])
@pytest.mark.parametrize("variant", VARIANTS)
def test_ragged_groups(variant: str, n: int, k: int, affine: bool) -> None:
    check(variant, RAGGED, n, k, affine)


@pytest.mark.parametrize(
    "sizes", [(0,), (0, 1), (1,), (513, 0, 0, 0), (0,) * 130 + (5,)], ids=lambda sizes: str(sizes[-4:])
)
@pytest.mark.parametrize("variant", VARIANTS)
def test_sparse_groups(variant: str, sizes: tuple[int, ...]) -> None:
    check(variant, sizes, 256, 384, affine=False)


@pytest.mark.parametrize("variant", [name for name, variant in VARIANTS.items() if variant.combines])
def test_rows_of_a_token_add_up(variant: str) -> None:
    """Six experts with a row of each of eleven tokens."""
    experts, count, n, k = 6, 11, 256, 384
    weights = random_weights(ENCODINGS[VARIANTS[variant].weights], experts, n, k)
    generator = torch.Generator("cuda").manual_seed(2)
    tokens = as_rows(VARIANTS[variant], torch.randn(experts * count, k, generator=generator, device="cuda"))
    weight = torch.rand(experts * count, generator=generator, device="cuda")
    token = torch.arange(experts * count, device="cuda") % count
    offsets = torch.arange(0, experts * count + 1, count, device="cuda", dtype=torch.int32)
    output, row_origins = torch.zeros(count, n, dtype=torch.bfloat16, device="cuda"), origins(token, weight)
    gemm = prepare(tokens, weights.packed, offsets, output, row_origins=row_origins)
    assert run(VARIANTS[variant], gemm) == 0
    rows = tokens.float().double().view(experts, count, k) @ weights.values.transpose(1, 2)
    reference = (rows * weight.double().view(experts, count, 1)).sum(0)
    assert relative_error(output.double(), reference) <= 6e-3  # adds of bf16


def test_scale_and_bias_each_alone() -> None:
    variant = next(iter(VARIANTS.values()))
    weights = random_weights(ENCODINGS[variant.weights], 1, 128, 128)
    tokens = as_rows(variant, torch.randn(5, 128, device="cuda"))
    offsets = torch.tensor([0, 5], device="cuda", dtype=torch.int32)
    scale, bias = torch.tensor([0.75], device="cuda"), torch.randn(1, 128, device="cuda") * 100
    product = tokens.float().double() @ weights.values[0].T
    for given, reference in (((scale, None), product * 0.75), ((None, bias), product + bias.double())):
        output = torch.empty(5, 128, dtype=torch.bfloat16, device="cuda")
        assert run(variant, prepare(tokens, weights.packed, offsets, output, *given)) == 0
        assert relative_error(output.double(), reference) <= 3e-3


@functools.lru_cache(maxsize=1)
def every_weight(encoding: str, first: int) -> Weights:
    """One expert of 32 rows that has every code under every factor code from `first` on, or every finite bf16.

    Of mxfp4 129 factors, which is about what bf16 holds beside each other.
    """
    if encoding == "bf16":
        values = torch.arange(1 << 16, dtype=torch.int32, device="cuda").to(torch.int16).view(torch.bfloat16)
        values = values.where(values.isfinite(), 0).view(1, 32, -1)
        return Weights(pack_bf16(values), values.double())
    count, block = (128, 16) if encoding == "nvfp4" else (129, 32)
    k = count * block + -count * block % 32
    factors = torch.arange(first, first + k // block, device="cuda").clamp(max=126 if encoding == "nvfp4" else 254)
    codes = (torch.arange(32, device="cuda")[:, None] + torch.arange(k, device="cuda")) % 16
    return of_codes(encoding, codes.to(torch.uint8)[None], factors.to(torch.uint8).expand(1, 32, -1).contiguous())


# Upper factors of mxfp4 too.
UPPER = {WeightLayout.MXFP4: 126, WeightLayout.FP8_MXFP4: 124}
WINDOWS = [(name, first) for name, v in VARIANTS.items() for first in {0, UPPER.get(WeightLayout(v.weights), 0)}]


def one_hot_product(variant: str, first: int) -> tuple[Tensor, Tensor]:
    """(output, weights [k, 32]): row j of the tokens is 1 in column j."""
    weights = every_weight(ENCODINGS[VARIANTS[variant].weights], first)
    k = weights.values.shape[2]
    tokens = as_rows(VARIANTS[variant], torch.eye(k, device="cuda"))
    offsets = torch.tensor([0, k], device="cuda", dtype=torch.int32)
    before = 0.0 if VARIANTS[variant].combines else torch.nan
    output = torch.full((k, 32), before, dtype=torch.bfloat16, device="cuda")
    row_origins = origins(torch.arange(k, device="cuda"), torch.ones(k, device="cuda"))
    assert run(VARIANTS[variant], prepare(tokens, weights.packed, offsets, output, row_origins=row_origins)) == 0
    return output, weights.values[0].T


@pytest.mark.parametrize(("variant", "first"), WINDOWS)
def test_every_weight_is_decoded_exactly(variant: str, first: int) -> None:
    output, expected = one_hot_product(variant, first)
    assert torch.equal(output.double(), expected)


@pytest.mark.parametrize(("n", "k"), [(48, 64), (64, 48)])
def test_refuses_what_it_does_not_fit(n: int, k: int) -> None:
    tokens = torch.zeros(1, k, dtype=torch.bfloat16, device="cuda")
    packed = torch.zeros(1 << 16, dtype=torch.uint8, device="cuda")
    offsets = torch.tensor([0, 1], device="cuda", dtype=torch.int32)
    output = torch.zeros(1, n, dtype=torch.bfloat16, device="cuda")
    assert run(next(iter(VARIANTS.values())), prepare(tokens, packed, offsets, output)) == CANNOT_IMPLEMENT
