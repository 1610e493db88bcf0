"""Other libraries' layers of bf16 tokens and MXFP4 weights: one small class each, as in peer_kernels.py.

All layers, ours too, activate as gpt-oss does, the one activation that triton_kernels fuses.

triton_kernels is the package of that name; vLLM's wheel has one in vllm/third_party, which compiles with triton 3.6. Of
vLLM, `Marlin` needs one file of the wheel, vllm/_moe_C_stable_libtorch.abi3.so: that of 0.33 was built for torch 2.14
and loads into 2.11 as well. Neither multiplies e4m3 tokens by MXFP4 weights on Hopper: triton_kernels' swizzled weights
assert bf16 tokens, and vLLM refuses Marlin's W4A8 there.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from benchmarks.formats import sampled_error
from benchmarks.peer_kernels import Call, Peer
from moe_runtime.executors.base import LayerInputs, MoEProblem
from moe_runtime.weights import PackedWeights

ALPHA, BETA, CLAMP = 1.702, 1.0, 7.0
FLOAT4_E2M1 = 2 | 1 << 8 | 1 << 16 | 1 << 49
"""vLLM's id of the type: bits of exponent, bits of mantissa, signed, and that all codes are finite."""
LOCKS = 4 * 256
"""Marlin's: of up to four blocks on each multiprocessor."""
MARLIN_TILES = (8, 16, 32, 48, 64)
"""Tokens that Marlin takes at a time."""
MARLIN_FULL = 0.9
"""vLLM takes the first tile that experts fill to less than this on average."""


@dataclass(frozen=True)
class PackedCase:
    """weights: of `as_gpt_oss`, for bf16 tokens. inputs: bf16 rows with ready ids of experts that are all here, and
    equal weights."""

    shape: MoEProblem
    weights: PackedWeights
    inputs: LayerInputs

    @property
    def ids(self) -> Tensor:
        assert self.inputs.topk_ids is not None
        return self.inputs.topk_ids - self.shape.local_expert_offset

    @property
    def experts(self) -> int:
        return self.shape.num_local_experts


def as_gpt_oss(weights: PackedWeights) -> PackedWeights:
    """The same weights with gpt-oss' activation."""

    def each(value: float) -> Tensor:
        return torch.full((len(weights.gate_up),), value, device=weights.device)

    return dataclasses.replace(weights, alpha=each(ALPHA), beta=each(BETA), clamp=each(CLAMP))


def activate(rows: Tensor) -> Tensor:
    """[rows, 2I] bf16, [gate; up] -> [rows, I] bf16."""
    gate, up = rows.float().chunk(2, 1)
    gate, up = gate.clamp(max=CLAMP), up.clamp(-CLAMP, CLAMP)
    return (gate * torch.sigmoid(ALPHA * gate) * (up + BETA)).bfloat16()


class PackedPeer(Peer[PackedCase]):
    """whole: it does all that our layers do."""

    numerics = "bf16 x MXFP4, as bf16_mxfp4"
    whole: ClassVar[bool] = True

    def error(self, case: PackedCase, result: Tensor) -> float:
        return sampled_error(case.shape, case.weights, case.inputs, result)


class TritonKernels(PackedPeer):
    """As vLLM composes it: routing from ids, a matmul that gathers and activates, one that scatters and combines."""

    name = "triton-kernels"
    module = "triton_kernels.matmul_ogs"
    split_k: ClassVar[int | None] = 1
    """vLLM's choice on Hopper."""

    def prepare(self, case: PackedCase) -> Call:
        ogs, limits = self.library(), importlib.import_module("triton_kernels.matmul_ogs_details.opt_flags")
        gate_up, down = swizzled(case.weights)
        swiglu = importlib.import_module("triton_kernels.swiglu").swiglu_fn
        activation = ogs.FusedActivation(ogs.FnSpecs("swiglu", swiglu, ("alpha", "limit")), (ALPHA, CLAMP), 2)
        rows, route = case.inputs.hidden_states, self.router(case)

        def call() -> Tensor:
            limits.update_opt_flags_constraints({"split_k": self.split_k})
            routing, gather, scatter = route()
            hidden = ogs.matmul_ogs(
                rows,
                gate_up[0],
                None,
                routing,
                gather_indx=gather,
                precision_config=ogs.PrecisionConfig(weight_scale=gate_up[1]),
                fused_activation=activation,
            )
            output: Tensor = ogs.matmul_ogs(
                hidden,
                down[0],
                None,
                routing,
                scatter_indx=scatter,
                precision_config=ogs.PrecisionConfig(weight_scale=down[1]),
                gammas=routing.gate_scal,
            )
            return output

        return call

    def router(self, case: PackedCase) -> Callable[[], Any]:
        routing = importlib.import_module("triton_kernels.routing").routing
        ids = case.ids.to(torch.int16)
        # It takes weights as a softmax over the logits of the chosen: of zeros, equal ones.
        logits = torch.zeros(len(ids), case.experts, dtype=torch.bfloat16, device=ids.device)
        return lambda: routing(logits, ids.shape[1], expt_indx=ids)


