"""Weights in any encoding, and back to the values that a GEMM multiplies."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import InvalidArgument
from . import fp8_block, mxfp4, nvfp4
from .elements import E4M3_NAN, UE8M0_NAN, concatenate
from .registry import Weights


class Encoded(NamedTuple):
    """Weights [L, N, K] of L experts in an encoding.

    values: e4m3 [L, N, K], packed e2m1 uint8 [L, N, K/2] or bf16 [L, N, K].
    scale: of blocks, f32 [L, N/128, K/128], ue8m0 as uint8 [L, N, K/32] or e4m3 [L, N, K/16]; None for bf16.
    global_scale: f32 [L], which multiplies an expert's whole product; nvfp4 only.
    """

    values: Tensor
    scale: Tensor | None = None
    global_scale: Tensor | None = None


def quantise_weights(encoding: Weights, w: Tensor) -> Encoded:
    """w [L, N, K] bf16 or f32."""
    match encoding:
        case Weights.FP8_BLOCK:
            return Encoded(*fp8_block.quantise_blocks(w))
        case Weights.MXFP4:
            return Encoded(*mxfp4.quantise(w))
        case Weights.NVFP4:
            scale = nvfp4.global_scale(w)
            return Encoded(*nvfp4.quantise(w.float() / scale[:, None, None]), scale)
        case Weights.BF16:
            return Encoded(w.to(torch.bfloat16))


def quantise_experts(encoding: Weights, w: Tensor, name: str) -> Encoded:
    """w [L, N, K] bf16 or f32, an expert at a time: quantising works in float32, which for all takes many times the
    memory of the result. Raises InvalidArgument, by the name, for another dtype or number of dimensions.
    """
    if w.ndim != 3 or w.dtype not in (torch.bfloat16, torch.float32):
        got = f"{w.dtype} of shape {list(w.shape)}"
        raise InvalidArgument(name, got, "a bfloat16 or float32 tensor of three dimensions")
    return stack_experts([quantise_weights(encoding, w[expert : expert + 1]) for expert in range(len(w))])


def dequantise_weights(
    encoding: Weights, values: Tensor, scale: Tensor | None, dtype: torch.dtype = torch.float32
) -> Tensor:
    """[..., N, K] in dtype, without the global scale, which belongs to the product."""
    if scale is None:
        return values.to(dtype)
    match encoding:
        case Weights.FP8_BLOCK:
            return fp8_block.dequantise_blocks(values, scale, dtype)
        case Weights.MXFP4:
            return mxfp4.dequantise(values, scale, dtype)
        case Weights.NVFP4:
            return nvfp4.dequantise(values, scale, dtype)
        case Weights.BF16:
            raise AssertionError("bf16 weights have no scale")


def stack_experts(experts: Sequence[Encoded]) -> Encoded:
    """[1, N, K] each -> [L, N, K]."""

    def joined(tensors: Sequence[Tensor | None]) -> Tensor | None:
        present = [tensor for tensor in tensors if tensor is not None]
        return concatenate(present) if present else None

    values, scale, global_scale = (joined(tensors) for tensors in zip(*experts, strict=True))
    assert values is not None
    return Encoded(values, scale, global_scale)


def described(
    encoding: Weights, shape: tuple[int, int, int]
) -> tuple[tuple[tuple[int, ...], torch.dtype], tuple[tuple[int, ...], torch.dtype] | None]:
    """Shape and dtype of the values and, where there is one, of the scale of weights of this shape [L, N, K]."""
    experts, n, k = shape
    match encoding:
        case Weights.FP8_BLOCK:
            blocks = (experts, n // fp8_block.BLOCK, k // fp8_block.BLOCK)
            return (shape, torch.float8_e4m3fn), (blocks, torch.float32)
        case Weights.MXFP4:
            return ((experts, n, k // 2), torch.uint8), ((experts, n, k // mxfp4.BLOCK), torch.uint8)
        case Weights.NVFP4:
            return ((experts, n, k // 2), torch.uint8), ((experts, n, k // nvfp4.BLOCK), torch.float8_e4m3fn)
        case Weights.BF16:
            return (shape, torch.bfloat16), None


def check_factors(name: str, encoding: Weights, scale: Tensor | None, source: object = None) -> None:
    """Raises InvalidArgument where a block factor is NaN, which would spoil rows of every token, or negative.

    Reads the values. source: the file that they are from, for the message.
    """
    if scale is None or scale.is_meta or encoding not in (Weights.MXFP4, Weights.NVFP4):
        return
    codes = scale.view(torch.uint8)
    bad = codes == UE8M0_NAN if encoding == Weights.MXFP4 else codes >= E4M3_NAN
    if bad.any():
        where = bad.nonzero()[0].tolist()
        kind = "ue8m0" if encoding == Weights.MXFP4 else "e4m3"
        raise InvalidArgument(
            name,
            f"the factor {codes[tuple(where)]:#04x} at {where}" + (f" in {source}" if source else ""),
            f"{kind} factors that are no NaN and not negative",
        )
