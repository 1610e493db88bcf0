"""Token rows in any encoding, and back to the values that a GEMM multiplies."""

from __future__ import annotations

import torch
from torch import Tensor

from . import fp8_block, mxfp8, nvfp4
from .elements import round_e4m3
from .registry import Tokens


def quantise_tokens(encoding: Tokens, x: Tensor) -> tuple[Tensor, Tensor | None]:
    """x [..., K] bf16 or f32 -> (values, factors or None) as the encoding's own module has them.

    A tensor scale is the caller's: x is divided by it already.
    """
    match encoding:
        case Tokens.FP8_BLOCK:
            return fp8_block.quantise_rows(x)
        case Tokens.FP8:
            return round_e4m3(x.float()), None
        case Tokens.MXFP8:
            return mxfp8.quantise(x)
        case Tokens.NVFP4:
            return nvfp4.quantise(x)
        case Tokens.BF16:
            return x.to(torch.bfloat16), None


def dequantise_tokens(encoding: Tokens, values: Tensor, factors: Tensor | None) -> Tensor:
    """The values [..., K] f32 that a GEMM multiplies: without the tensor scale, which belongs to its result."""
    if factors is None:
        return values.float()
    match encoding:
        case Tokens.FP8_BLOCK:
            return fp8_block.dequantise_rows(values, factors)
        case Tokens.MXFP8:
            return mxfp8.dequantise(values, factors.view(torch.uint8))
        case Tokens.NVFP4:
            return nvfp4.dequantise(values, factors.view(torch.float8_e4m3fn))
        case _:
            raise AssertionError(f"{encoding.name} tokens have no factors")


def round_rows(encoding: Tokens, x: Tensor, scale: float | Tensor = 1.0) -> Tensor:
    """x [..., K] bf16 or f32, rounded through the encoding after division by scale -> the exact values of its codes.

    scale: a number, or f32 that broadcasts against x. bf16, which holds every encoding's values without loss, but f32
    for fp8_block, whose scales are no short numbers.
    """
    if isinstance(scale, Tensor) or scale != 1.0:
        # By the reciprocal, as the kernels multiply by one.
        x = x.float() * torch.as_tensor(scale, dtype=torch.float32, device=x.device).reciprocal()
    values, factors = quantise_tokens(encoding, x)
    rounded = dequantise_tokens(encoding, values, factors)
    return rounded if encoding == Tokens.FP8_BLOCK else rounded.to(torch.bfloat16)
