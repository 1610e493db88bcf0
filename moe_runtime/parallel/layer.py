"""A whole MoE layer over several ranks: the experts of each, and the exchange of tokens between them."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

from ..config import MoEConfig
from ..errors import InvalidArgument
from ..executors.base import Executor, LayerInputs, MoEProblem
from ..executors.cpu import check_ids
from ..executors.cuda import CudaExecutor
from ..layer import FusedMoE
from ..weights import ExpertWeights
from .dispatch import Arrived, DispatcherFactory, make_dispatcher
from .groups import rank_groups
from .layout import Parallel
from .native import MAX_RANKS, NativePacking
from .overlap import overlap
from .packing import Packing, TorchPacking

if TYPE_CHECKING:
    from ..tuning.plan import Plan


class ParallelMoE:
    """One MoE layer over the ranks of a process group: from a rank's own token rows to complete token rows.

    Every rank makes the layer and calls it as often as the others, with the same settings: with tokens of its own under
    ``dep``, as many as it has, none included; with the same tokens on all ranks under ``ep`` and ``tp``. The ranks of a
    ``dep<N>tp<M>`` group that slice the same experts have the same tokens.

    parallel: the layout, of as many ranks as the group has, seen from this one.
    weights, plan, deterministic: as in `FusedMoE`, of this rank's experts.
    group: the ranks, by default all; with NCCL for weights on a GPU, gloo on the CPU.
    dispatch: how tokens travel, by default as the layout has it: "alltoall", "allgather", "allreduce", "deepep" where
        the package deep_ep is installed, or a function that makes a `Dispatcher`. See `moe_runtime.parallel.dispatch`,
        which also says how the plan's buckets are met.
    max_num_tokens: tokens per rank that travel at a time. A call with more of them on some rank is cut into chunks of
        so many, and while the experts of one work, the results of the one before and the rows of the one after travel.
    timeout_seconds: after which a rank that does not take part is an error on the others, see `groups.RankGroup`; None
        for the group's own time-out. With a number the layers that name it get groups, and so communicators, of their
        own.

    Raises InvalidArgument and PlanRefused as FusedMoE does, and where layout and group do not fit; Unsupported for
    "deepep" where deep_ep cannot be imported; RankError where the ranks' layers differ or one does not come.
    """

    def __init__(
        self,
        config: MoEConfig,
        parallel: Parallel,
        weights: ExpertWeights,
        plan: Plan | None = None,
        *,
        group: dist.ProcessGroup | None = None,
        dispatch: str | DispatcherFactory | None = None,
        max_num_tokens: int = 8192,
        deterministic: bool = False,
        timeout_seconds: float | None = None,
    ) -> None:
        if max_num_tokens < 1:
            raise InvalidArgument("max_num_tokens", max_num_tokens, "1 or more")
        self.experts = FusedMoE(config, parallel, weights, plan, deterministic)
        self.problem, self.device, self.max_num_tokens = self.experts.problem, weights.device, max_num_tokens
        groups = rank_groups(parallel, self.device, group, timeout_seconds)
        self.packing = _packing(self.problem, self.experts.executor, self.device)
        self.dispatcher = make_dispatcher(self.problem, groups, self.packing, dispatch)
        if groups.all is not None:
            name = type(self.dispatcher).__name__
            groups.all.require_alike(
                {"config": config, "parallel": parallel, "dispatch": name, "max_num_tokens": max_num_tokens}
            )

    @torch.no_grad()
    def __call__(
        self,
        x: Tensor,
        router_logits: Tensor | None = None,
        *,
        routing_bias: Tensor | None = None,
        topk_ids: Tensor | None = None,
        topk_weights: Tensor | None = None,
        capacity: int | None = None,
    ) -> Tensor:
        """x [n, H] bf16 -> [n, H] bf16, the sums over all ranks. Takes router_logits, or topk_ids and topk_weights.

        router_logits, routing_bias, topk_ids, topk_weights: as in `FusedMoE`; ids of -1 add nothing, here or elsewhere.
        capacity: None, or the most tokens that any rank brings, the same number on all. With it all buffers have that
            size, the host waits for nothing, and the call can be captured in a CUDA graph, which then serves every
            number of tokens up to the capacity whose absent rows have ids -1.

        Raises InvalidArgument, before anything is sent, for bad tensors or more tokens than the capacity; the other
        ranks then wait for their time-out. Raises RankError where another rank does not take part.
        """
        inputs = LayerInputs(x, None, router_logits, routing_bias, topk_ids, topk_weights)
        num_tokens = self._check(inputs, capacity)
        if self.dispatcher.needs_ids and router_logits is not None:
            inputs = LayerInputs(x, None, None, None, *self.packing.route(router_logits, routing_bias))
        part = functools.partial(self._dispatch, inputs, num_tokens, capacity)
        arrived = part(0)
        if not arrived.later:
            return self.dispatcher.combine(self._run_experts(arrived), arrived.handle)
        return self._in_chunks(part, arrived)

    def _in_chunks(self, part: functools.partial[Arrived], first: Arrived) -> Tensor:
        done: list[Tensor] = []
        arrived: Arrived | None = first
        computed: tuple[Tensor, Any] | None = None

        def communicate(chunk: int, is_there: bool) -> Arrived | None:
            if computed is not None:
                done.append(self.dispatcher.combine(*computed))
            return part(chunk) if is_there else None

        chunk = 1
        while arrived is not None:
            partial, following = overlap(
                self.device,
                functools.partial(self._run_experts, arrived),
                functools.partial(communicate, chunk, arrived.later > 0),
            )
            computed, arrived, chunk = (partial, arrived.handle), following, chunk + 1
        communicate(chunk, False)
        return torch.cat(done)

    def _dispatch(self, inputs: LayerInputs, num_tokens: int, capacity: int | None, chunk: int) -> Arrived:
        """One chunk's; a rank that has no more tokens takes part with none."""
        first, size = chunk * self.max_num_tokens, num_tokens if capacity is None else capacity
        rows = slice(first, first + self.max_num_tokens)
        x, _, logits, bias, ids, weights = inputs
        part = LayerInputs(x[rows], None, _cut(logits, rows), bias, _cut(ids, rows), _cut(weights, rows))
        later = max(0, size - rows.stop)
        return self.dispatcher.dispatch(
            part, later, None if capacity is None else min(self.max_num_tokens, size - first)
        )

    def _run_experts(self, arrived: Arrived) -> Tensor:
        x, scale, logits, bias, ids, weights = arrived.inputs
        return self.experts(x, logits, routing_bias=bias, topk_ids=ids, topk_weights=weights, hidden_states_scale=scale)

    def _check(self, inputs: LayerInputs, capacity: int | None) -> int:
        """The number of tokens."""
        if inputs.hidden_states.dtype != torch.bfloat16:
            raise InvalidArgument("x", inputs.hidden_states.dtype, "torch.bfloat16", "It is encoded on its way.")
        num_tokens = inputs.check(self.problem, self.device)
        if capacity is not None and capacity < max(1, num_tokens):
            accepted = f"1 or more, at least this rank's {num_tokens} tokens, and the same on all ranks"
            raise InvalidArgument("capacity", capacity, accepted)
        if inputs.topk_ids is not None and self.device.type == "cpu":
            check_ids(inputs.topk_ids, self.problem.config.num_experts)
        return num_tokens


def _cut(tensor: Tensor | None, rows: slice) -> Tensor | None:
    return None if tensor is None else tensor[rows]


def _packing(problem: MoEProblem, executor: Executor, device: torch.device) -> Packing:
    if executor.name == "cuda" and problem.parallel.size <= MAX_RANKS:
        return NativePacking(problem, cast(CudaExecutor, executor), device)
    return TorchPacking(problem)
