"""One MoE layer, from token rows and router logits to token rows."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .config import MoEConfig
from .executors import get_executor
from .executors.base import LayerInputs, MoEProblem
from .ops import LayerCalls, plan_table
from .parallel import Parallel
from .weights import FP8BlockWeights

if TYPE_CHECKING:
    from .tuning.plan import Plan


class FusedMoE:
    """The local experts' share of one MoE layer, for inference.

    Routing, gather and quantisation, GEMM1, SwiGLU and quantisation, GEMM2, weighted combine. The output holds what
    the rank's own experts contribute, or its slices of them under tensor parallelism, a partial sum; summing over ranks
    is the caller's all-reduce or all-to-all.

    Raises InvalidArgument where weights, config and parallel do not fit, PlanRefused for a plan of another regime,
    shape, device or library, Unsupported where the device has no kernels.
    """

    def __init__(
        self, config: MoEConfig, parallel: Parallel, weights: FP8BlockWeights, plan: Plan | None = None
    ) -> None:
        self.problem = MoEProblem(config, parallel)
        weights.check(config, self.problem.num_local_experts, tp_size=parallel.tp_size)
        self.weights = weights
        self.executor = get_executor(weights.device)
        if plan is not None:
            plan.require(self.problem, self.executor.device_name, self.executor.library_hash)
        table = plan_table(plan)
        self._calls = LayerCalls(self.executor, self.problem, table)
        self._op_arguments = (
            weights.gate_up,
            weights.gate_up_scale,
            weights.down,
            weights.down_scale,
            weights.gate_first,
            config.num_experts,
            config.top_k,
            int(config.routing_method),
            config.n_group,
            config.topk_group,
            config.routed_scaling_factor,
            config.clamp_limit,
            str(parallel),
            parallel.rank,
            *map(list, table),
        )

    def __call__(
        self,
        x: Tensor,
        router_logits: Tensor | None = None,
        *,
        routing_bias: Tensor | None = None,
        topk_ids: Tensor | None = None,
        topk_weights: Tensor | None = None,
        hidden_states_scale: Tensor | None = None,
        output: Tensor | None = None,
        workspace: Tensor | None = None,
    ) -> Tensor:
        """x [T, H] -> [T, H] bf16. Takes router_logits, or topk_ids and topk_weights.

        x: bf16, or e4m3 with hidden_states_scale [T, H/128] f32 (any strides).
        router_logits: [T, E] bf16 or f32; routing_bias: [E] bf16 or f32, DeepSeekV3 only.
        topk_ids: [T, k] int32 global ids; -1 and other ranks' experts add nothing. topk_weights: [T, k] f32.
            Ids of num_experts and above are an InvalidArgument on the CPU; on CUDA, where looking would stall the
            stream, they add nothing.
        output: [T, H] bf16 to write to. workspace: workspace_bytes(T) bytes or more; by default torch's allocator
            serves both. Under torch.compile the op always has a workspace of its own.

        Zero tokens and rows without a local expert give zeros. Raises InvalidArgument.
        """
        # Under torch.compile the op is what keeps the call whole. Eager calls go round it: the dispatcher takes longer
        # to unpack its 22 arguments than all checks here take.
        if torch.compiler.is_compiling():
            result: Tensor = torch.ops.moe_runtime.fp8_block_moe(
                x, hidden_states_scale, router_logits, routing_bias, topk_ids, topk_weights, *self._op_arguments
            )
            return result if output is None else output.copy_(result)
        inputs = LayerInputs(x, hidden_states_scale, router_logits, routing_bias, topk_ids, topk_weights)
        return self._calls.run(self.weights, inputs, output, workspace)

    def workspace_bytes(self, num_tokens: int) -> int:
        """Bytes of workspace that a call with num_tokens tokens needs, at a 256-byte aligned address."""
        return self.executor.workspace_bytes(self.problem, num_tokens)


def fused_moe(
    x: Tensor,
    weights: FP8BlockWeights,
    config: MoEConfig,
    parallel: Parallel,
    router_logits: Tensor | None = None,
    *,
    routing_bias: Tensor | None = None,
    topk_ids: Tensor | None = None,
    topk_weights: Tensor | None = None,
    hidden_states_scale: Tensor | None = None,
    output: Tensor | None = None,
    workspace: Tensor | None = None,
    plan: Plan | None = None,
) -> Tensor:
    """FusedMoE without the object: checks weights and plan on every call. Arguments as there."""
    return FusedMoE(config, parallel, weights, plan)(
        x,
        router_logits,
        routing_bias=routing_bias,
        topk_ids=topk_ids,
        topk_weights=topk_weights,
        hidden_states_scale=hidden_states_scale,
        output=output,
        workspace=workspace,
    )
