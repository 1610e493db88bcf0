from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from moe_runtime.errors import InvalidArgument
from moe_runtime.formats import (
    FORMATS,
    Extra,
    Tokens,
    Weights,
    elements,
    find_format,
    mxfp4,
    mxfp8,
    nvfp4,
    scale_layouts,
)
from moe_runtime.formats.tokens import dequantise_tokens, quantise_tokens, round_rows
from moe_runtime.formats.weights import check_factors, dequantise_weights, described, quantise_weights
from tests import reference
from tests import reference_formats as exact

FINITE_E4M3 = [code for code in range(256) if code & 0x7F != 0x7F]


def random_rows(rows: int, columns: int, seed: int, spread: float = 0.0, magnitude: float = 1.0) -> Tensor:
    """Normal values whose magnitudes also vary by e^spread, so that blocks hold large and small ones."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, columns, generator=generator)
    return magnitude * x * torch.exp(spread * torch.randn(x.shape, generator=generator))


def test_formats_pair_encodings_as_named() -> None:
    pairs = {name: (format.weights.name.lower(), format.tokens.name.lower()) for name, format in FORMATS.items()}
    assert pairs == {
        "fp8_block": ("fp8_block", "fp8_block"),
        "nvfp4": ("nvfp4", "nvfp4"),
        "mxfp8_mxfp4": ("mxfp4", "mxfp8"),
        "fp8_mxfp4": ("mxfp4", "fp8"),
        "bf16_mxfp4": ("mxfp4", "bf16"),
        "fp8_nvfp4": ("nvfp4", "fp8"),
        "bf16": ("bf16", "bf16"),
    }
    scaled = {name for name, format in FORMATS.items() if Extra.OUTPUT_SCALES in format.extras}
    assert scaled == {"nvfp4", "fp8_mxfp4", "fp8_nvfp4"}
    assert all(FORMATS[name].tokens.has_tensor_scale for name in scaled)


def test_unknown_format_lists_the_known_ones() -> None:
    with pytest.raises(InvalidArgument, match="format: got 'int3'") as error:
        find_format("int3")
    assert all(name in str(error.value) for name in FORMATS)


def test_e2m1_values() -> None:
    assert torch.equal(elements.e2m1_values(torch.arange(8)).double(), torch.from_numpy(exact.E2M1_VALUES))
    assert torch.equal(elements.e2m1_values(torch.arange(8, 16)), -elements.e2m1_values(torch.arange(8)))


def test_e2m1_ties_go_to_the_even_code() -> None:
    values = elements.e2m1_values(torch.arange(8))
    midpoints = (values[1:] + values[:-1]) / 2
    assert elements.e2m1_codes(midpoints).tolist() == [0, 2, 2, 4, 4, 6, 6]
    assert elements.e2m1_codes(-midpoints).tolist() == [8, 10, 10, 12, 12, 14, 14]
    above, below = torch.nextafter(midpoints, torch.tensor(9.0)), torch.nextafter(midpoints, torch.tensor(0.0))
    assert elements.e2m1_codes(above).tolist() == list(range(1, 8))
    assert elements.e2m1_codes(below).tolist() == list(range(7))
    assert elements.e2m1_codes(torch.tensor([6.0, 7.0, 1e30, -torch.inf])).tolist() == [7, 7, 7, 15]


def test_the_low_nibble_comes_first() -> None:
    packed = elements.pack_e2m1(torch.tensor([[1, 2, 15, 0]], dtype=torch.uint8))
    assert packed.tolist() == [[0x21, 0x0F]]
    assert elements.unpack_e2m1(packed).tolist() == [[1, 2, 15, 0]]


def every_code_by_every_factor(factors: list[int], block: int) -> tuple[Tensor, Tensor]:
    """Packed [F, block/2] with all 16 codes in each row, and factors [F, 1]."""
    codes = (torch.arange(block, dtype=torch.uint8) % 16).expand(len(factors), -1)
    return elements.pack_e2m1(codes), torch.tensor(factors, dtype=torch.uint8)[:, None]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_mxfp4_decodes_exactly(dtype: torch.dtype) -> None:
    smallest = 0 if dtype == torch.float64 else 2  # 0.5 * 2^-126 and less are subnormal there
    packed, factors = every_code_by_every_factor(list(range(smallest, 252)), 32)
    want = exact.dequantise_weights("mxfp4", packed, factors)
    assert np.array_equal(mxfp4.dequantise(packed, factors, dtype).double().numpy(), want)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_nvfp4_decodes_exactly(dtype: torch.dtype) -> None:
    packed, codes = every_code_by_every_factor(FINITE_E4M3, 16)
    factors = codes.view(torch.float8_e4m3fn)
    want = exact.dequantise_weights("nvfp4", packed, factors)
    assert np.array_equal(nvfp4.dequantise(packed, factors, dtype).double().numpy(), want)


def test_mxfp8_decodes_exactly_in_bf16() -> None:
    values = torch.tensor([*FINITE_E4M3, 0, 0], dtype=torch.uint8).expand(200, -1)
    factors = torch.arange(20, 220, dtype=torch.uint8)[:, None].expand(-1, 8)
    found = mxfp8.dequantise(values.view(torch.float8_e4m3fn), factors, torch.bfloat16)
    want = reference.decode_e4m3(values.numpy()) * exact.decode_ue8m0(factors.numpy()).repeat(32, -1)
    assert np.array_equal(found.double().numpy(), want)


ROUNDED = [tokens for tokens in Tokens if tokens != Tokens.FP8_BLOCK]  # which has tests of its own
any_rows = st.builds(
    random_rows,
    st.integers(0, 3),
    st.sampled_from([32, 96]),
    st.integers(0, 2**31),
    st.floats(0, 6),
    st.sampled_from([1e-20, 1e-3, 1.0, 300.0, 1e6]),
)


@pytest.mark.parametrize("tokens", ROUNDED, ids=lambda tokens: tokens.name)
@given(any_rows, st.sampled_from([1.0, 0.37, 12.5]))
def test_rows_round_bit_for_bit(tokens: Tokens, x: Tensor, scale: float) -> None:
    found = round_rows(tokens, x, scale)
    assert found.dtype == torch.bfloat16
    want = exact.round_rows(tokens.name.lower(), x.numpy(), np.float32(1) / np.float32(scale))
    normal = np.abs(want) >= 2.0**-126  # of bf16: only blocks of values below 1e-35 have others
    assert np.array_equal(found.double().numpy()[normal], want[normal])


@pytest.mark.parametrize("tokens", ROUNDED, ids=lambda tokens: tokens.name)
@given(any_rows)
def test_rounding_again_changes_nothing(tokens: Tokens, x: Tensor) -> None:
    once = round_rows(tokens, x)
    again = round_rows(tokens, once)
    if tokens == Tokens.NVFP4:
        # A factor that is subnormal in e4m3 is off by more than the step from e2m1's 4 to 6, and rounds differently.
        kept = (nvfp4.quantise(x)[1].float() >= 2.0**-6).repeat_interleave(16, -1)
        once, again = once[kept], again[kept]
    assert torch.equal(again, once)


@pytest.mark.parametrize(
    ("tokens", "bound"), [(Tokens.BF16, 2**-8), (Tokens.FP8, 2**-4), (Tokens.MXFP8, 2**-3), (Tokens.NVFP4, 1 / 4)]
)
@given(st.integers(0, 2**31))
def test_no_value_moves_far(tokens: Tokens, bound: float, seed: int) -> None:
    """By no more than a part of itself, or of its block's largest: half a step of e4m3 or e2m1, or the saturation."""
    x = random_rows(3, 64, seed)
    block = {Tokens.NVFP4: 16, Tokens.MXFP8: 32}.get(tokens, 1)
    largest = x.unflatten(-1, (-1, block)).abs().amax(-1, keepdim=True).expand(-1, -1, block).flatten(-2)
    assert ((round_rows(tokens, x).float() - x).abs() <= bound * largest + 2**-10).all()