class TritonKernelsSplit(TritonKernels):
    """With its own choice of how many blocks share a sum."""

    name = "triton-kernels-split"
    split_k = None


class TritonKernelsRouted(TritonKernels):
    """Its matmuls alone: a floor of what a better way to sort the ids could reach."""

    name = "triton-kernels-routed"
    numerics = "bf16 x MXFP4, with the ids sorted beforehand"
    whole = False

    def router(self, case: PackedCase) -> Callable[[], Any]:
        ready = super().router(case)()
        return lambda: ready


@functools.lru_cache(maxsize=1)
def swizzled(weights: PackedWeights) -> tuple[tuple[Any, Any], tuple[Any, Any]]:
    """gate_up, its rows in turns, and down as triton_kernels' (values, factors), both [L, K, N] in Hopper's layouts."""
    tensor, layout = (importlib.import_module(f"triton_kernels.{name}") for name in ("tensor", "tensor_details.layout"))

    def swizzle(values: Tensor, factors: Tensor) -> tuple[Any, Any]:
        of_values, value_options = layout.make_default_matmul_mxfp4_w_layout(mx_axis=1)
        of_factors, factor_options = layout.make_default_matmul_mxfp4_w_scale_layout(mx_axis=1, num_warps=8)
        # The kernel reads factors of whole tiles of 128 along K, and expects none beyond K.
        factors = pad(factors, (0, -factors.shape[2] % 4))
        return (
            tensor.convert_layout(tensor.wrap_torch_tensor(values.mT, dtype=tensor.FP4), of_values, **value_options),
            tensor.convert_layout(tensor.wrap_torch_tensor(factors.mT), of_factors, **factor_options),
        )

    assert weights.gate_up_scale is not None and weights.down_scale is not None
    gate_up, gate_up_scale = in_turns(weights.gate_up), in_turns(weights.gate_up_scale)
    return swizzle(gate_up, gate_up_scale), swizzle(weights.down, weights.down_scale)


def in_turns(rows: Tensor) -> Tensor:
    """[L, 2I, ...], [gate; up] -> gate and up in turns, as gpt-oss has them."""
    return rows.unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2)


