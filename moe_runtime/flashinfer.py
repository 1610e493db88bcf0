"""The layer by the names that callers of FlashInfer and TensorRT-LLM use: one function for each format's runner.

`fp8_block_scale_moe` is written out; those of the 4-bit formats share their arguments, and are made from the registry:
`fp4_block_scale_moe` (nvfp4), `mxe4m3_mxe2m1_block_scale_moe`, `e4m3_mxe2m1_block_scale_moe`,
`bf16_mxe2m1_block_scale_moe` and `fp8_fp4_block_scale_moe`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from .errors import InvalidArgument, PlanRefused
from .executors import get_executor
from .executors.base import LayerInputs, MoEProblem, check_tensor, version
from .formats import FORMATS, Extra, Format, Tokens, Weights, nvfp4
from .ops import NO_PLAN, PlanTable, layer_op, make_problem, plan_table, shared_calls
from .weights import BoundWeights, FP8BlockWeights, LayerWeights, PackedWeights

if TYPE_CHECKING:
    from .tuning.plan import Plan

# What callers of FlashInfer may also pass, with the values that ask for what these functions do.
_NEUTRAL: dict[str, tuple[object, ...]] = {
    "use_shuffled_weight": (False,),
    "weight_layout": (0,),
    "enable_pdl": (None, False, True),
    "norm_topk_prob": (True,),
    "routing_replay_out": (None,),
}
_NEUTRAL_FP8_BLOCK = _NEUTRAL | {
    "fp8_quantization_type": (None, 1),
    "activation_type": (None, 3),
    "gemm1_alpha": (None,),
    "gemm1_beta": (None,),
    "gemm1_clamp_limit": (None,),
}

# FlashInfer's ActivationType; SwigluBias is SwiGLU with the biases and factors that are arguments here.
_ACTIVATIONS = {3: "swiglu", 5: "swiglu", 6: "relu2"}

_NAMES = {
    "gate_up": "gemm1_weights",
    "gate_up_scale": "gemm1_weights_scale",
    "gate_up_bias": "gemm1_bias",
    "alpha": "gemm1_alpha",
    "beta": "gemm1_beta",
    "clamp": "gemm1_clamp_limit",
    "down": "gemm2_weights",
    "down_scale": "gemm2_weights_scale",
    "down_bias": "gemm2_bias",
}


def _refuse_others(function: str, others: dict[str, object], neutral: dict[str, tuple[object, ...]]) -> None:
    for name, value in others.items():
        if name not in neutral:
            raise TypeError(f"{function}() got an unexpected keyword argument {name!r}")
        if value not in neutral[name]:
            raise InvalidArgument(name, repr(value), " or ".join(map(repr, neutral[name])))


def _with_shared_experts(
    others: dict[str, object], num_experts: int, top_k: int, local_num_experts: int
) -> tuple[int, int, int, int]:
    """num_fused_shared_experts, taken out of the arguments, and the other counts, which come without it, with it."""
    shared = others.pop("num_fused_shared_experts", None) or 0
    if not isinstance(shared, int) or shared < 0 or (shared and local_num_experts != num_experts):
        accepted = "None, 0, or a number where all experts are local"
        raise InvalidArgument("num_fused_shared_experts", repr(shared), accepted)
    return shared, num_experts + shared, top_k + shared, local_num_experts + shared


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
    routing_method_type: the number of a RoutingMethod.
    num_fused_shared_experts: S experts that every token has, with weight 1: the last of L = num_experts + S in the
        weights; k of the results is top_k + S. Only where all experts are local.
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
    shared, num_experts, top_k, local_num_experts = _with_shared_experts(others, num_experts, top_k, local_num_experts)
    _refuse_others("fp8_block_scale_moe", others, _NEUTRAL_FP8_BLOCK)
    parallel, rank = _shard(num_experts, local_expert_offset, local_num_experts, use_dp)
    if gemm1_weights.shape[1] != 2 * intermediate_size:
        got = f"shape {list(gemm1_weights.shape)}"
        raise InvalidArgument("gemm1_weights", got, f"[L, 2 * intermediate_size = {2 * intermediate_size}, H]")
    scale = None if hidden_states_scale is None else hidden_states_scale.mT
    scaling = 1.0 if routed_scaling_factor is None else routed_scaling_factor
    routing = (num_experts, top_k, int(routing_method_type), n_group or 1, topk_group or 1, scaling)
    layer = (hidden_states.shape[-1], intermediate_size, *routing, None, "swiglu", shared, False, parallel, rank)
    if torch.compiler.is_compiling():
        result = layer_op("fp8_block")(
            hidden_states, scale, routing_logits, routing_bias, None, None,
            [gemm1_weights, gemm1_weights_scale, gemm2_weights, gemm2_weights_scale], False, 1.0,
            *layer, False, *NO_PLAN,
        )  # fmt: skip
        return result if output is None else output.copy_(result)
    problem = make_problem("fp8_block", *layer)
    weights = FP8BlockWeights(gemm1_weights, gemm1_weights_scale, gemm2_weights, gemm2_weights_scale, gate_first=False)
    weights.check(problem.config, local_num_experts, _NAMES)
    inputs = LayerInputs(hidden_states, scale, routing_logits, routing_bias)
    return _call(problem, weights, inputs, plan, tune_max_num_tokens, do_finalize, output)


_outside_the_graph = torch.compiler.disable(
    fp8_block_scale_moe, reason="the op takes no plan object and always finalises; FusedMoE compiles with a plan"
)


def _call(
    problem: MoEProblem,
    weights: LayerWeights,
    inputs: LayerInputs,
    plan: Plan | None,
    tune_max_num_tokens: int,
    do_finalize: bool,
    output: Tensor | None,
) -> Tensor | list[Tensor]:
    device = inputs.hidden_states.device
    calls = shared_calls(device, problem, _admit(plan, device, problem, tune_max_num_tokens))
    if do_finalize:
        return calls.run(weights, inputs, output)
    return calls.run_unfinalised(weights, inputs, output)


def _make_function(format: Format) -> Callable[..., Tensor | list[Tensor]]:
    """The function of a format of 4-bit weights."""
    name = format.operator
    assert name is not None

    def block_scale_moe(
        routing_logits: Tensor,
        routing_bias: Tensor | None,
        hidden_states: Tensor,
        hidden_states_scale: Tensor | None,
        gemm1_weights: Tensor,
        gemm1_weights_scale: Tensor,
        gemm1_bias: Tensor | None,
        gemm1_alpha: Tensor | None,
        gemm1_beta: Tensor | None,
        gemm1_clamp_limit: Tensor | None,
        gemm2_weights: Tensor,
        gemm2_weights_scale: Tensor,
        gemm2_bias: Tensor | None,
        output1_scale_scalar: Tensor | None,
        output1_scale_gate_scalar: Tensor | None,
        output2_scale_scalar: Tensor | None,
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
        activation_type: int | None = None,
        tune_max_num_tokens: int = 8192,
        use_dp: bool = False,
        do_finalize: bool = True,
        output: Tensor | None = None,
        plan: Plan | None = None,
        **others: object,
    ) -> Tensor | list[Tensor]:
        shared, num_experts, top_k, local_num_experts = _with_shared_experts(
            others, num_experts, top_k, local_num_experts
        )
        _refuse_others(name, others, _NEUTRAL)
        activation = _ACTIVATIONS.get(3 if activation_type is None else int(activation_type))
        if activation is None:
            raise InvalidArgument("activation_type", activation_type, "None, 3 or 5 (SwiGLU), or 6 (relu^2)")
        parallel, rank = _shard(num_experts, local_expert_offset, local_num_experts, use_dp)
        hidden_size = gemm2_weights.shape[1] if gemm2_weights.ndim == 3 else 0
        problem = make_problem(
            format.name, hidden_size, intermediate_size, num_experts, top_k, int(routing_method_type), n_group or 1,
            topk_group or 1, 1.0 if routed_scaling_factor is None else routed_scaling_factor, None, activation,
            shared, False, parallel, rank,
        )  # fmt: skip
        weights = PackedWeights(
            format.name,
            gemm1_weights,
            _factors(format, gemm1_weights, gemm1_weights_scale),
            gemm2_weights,
            _factors(format, gemm2_weights, gemm2_weights_scale),
            gate_up_global=output1_scale_gate_scalar,
            down_global=output2_scale_scalar,
            gate_up_bias=gemm1_bias,
            down_bias=gemm2_bias,
            alpha=gemm1_alpha,
            beta=gemm1_beta,
            clamp=gemm1_clamp_limit,
            gate_first=False,
        )
        scalars = {
            "output1_scale_scalar": output1_scale_scalar,
            "output1_scale_gate_scalar": output1_scale_gate_scalar,
            "output2_scale_scalar": output2_scale_scalar,
        }
        for scalar, value in scalars.items():
            if value is not None and Extra.OUTPUT_SCALES not in format.extras:
                raise InvalidArgument(scalar, "a tensor", f"None: {format.name} takes none")
            if value is not None:
                check_tensor(scalar, value, (local_num_experts,), (torch.float32,), weights.device)
        inputs = LayerInputs(hidden_states, hidden_states_scale, routing_logits, routing_bias)
        bound = _bind(problem, weights, gemm1_weights_scale, gemm2_weights_scale, *scalars.values())
        return _call(problem, bound, inputs, plan, tune_max_num_tokens, do_finalize, output)

    block_scale_moe.__name__ = block_scale_moe.__qualname__ = name
    block_scale_moe.__doc__ = _DOC.format(
        name=name,
        format=format.name,
        tokens=_TOKENS_DOC[format.tokens],
        factors="ue8m0 as uint8 [L, N, K/32]"
        if format.weights == Weights.MXFP4
        else "e4m3 [L, N, K/16] or [L, N, K/32]",
        extras="" if Extra.BIAS in format.extras else "; this format takes none of them",
        scalars="" if Extra.OUTPUT_SCALES in format.extras else "; this format takes none of them",
    )
    function: Callable[..., Tensor | list[Tensor]] = torch.compiler.disable(
        block_scale_moe, reason="it keeps weights packed from call to call; FusedMoE compiles"
    )
    return function


_TOKENS_DOC = {
    Tokens.BF16: "[T, H] bf16, without a scale.",
    Tokens.FP8: "[T, H] e4m3 without a scale, which the output scalars hold; or bf16, taken with a scale of 1.",
    Tokens.MXFP8: "[T, H] e4m3 with hidden_states_scale [T, H/32] ue8m0 as uint8; or bf16 with None.",
    Tokens.NVFP4: "[T, H/2] packed e2m1 with hidden_states_scale [T, H/16] e4m3; or bf16 with None, scaled by 1.",
}

_DOC = """One layer in {format}, with the arguments of FlashInfer's trtllm_fp4_block_scale_moe.

    routing_logits: [T, E] bf16 or f32. routing_bias: [E] bf16 or f32, or None.
    hidden_states: {tokens}
    gemm1_weights: packed e2m1 uint8 [L, 2I, H/2], rows [up; gate]: the second half is the gate.
    gemm2_weights: packed e2m1 uint8 [L, H, I/2]. The scales of both: {factors}, row by row.
    gemm1_bias: f32 [L, 2I]. gemm2_bias: f32 [L, H]. gemm1_alpha, gemm1_beta, gemm1_clamp_limit: f32 [L]. Each may be
        None{extras}.
    output1_scale_gate_scalar, output2_scale_scalar: f32 [L], by which sums of the GEMMs are multiplied.
        output1_scale_scalar: f32 [L], the same for GEMM1 with the scale that quantises the activation. Each may be
        None{scalars}.
    activation_type: 3 or 5 for SwiGLU; 6 for relu^2, with gemm1_weights of I rows.
    All else as in `fp8_block_scale_moe`. On a GPU the first call with a tensor of weights packs it for the kernels, and
    later calls find it packed while the tensor lives and is not written to.

    Returns [T, H] bf16, or with do_finalize=False the list that `fp8_block_scale_moe` describes.
    Raises InvalidArgument, and PlanRefused for a plan of another problem. torch.compile breaks the graph here.
    """


def _factors(format: Format, values: Tensor, scale: Tensor) -> Tensor:
    """The block factors in the dtype and the blocks of the encoding."""
    if scale.element_size() != 1:
        return scale
    if format.weights == Weights.MXFP4:
        return scale.view(torch.uint8)
    scale = scale.view(torch.float8_e4m3fn)
    if values.shape[-1] * 2 == scale.shape[-1] * 2 * nvfp4.BLOCK:  # one factor per 32
        return scale.view(torch.uint8).repeat_interleave(2, -1).view(torch.float8_e4m3fn)
    return scale


# Weights that were checked and, on a GPU, packed, by the tensor gemm1_weights. What it is found for must be the same
# tensors, unchanged. The values hold no plain weights: a weak key that its value refers to would never go.
_bound: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def _bind(problem: MoEProblem, weights: PackedWeights, *tensors: Tensor | None) -> LayerWeights:
    """weights, which have the scalars of both GEMMs as their global scales, checked and with output1's.

    tensors: the scales of both weights as the caller gave them, then output1, output1 gate and output2 scalar.
    """
    key, executor = weights.gate_up, get_executor(weights.device)
    others = (
        *tensors,
        weights.down,
        weights.gate_up_bias,
        weights.down_bias,
        weights.alpha,
        weights.beta,
        weights.clamp,
    )
    state = (problem, *(None if t is None else (id(t), t.data_ptr(), version(t)) for t in (key, *others)))
    found = _bound.get(key)
    if found is not None and found[0] == state:
        bound: LayerWeights = found[1]
        return bound
    weights.check(problem.config, problem.num_local_experts, _NAMES)
    *_, output1, gate, _ = tensors
    multiplier = None
    if output1 is not None:
        multiplier = output1 if gate is None else output1 / gate
    elif gate is not None:
        multiplier = gate.reciprocal()
    made = BoundWeights(executor.prepare(weights)._replace(activation_multiplier=multiplier))
    if executor.name == "cuda":  # on a CPU the operands hold the key, and there is nothing to pack
        _bound[key] = (state, made, others)  # which keeps the ids of the others from being reused
    return made


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


fp4_block_scale_moe = _make_function(FORMATS["nvfp4"])
mxe4m3_mxe2m1_block_scale_moe = _make_function(FORMATS["mxfp8_mxfp4"])
e4m3_mxe2m1_block_scale_moe = _make_function(FORMATS["fp8_mxfp4"])
bf16_mxe2m1_block_scale_moe = _make_function(FORMATS["bf16_mxfp4"])
fp8_fp4_block_scale_moe = _make_function(FORMATS["fp8_nvfp4"])