@pytest.mark.parametrize("tokens", ROUNDED, ids=lambda tokens: tokens.name)
def test_zero_blocks_stay_zero(tokens: Tokens) -> None:
    x = torch.zeros(2, 64)
    x[1, 32:] = 6.0
    assert torch.equal(round_rows(tokens, x).float(), x)


def test_factors_of_zero_blocks() -> None:
    assert mxfp8.quantise(torch.zeros(1, 32))[1].tolist() == [[0]]
    packed, factors = nvfp4.quantise(torch.tensor([[2.0**-10, -(2.0**-12)] * 8]))  # amax / 6 is below half of 2^-9
    assert factors.float().item() == 0 and not packed.any()


def test_mx_factors_by_hand() -> None:
    """Of 1.0 the exponent 0 less e4m3's 8; values just below the next power of two saturate."""
    x = torch.zeros(3, 32)
    x[:, 0] = torch.tensor([1.0, 1.99, 2.0])
    values, factors = mxfp8.quantise(x)
    assert factors.flatten().tolist() == [119, 119, 120]
    assert values[:, 0].float().tolist() == [256.0, 448.0, 256.0]
    packed, factors = mxfp4.quantise(x)
    assert factors.flatten().tolist() == [125, 125, 126]
    assert elements.e2m1_values(elements.unpack_e2m1(packed))[:, 0].tolist() == [4.0, 6.0, 4.0]


def test_nvfp4_saturates_at_its_largest_factor() -> None:
    x = torch.full((1, 16), 1e6)
    assert (round_rows(Tokens.NVFP4, x) == 6 * 448).all()


