"""Packed weights, decoded by the kernels' own arithmetic compiled for the host, against values taken from the formats'
definitions."""

from __future__ import annotations

import ctypes
import dataclasses
import itertools
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moe_runtime import MoEConfig, PackedWeights
from moe_runtime.errors import InvalidArgument
from moe_runtime.formats import find_format
from moe_runtime.formats.packing import pack_bf16, pack_fp8_mxfp4, pack_mxfp4, pack_nvfp4
from tests.host_build import compile_shim, needs_gxx
from tests.reference_formats import dequantise_weights

pytestmark = needs_gxx

E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
NVFP4_SCALE = 2.0**-8  # fragments are the weights times this; the epilogue takes it back

Decode = Callable[[str, Tensor], np.ndarray]


@pytest.fixture(scope="module")
def decode(tmp_path_factory: pytest.TempPathFactory) -> Decode:
    """(encoding, one expert's blob) -> float64 [rows, columns] of the padded matrix, from every thread's fragments."""
    handle = compile_shim("decode_shim", tmp_path_factory.mktemp("decode"))

    def decode_e4m3(blob: Tensor) -> np.ndarray:
        """Operand A of m64k32 times what its products are multiplied by."""
        tiles, blocks, _ = blob.shape
        matrix = np.full((128 * tiles, 128 * blocks), np.nan)
        fragments = np.empty((8, 8, 4, 4, 4), np.uint32)  # [warp, group, lane, step, register]
        factors = np.empty((8, 8, 4, 2), np.float32)  # [warp, group, lane, half]
        warp, group, lane, step, register = np.ix_(*map(np.arange, fragments.shape))
        rows = 16 * warp + group + 8 * (register % 2) + 0 * (lane + step)
        columns = 32 * step + 4 * lane + 16 * (register // 2) + 0 * (warp + group)
        for tile, block in itertools.product(range(tiles), range(blocks)):
            given = np.ascontiguousarray(blob[tile, block].numpy())
            pointers = (array.ctypes.data_as(ctypes.c_void_p) for array in (given, fragments, factors))
            assert handle.fp8_mxfp4(*pointers) == given.size
            assert (factors == factors[:, :, :1]).all()
            for place in range(4):
                codes = torch.from_numpy((fragments >> 8 * place).astype(np.uint8)).view(torch.float8_e4m3fn)
                values = codes.double().numpy() * factors[:, :, :, None].repeat(2, 3).reshape(8, 8, 4, 1, 4)
                matrix[128 * tile + rows, 128 * block + columns + place] = values
        return matrix

    def decode(encoding: str, blob: Tensor) -> np.ndarray:
        if encoding == "fp8_mxfp4":
            return decode_e4m3(blob)
        tiles, blocks, size = blob.shape
        slices = np.ascontiguousarray(blob.numpy().reshape(tiles, 2 * blocks, size // 2))
        matrix = np.full((128 * tiles, 128 * blocks), np.nan)
        fragments = np.empty((8, 8, 4, 4, 4), np.uint32)  # [warp, group, lane, step, register]
        # m64k16's operand A: which row and column the low half of each register holds.
        warp, group, lane, step, register = np.ix_(*map(np.arange, fragments.shape))
        rows = 16 * warp + group + 8 * (register % 2) + 0 * (lane + step)
        columns = 16 * step + 2 * lane + 8 * (register // 2) + 0 * (warp + group)
        for tile in range(tiles):
            for index in range(2 * blocks):
                pointer = slices[tile, index].ctypes.data_as(ctypes.c_void_p)
                assert getattr(handle, encoding)(pointer, fragments.ctypes.data_as(ctypes.c_void_p)) == size // 2
                for odd in range(2):
                    values = (fragments >> 16 * odd << 16).view(np.float32)
                    matrix[128 * tile + rows, 64 * index + columns + odd] = values
        return matrix

    return decode


def bits(values: np.ndarray) -> np.ndarray:
    """float64 whose values bf16 holds -> their bf16 bits; -0 and 0 differ."""
    with np.errstate(over="ignore"):
        wide = values.astype(np.float32)
    np.testing.assert_array_equal(wide.view(np.uint32) & 0xFFFF, 0)
    return (wide.view(np.uint32) >> 16).astype(np.uint16)


def padded(matrix: np.ndarray) -> np.ndarray:
    rows, columns = matrix.shape
    return np.pad(matrix, ((0, -rows % 128), (0, -columns % 128)))


def nibbles(codes: np.ndarray) -> Tensor:
    return torch.from_numpy((codes[..., ::2] | codes[..., 1::2] << 4).astype(np.uint8))


def ue8m0(factors: np.ndarray) -> np.ndarray:
    return np.ldexp(1.0, factors.astype(int) - 127)


def e4m3(factors: np.ndarray) -> np.ndarray:
    exponent, mantissa = factors.astype(int) >> 3, factors.astype(int) & 7
    return np.where(exponent > 0, np.ldexp(1 + mantissa / 8, exponent - 7), np.ldexp(mantissa / 8, -6))


def mxfp4(codes: np.ndarray, factors: np.ndarray) -> tuple[Tensor, np.ndarray]:
    """[n, k] codes, [n, k/32] factors -> (blob of one expert, fragments' values)."""
    blob, scale = pack_mxfp4(nibbles(codes)[None], torch.from_numpy(factors)[None])
    assert scale == max(1, ue8m0(factors).max() / 2)
    return blob[0], E2M1[codes] * ue8m0(factors).repeat(32, -1) / scale


def nvfp4(codes: np.ndarray, factors: np.ndarray) -> tuple[Tensor, np.ndarray]:
    blob = pack_nvfp4(nibbles(codes)[None], torch.from_numpy(factors)[None].view(torch.float8_e4m3fn))[0]
    return blob, E2M1[codes] * e4m3(factors).repeat(16, -1) * NVFP4_SCALE


def fp8_mxfp4(codes: np.ndarray, factors: np.ndarray) -> tuple[Tensor, np.ndarray]:
    blob = pack_fp8_mxfp4(nibbles(codes)[None], torch.from_numpy(factors)[None])[0]
    return blob, E2M1[codes] * ue8m0(factors).repeat(32, -1)


def every_code(first: int, end: int, block: int) -> tuple[np.ndarray, np.ndarray]:
    """Codes and factors in which each factor code first .. end - 1 meets all 16 codes at every place of a block."""
    rows, columns = 32, (end - first) * block
    k = columns + -columns % 32
    codes = (np.arange(rows)[:, None] + np.arange(k)) % 16
    factors = np.minimum(np.arange(first, first + k // block), end - 1)
    return codes.astype(np.uint8), np.tile(factors, (rows, 1)).astype(np.uint8)


@pytest.mark.parametrize(("first", "end"), [(0, 129), (122, 255), (0, 134)])
def test_mxfp4_decodes_every_code_under_every_factor(decode: Decode, first: int, end: int) -> None:
    """All that are 2 at most, and as many binades below the largest as bf16 holds of their products."""
    blob, values = mxfp4(*every_code(first, end, 32))
    np.testing.assert_array_equal(bits(decode("mxfp4", blob)), bits(padded(values)))


def test_mxfp4_beside_a_far_larger_factor_vanishes(decode: Decode) -> None:
    factors = np.repeat([[0, 254]], 32, 0).astype(np.uint8)
    blob, values = mxfp4(np.full((32, 64), 1, np.uint8), factors)
    decoded = decode("mxfp4", blob)[:32, :64]
    np.testing.assert_array_equal(decoded[:, 32:], values[:, 32:])
    assert not decoded[:, :32].any()


@pytest.mark.parametrize(("first", "end"), [(0, 130), (125, 255)])
def test_mxfp4_for_e4m3_decodes_every_code_under_every_factor(decode: Decode, first: int, end: int) -> None:
    blob, values = fp8_mxfp4(*every_code(first, end, 32))
    np.testing.assert_array_equal(decode("fp8_mxfp4", blob), padded(values))


@pytest.mark.parametrize("distance", [0, 1, 13, 14, 15, 16, 100])
@pytest.mark.parametrize("largest", [0, 5, 20, 130, 254])
def test_mxfp4_for_e4m3_is_exact_up_to_14_binades_below_a_rows_largest_factor(
    decode: Decode, largest: int, distance: int
) -> None:
    """Then it is zero. Beside, a block of zeros with the largest factor of all, which does not count."""
    factors = np.array([[largest, max(largest - distance, 0), 254, largest], [127, 100, 127, 120]], np.uint8)
    factors = np.repeat(factors, 16, 0)
    codes = (np.arange(32)[:, None] + np.arange(128)) % 16
    codes[:16, 64:96] %= 2
    codes[:16, 64:96] *= 8  # zeros of either sign
    blob, values = fp8_mxfp4(codes.astype(np.uint8), factors)
    expected = values.copy()
    if min(largest, distance) > 14:
        expected[:16, 32:64] = 0
    expected[16:, 32:64] = 0  # 27 binades
    np.testing.assert_array_equal(decode("fp8_mxfp4", blob)[:32, :128], expected)


def test_nvfp4_decodes_every_code_under_every_factor(decode: Decode) -> None:
    blob, values = nvfp4(*every_code(0, 127, 16))
    np.testing.assert_array_equal(bits(decode("nvfp4", blob)), bits(padded(values)))


@pytest.mark.parametrize(
    ("encoding", "block", "factors"), [(mxfp4, 32, (100, 140)), (nvfp4, 16, (0, 127)), (fp8_mxfp4, 32, (113, 128))]
)
@given(n=st.integers(1, 9), k=st.integers(1, 9), seed=st.integers(0, 2**32 - 1))
@settings(max_examples=10)
def test_fragments_are_the_weights_and_zeros_around_them(decode, encoding, block, factors, n, k, seed) -> None:
    generator = np.random.default_rng(seed)
    codes = generator.integers(0, 16, (32 * n, 32 * k), dtype=np.uint8)
    blob, values = encoding(codes, generator.integers(*factors, (32 * n, 32 * k // block), dtype=np.uint8))
    decoded = decode(encoding.__name__, blob)
    np.testing.assert_array_equal(decoded, padded(values))
    np.testing.assert_array_equal(np.signbit(decoded), np.signbit(padded(values)))


@given(n=st.integers(1, 9), k=st.integers(1, 9))
@settings(max_examples=10)
def test_bf16_fragments_are_the_weights(decode, n, k) -> None:
    weights = torch.randn(1, 32 * n, 32 * k, generator=torch.Generator().manual_seed(n)).bfloat16()
    blob = pack_bf16(weights)
    assert blob.shape == (1, -(-n // 4), -(-k // 4), 32768)
    np.testing.assert_array_equal(decode("bf16", blob[0]), padded(weights[0].double().numpy()))


def test_experts_are_packed_each_for_itself() -> None:
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(256, (3, 160, 80), generator=generator, dtype=torch.uint8)
    factors = torch.randint(129, (3, 160, 5), generator=generator, dtype=torch.uint8)
    blob, _ = pack_mxfp4(codes, factors)
    assert blob.shape == (3, 2, 2, 8704) and blob.is_contiguous() and blob.dtype is torch.uint8
    for expert in range(3):
        assert torch.equal(blob[expert], pack_mxfp4(codes[expert, None], factors[expert, None])[0][0])


def decoded_layer(decode: Decode, weights: PackedWeights, blob: Tensor) -> np.ndarray:
    """[experts, rows, columns], padded: what either matrix' blob holds, without what packing takes out."""
    encoding = find_format(weights.format).weight_layout.name.lower()
    matrices = np.stack([decode(encoding, expert) for expert in blob])
    return matrices / (NVFP4_SCALE if encoding == "nvfp4" else 1)


def values_of(weights: PackedWeights, matrix: str) -> np.ndarray:
    scale = getattr(weights, f"{matrix}_scale")
    return dequantise_weights(weights.encoding.name.lower(), getattr(weights, matrix), scale)


@pytest.mark.parametrize("gate_first", [True, False])
@pytest.mark.parametrize("format", ["nvfp4", "mxfp8_mxfp4", "fp8_mxfp4", "bf16"])
@given(inter=st.integers(1, 9), hidden=st.integers(1, 5))
@settings(max_examples=6)
def test_tiles_of_gate_up_have_eight_rows_of_gate_beside_eight_of_up(decode, format, gate_first, inter, hidden) -> None:
    """A warp multiplies 16 rows of a tile. Where 64 do not divide either half, the last tile ends in zeros."""
    inter, hidden = 32 * inter, 32 * hidden
    config = MoEConfig("packed", hidden, inter, 2, 1, format=format)
    weights = dataclasses.replace(PackedWeights.random(config, 2, inter), gate_first=gate_first)
    tiled, values = weights.tiled_operands, values_of(weights, "gate_up")
    halves = (values[:, :inter], values[:, inter:])
    gate, up = halves if gate_first else halves[::-1]
    found = decoded_layer(decode, weights, tiled.gate_up)
    assert found.shape == (2, 128 * -(-inter // 64), 128 * -(-hidden // 128))
    for tile, warp, half, group in itertools.product(range(found.shape[1] // 128), range(8), range(2), range(8)):
        row = 64 * tile + 8 * warp + group
        expected = (gate, up)[half][:, row] if row < inter else np.zeros((2, hidden))
        packed = found[:, 128 * tile + 16 * warp + 8 * half + group]
        np.testing.assert_array_equal(packed[:, :hidden], expected)
        assert not packed[:, hidden:].any()
    down = decoded_layer(decode, weights, tiled.down)
    np.testing.assert_array_equal(down, np.stack([padded(expert) for expert in values_of(weights, "down")]))


@pytest.mark.parametrize("format", ["nvfp4", "mxfp8_mxfp4", "fp8_mxfp4", "bf16"])
def test_tiles_of_gate_up_without_a_gate_keep_their_order(decode: Decode, format: str) -> None:
    config = MoEConfig("packed", 96, 160, 2, 1, format=format, activation="relu2")
    weights = PackedWeights.random(config, 2, extras=True)
    found = decoded_layer(decode, weights, weights.tiled_operands.gate_up)
    np.testing.assert_array_equal(found, np.stack([padded(expert) for expert in values_of(weights, "gate_up")]))


@pytest.mark.parametrize("gate_first", [True, False])
@pytest.mark.parametrize("format", ["nvfp4", "mxfp8_mxfp4", "fp8_mxfp4", "bf16"])
def test_only_the_tiles_have_another_order_than_the_weights(format: str, gate_first: bool) -> None:
    """The bias keeps the caller's: kernels read it by gate_first."""
    weights = PackedWeights.random(MoEConfig("packed", 96, 160, 2, 1, format=format), 2, extras=True)
    weights = dataclasses.replace(weights, gate_first=gate_first)
    before, tiled = weights.gate_up.clone(), weights.tiled_operands
    assert torch.equal(weights.gate_up, before) and tiled.gate_first is gate_first
    assert tiled.gemm1_bias is weights.gate_up_bias is not None
    assert weights.operands.gate_up is weights.gate_up


CODES = torch.zeros(1, 32, 32, dtype=torch.uint8)
UE8M0 = torch.zeros(1, 32, 2, dtype=torch.uint8)
E4M3 = torch.zeros(1, 32, 4, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("call", "argument"),
    [
        (lambda: pack_mxfp4(CODES[:, :31], UE8M0), "codes"),
        (lambda: pack_mxfp4(CODES[..., :8], UE8M0), "codes"),
        (lambda: pack_mxfp4(CODES.int(), UE8M0), "codes"),
        (lambda: pack_mxfp4(CODES, UE8M0[..., :1]), "factors"),
        (lambda: pack_mxfp4(CODES, UE8M0 + 255), "factors"),
        (lambda: pack_fp8_mxfp4(CODES[..., :8], UE8M0), "codes"),
        (lambda: pack_fp8_mxfp4(CODES, UE8M0 + 255), "factors"),
        (lambda: pack_nvfp4(CODES, E4M3), "factors"),
        (lambda: pack_nvfp4(CODES, (E4M3 + 127).view(torch.float8_e4m3fn)), "factors"),
        (lambda: pack_nvfp4(CODES, (E4M3 + 129).view(torch.float8_e4m3fn)), "factors"),
        (lambda: pack_bf16(torch.zeros(1, 32, 48, dtype=torch.bfloat16)), "weights"),
        (lambda: pack_bf16(torch.zeros(1, 32, 32)), "weights"),
    ],
)
def test_wrong_operands_are_named(call: Callable[[], Tensor], argument: str) -> None:
    with pytest.raises(InvalidArgument) as error:
        call()
    assert error.value.argument == argument
