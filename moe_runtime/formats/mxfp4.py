"""mxfp4, for weights: e2m1 values, one power of two (ue8m0) per 32 along K, as in OCP Microscaling."""

from __future__ import annotations

import torch
from torch import Tensor

from .elements import amax_of_blocks, e2m1_codes, e2m1_values, pack_e2m1, ue8m0_codes, ue8m0_values, unpack_e2m1

BLOCK = 32


def quantise(w: Tensor) -> tuple[Tensor, Tensor]:
    """w [..., K] bf16 or f32 -> (packed uint8 [..., K/2], factors ue8m0 as uint8 [..., K/32]).

    A block's values between 6 and 8 times its factor become 6 times it.
    """
    blocks, amax = amax_of_blocks(w, BLOCK, "w")
    factors = ue8m0_codes(amax, largest_exponent=2)
    codes = e2m1_codes(blocks / ue8m0_values(factors))
    return pack_e2m1(codes.flatten(-2)), factors.squeeze(-1)


def dequantise(packed: Tensor, factors: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Inverse of quantise: [..., K] in dtype, exact in bf16 and wider where it is normal there."""
    blocks = e2m1_values(unpack_e2m1(packed), dtype).unflatten(-1, (-1, BLOCK))
    return (blocks * ue8m0_values(factors, dtype).unsqueeze(-1)).flatten(-2)
