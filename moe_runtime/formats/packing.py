"""Weights -> the bytes that the mixed kernels load and decode; templates/mixed/decode.cuh has the reasons.

A blob is uint8 [L, ceil(n/128), ceil(k/128), bytes], its blocks of 128 rows by 128 of K zero-padded, each two slices of
64 along K. In a slice, row = 16 warp + 8 half + group and column = 16 step + 8 upper + 2 lane + odd: the code there is
part of the word of thread 32 warp + 4 group + lane at its step, as register 2 upper + half, in the low half of each
where odd is 0. For e4m3 tokens a block is one slice, its column 32 step + 16 upper + 4 lane + place: the code there is
byte `place` of register 2 upper + half.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import torch
from torch import Tensor

from ..errors import InvalidArgument

BLOCK = 128
"""Rows, and columns of K, of a block."""
MULTIPLE = 32
"""What n and k must be multiples of."""

_SLICES = 2  # of a block
_FARTHEST = 14  # binades from a row's largest factor to one that e4m3 holds beside it
_CODE_BITS = (6, 7, 8, 15)  # of a bf16: mantissa, exponent and sign of a code
_SHIFTS = ((0, 0, 0, 0), (4, 4, 4, 4), (10, 10, 10, 10), (6, -2, -2, -2))  # to the left, word to register, each bit


def pack_mxfp4(codes: Tensor, factors: Tensor) -> tuple[Tensor, float]:
    """Codes uint8 [L, n, k/2], low nibble first, and factors ue8m0 as uint8 [L, n, k/32] -> blob and scale.

    The weights are scale times what the kernels decode: 1, unless a factor exceeds 2. Decoding is exact where bf16
    holds that: not where a weight is below 2^-133 * scale.
    Raises InvalidArgument unless n and k are multiples of 32, and for factor 255, which is NaN.
    """
    _check_mxfp4(codes, factors)
    # Stored so that the largest that a blob can hold, 2, is the largest exponent of bf16.
    beyond = max(0, int(factors.max()) - 128) if factors.numel() else 0

    def pack(codes: Tensor, factors: Tensor) -> Tensor:
        exponents = (factors.int() + (126 - beyond)).clamp(min=0)
        return _slices(_code_words(codes), _factor_words(exponents << 7, 32))

    return _by_expert(pack, codes, factors), 2.0**beyond


def pack_fp8_mxfp4(codes: Tensor, factors: Tensor) -> Tensor:
    """Codes and factors as of `pack_mxfp4` -> blob of kernels that multiply e4m3.

    Decoding is exact, but for codes whose factor is less than 2^-14 of the largest of the same row and 128 columns,
    which become zeros. Factors of zeros alone do not count.
    Raises InvalidArgument as `pack_mxfp4`.
    """
    _check_mxfp4(codes, factors)

    def pack(codes: Tensor, factors: Tensor) -> Tensor:
        # [tile, warp, half, group, block, step, upper, lane, pair], and without the last three
        pairs = _whole_blocks(_tiles(codes, BLOCK // 4)).unflatten(-1, (4, 2, 4, 2))
        exponents = _whole_blocks(_tiles(factors.int(), 2))
        present = ((pairs & 0x77) != 0).flatten(-3).any(-1)
        # Of the float that sums are multiplied by: e4m3 holds the magnitudes under the largest factor times 2^6.
        base = ((exponents * present).amax(-1, keepdim=True) - 6).clamp(min=1)
        distance = (base + 6 - exponents) * present
        near = (distance <= _FARTHEST)[..., None, None, None]
        distance = distance.clamp(max=_FARTHEST)
        words = _e4m3_words(pairs * near)  # [tile, warp, half, group, block, step, lane]
        of_codes = words.unflatten(5, (2, 2)).permute(0, 4, 5, 1, 3, 7, 6, 2)
        of_factors = (distance << 3 + 8 * torch.arange(4, device=codes.device)).sum(-1)
        of_factors = of_factors | ((base & 15) << 23 | base >> 4 << 15).squeeze(-1)
        return _slices(of_codes, of_factors.to(torch.int32).permute(0, 4, 1, 3, 2))

    return _by_expert(pack, codes, factors, slices=1)


def pack_nvfp4(codes: Tensor, factors: Tensor) -> Tensor:
    """Codes uint8 [L, n, k/2], low nibble first, and factors e4m3 [L, n, k/16] -> blob.

    Raises InvalidArgument unless n and k are multiples of 32, and for factors that are negative or NaN.
    """
    _check(codes, factors, torch.float8_e4m3fn, 16)
    bits = factors.view(torch.uint8)
    if (bits >= 127).any():
        raise InvalidArgument("factors", "a negative one or NaN", "0 to 448")
    wide = torch.tensor([_e5m3(code) for code in range(127)], dtype=torch.int32, device=codes.device)

    def pack(codes: Tensor, factors: Tensor) -> Tensor:
        signs = codes & 0x88
        codes = torch.where((factors == 0).repeat_interleave(8, -1), signs, codes)
        return _slices(_code_words(codes), _factor_words(wide[factors.long()] << 4, 16))

    return _by_expert(pack, codes, bits)


def pack_bf16(weights: Tensor) -> Tensor:
    """bf16 [L, n, k] -> blob. Raises InvalidArgument unless n and k are multiples of 32."""
    if weights.dtype is not torch.bfloat16 or weights.dim() != 3 or any(size % MULTIPLE for size in weights.shape[1:]):
        accepted = f"bf16 [L, n, k], n and k multiples of {MULTIPLE}"
        raise InvalidArgument("weights", f"{weights.dtype} {list(weights.shape)}", accepted)

    def pack(weights: Tensor) -> Tensor:
        tiles = _tiles(weights, 64).unflatten(-1, (4, 2, 4, 2))
        # [tile, warp, half, group, slice, step, upper, lane, odd] -> [tile, slice][step][thread][register]
        return tiles.permute(0, 4, 5, 1, 3, 7, 6, 2, 8).flatten(2)

    return _by_expert(pack, weights)


def _check_mxfp4(codes: Tensor, factors: Tensor) -> None:
    _check(codes, factors, torch.uint8, 32)
    if (factors == 255).any():
        raise InvalidArgument("factors", "255, which is NaN", "0 to 254")


def _check(codes: Tensor, factors: Tensor, dtype: torch.dtype, block: int) -> None:
    sizes = codes.shape
    if codes.dtype is not torch.uint8 or len(sizes) != 3 or sizes[1] % MULTIPLE or 2 * sizes[2] % MULTIPLE:
        accepted = f"uint8 [L, n, k/2], n and k multiples of {MULTIPLE}"
        raise InvalidArgument("codes", f"{codes.dtype} {list(sizes)}", accepted)
    expected = [sizes[0], sizes[1], 2 * sizes[2] // block]
    if factors.dtype is not dtype or list(factors.shape) != expected:
        raise InvalidArgument("factors", f"{factors.dtype} {list(factors.shape)}", f"{dtype} {expected}")


def _e5m3(e4m3: int) -> int:
    """A factor's e4m3 code -> 5 bits of exponent, such that 224 more are the exponent of it times 2^118 in bf16, and 3
    of mantissa. Subnormals become normal; zero has no code, and its block's codes are zeros instead."""
    value = (8 + e4m3 % 8) * 2.0 ** (e4m3 // 8 - 10) if e4m3 >= 8 else e4m3 * 2.0**-9
    mantissa, exponent = math.frexp(value)  # mantissa in [1/2, 1)
    return (exponent - 1 + 118 + 127 - 224 << 3 | int(mantissa * 16) - 8) if value else 0


def _by_expert(pack: Callable[..., Tensor], *operands: Tensor, slices: int = _SLICES) -> Tensor:
    """pack: an expert's operands -> its slices [tiles, slices, values]; by experts, for it takes several times that."""
    packed = (pack(*expert).contiguous().view(torch.uint8) for expert in zip(*operands, strict=True))
    return torch.stack([expert.unflatten(1, (-1, slices)).flatten(2) for expert in packed])


def _slices(*words: Tensor) -> Tensor:
    return torch.cat([part.flatten(2) for part in words], -1)


def _tiles(matrix: Tensor, columns: int) -> Tensor:
    """[n, columns of all K] -> [tile, warp 8, half 2, group 8, slice, columns of a slice], padded to whole blocks."""
    rows, width = matrix.shape
    padded = matrix.new_zeros(-(-rows // BLOCK) * BLOCK, -(-width // (_SLICES * columns)) * _SLICES * columns)
    padded[:rows, :width] = matrix
    return padded.unflatten(0, (-1, 8, 2, 8)).unflatten(-1, (-1, columns))


def _whole_blocks(tiles: Tensor) -> Tensor:
    """_tiles with the slices of a block beside each other."""
    return tiles.unflatten(-2, (-1, _SLICES)).flatten(-2)


def _e4m3_words(tiles: Tensor) -> Tensor:
    """Bytes of codes [..., upper, lane, pair] -> int32 [..., lane]: each thread's word of a row and step."""
    words = torch.zeros((), dtype=torch.int32, device=tiles.device)
    for upper, pair in itertools.product(range(2), range(2)):
        table = torch.tensor([_placed_for_e4m3(codes, upper, pair) for codes in range(256)], dtype=torch.int64)
        words = words | table.to(torch.int32).to(tiles.device)[tiles[..., upper, :, pair].long()]
    return words


def _placed_for_e4m3(codes: int, upper: int, pair: int) -> int:
    """Bits of a word that become bytes 2 pair and 2 pair + 1 of the register of `upper`: magnitudes, then signs."""
    word = 0
    for place, code in ((2 * pair, codes & 15), (2 * pair + 1, codes >> 4)):
        word |= (code & 7) << 16 * upper + 4 * place | code >> 3 << 8 * place + 7 - 4 * upper
    return word


def _code_words(codes: Tensor) -> Tensor:
    """[n, k/2] bytes -> int32 [tile, slice, warp, group, lane, step]."""
    tiles = _tiles(codes, 32).unflatten(-1, (4, 2, 4))  # [tile, warp, half, group, slice, step, upper, lane]
    words = torch.zeros((), dtype=torch.int32, device=codes.device)
    for upper, half in itertools.product(range(2), range(2)):
        table = torch.tensor([_placed(pair, 2 * upper + half) for pair in range(256)], dtype=torch.int64)
        words = words | table.to(torch.int32).to(codes.device)[tiles[:, :, half, :, :, :, upper].long()]
    return words.permute(0, 3, 1, 2, 5, 4)


def _placed(pair: int, register: int) -> int:
    """Bits of a word that become two codes, low nibble first, in a register."""
    word = 0
    for odd, bit in itertools.product(range(2), range(4)):
        position = (_CODE_BITS[bit] + 16 * odd - _SHIFTS[register][bit]) % 32
        word |= (pair >> 4 * odd + bit & 1) << position
    return word


def _factor_words(bits: Tensor, block: int) -> Tensor:
    """Factors as the bits of a bf16, int32 [n, k/block] -> int32 [tile, slice, warp, group, words].

    A word holds two neighbours along K, one in place and one rotated right by 8, each for row `group` in the low half
    and for row `group + 8` in the high half.
    """
    tiles = _tiles(bits, 64 // block).long()  # [tile, warp, half, group, slice, factor]
    pairs = tiles[:, :, 0] | tiles[:, :, 1] << 16
    in_place, rotated = pairs[..., ::2], pairs[..., 1::2]
    words = in_place | rotated >> 8 | (rotated & 0xFF) << 24
    return words.to(torch.int32).permute(0, 3, 1, 2, 4)
