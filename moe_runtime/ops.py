"""The torch op `moe_runtime::fp8_block_moe`, and the layer by the names that callers of FlashInfer use."""

from __future__ import annotations

import functools
from bisect import bisect_right
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch._C._dynamo.guards import _empty_strided_cuda  # type: ignore[attr-defined]

from .config import MoEConfig, RoutingMethod
from .errors import InvalidArgument, PlanRefused
from .executors import get_executor
from .executors.base import Executor, LayerInputs, MoEProblem, TacticPair, check_tensor, not_contiguous
from .parallel import Parallel
from .weights import FP8BlockWeights

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

    def __init__(self, executor: Executor, problem: MoEProblem, table: PlanTable) -> None:
        self._executor, self._problem = executor, problem

        @functools.lru_cache(maxsize=4096)
        def needs(num_tokens: int) -> tuple[TacticPair, int]:
            tactics = choose_tactics(executor, problem, table, num_tokens)
            return tactics, executor.workspace_bytes(problem, num_tokens)

        self._needs = needs

    def run(
        self,
        weights: FP8BlockWeights,
        inputs: LayerInputs,
        output: Tensor | None = None,
        workspace: Tensor | None = None,
    ) -> Tensor:
        """[T, H] bf16: output, if given. workspace: see FusedMoE. Raises InvalidArgument."""
        num_tokens, tactics, output, workspace = self._prepare(weights, inputs, output, workspace)
        if num_tokens:
            self._executor.run(self._problem, weights, inputs, tactics, output, workspace)
        return output

    def run_unfinalised(self, weights: FP8BlockWeights, inputs: LayerInputs, output: Tensor | None) -> list[Tensor]:
        """[gemm2_output, topk_weights, permuted_row], as Executor.run has them, the last one flat."""
        _, tactics, output, workspace = self._prepare(weights, inputs, output, None)
        parts = self._executor.run(self._problem, weights, inputs, tactics, output, workspace, finalize=False)
        assert parts is not None
        gemm2_output, topk_weights, permuted_row = parts
        return [gemm2_output, topk_weights, permuted_row.flatten()]

    def _prepare(
        self, weights: FP8BlockWeights, inputs: LayerInputs, output: Tensor | None, workspace: Tensor | None
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
def _shared_calls(device: torch.device, problem: MoEProblem, table: PlanTable) -> LayerCalls:
    """For callers without an object to keep it in."""
    return LayerCalls(get_executor(device), problem, table)


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
def _problem(
    hidden_size: int,
    intermediate_size: int,
    num_experts: int,
    top_k: int,
    routing_method: int,
    n_group: int,
    topk_group: int,
    routed_scaling_factor: float,
    clamp_limit: float | None,
    parallel: str,
    rank: int,
) -> MoEProblem:
    """Cached, because validating a configuration takes longer than the rest of a call's checks.

    intermediate_size: the rank's part, as the weights show it.
    """
    layout = Parallel.parse(parallel, rank)
    try:
        method = RoutingMethod(routing_method)
    except ValueError:
        accepted = ", ".join(f"{known.value} ({known.name})" for known in RoutingMethod)
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
        clamp_limit=clamp_limit,
    )
    return MoEProblem(config, layout)


# Library.define and impl rather than torch.library.custom_op: at 22 arguments a bare call of the op takes 7 us instead
# of 20 us on the same CPU. needs_exact_strides, because the executors take contiguous tensors and inductor pads rows.
_library = torch.library.Library("moe_runtime", "DEF")
_library.define(
    "fp8_block_moe(Tensor hidden_states, Tensor? hidden_states_scale, Tensor? routing_logits, Tensor? routing_bias, "
    "Tensor? topk_ids, Tensor? topk_weights, Tensor gate_up, Tensor gate_up_scale, Tensor down, Tensor down_scale, "
    "bool gate_first, int num_experts, int top_k, int routing_method, int n_group, int topk_group, "
    "float routed_scaling_factor, float? clamp_limit, str parallel, int rank, int[] bucket_starts, "
    "str[] tactics) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides),
)


