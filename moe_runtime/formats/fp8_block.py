"""fp8_block: e4m3 values, one fp32 scale per 1x128 of a token row and per 128x128 of a weight.

These functions define the format: the CUDA kernels quantise with the same operations in the same order, so the
two can be compared bit for bit.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import InvalidArgument
from .elements import E4M3_MAX, round_e4m3
from .registry import FORMATS

BLOCK = FORMATS["fp8_block"].multiple
AMAX_FLOOR = 1e-10  # keeps 1 / scale finite for a block of zeros


def quantise_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [..., K] bf16 or f32 -> (values [..., K] e4m3, scale [..., K/128] f32). K must be a multiple of 128."""
    _check_multiple("x", x, x.shape[-1])
    blocks = x.float().unflatten(-1, (-1, BLOCK))
    scale = _scale(blocks.abs().amax(-1))
    return _encode(blocks, scale.unsqueeze(-1)).flatten(-2), scale


def quantise_blocks(w: Tensor) -> tuple[Tensor, Tensor]:
    """w [..., N, K] bf16 or f32 -> (values [..., N, K] e4m3, scale [..., N/128, K/128] f32).

    N and K must be multiples of 128.
    """
    _check_multiple("w", w, w.shape[-2], w.shape[-1])
    blocks = w.float().unflatten(-1, (-1, BLOCK)).unflatten(-3, (-1, BLOCK))
    scale = _scale(blocks.abs().amax((-3, -1)))
    return _encode(blocks, scale[..., :, None, :, None]).flatten(-4, -3).flatten(-2), scale


def dequantise_rows(values: Tensor, scale: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Inverse of quantise_rows: [..., K] in dtype; scale may have any strides."""
    return (values.to(dtype).unflatten(-1, (-1, BLOCK)) * scale.to(dtype).unsqueeze(-1)).flatten(-2)


def dequantise_blocks(values: Tensor, scale: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Inverse of quantise_blocks: [..., N, K] in dtype."""
    blocks = values.to(dtype).unflatten(-1, (-1, BLOCK)).unflatten(-3, (-1, BLOCK))
    return (blocks * scale.to(dtype)[..., :, None, :, None]).flatten(-4, -3).flatten(-2)


def rounding_of_rows(x: Tensor) -> Tensor:
    """x [..., K] f32 -> the most by which quantise_rows moves each value: half a unit of e4m3's last place."""
    blocks = x.unflatten(-1, (-1, BLOCK))
    scale = _scale(blocks.abs().amax(-1)).unsqueeze(-1)
    exponent = (blocks.abs() / scale).log2().floor().clamp(min=-6.0)  # below 2^-6 values are subnormal
    return (scale * torch.exp2(exponent - 4)).flatten(-2)


def _scale(amax: Tensor) -> Tensor:
    # A tensor divisor, not a number: torch divides CUDA tensors by a number as a multiplication by its reciprocal.
    return amax.clamp(min=AMAX_FLOOR) / torch.full((), E4M3_MAX, device=amax.device)


def _encode(blocks: Tensor, scale: Tensor) -> Tensor:
    return round_e4m3(blocks * scale.reciprocal())


def _check_multiple(name: str, tensor: Tensor, *sizes: int) -> None:
    if any(size % BLOCK for size in sizes):
        raise InvalidArgument(name, f"shape {list(tensor.shape)}", f"quantised sizes that are multiples of {BLOCK}")
