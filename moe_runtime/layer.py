"""One MoE layer, from token rows and router logits to token rows."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .config import MoEConfig
from .executors import get_executor
from .executors.base import LayerInputs, MoEProblem
from .ops import LayerCalls, layer_op, op_arguments, plan_table
from .parallel import Parallel
from .weights import BoundWeights, ExpertWeights

if TYPE_CHECKING:
    from .tuning.plan import Plan


class FusedMoE:
    """The local experts' share of one MoE layer, for inference.

    Routing, gather and quantisation, GEMM1, activation and quantisation, GEMM2, weighted combine. The output holds what
    the rank's own experts contribute, or its slices of them under tensor parallelism, a partial sum; `ParallelMoE` sums
    them over ranks, or the caller's all-reduce or all-to-all.

    deterministic: two calls give equal bits. Else a kernel may add up what a token's experts give as they finish, which
    spares 1 to 4 % of a layer.

    It keeps what its executor reads of the weights. On a GPU that is the formats of packed weights in the kernels' own
    layout, which is made once for each object of weights; where the object is let go, its plain layout is freed.

    Raises InvalidArgument where weights, config and parallel do not fit, PlanRefused for a plan of another regime,
    shape, device or library, Unsupported where the device has no kernels.
    """

    def __init__(
        self,
        config: MoEConfig,
        parallel: Parallel,
        weights: ExpertWeights,
        plan: Plan | None = None,
        deterministic: bool = False,
    ) -> None:
        self.problem = MoEProblem(config, parallel)
        weights.check(config, self.problem.num_local_experts, tp_size=parallel.tp_size)
        self.executor = get_executor(weights.device)
        if plan is not None:
            plan.require(self.problem, self.executor.device_name, self.executor.library_hash)
        table = plan_table(plan)
        self._calls = LayerCalls(self.executor, self.problem, table, deterministic)
        # Not the weights themselves: packed for a GPU's kernels they are held twice for as long as both are.
        self._weights = BoundWeights(self.executor.prepare(weights))
        self._op = layer_op(config.format)
        self._op_arguments = op_arguments(self.problem, self._weights.operands, table, deterministic)

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

        x: bf16, or quantised, with hidden_states_scale, as `LayerInputs` has them for each format.
        router_logits: [T, E] bf16 or f32; routing_bias: [E] bf16 or f32, where RoutingMethod.reads_bias.
        topk_ids: [T, k] int32 global ids; -1 and other ranks' experts add nothing. topk_weights: [T, k] f32.
            Ids of num_experts and above are an InvalidArgument on the CPU; on CUDA, where looking would stall the
            stream, they add nothing.
        output: [T, H] bf16 to write to. workspace: workspace_bytes(T) bytes or more; by default torch's allocator
            serves both. Under torch.compile the op always has a workspace of its own.

        Zero tokens and rows without a local expert give zeros. Raises InvalidArgument.
        """
        # Under torch.compile the op is what keeps the call whole. Eager calls go round it: the dispatcher takes longer
        # to unpack its arguments than all checks here take.
        if torch.compiler.is_compiling():
            result: Tensor = self._op(
                x, hidden_states_scale, router_logits, routing_bias, topk_ids, topk_weights, *self._op_arguments
            )
            return result if output is None else output.copy_(result)
        inputs = LayerInputs(x, hidden_states_scale, router_logits, routing_bias, topk_ids, topk_weights)
        return self._calls.run(self._weights, inputs, output, workspace)

    @property
    def device(self) -> torch.device:
        """Of the weights, on which calls run."""
        return self._weights.device

    def workspace_bytes(self, num_tokens: int) -> int:
        """Bytes of workspace that a call with num_tokens tokens needs, at a 256-byte aligned address."""
        return self.executor.workspace_bytes(self.problem, num_tokens)


def fused_moe(
    x: Tensor,
    weights: ExpertWeights,
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
    deterministic: bool = False,
) -> Tensor:
    """FusedMoE without the object: checks weights and plan on every call. Arguments as there."""
    return FusedMoE(config, parallel, weights, plan, deterministic)(
        x,
        router_logits,
        routing_bias=routing_bias,
        topk_ids=topk_ids,
        topk_weights=topk_weights,
        hidden_states_scale=hidden_states_scale,
        output=output,
        workspace=workspace,
    )