class Marlin(PackedPeer):
    """vLLM's fused Marlin layer: aligned ids, GEMM, activation, GEMM, sum. Its kernels come as PTX of sm_80.

    The activation is torch.compile's kernel instead of vLLM's, which is in another, larger library.
    """

    name = "marlin"
    module = "vllm._moe_C_stable_libtorch"

    def library(self) -> Any:
        super().library()
        return torch.ops._moe_C

    def prepare(self, case: PackedCase) -> Call:
        ops, weights = self.library(), for_marlin(case.weights)
        ids, scales, rows = case.ids, case.inputs.topk_weights, case.inputs.hidden_states
        (tokens, k), hidden, experts, slots = ids.shape, rows.shape[1], case.experts, ids.numel()
        wide, inter = weights.hidden_size, weights.intermediate_size
        rows = pad(rows, (0, wide - hidden))
        tile = marlin_tile(slots / experts)
        most = min(slots * tile, slots + experts * (tile - 1))

        def empty(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
            return torch.empty(shape, dtype=dtype, device=rows.device)

        sorted_ids, expert_of_tile, padded = empty(most), empty(-(-most // tile)), empty(1)
        gate_up, down = (empty(slots, columns, dtype=rows.dtype) for columns in (2 * inter, wide))
        output, locks = torch.empty_like(rows), torch.zeros(LOCKS, dtype=torch.int32, device=rows.device)
        torch._dynamo.reset()  # of one function it compiles eight shapes only
        activation = torch.compile(activate, dynamic=False)

        def multiply(x: Tensor, matrix: tuple[Tensor, Tensor], result: Tensor, each: int) -> None:
            values, factors = matrix
            sizes = len(x), result.shape[1], x.shape[1]
            matrix_and_none = values, None, factors, None, None, None
            order = sorted_ids, expert_of_tile, padded, scales
            vllms_choice = False, True, False, -1, -1, -1  # no atomics, fp32 sums of blocks, blocks by its own table
            sized = tile, each, each == 1, FLOAT4_E2M1, *sizes
            ops.moe_wna16_marlin_gemm(x, result, *matrix_and_none, locks, *order, *sized, *vllms_choice)

        def call() -> Tensor:
            ops.moe_align_block_size(ids, experts, tile, sorted_ids, expert_of_tile, padded, None)
            multiply(rows, weights.gate_up, gate_up, k)
            multiply(activation(gate_up), weights.down, down, 1)
            ops.moe_sum(down.view(tokens, k, wide), output)
            return output[:, :hidden]

        return call


@dataclass(frozen=True)
class MarlinWeights:
    """gate_up, down: values and factors, of sizes that are padded as vLLM pads them."""

    gate_up: tuple[Tensor, Tensor]
    down: tuple[Tensor, Tensor]
    hidden_size: int
    intermediate_size: int


@functools.lru_cache(maxsize=1)
def for_marlin(weights: PackedWeights) -> MarlinWeights:
    hidden, inter = weights.down.shape[1], 2 * weights.down.shape[2]
    more_hidden, more_inter = -hidden % 256, -inter % 128

    def padded(gate_up: Tensor, down: Tensor, block: int) -> tuple[Tensor, Tensor]:
        halves = pad(gate_up.unflatten(1, (2, -1)), (0, more_hidden // block, 0, more_inter))
        return halves.flatten(1, 2), pad(down, (0, more_inter // block, 0, more_hidden))

    assert weights.gate_up_scale is not None and weights.down_scale is not None
    values = padded(weights.gate_up, weights.down, 2)
    factors = padded(weights.gate_up_scale, weights.down_scale, 32)
    gate_up, down = ((marlin_values(v), marlin_factors(f)) for v, f in zip(values, factors, strict=True))
    return MarlinWeights(gate_up, down, hidden + more_hidden, inter + more_inter)


def marlin_values(codes: Tensor) -> Tensor:
    """Codes uint8 [L, N, K/2], low nibble first -> int32 [L, K/16, 2N]: the words of fragments of m16n8k16.

    Of 16 along K and 64 rows of weights, thread 4 column + row has a word for each 16 rows: 2 blocks of 8, in each K
    2 row + odd and that plus 8; its nibbles count the upper K first, then the block, then odd.
    """
    # [L, tile, 16s, block, column, 16 of K, upper, row]
    tiles = codes.unflatten(2, (-1, 2, 4)).unflatten(1, (-1, 4, 2, 8))
    halves = [part[..., 0, :] | part[..., 1, :] << 4 for part in (tiles & 15, tiles >> 4)]
    pairs = torch.stack(halves, -1)  # [L, tile, 16s, block, column, 16 of K, row, odd]
    return pairs.permute(0, 5, 1, 4, 6, 2, 7, 3).contiguous().flatten(2).view(torch.int32)


def marlin_factors(factors: Tensor) -> Tensor:
    """ue8m0 as uint8 [L, N, K/32] -> e8m0 [L, K/32, N]: of 64, those that a thread needs side by side, in its order."""
    blocks = factors.mT.unflatten(2, (-1, 2, 2, 2, 8))  # [L, K/32, tile, 32s, 16s, block, column]
    return blocks.permute(0, 1, 2, 6, 3, 5, 4).contiguous().flatten(2).view(torch.float8_e8m0fnu)


def marlin_tile(rows_per_expert: float) -> int:
    return next((tile for tile in MARLIN_TILES if rows_per_expert / tile < MARLIN_FULL), MARLIN_TILES[-1])


PEERS: tuple[PackedPeer, ...] = (TritonKernels(), TritonKernelsSplit(), TritonKernelsRouted(), Marlin())