def _fp8_block_moe(
    hidden_states: Tensor,
    hidden_states_scale: Tensor | None,
    routing_logits: Tensor | None,
    routing_bias: Tensor | None,
    topk_ids: Tensor | None,
    topk_weights: Tensor | None,
    gate_up: Tensor,
    gate_up_scale: Tensor,
    down: Tensor,
    down_scale: Tensor,
    gate_first: bool,
    num_experts: int,
    top_k: int,
    routing_method: int,
    n_group: int,
    topk_group: int,
    routed_scaling_factor: float,
    clamp_limit: float | None,
    parallel: str,
    rank: int,
    bucket_starts: list[int],
    tactics: list[str],
) -> Tensor:
    problem = _problem(
        hidden_states.shape[-1],
        gate_up.shape[1] // 2,
        num_experts,
        top_k,
        routing_method,
        n_group,
        topk_group,
        routed_scaling_factor,
        clamp_limit,
        parallel,
        rank,
    )
    weights = FP8BlockWeights(gate_up, gate_up_scale, down, down_scale, gate_first)
    weights.check(problem.config, problem.num_local_experts, tp_size=problem.parallel.tp_size)
    inputs = LayerInputs(hidden_states, hidden_states_scale, routing_logits, routing_bias, topk_ids, topk_weights)
    table = (tuple(bucket_starts), tuple(tactics))
    return _shared_calls(hidden_states.device, problem, table).run(weights, inputs)


_library.impl("fp8_block_moe", _fp8_block_moe, "CPU")
_library.impl("fp8_block_moe", _fp8_block_moe, "CUDA")


@torch.library.register_fake("moe_runtime::fp8_block_moe", lib=_library)
def _fp8_block_moe_fake(hidden_states: Tensor, *_: object) -> Tensor:
    return hidden_states.new_empty(hidden_states.shape, dtype=torch.bfloat16)


# What callers of FlashInfer may also pass, with the values that ask for what this function does.
_NEUTRAL: dict[str, tuple[object, ...]] = {
    "use_shuffled_weight": (False,),
    "weight_layout": (0,),
    "enable_pdl": (None, False, True),
    "fp8_quantization_type": (None, 1),
    "num_fused_shared_experts": (None, 0),
    "activation_type": (None, 3),
    "norm_topk_prob": (True,),
    "routing_replay_out": (None,),
    "gemm1_alpha": (None,),
    "gemm1_beta": (None,),
    "gemm1_clamp_limit": (None,),
}


