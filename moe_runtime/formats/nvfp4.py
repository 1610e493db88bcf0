"""nvfp4: e2m1 values, one e4m3 factor per 16 along K, and one fp32 scale for an expert's weights or for all tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from .elements import (
    E2M1_MAX,
    E4M3_MAX,
    amax_of_blocks,
    e2m1_codes,
    e2m1_values,
    pack_e2m1,
    round_e4m3,
    unpack_e2m1,
)

BLOCK = 16


def quantise(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [..., K] bf16 or f32 -> (packed uint8 [..., K/2], factors e4m3 [..., K/16]); the fp32 scale is the caller's.

    A factor is amax / 6, rounded. A block whose factor rounds to zero becomes zeros.
    """
    blocks, amax = amax_of_blocks(x, BLOCK)
    # A tensor divisor, not a number: torch divides CUDA tensors by a number as a multiplication by its reciprocal.
    factors = round_e4m3(amax / torch.full((), E2M1_MAX, device=x.device))
    divisor = factors.float()
    codes = e2m1_codes(torch.where(divisor > 0, blocks / divisor, 0.0))
    return pack_e2m1(codes.flatten(-2)), factors.squeeze(-1)


def dequantise(packed: Tensor, factors: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Inverse of quantise: [..., K] in dtype, exact in bf16 and wider."""
    blocks = e2m1_values(unpack_e2m1(packed), dtype).unflatten(-1, (-1, BLOCK))
    return (blocks * factors.to(dtype).unsqueeze(-1)).flatten(-2)


def global_scale(w: Tensor) -> Tensor:
    """w [L, N, K] -> f32 [L]: the scale by which the largest value of each expert becomes the largest there is."""
    amax = w.float().abs().amax((-2, -1))
    return torch.where(amax > 0, amax, E2M1_MAX * E4M3_MAX) / (E2M1_MAX * E4M3_MAX)
