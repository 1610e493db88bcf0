"""The torch ops `moe_runtime::<format>_moe`, and what runs a call of a layer."""

from __future__ import annotations

import functools
from bisect import bisect_right
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch._C._dynamo.guards import _empty_strided_cuda  # type: ignore[attr-defined]

from .config import MoEConfig, RoutingMethod
from .errors import InvalidArgument
from .executors import get_executor
from .executors.base import Executor, LayerInputs, MoEProblem, TacticPair, check_tensor, not_contiguous
from .formats import FORMATS
from .parallel import Parallel
from .weights import NUM_OPERAND_TENSORS, BoundWeights, FP8BlockWeights, LayerWeights, Operands

if TYPE_CHECKING:
    from .tuning.plan import Plan

WORKSPACE_ALIGNMENT = 256

# A plan as the op's schema can carry it: the first number of kernel rows of each bucket, then gemm1 and gemm2 tactic of
# each in turn, both "" where the bucket was not tuned.
PlanTable = tuple[tuple[int, ...], tuple[str, ...]]
NO_PLAN: PlanTable = ((), ())


def plan_table(plan: Plan | None) -> PlanTable:
    if plan is None:
        return NO_PLAN
    starts, pairs = plan.table
    return starts, tuple(tactic for pair in pairs for tactic in pair or ("", ""))


def choose_tactics(executor: Executor, problem: MoEProblem, table: PlanTable, num_tokens: int) -> TacticPair:
    """(gemm1, gemm2) tactics of a call: the plan's, or the executor's defaults where the plan has none."""
    starts, tactics = table
    if starts:
        first = 2 * (bisect_right(starts, num_tokens) - 1)
        if tactics[first]:
            return tactics[first], tactics[first + 1]
    return (
        executor.default_tactic(problem, "gemm1", num_tokens),
        executor.default_tactic(problem, "gemm2", num_tokens),
    )


class LayerCalls:
    """Checks and runs calls of a layer, with the tactics of one plan, on weights that have been checked.

    Tactics and workspace size follow from the number of tokens alone, and are worked out once for each: looking them
    up in the plan and the executor took 0.4 us of a call, finding them here takes 0.05.
    """

    def __init__(self, executor: Executor, problem: MoEProblem, table: PlanTable, deterministic: bool = False) -> None:
        self._executor, self._problem = executor, problem

        @functools.lru_cache(maxsize=4096)
        def needs(num_tokens: int) -> tuple[TacticPair, int]:
            gemm1, gemm2 = choose_tactics(executor, problem, table, num_tokens)
            if deterministic:
                gemm2 = executor.leaving_rows(gemm2)
            return (gemm1, gemm2), executor.workspace_bytes(problem, num_tokens)

        self._needs = needs

    def run(
        self,
        weights: LayerWeights,
        inputs: LayerInputs,
        output: Tensor | None = None,
        workspace: Tensor | None = None,
    ) -> Tensor:
        """[T, H] bf16: output, if given. workspace: see FusedMoE. Raises InvalidArgument."""
        num_tokens, tactics, output, workspace = self._prepare(weights, inputs, output, workspace)
        if num_tokens:
            self._executor.run(self._problem, weights, inputs, tactics, output, workspace)
        return output

    def run_unfinalised(self, weights: LayerWeights, inputs: LayerInputs, output: Tensor | None) -> list[Tensor]:
        """[gemm2_output, topk_weights, permuted_row], as Executor.run has them, the last one flat."""
        _, (gemm1, gemm2), output, workspace = self._prepare(weights, inputs, output, None)
        tactics = gemm1, self._executor.leaving_rows(gemm2)
        parts = self._executor.run(self._problem, weights, inputs, tactics, output, workspace, finalize=False)
        assert parts is not None
        gemm2_output, topk_weights, permuted_row = parts
        return [gemm2_output, topk_weights, permuted_row.flatten()]

    def _prepare(
        self, weights: LayerWeights, inputs: LayerInputs, output: Tensor | None, workspace: Tensor | None
    ) -> tuple[int, TacticPair, Tensor, Tensor | None]:
        device, hidden = weights.device, self._problem.config.hidden_size
        num_tokens = inputs.check(self._problem, device)
        tactics, needed = self._needs(num_tokens)
        if output is None:
            output = allocate((num_tokens, hidden), (hidden, 1), torch.bfloat16, device)
        else:
            check_tensor("output", output, (num_tokens, hidden), (torch.bfloat16,), device)
        if workspace is None:
            # Not kept from call to call: torch's caching allocator hands the same block to each layer of a model in
            # turn, knows the stream and serves CUDA graphs from their own pool.
            workspace = allocate((needed,), (1,), torch.uint8, device) if needed else None
        else:
            _check_workspace(workspace, needed, device)
        return num_tokens, tactics, output, workspace


