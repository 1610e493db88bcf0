"""The elements that formats are made of: e2m1 and e4m3 values, and ue8m0 factors."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from ..errors import InvalidArgument

E2M1_MAX = 6.0
E4M3_MAX = 448.0
E4M3_NAN = 0x7F
UE8M0_BIAS = 127
UE8M0_NAN = 0xFF

E2M1_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""Of codes 0 to 7; bit 3 is the sign."""


def e2m1_codes(x: Tensor) -> Tensor:
    """x f32 -> codes 0 to 15, uint8, same shape: the nearest value, of two as near the even code, saturating at 6."""
    magnitude = x.abs()
    code = torch.zeros(x.shape, dtype=torch.uint8, device=x.device)
    for below, (low, high) in enumerate(pairwise(E2M1_VALUES)):
        midpoint = (low + high) / 2
        code += (magnitude >= midpoint) if below % 2 else (magnitude > midpoint)
    return code | x.signbit().to(torch.uint8) << 3


def e2m1_values(codes: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Codes 0 to 15, any integer dtype -> their values, exact in every dtype of e2m1's range and more."""
    table = torch.tensor(E2M1_VALUES, dtype=dtype, device=codes.device)
    return torch.cat([table, -table])[codes.long()]


def pack_e2m1(codes: Tensor) -> Tensor:
    """Codes uint8 [..., K] -> bytes uint8 [..., K/2], the earlier value in the low nibble. K must be even."""
    return codes[..., ::2] | codes[..., 1::2] << 4


def unpack_e2m1(packed: Tensor) -> Tensor:
    """Inverse of pack_e2m1: bytes uint8 [..., K/2] -> codes uint8 [..., K]."""
    return torch.stack([packed & 0xF, packed >> 4], -1).flatten(-2)


def concatenate(tensors: Sequence[Tensor], dimension: int = 0) -> Tensor:
    """torch.cat of one dtype, e4m3 as bytes: torch implements few operations on it."""
    if tensors[0].dtype != torch.float8_e4m3fn:
        return torch.cat(list(tensors), dimension)
    return torch.cat([tensor.view(torch.uint8) for tensor in tensors], dimension).view(torch.float8_e4m3fn)


def round_e4m3(x: Tensor) -> Tensor:
    """x f32 -> e4m3, same shape: the nearest value, of two as near the even code, saturating at 448."""
    return x.clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)


def ue8m0_codes(amax: Tensor, largest_exponent: int) -> Tensor:
    """Factors of blocks with these largest magnitudes f32, by the OCP MX rule -> uint8, same shape.

    largest_exponent: of the element's largest value, 2 for e2m1 and 8 for e4m3. A block of zeros gets code 0.
    """
    # frexp's mantissa lies in [1/2, 1), so its exponent is one above that of the leading bit.
    exponent = torch.frexp(amax).exponent - 1 - largest_exponent
    return torch.where(amax > 0, exponent + UE8M0_BIAS, 0).clamp(0, UE8M0_NAN - 1).to(torch.uint8)


def ue8m0_values(codes: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Codes uint8 -> 2^(code - 127); NaN for code 255."""
    # The exponent's bits of a float64 of bias 1023: exact on every device, which exp2 need not be.
    values = ((codes.long() + (1023 - UE8M0_BIAS)) << 52).view(torch.float64).to(dtype)
    return values.masked_fill(codes == UE8M0_NAN, torch.nan)


def amax_of_blocks(x: Tensor, block: int, name: str = "x") -> tuple[Tensor, Tensor]:
    """x [..., K] -> (f32 [..., K/block, block], largest magnitudes [..., K/block, 1]).

    Raises InvalidArgument unless K is a multiple of the block.
    """
    if x.shape[-1] % block:
        raise InvalidArgument(name, f"shape {list(x.shape)}", f"a last dimension that is a multiple of {block}")
    blocks = x.float().unflatten(-1, (-1, block))
    return blocks, blocks.abs().amax(-1, keepdim=True)
