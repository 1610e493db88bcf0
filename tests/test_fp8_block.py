from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moe_runtime.errors import InvalidArgument
from moe_runtime.formats import fp8_block
from tests import reference


def same_bits(x: torch.Tensor) -> None:
    values, scale = fp8_block.quantise_rows(x)
    codes, scales = reference.quantise(x.float().numpy())
    np.testing.assert_array_equal(values.view(torch.uint8).numpy(), codes)
    np.testing.assert_array_equal(scale.numpy(), scales)


def test_e4m3_table_is_torch_s() -> None:
    codes = torch.arange(127, dtype=torch.uint8)
    np.testing.assert_array_equal(codes.view(torch.float8_e4m3fn).double().numpy(), reference.E4M3_VALUES)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("magnitude", [1e-20, 1e-6, 1.0, 1e6, 1e30])
def test_rows_bit_for_bit(dtype: torch.dtype, magnitude: float) -> None:
    x = torch.randn(9, 384, generator=torch.Generator().manual_seed(0)) * magnitude
    same_bits(x.to(dtype))


@given(st.integers(0, 4), st.integers(1, 3), st.integers(0, 2**31), st.floats(-8, 8))
def test_rows_of_any_shape(tokens: int, blocks: int, seed: int, spread: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, 128 * blocks, generator=generator)
    same_bits(x * torch.exp(spread * torch.randn(x.shape, generator=generator)))


def test_zeros_stay_zeros() -> None:
    values, scale = fp8_block.quantise_rows(torch.zeros(2, 256))
    assert (scale > 0).all() and scale.isfinite().all()
    assert (fp8_block.dequantise_rows(values, scale) == 0).all()


def test_largest_value_is_exact() -> None:
    x = torch.linspace(-3, 3, 128)[None]
    values, _ = fp8_block.quantise_rows(x)
    assert values.float().abs().max() == 448


@given(st.integers(1, 4), st.integers(1, 3), st.integers(0, 2**31), st.floats(-8, 8), st.floats(-25, 25))
def test_no_value_moves_by_more_than_its_rounding(
    tokens: int, blocks: int, seed: int, spread: float, magnitude: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, 128 * blocks, generator=generator) * 10**magnitude
    x = x * torch.exp(spread * torch.randn(x.shape, generator=generator))
    values, scale = fp8_block.quantise_rows(x)
    moved = (fp8_block.dequantise_rows(values, scale, torch.float64) - x.double()).abs()
    rounding = fp8_block.rounding_of_rows(x).double()
    # A value is at most 2^5 times its rounding, and float32 puts it that much off at 2^-23 of itself.
    assert (moved <= rounding * (1 + 2**-17)).all()


def test_rounding_by_hand() -> None:
    """Under a scale of 1: half of e4m3's eighth in each binade, and of 2^-9 among the subnormal values below 2^-6."""
    x = torch.zeros(1, 128)
    x[0, :8] = torch.tensor([448.0, 255.0, 256.0, -1.0, 1.99, 2**-6, 2**-7, -(2**-12)])
    expected = torch.tensor([16.0, 8.0, 16.0, 2**-4, 2**-4, 2**-10, 2**-10, 2**-10])
    assert fp8_block.rounding_of_rows(x)[0, :8].equal(expected)
    assert fp8_block.rounding_of_rows(x)[0, 8:].eq(2**-10).all()


def test_halfway_values_move_by_their_rounding() -> None:
    x = torch.zeros(2, 256)
    x[:, ::128] = 448.0
    x[:, 1::128], x[:, 2::128], x[:, 3::128] = 1 + 2**-4, 248.0, 2**-10
    values, scale = fp8_block.quantise_rows(x)
    moved = (fp8_block.dequantise_rows(values, scale) - x).abs()
    assert moved[:, 1:4].equal(fp8_block.rounding_of_rows(x)[:, 1:4]) and (moved[:, 1:4] > 0).all()


def test_rows_keep_leading_dimensions() -> None:
    x = torch.randn(2, 3, 256)
    values, scale = fp8_block.quantise_rows(x)
    assert (values.shape, scale.shape) == ((2, 3, 256), (2, 3, 2))
    torch.testing.assert_close(fp8_block.dequantise_rows(values, scale), x, rtol=2**-4, atol=2e-3)


def test_dequantise_rows_takes_any_strides() -> None:
    values, scale = fp8_block.quantise_rows(torch.randn(5, 384))
    column_major = scale.T.contiguous().T
    assert not column_major.is_contiguous()
    assert torch.equal(fp8_block.dequantise_rows(values, column_major), fp8_block.dequantise_rows(values, scale))


@pytest.mark.parametrize("shape", [(128, 256), (3, 256, 128)])
def test_blocks(shape: tuple[int, ...]) -> None:
    w = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    values, scale = fp8_block.quantise_blocks(w)
    assert values.shape == shape
    assert scale.shape == (*shape[:-2], shape[-2] // 128, shape[-1] // 128)
    first = w[..., :128, :128]
    torch.testing.assert_close(scale[..., 0, 0], first.abs().amax((-2, -1)) / 448)
    last = values[..., -128:, -128:].double() * scale[..., -1:, -1:].double()
    assert torch.equal(fp8_block.dequantise_blocks(values, scale, torch.float64)[..., -128:, -128:], last)
    assert reference.relative_error(fp8_block.dequantise_blocks(values, scale), w) < 0.03


def test_blocks_have_one_scale_each() -> None:
    w = torch.ones(256, 256)
    w[128:, :128] = 1000.0
    _, scale = fp8_block.quantise_blocks(w)
    torch.testing.assert_close(scale, torch.tensor([[1.0, 1.0], [1000.0, 1.0]]) / 448)


def test_sizes_must_be_multiples_of_128() -> None:
    with pytest.raises(InvalidArgument, match=r"x: got shape \[2, 100\]"):
        fp8_block.quantise_rows(torch.zeros(2, 100))
    with pytest.raises(InvalidArgument, match="w: got shape"):
        fp8_block.quantise_blocks(torch.zeros(100, 128))