def allocate(size: tuple[int, ...], stride: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """torch.empty_strided, on the current GPU by what torch.compile's own code allocates with.

    That goes round the dispatcher, which takes more than half of the host's time for torch.empty.
    """
    index = device.index  # None on the CPU
    if index is not None and index == torch._C._cuda_getDevice():
        return _empty_strided_cuda(size, stride, dtype)
    return torch.empty_strided(size, stride, dtype=dtype, device=device)


@functools.lru_cache(maxsize=256)
def shared_calls(
    device: torch.device, problem: MoEProblem, table: PlanTable, deterministic: bool = False
) -> LayerCalls:
    """For callers without an object to keep it in."""
    return LayerCalls(get_executor(device), problem, table, deterministic)


def _check_workspace(workspace: Tensor, needed: int, device: torch.device) -> None:
    if workspace.device != device:
        raise InvalidArgument("workspace", f"a tensor on {workspace.device}", f"a tensor on {device}")
    if not workspace.is_contiguous():
        raise not_contiguous("workspace", workspace)
    if workspace.nbytes < needed:
        hint = "workspace_bytes(num_tokens) of the layer gives the size."
        raise InvalidArgument("workspace", f"{workspace.nbytes} bytes", f"{needed} bytes or more", hint)
    if workspace.data_ptr() % WORKSPACE_ALIGNMENT:
        accepted = f"an address that is a multiple of {WORKSPACE_ALIGNMENT}"
        raise InvalidArgument("workspace", f"address {workspace.data_ptr():#x}", accepted)


@functools.lru_cache(maxsize=1024)
def make_problem(
    format: str,
    hidden_size: int,
    intermediate_size: int,
    num_experts: int,
    top_k: int,
    routing_method: int,
    n_group: int,
    topk_group: int,
    routed_scaling_factor: float,
    clamp_limit: float | None,
    activation: str,
    num_fused_shared_experts: int,
    experts_are_slots: bool,
    parallel: str,
    rank: int,
) -> MoEProblem:
    """intermediate_size: the rank's own."""
    layout = Parallel.parse(parallel, rank)
    try:
        method = RoutingMethod(routing_method)
    except ValueError:
        accepted = ", ".join(f"{each.value} ({each.name})" for each in RoutingMethod)
        raise InvalidArgument("routing_method_type", routing_method, accepted) from None
    config = MoEConfig(
        name="op",
        hidden_size=hidden_size,
        intermediate_size=intermediate_size * layout.tp_size,
        num_experts=num_experts,
        top_k=top_k,
        routing_method=method,
        n_group=n_group,
        topk_group=topk_group,
        routed_scaling_factor=routed_scaling_factor,
        format=format,
        clamp_limit=clamp_limit,
        activation=activation,
        num_fused_shared_experts=num_fused_shared_experts,
        experts_are_slots=experts_are_slots,
    )
    return MoEProblem(config, layout)


def op_arguments(
    problem: MoEProblem, operands: Operands, table: PlanTable, deterministic: bool = False
) -> tuple[object, ...]:
    """The op's arguments after the call's own inputs."""
    config = problem.config
    return (
        list(operands[:NUM_OPERAND_TENSORS]),
        operands.gate_first,
        operands.input_scale,
        config.hidden_size,
        problem.local_intermediate_size,
        config.num_experts,
        config.top_k,
        int(config.routing_method),
        config.n_group,
        config.topk_group,
        config.routed_scaling_factor,
        config.clamp_limit,
        config.activation,
        config.num_fused_shared_experts,
        config.experts_are_slots,
        str(problem.parallel),
        problem.parallel.rank,
        deterministic,
        *map(list, table),
    )


def layer_op(format: str) -> Callable[..., Tensor]:
    op: Callable[..., Tensor] = getattr(torch.ops.moe_runtime, f"{format}_moe")
    return op


# One schema for all formats. Library.define and impl rather than torch.library.custom_op: at 22 arguments a bare call
# of such an op takes 7 us instead of 20 us on the same CPU. needs_exact_strides, because the executors take contiguous
# tensors and inductor pads rows.
_SCHEMA = (
    "{format}_moe(Tensor hidden_states, Tensor? hidden_states_scale, Tensor? routing_logits, Tensor? routing_bias, "
    "Tensor? topk_ids, Tensor? topk_weights, Tensor?[] operands, bool gate_first, float input_scale, "
    "int hidden_size, int intermediate_size, int num_experts, int top_k, int routing_method, int n_group, "
    "int topk_group, float routed_scaling_factor, float? clamp_limit, str activation, int num_fused_shared_experts, "
    "bool experts_are_slots, str parallel, int rank, bool deterministic, int[] bucket_starts, str[] tactics) -> Tensor"
)
_library = torch.library.Library("moe_runtime", "DEF")


def _layer_op(
    format: str,
    hidden_states: Tensor,
    hidden_states_scale: Tensor | None,
    routing_logits: Tensor | None,
    routing_bias: Tensor | None,
    topk_ids: Tensor | None,
    topk_weights: Tensor | None,
    operands: list[Tensor | None],
    gate_first: bool,
    input_scale: float,
    hidden_size: int,
    intermediate_size: int,
    num_experts: int,
    top_k: int,
    routing_method: int,
    n_group: int,
    topk_group: int,
    routed_scaling_factor: float,
    clamp_limit: float | None,
    activation: str,
    num_fused_shared_experts: int,
    experts_are_slots: bool,
    parallel: str,
    rank: int,
    deterministic: bool,
    bucket_starts: list[int],
    tactics: list[str],
) -> Tensor:
    problem = make_problem(
        format,
        hidden_size,
        intermediate_size,
        num_experts,
        top_k,
        routing_method,
        n_group,
        topk_group,
        routed_scaling_factor,
        clamp_limit,
        activation,
        num_fused_shared_experts,
        experts_are_slots,
        parallel,
        rank,
    )
    bound = BoundWeights(Operands(*operands)._replace(gate_first=gate_first, input_scale=input_scale))  # type: ignore[arg-type]
    if format == FP8BlockWeights.format:
        # Of other formats the operands come from weights that were checked when they were packed.
        plain = FP8BlockWeights(*operands[:4])  # type: ignore[arg-type]
        plain.check(problem.config, problem.num_local_experts, tp_size=problem.parallel.tp_size)
    inputs = LayerInputs(hidden_states, hidden_states_scale, routing_logits, routing_bias, topk_ids, topk_weights)
    table = (tuple(bucket_starts), tuple(tactics))
    return shared_calls(hidden_states.device, problem, table, deterministic).run(bound, inputs)


def _layer_op_fake(hidden_states: Tensor, *rest: object) -> Tensor:
    hidden_size = rest[_HIDDEN_SIZE - 1]
    assert isinstance(hidden_size, int)
    return hidden_states.new_empty((hidden_states.shape[0], hidden_size), dtype=torch.bfloat16)


_HIDDEN_SIZE = 9  # its place among the op's arguments

for _format in FORMATS:
    _library.define(_SCHEMA.format(format=_format), tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides))
    for _device in ("CPU", "CUDA"):
        _library.impl(f"{_format}_moe", functools.partial(_layer_op, _format), _device)
    torch.library.register_fake(f"moe_runtime::{_format}_moe", _layer_op_fake, lib=_library)
