"""mxfp8, for tokens: e4m3 values, one power of two (ue8m0) per 32 along K, as in OCP Microscaling."""

from __future__ import annotations

import torch
from torch import Tensor

from .elements import amax_of_blocks, round_e4m3, ue8m0_codes, ue8m0_values

BLOCK = 32


def quantise(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [..., K] bf16 or f32 -> (values e4m3 [..., K], factors ue8m0 as uint8 [..., K/32]).

    A block's values between 448 and 512 times its factor become 448 times it.
    """
    blocks, amax = amax_of_blocks(x, BLOCK)
    factors = ue8m0_codes(amax, largest_exponent=8)
    return round_e4m3(blocks / ue8m0_values(factors)).flatten(-2), factors.squeeze(-1)


def dequantise(values: Tensor, factors: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Inverse of quantise: [..., K] in dtype, exact in bf16 and wider where it is normal there."""
    blocks = values.to(dtype).unflatten(-1, (-1, BLOCK))
    return (blocks * ue8m0_values(factors, dtype).unsqueeze(-1)).flatten(-2)
