"""Our layers as vLLM's modular kernels call experts. Importing this imports vLLM."""

from __future__ import annotations

import functools
import os

import msgspec
import torch
import vllm.model_executor.layers.fused_moe.modular_kernel as mk
from torch import Tensor
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.fused_moe.config import FusedMoEConfig, FusedMoEParallelConfig, FusedMoEQuantConfig
from vllm.model_executor.layers.fused_moe.topk_weight_and_reduce import TopKWeightAndReduceNoOP
from vllm.model_executor.layers.quantization.utils.quant_utils import (
    QuantKey,
    kFp8Dynamic128Sym,
    kFp8Static128BlockSym,
)
from vllm.platforms import current_platform

from ...config import MoEConfig
from ...errors import InvalidArgument, MoEError, PlanRefused, Unsupported
from ...executors import get_executor
from ...executors.base import GEMMS, Executor, LayerInputs, MoEProblem, version
from ...ops import LayerCalls, plan_table
from ...parallel import Parallel
from ...tuning.plan import Plan, routing_name
from ...weights import BoundWeights, FP8BlockWeights
from . import PLAN_VARIABLE, _log_once, logger


class MoeRuntimeExperts(mk.FusedMoEExpertsModular):
    """Experts of one layer in FP8 with 128x128 blocks, in vLLM's terms.

    Reads vLLM's tensors as they are: w1 [L, 2I, H] e4m3 of rows [gate; up], w2 [L, H, I], scales f32 by 128x128 blocks.
    It weighs and adds up the experts' results itself, into `output`.
    """

    def __init__(self, moe_config: FusedMoEConfig, quant_config: FusedMoEQuantConfig) -> None:
        super().__init__(moe_config=moe_config, quant_config=quant_config)
        self._problem = layer_problem(moe_config, self.activation_config.clamp_limit)
        self._executor = get_executor(current_platform.device_type)
        plan = plan_for(self._problem, self._executor)
        self._calls = LayerCalls(self._executor, self._problem, plan_table(plan))
        self._bound: tuple[tuple[Tensor, ...], BoundWeights] | None = None
        self._placement: tuple[Tensor, int, Tensor | None] | None = None
        tactics = "default tactics" if plan is None else f"the plan of {os.environ[PLAN_VARIABLE]}"
        _log_once(logger.info, f"moe_runtime serves FP8 layers as {self._problem.parallel} with {tactics}")

    @staticmethod
    def activation_format() -> mk.FusedMoEActivationFormat:
        return mk.FusedMoEActivationFormat.Standard

    @staticmethod
    def is_supported_config(
        cls: type[mk.FusedMoEExperts],
        moe_config: FusedMoEConfig,
        weight_key: QuantKey | None,
        activation_key: QuantKey | None,
        activation_format: mk.FusedMoEActivationFormat,
    ) -> tuple[bool, str | None]:
        if moe_config.moe_backend != "auto":
            return False, f"the MoE backend {moe_config.moe_backend} was asked for"
        try:
            supported, reason = mk.FusedMoEExperts.is_supported_config(
                cls, moe_config, weight_key, activation_key, activation_format
            )
            return (supported, reason) if not supported else _serves(moe_config)
        except Exception as error:  # whatever it is, vLLM has other experts
            logger.debug("moe_runtime's plug-in failed", exc_info=True)
            return False, f"{type(error).__name__}: {error}"

    @staticmethod
    def _supports_current_device() -> bool:
        if not (current_platform.is_cuda() or current_platform.is_cpu()):
            return False  # ROCm is "cuda" to torch
        try:
            get_executor(current_platform.device_type)
        except MoEError as error:
            _log_once(logger.warning, f"moe_runtime has no kernels here: {error}")
            return False
        return True

    @staticmethod
    def _supports_no_act_and_mul() -> bool:
        return False

    @staticmethod
    def _supports_quant_scheme(weight_key: QuantKey | None, activation_key: QuantKey | None) -> bool:
        return (weight_key, activation_key) == (kFp8Static128BlockSym, kFp8Dynamic128Sym)

    @staticmethod
    def _supports_activation(activation: MoEActivation) -> bool:
        return activation == MoEActivation.SILU

    @staticmethod
    def _supports_parallel_config(moe_parallel_config: FusedMoEParallelConfig) -> bool:
        # The dispatches whose rows, ids and scales come as `apply` reads them.
        layout = moe_parallel_config
        if layout.use_passthrough_all2all:
            return False
        return not layout.use_all2all_kernels or layout.use_ag_rs_all2all_kernels or layout.use_deepep_ht_kernels

    @property
    def expects_unquantized_inputs(self) -> bool:
        # Alone our gather quantises on its way, which spares a kernel; before a dispatch e4m3 halves what travels.
        layout = self.moe_config.moe_parallel_config
        return not (layout.use_all2all_kernels or layout.dp_size > 1)

    def finalize_weight_and_reduce_impl(self) -> mk.TopKWeightAndReduce:
        return TopKWeightAndReduceNoOP()

    def workspace_shapes(
        self,
        M: int,
        N: int,
        K: int,
        topk: int,
        global_num_experts: int,
        local_num_experts: int,
        expert_tokens_meta: mk.ExpertTokensMetadata | None,
        activation: MoEActivation,
    ) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        # All in the second: vLLM may place the output in the first.
        needed = self._executor.workspace_bytes(self._problem, M)
        return (0,), (-(-needed // self.workspace_dtype(self.moe_config.in_dtype).itemsize),), (M, K)

    def apply(
        self,
        output: Tensor,
        hidden_states: Tensor,
        w1: Tensor,
        w2: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        activation: MoEActivation,
        global_num_experts: int,
        expert_map: Tensor | None,
        a1q_scale: Tensor | None,
        a2_scale: Tensor | None,
        workspace13: Tensor,
        workspace2: Tensor,
        expert_tokens_meta: mk.ExpertTokensMetadata | None,
        apply_router_weight_on_input: bool,
    ) -> None:
        """Writes the local experts' weighted sum [M, H] bf16 to output; rows that have none become zeros.

        hidden_states: bf16 [M, H], or e4m3 with a1q_scale f32 [M, H/128]. topk_ids: global, any integers; -1 is absent.
        apply_router_weight_on_input: vLLM has multiplied the rows already, so the weights count as ones.
        """
        if self.post_gemm2_hook is not None:
            raise Unsupported("moe_runtime adds up the experts' rows itself, and runs no post_gemm2_hook before that.")
        if global_num_experts != self._problem.config.num_experts:
            raise InvalidArgument("global_num_experts", global_num_experts, str(self._problem.config.num_experts))
        if apply_router_weight_on_input:
            topk_weights = torch.ones_like(topk_weights, dtype=torch.float32)
        inputs = LayerInputs(
            hidden_states,
            a1q_scale,
            topk_ids=self._placed(topk_ids, expert_map).to(torch.int32).contiguous(),
            topk_weights=topk_weights.to(torch.float32).contiguous(),
        )
        workspace = workspace2.flatten().view(torch.uint8) if workspace2.numel() else None
        self._calls.run(self._weights(w1, w2), inputs, output, workspace)

    def _weights(self, w1: Tensor, w2: Tensor) -> BoundWeights:
        """The call's weights, checked where they are others than the last call's."""
        tensors = (w1, self.w1_scale, w2, self.w2_scale)
        if self._bound is None or any(a is not b for a, b in zip(self._bound[0], tensors, strict=True)):
            weights = FP8BlockWeights(*tensors)
            names = {"gate_up": "w1", "gate_up_scale": "w1_scale", "down": "w2", "down_scale": "w2_scale"}
            problem = self._problem
            weights.check(problem.config, problem.num_local_experts, names, tp_size=problem.parallel.tp_size)
            self._bound = tensors, BoundWeights(weights.operands)
        return self._bound[1]

    def _placed(self, topk_ids: Tensor, expert_map: Tensor | None) -> Tensor:
        """The ids with the rank's experts at local_expert_offset and up, which is where our kernels look for them.

        vLLM's usual placement has them there, and its ids pass as they are. Whether it does is read from the map once,
        which waits for the GPU; while a graph is captured it cannot be, and ids go through the table.
        """
        if expert_map is None:
            return topk_ids
        if self._placement is not None:
            seen, seen_version, table = self._placement
            if seen is expert_map and seen_version == version(expert_map):
                return topk_ids if table is None else table[topk_ids]
        table, usual = placement_table(self._problem, expert_map)
        if not (table.is_cuda and torch.cuda.is_current_stream_capturing()):
            self._placement = expert_map, version(expert_map), None if usual.all() else table
        return table[topk_ids]


def placement_table(problem: MoEProblem, expert_map: Tensor) -> tuple[Tensor, Tensor]:
    """Of expert_map [E], local ids or -1: (table [E + 1] int32, usual [E] bool).

    table: by global id, local_expert_offset + local id, or -1; the last, which the id -1 indexes, is -1. usual: whether
    that changes nothing for the id.
    """
    first, ids = problem.local_expert_offset, torch.arange(len(expert_map), device=expert_map.device)
    placed = torch.where(expert_map >= 0, expert_map + first, -1)
    is_local = (ids >= first) & (ids < first + problem.num_local_experts)
    table = torch.cat([placed, placed.new_full((1,), -1)]).to(torch.int32)
    return table, placed == torch.where(is_local, ids, -1)


def layer_problem(moe_config: FusedMoEConfig, clamp_limit: float | None) -> MoEProblem:
    """The layer as our kernels have it. Raises InvalidArgument where they do not.

    The routing method is left at its default: vLLM routes, and hands us ids.
    """
    layout = moe_config.moe_parallel_config
    if not layout.use_ep:
        parallel = Parallel("tp", 1, layout.tp_rank, layout.tp_size)
    else:
        parallel = Parallel("dep" if layout.use_all2all_kernels else "ep", layout.ep_size, layout.ep_rank)
    config = MoEConfig(
        name="vllm",
        hidden_size=moe_config.hidden_dim,
        # The rank's share may be padded to whole blocks, so it is what counts.
        intermediate_size=moe_config.intermediate_size_per_partition * parallel.tp_size,
        num_experts=moe_config.num_experts,
        top_k=moe_config.experts_per_token,
        clamp_limit=clamp_limit,
    )
    return MoEProblem(config, parallel)


def _serves(moe_config: FusedMoEConfig) -> tuple[bool, str | None]:
    """Whether our kernels serve a layer that has passed vLLM's own questions, and the reason if not."""
    if moe_config.in_dtype != torch.bfloat16:
        return False, f"activations are {moe_config.in_dtype}, not torch.bfloat16"
    if moe_config.has_bias:
        return False, "the experts have biases"
    if moe_config.swiglu_alpha not in (None, 1.0) or moe_config.swiglu_beta not in (None, 0.0):
        return False, f"SwiGLU has alpha {moe_config.swiglu_alpha} and beta {moe_config.swiglu_beta}"
    try:
        problem, executor = (
            layer_problem(moe_config, moe_config.swiglu_limit),
            get_executor(current_platform.device_type),
        )
        for gemm in GEMMS:
            executor.default_tactic(problem, gemm, 1)
    except MoEError as error:
        return False, str(error)
    return True, None


def plan_for(problem: MoEProblem, executor: Executor) -> Plan | None:
    """The plan that MOE_RUNTIME_VLLM_PLAN names; None without one, or, with a warning, where it does not fit."""
    path = os.environ.get(PLAN_VARIABLE)
    if not path:
        return None
    try:
        plan = _load(path)
        # Which routing made the rows is not known here, and is taken on trust.
        key = msgspec.structs.replace(plan.key, routing=routing_name(problem.config))
        msgspec.structs.replace(plan, key=key).require(problem, executor.device_name, executor.library_hash)
    except PlanRefused as reason:
        _log_once(logger.warning, f"{PLAN_VARIABLE}={path} is not used: {reason}")
        return None
    return plan


_load = functools.cache(Plan.load)