@pytest.mark.parametrize("tokens", list(Tokens), ids=lambda tokens: tokens.name)
def test_quantised_tokens_give_the_rounded_rows(tokens: Tokens) -> None:
    x = random_rows(5, 256, 0)
    found = dequantise_tokens(tokens, *quantise_tokens(tokens, x))
    assert torch.equal(found, round_rows(tokens, x).float())


@pytest.mark.parametrize("encoding", list(Weights), ids=lambda encoding: encoding.name)
def test_quantised_weights(encoding: Weights) -> None:
    w = random_rows(3 * 128, 256, 1, magnitude=0.02).view(3, 128, 256)
    values, scale, scale_of_expert = quantise_weights(encoding, w)
    about_values, about_scale = described(encoding, (3, 128, 256))
    assert (tuple(values.shape), values.dtype) == about_values
    assert about_scale == (None if scale is None else (tuple(scale.shape), scale.dtype))
    found = dequantise_weights(encoding, values, scale, torch.float64)
    assert np.array_equal(found.numpy(), exact.dequantise_weights(encoding.name.lower(), values, scale))
    whole = found if scale_of_expert is None else found * scale_of_expert.double()[:, None, None]
    bound = {Weights.BF16: 2e-3, Weights.FP8_BLOCK: 0.03, Weights.MXFP4: 0.14, Weights.NVFP4: 0.1}[encoding]
    assert reference.relative_error(whole, w) < bound


def test_nvfp4_weights_use_the_whole_range() -> None:
    w = random_rows(2 * 8, 64, 2, magnitude=1e-6).view(2, 8, 64)
    w[1] *= 1e9
    _, scale, scale_of_expert = quantise_weights(Weights.NVFP4, w)
    assert scale is not None and scale_of_expert is not None
    assert (scale.float().amax((1, 2)) == 448).all()
    assert quantise_weights(Weights.NVFP4, torch.zeros(1, 8, 64)).global_scale == 1


def test_factors_that_are_no_positive_numbers_are_refused() -> None:
    ue8m0, e4m3 = torch.zeros(2, 4, 3, dtype=torch.uint8), torch.zeros(2, 4, 3, dtype=torch.uint8)
    ue8m0[1, 2, 0], e4m3[0, 3, 1] = 0xFE, 0x7E
    check_factors("scale", Weights.MXFP4, ue8m0)
    check_factors("scale", Weights.NVFP4, e4m3.view(torch.float8_e4m3fn))
    ue8m0[1, 2, 0], e4m3[0, 3, 1] = 0xFF, 0xFF
    with pytest.raises(InvalidArgument, match=r"scale: got the factor 0xff at \[1, 2, 0\]; accepted: ue8m0"):
        check_factors("scale", Weights.MXFP4, ue8m0)
    for bad in (0xFF, 0x7F, 0x80, 0xB8):
        e4m3[0, 3, 1] = bad
        with pytest.raises(InvalidArgument, match=rf"scale: got the factor {bad:#x} at \[0, 3, 1\]; accepted: e4m3"):
            check_factors("scale", Weights.NVFP4, e4m3.view(torch.float8_e4m3fn))


@pytest.mark.parametrize("quantiser", [mxfp4.quantise, mxfp8.quantise, nvfp4.quantise])
def test_blocks_must_be_whole(quantiser: object) -> None:
    with pytest.raises(InvalidArgument, match=r"got shape \[2, 40\]"):
        quantiser(torch.zeros(2, 40))  # type: ignore[operator]


@given(st.integers(1, 300), st.integers(1, 9))
def test_atoms_lie_as_the_tensor_cores_read_them(rows: int, groups: int) -> None:
    factors = torch.randint(1, 256, (2, rows, groups), dtype=torch.uint8)
    atoms = scale_layouts.to_atoms(factors)
    row_atoms, factor_atoms = -(-rows // 128), -(-groups // 4)
    assert atoms.shape == (2, row_atoms, factor_atoms, 512)
    r, k = np.indices((rows, groups))
    # The formula of moe_scale_factor_offset in templates/abi_block_scaled.h.
    offset = (r // 128 * factor_atoms + k // 4) * 512 + r % 32 * 16 + r % 128 // 32 * 4 + k % 4
    assert np.array_equal(atoms.flatten(1).numpy()[:, offset], factors.numpy())
    assert int((atoms != 0).sum()) == factors.numel()
    assert torch.equal(scale_layouts.from_atoms(atoms, rows, groups), factors)


@given(st.integers(1, 300), st.integers(1, 9))
def test_unit_atoms_make_fp8_rows_of_mxfp8(rows: int, groups: int) -> None:
    factors = scale_layouts.from_atoms(scale_layouts.unit_atoms(rows, groups), rows, groups)
    codes = torch.randn(rows, 32 * groups).to(torch.float8_e4m3fn)
    assert torch.equal(mxfp8.dequantise(codes, factors), codes.float())
    assert scale_layouts.unit_atoms(rows, groups).shape == scale_layouts.to_atoms(factors).shape