def fp8_block_scale_moe(
    routing_logits: Tensor,
    routing_bias: Tensor | None,
    hidden_states: Tensor,
    hidden_states_scale: Tensor | None,
    gemm1_weights: Tensor,
    gemm1_weights_scale: Tensor,
    gemm2_weights: Tensor,
    gemm2_weights_scale: Tensor,
    num_experts: int,
    top_k: int,
    n_group: int | None,
    topk_group: int | None,
    intermediate_size: int,
    local_expert_offset: int,
    local_num_experts: int,
    routed_scaling_factor: float | None,
    routing_method_type: int = 0,
    *,
    tune_max_num_tokens: int = 8192,
    use_dp: bool = False,
    do_finalize: bool = True,
    output: Tensor | None = None,
    plan: Plan | None = None,
    **others: object,
) -> Tensor | list[Tensor]:
    """One layer, with the arguments of FlashInfer's trtllm_fp8_block_scale_moe.

    routing_logits: [T, E] bf16 or f32. routing_bias: [E] bf16 or f32, or None.
    hidden_states: [T, H] e4m3 with hidden_states_scale [H/128, T] f32 (any strides), or bf16 with None.
    gemm1_weights: [L, 2I, H] e4m3, rows [up; gate] as that function has them: SiLU goes to the second half.
    gemm1_weights_scale: [L, 2I/128, H/128] f32. gemm2_weights: [L, H, I] e4m3, its scale [L, H/128, I/128] f32.
    local_num_experts must divide num_experts and local_expert_offset be a multiple of it.
    routing_method_type: 1 (Renormalize) or 2 (DeepSeekV3).
    tune_max_num_tokens, use_dp: the regime that plan must have been tuned for; no other effect.
    others: that function's remaining arguments, accepted at values that change nothing here.

    Returns [T, H] bf16 (output, if given); with do_finalize=False the list [gemm2_output [rows, H] bf16,
    expert_weights [T, k] f32, expanded_idx_to_permuted_idx [T*k] int32]: slot t*k + j is that row of gemm2_output,
    -1 where its expert is remote.

    Raises InvalidArgument, and PlanRefused for a plan of another problem. torch.compile sees one op, except
    that it breaks the graph for do_finalize=False and for a plan (FusedMoE takes one there).
    """
    if torch.compiler.is_compiling() and not (do_finalize and plan is None):
        return _outside_the_graph(
            routing_logits, routing_bias, hidden_states, hidden_states_scale,
            gemm1_weights, gemm1_weights_scale, gemm2_weights, gemm2_weights_scale,
            num_experts, top_k, n_group, topk_group, intermediate_size, local_expert_offset, local_num_experts,
            routed_scaling_factor, routing_method_type, tune_max_num_tokens=tune_max_num_tokens, use_dp=use_dp,
            do_finalize=do_finalize, output=output, plan=plan, **others,
        )  # fmt: skip
    for name, value in others.items():
        if name not in _NEUTRAL:
            raise TypeError(f"fp8_block_scale_moe() got an unexpected keyword argument {name!r}")
        if value not in _NEUTRAL[name]:
            raise InvalidArgument(name, repr(value), " or ".join(map(repr, _NEUTRAL[name])))
    parallel, rank = _shard(num_experts, local_expert_offset, local_num_experts, use_dp)
    if gemm1_weights.shape[1] != 2 * intermediate_size:
        got = f"shape {list(gemm1_weights.shape)}"
        raise InvalidArgument("gemm1_weights", got, f"[L, 2 * intermediate_size = {2 * intermediate_size}, H]")
    scale = None if hidden_states_scale is None else hidden_states_scale.mT
    routing = (num_experts, top_k, int(routing_method_type), n_group or 1, topk_group or 1)
    scaling = 1.0 if routed_scaling_factor is None else routed_scaling_factor
    if torch.compiler.is_compiling():
        result: Tensor = torch.ops.moe_runtime.fp8_block_moe(
            hidden_states, scale, routing_logits, routing_bias, None, None,
            gemm1_weights, gemm1_weights_scale, gemm2_weights, gemm2_weights_scale,
            False, *routing, scaling, None, parallel, rank, *NO_PLAN,
        )  # fmt: skip
        return result if output is None else output.copy_(result)

    problem = _problem(hidden_states.shape[-1], intermediate_size, *routing, scaling, None, parallel, rank)
    weights = FP8BlockWeights(gemm1_weights, gemm1_weights_scale, gemm2_weights, gemm2_weights_scale, gate_first=False)
    weights.check(problem.config, local_num_experts, "gemm1_weights", "gemm2_weights")
    device = hidden_states.device
    calls = _shared_calls(device, problem, _admit(plan, device, problem, tune_max_num_tokens))
    inputs = LayerInputs(hidden_states, scale, routing_logits, routing_bias)
    if do_finalize:
        return calls.run(weights, inputs, output)
    return calls.run_unfinalised(weights, inputs, output)


_outside_the_graph = torch.compiler.disable(
    fp8_block_scale_moe, reason="the op takes no plan object and always finalises; FusedMoE compiles with a plan"
)


# Plans whose key was compared with a problem, so that a call in a loop does not compare again. Holding the plan keeps
# its id from being reused.
_admitted: dict[tuple[int, MoEProblem, int], tuple[Plan, PlanTable]] = {}


def _admit(plan: Plan | None, device: torch.device, problem: MoEProblem, tune_max_num_tokens: int) -> PlanTable:
    """The plan's table. Raises PlanRefused unless the plan was tuned for this problem."""
    if plan is None:
        return NO_PLAN
    key = (id(plan), problem, tune_max_num_tokens)
    if key not in _admitted:
        executor = get_executor(device)
        reason = plan.fits(problem, executor.device_name, executor.library_hash, tune_max_num_tokens)
        if reason is not None:
            raise PlanRefused(f"plan: {reason}")
        _admitted[key] = (plan, plan_table(plan))
    return _admitted[key][1]


def _shard(num_experts: int, offset: int, local: int, use_dp: bool) -> tuple[str, int]:
    """(regime and size, rank) of the shard of experts [offset, offset + local)."""
    if local < 1 or num_experts % local:
        raise InvalidArgument("local_num_experts", local, f"a divisor of num_experts = {num_experts}")
    if offset % local or not 0 <= offset < num_experts:
        accepted = f"a multiple of local_num_experts = {local} from 0 to {num_experts - local}"
        raise InvalidArgument("local_expert_offset", offset, accepted)
    return f"{'dep' if use_dp else 'ep'}{num_experts // local}", offset // local
