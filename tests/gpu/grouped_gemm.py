"""MoeGroupedGemm of templates/abi.h, to run one variant of a library without the layer around it."""

from __future__ import annotations

import ctypes
import functools
from ctypes import POINTER, Structure, c_float, c_int32, c_int64, c_void_p
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from moe_runtime.kernels import VariantRecord


class MoeGemmOperands(Structure):
    _fields_ = [
        ("tokens", c_void_p),
        ("token_scales", c_void_p),
        ("weights", c_void_p),
        ("weight_scales", c_void_p),
        ("expert_offsets", c_void_p),
        ("tiles_taken", c_void_p),
        ("output_done", c_void_p),
        ("tokens_done", c_void_p),
        ("output", c_void_p),
        ("output_scales", c_void_p),
        ("max_rows", c_int64),
        ("gate_first", c_int32),
        ("clamp_limit", c_float),
        ("offsets_ready", c_int32),
        ("local_expert_offset", c_int32),
        ("topk_ids", c_void_p),
        ("bias", c_void_p),
        ("encoding", c_int32),
        ("alpha", c_void_p),
        ("beta", c_void_p),
        ("clamp", c_void_p),
        ("activation_multiplier", c_void_p),
        ("row_origins", c_void_p),
    ]


class MoeGroupMetadata(Structure):
    _fields_ = [
        ("problem", c_void_p),
        ("problem_swapped", c_void_p),
        ("tokens", c_void_p),
        ("weights", c_void_p),
        ("token_scales", c_void_p),
        ("weight_scales", c_void_p),
        ("output", c_void_p),
        ("token_stride", c_void_p),
        ("weight_stride", c_void_p),
        ("output_stride", c_void_p),
        ("token_scale_layout", c_void_p),
        ("weight_scale_layout", c_void_p),
    ]


class MoeGroupedGemm(Structure):
    _fields_ = [
        ("num_groups", c_int32),
        ("n", c_int32),
        ("k", c_int32),
        ("sm_count", c_int32),
        ("operands", MoeGemmOperands),
        ("metadata", MoeGroupMetadata),
        ("workspace", c_void_p),
        ("stream", c_void_p),
    ]


def variants(path: Path, weights: set[int]) -> dict[str, VariantRecord]:
    """The library's variants that read one of these MoeWeights, by name."""
    library = ctypes.CDLL(str(path))
    library.moe_variant.restype = POINTER(VariantRecord)
    records = [library.moe_variant(index).contents for index in range(library.moe_variant_count())]
    return {record.name.decode(): record for record in records if record.weights in weights}


def origins(token: Tensor, weight: Tensor) -> Tensor:
    """MoeRowOrigin [rows], as int32 [rows, 2]: whose slots the rows are, and what each weighs there."""
    return torch.stack([token.int(), weight.float().view(torch.int32)], 1).contiguous()


@dataclass(frozen=True)
class Activation:
    """Of a variant that fuses SwiGLU. encoding: MoeTokens that the activations are rounded through. clamp_limit: 0 is
    none. alpha, beta, clamp, multiplier: f32 [L]."""

    encoding: int
    gate_first: bool = True
    clamp_limit: float = 0.0
    alpha: Tensor | None = None
    beta: Tensor | None = None
    clamp: Tensor | None = None
    multiplier: Tensor | None = None


def address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


@functools.cache
def _counter(device: torch.device) -> Tensor:
    """Which a launch leaves at 0 for the next."""
    return torch.zeros(1, dtype=torch.int32, device=device)


def prepare(
    tokens: Tensor,
    packed: Tensor,
    expert_offsets: Tensor,
    output: Tensor,
    scale: Tensor | None = None,
    bias: Tensor | None = None,
    row_origins: Tensor | None = None,
    activation: Activation | None = None,
) -> MoeGroupedGemm:
    """Of a mixed variant: tokens [rows, k] as it multiplies them, packed weights, offsets int32 [L + 1], output bf16
    [rows or more, n], scale f32 [L], bias f32 [L, n]; row_origins of `origins`, where the variant combines; activation
    where it fuses SwiGLU, whose output is as the tokens, [rows or more, n/2]. Holds addresses only. The stream is the
    current one."""
    operands = MoeGemmOperands(
        tokens=tokens.data_ptr(),
        weights=packed.data_ptr(),
        weight_scales=address(scale),
        expert_offsets=expert_offsets.data_ptr(),
        tiles_taken=_counter(tokens.device).data_ptr(),
        output=output.data_ptr(),
        max_rows=tokens.shape[0],
        bias=address(bias),
        row_origins=address(row_origins),
    )
    if activation is not None:
        operands.encoding, operands.gate_first = activation.encoding, activation.gate_first
        operands.clamp_limit, operands.clamp = activation.clamp_limit, address(activation.clamp)
        operands.alpha, operands.beta = address(activation.alpha), address(activation.beta)
        operands.activation_multiplier = address(activation.multiplier)
    return MoeGroupedGemm(
        num_groups=len(expert_offsets) - 1,
        n=output.shape[1] * (1 if activation is None else 2),
        k=tokens.shape[1],
        sm_count=torch.cuda.get_device_properties(tokens.device).multi_processor_count,
        operands=operands,
        stream=torch.cuda.current_stream().cuda_stream,
    )


def run(variant: VariantRecord, gemm: MoeGroupedGemm) -> int:
    """What the variant's run returns: 0, or an error."""
    return ctypes.CFUNCTYPE(c_int32, POINTER(MoeGroupedGemm))(variant.run)(gemm)
