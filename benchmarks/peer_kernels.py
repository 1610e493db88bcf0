"""Other libraries' FP8 kernels for what ours do: one small class each, prepared outside of what is timed.

Rows are balanced: every expert has as many, so a result is [experts, rows, N] whatever a library pads in between.
"""

from __future__ import annotations

import dataclasses
import importlib
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, TypeVar

import torch
from torch import Tensor

from moe_runtime import FP8BlockWeights
from moe_runtime.executors.base import LayerInputs, MoEProblem
from moe_runtime.formats.fp8_block import BLOCK, dequantise_blocks, dequantise_rows
from moe_runtime.reference import reference_layer, relative_error

Call = Callable[[], Tensor]
BLOCK_SCALES = "block scales, as ours"
CHECKED_TOKENS = 4


@dataclass(frozen=True)
class GemmCase:
    """rows [experts * each, K] e4m3 with row_scales [.., K/128]; weights [experts, N, K] e4m3 with weight_scales."""

    shape: MoEProblem
    each: int
    rows: Tensor
    row_scales: Tensor
    weights: Tensor
    weight_scales: Tensor

    @property
    def experts(self) -> int:
        return len(self.weights)

    @property
    def n(self) -> int:
        return self.weights.shape[1]

    def output(self, each: int | None = None) -> Tensor:
        """[experts, each, N] bf16 to write to."""
        shape = (self.experts, each or self.each, self.n)
        return torch.empty(shape, dtype=torch.bfloat16, device=self.rows.device)

    def padded(self, alignment: int) -> tuple[Tensor, Tensor]:
        """Rows [experts, aligned, K] and scales [experts, aligned, K/128]; padding is zero."""
        aligned = -(-self.each // alignment) * alignment
        rows = torch.zeros(self.experts, aligned, self.rows.shape[1], dtype=torch.uint8, device=self.rows.device)
        scales = torch.zeros(self.experts, aligned, self.row_scales.shape[1], device=self.rows.device)
        rows[:, : self.each] = self.rows.view(torch.uint8).unflatten(0, (self.experts, self.each))
        scales[:, : self.each] = self.row_scales.unflatten(0, (self.experts, self.each))
        return rows.view(torch.float8_e4m3fn), scales


@dataclass(frozen=True)
class LayerCase:
    """inputs: bf16 rows with ready ids, all of them of experts that are here."""

    shape: MoEProblem
    weights: FP8BlockWeights
    inputs: LayerInputs


C = TypeVar("C")
"""The case that a peer takes."""


class Peer(ABC, Generic[C]):
    """numerics: how it differs. tolerance: relative error under which a result is plausible, far above its rounding."""

    name: ClassVar[str]
    module: ClassVar[str] = "torch"
    numerics: ClassVar[str] = BLOCK_SCALES
    tolerance: ClassVar[float] = 0.03

    def available(self) -> str | None:
        """None, or the reason why it cannot run here at all."""
        try:
            return self.refusal()
        except Exception as failure:  # a package built for another torch raises more than ImportError
            return f"cannot use {self.module}: {describe(failure)}"

    def refusal(self) -> str | None:
        self.library()
        return None

    def library(self) -> Any:
        return importlib.import_module(self.module)

    @abstractmethod
    def prepare(self, case: C) -> Call:
        """What is to be timed; its result is a view."""

    @abstractmethod
    def error(self, case: C, result: Tensor) -> float:
        """||result - exact|| / ||exact|| on a sample, the exact result being that of its own numerics."""


def describe(failure: Exception) -> str:
    first = next(iter(str(failure).splitlines()), "")
    return f"{type(failure).__name__}: {first[:200]}" if first else type(failure).__name__


class GemmPeer(Peer[GemmCase]):
    def error(self, case: GemmCase, result: Tensor) -> float:
        found, exact = [], []
        for expert in {0, case.experts // 2, case.experts - 1}:
            rows = torch.tensor(sorted({0, case.each // 2, case.each - 1}), device=case.rows.device)
            found.append(result[expert, rows])
            exact.append(self.exact_rows(case, expert * case.each + rows) @ self.exact_weight(case, expert).T)
        return relative_error(torch.cat(found), torch.cat(exact))

    def exact_rows(self, case: GemmCase, index: Tensor) -> Tensor:
        # As bytes: torch implements few operations on e4m3 itself.
        rows = case.rows.view(torch.uint8)[index].view(torch.float8_e4m3fn)
        return dequantise_rows(rows, case.row_scales[index])

    def exact_weight(self, case: GemmCase, expert: int) -> Tensor:
        return dequantise_blocks(case.weights[expert], case.weight_scales[expert])


class TorchGrouped(GemmPeer):
    """The same codes with one scale a row of either operand, the mean of what their blocks have."""

    name = "torch-grouped"
    numerics = "row-wise scales, other numerics"
    tolerance = 0.1

    def row_scales(self, case: GemmCase) -> Tensor:
        return case.row_scales.mean(1)

    def column_scales(self, case: GemmCase) -> Tensor:
        return case.weight_scales.mean(2).repeat_interleave(BLOCK, 1)

    def prepare(self, case: GemmCase) -> Call:
        device = case.rows.device
        ends = torch.arange(1, case.experts + 1, dtype=torch.int32, device=device) * case.each
        row_scales, column_scales = self.row_scales(case), self.column_scales(case)

        def call() -> Tensor:
            result = torch._scaled_grouped_mm(
                case.rows,
                case.weights.mT,
                row_scales,
                column_scales,
                offs=ends,
                out_dtype=torch.bfloat16,
                use_fast_accum=True,
            )
            return result.unflatten(0, (case.experts, case.each))

        return call

    def exact_rows(self, case: GemmCase, index: Tensor) -> Tensor:
        return case.rows.view(torch.uint8)[index].view(torch.float8_e4m3fn).float() * self.row_scales(case)[index, None]

    def exact_weight(self, case: GemmCase, expert: int) -> Tensor:
        return case.weights[expert].float() * self.column_scales(case)[expert, :, None]


class CublasDense(GemmPeer):
    """As many FLOPs in one dense GEMM of all rows with the first expert's weights: no roof for reading weights."""

    name = "cublas-dense"
    numerics = "dense, one scale a tensor: a roof of FLOPs"
    tolerance = 0.1

    def prepare(self, case: GemmCase) -> Call:
        one = torch.ones((), device=case.rows.device)
        weight = case.weights[0].T

        def call() -> Tensor:
            result = torch._scaled_mm(
                case.rows, weight, scale_a=one, scale_b=one, out_dtype=torch.bfloat16, use_fast_accum=True
            )
            return result.unflatten(0, (case.experts, case.each))

        return call

    def exact_rows(self, case: GemmCase, index: Tensor) -> Tensor:
        return case.rows.view(torch.uint8)[index].view(torch.float8_e4m3fn).float()

    def exact_weight(self, case: GemmCase, expert: int) -> Tensor:
        return case.weights[0].float()


class CublasDenseBlocks(GemmPeer):
    """`CublasDense` with block scales, which cuBLAS has from CUDA 12.9 on."""

    name = "cublas-dense-blocks"
    numerics = "dense, block scales as ours: a roof of FLOPs"

    def prepare(self, case: GemmCase) -> Call:
        row_scales, weight_scales = case.row_scales.T.contiguous().T, case.weight_scales[0].T
        weight = case.weights[0].T

        def call() -> Tensor:
            result = torch._scaled_mm(
                case.rows, weight, scale_a=row_scales, scale_b=weight_scales, out_dtype=torch.bfloat16
            )
            return result.unflatten(0, (case.experts, case.each))

        return call

    def exact_weight(self, case: GemmCase, expert: int) -> Tensor:
        return super().exact_weight(case, 0)


class DeepGemmContiguous(GemmPeer):
    """Each expert's rows padded to whole tiles: its way of prefilling. Compiles a kernel for each new shape."""

    name = "deepgemm-contiguous"
    module = "deep_gemm"

    def prepare(self, case: GemmCase) -> Call:
        deep_gemm = self.library()
        layout = deep_gemm.utils.layout
        alignment = layout.get_theoretical_mk_alignment_for_contiguous_layout(case.each)
        layout.set_mk_alignment_for_contiguous_layout(alignment)
        rows, scales = (tensor.flatten(0, 1) for tensor in case.padded(alignment))
        output = case.output(len(rows) // case.experts)
        owner = torch.full(output.shape[:2], -1, dtype=torch.int32, device=rows.device)
        owner[:, : case.each] = torch.arange(case.experts, dtype=torch.int32, device=rows.device)[:, None]
        left = rows, layout.get_mn_major_tma_aligned_tensor(scales)
        right = case.weights, case.weight_scales

        def call() -> Tensor:
            deep_gemm.m_grouped_fp8_gemm_nt_contiguous(left, right, output.flatten(0, 1), owner.flatten())
            return output[:, : case.each]

        return call


class DeepGemmMasked(GemmPeer):
    """Each expert has a buffer of which it fills its first rows: its way of decoding."""

    name = "deepgemm-masked"
    module = "deep_gemm"
    buffer_rows = 128
    """Buffers are multiples of this: a tile that reaches beyond would write into the next."""

    def prepare(self, case: GemmCase) -> Call:
        deep_gemm = self.library()
        layout = deep_gemm.utils.layout
        rows, scales = case.padded(self.buffer_rows)
        output = case.output(rows.shape[1])
        filled = torch.full((case.experts,), case.each, dtype=torch.int32, device=rows.device)
        left = rows, layout.get_mn_major_tma_aligned_tensor(scales)
        right = case.weights, case.weight_scales

        def call() -> Tensor:
            deep_gemm.m_grouped_fp8_gemm_nt_masked(left, right, output, filled, case.each)
            return output[:, : case.each]

        return call


class VllmTriton(GemmPeer):
    """With the tuned table that vLLM has for the layer, else its default; the rows are sorted beforehand."""

    name = "vllm-triton"
    module = "vllm.model_executor.layers.fused_moe.fused_moe"

    def prepare(self, case: GemmCase) -> Call:
        vllm = self.library()
        top_k, total, device = case.shape.config.top_k, len(case.rows), case.rows.device
        shapes = [(case.experts, *case.shape.gemm_shape(gemm)) for gemm in ("gemm1", "gemm2")]
        block = [BLOCK, BLOCK]
        config = vllm.try_get_optimal_moe_config(*shapes, top_k, "fp8_w8a8", -(-total // top_k), block_shape=block)
        tile = config["BLOCK_SIZE_M"]
        tiles = -(-case.each // tile)
        ids = torch.full((case.experts, tiles * tile), total, dtype=torch.int32, device=device)
        ids[:, : case.each] = torch.arange(total, dtype=torch.int32, device=device).view(case.experts, case.each)
        expert_of_tile = torch.arange(case.experts, dtype=torch.int32, device=device).repeat_interleave(tiles)
        padded = torch.tensor([ids.numel()], dtype=torch.int32, device=device)
        output = case.output()

        def call() -> Tensor:
            vllm.invoke_fused_moe_triton_kernel(
                case.rows,
                case.weights,
                output.view(total, 1, case.n),
                case.row_scales,
                case.weight_scales,
                None,
                ids.flatten(),
                expert_of_tile,
                padded,
                False,
                1,
                config,
                compute_type=vllm.tl.bfloat16,
                use_fp8_w8a8=True,
                use_int8_w8a8=False,
                use_int8_w8a16=False,
                use_int4_w4a16=False,
                per_channel_quant=False,
                block_shape=block,
            )
            return output

        return call


class FlashInferGrouped(GemmPeer):
    """So far for Blackwell only: here to say so, and to run once it serves Hopper."""

    name = "flashinfer-grouped"
    module = "flashinfer.gemm"

    def prepare(self, case: GemmCase) -> Call:
        multiply = self.library().group_gemm_fp8_nt_groupwise
        rows, scales = case.padded(4)
        output = case.output(rows.shape[1])
        starts = torch.arange(case.experts + 1, dtype=torch.int32, device=rows.device) * rows.shape[1]
        rows, scales = rows.flatten(0, 1), scales.flatten(0, 1)

        def call() -> Tensor:
            multiply(
                rows,
                case.weights,
                scales,
                case.weight_scales,
                starts,
                scale_major_mode="K",
                out=output.flatten(0, 1),
            )
            return output[:, : case.each]

        return call


class FlashInferLayer(Peer[LayerCase]):
    """The whole layer by TensorRT-LLM's kernels: quantises, sorts, multiplies, activates and combines."""

    name = "flashinfer-layer"
    module = "flashinfer.fused_moe"
    tolerance = 0.05

    def refusal(self) -> str | None:
        self.library()
        kernels = importlib.import_module("flashinfer.jit.fused_moe").gen_cutlass_fused_moe_sm90_module()
        built = kernels.is_compiled
        return None if built else "its Hopper kernels are not built, which takes nvcc many minutes: build them first"

    def prepare(self, case: LayerCase) -> Call:
        run = self.library().cutlass_fused_moe
        # It reads up before gate; with random weights it is as well to call ours that.
        weights, inputs = case.weights, case.inputs
        output = torch.empty_like(inputs.hidden_states)

        def call() -> Tensor:
            run(
                inputs.hidden_states,
                inputs.topk_ids,
                inputs.topk_weights,
                weights.gate_up,
                weights.down,
                torch.bfloat16,
                quant_scales=[weights.gate_up_scale, weights.down_scale],
                output=output,
                use_deepseek_fp8_block_scale=True,
            )
            return output

        return call

    def error(self, case: LayerCase, result: Tensor) -> float:
        x, ids, scales = case.inputs.hidden_states, case.inputs.topk_ids, case.inputs.topk_weights
        assert ids is not None and scales is not None
        weights = dataclasses.replace(case.weights, gate_first=False)
        few = slice(CHECKED_TOKENS)
        return relative_error(result[few], reference_layer(case.shape, weights, x[few], ids[few], scales[few]))


GEMM_PEERS: tuple[Peer[GemmCase], ...] = (
    CublasDense(),
    CublasDenseBlocks(),
    TorchGrouped(),
    DeepGemmContiguous(),
    DeepGemmMasked(),
    VllmTriton(),
    FlashInferGrouped(),
)
LAYER_PEERS: tuple[Peer[LayerCase], ...] = (FlashInferLayer(),)
