"""The bandwidth-bound stages one by one against plain torch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moe_runtime import MoEConfig, Parallel
from moe_runtime.config import RoutingMethod
from moe_runtime.executors.base import LayerInputs, MoEProblem
from moe_runtime.formats.fp8_block import dequantise_rows, quantise_rows
from moe_runtime.kernels import Stage
from moe_runtime.reference import relative_error
from moe_runtime.routing import route
from moe_runtime.workload import make_workload
from tests.gpu import support

SMALL = MoEConfig("small", 512, 384, 32, 4)
SMALL_PROBLEM = MoEProblem(SMALL, Parallel.parse("ep4", rank=2))


def small_call(
    num_tokens: int, seed: int = 0, hidden_states: Tensor | None = None, scale: Tensor | None = None
) -> support.Call:
    generator = torch.Generator("cuda").manual_seed(seed)
    x = torch.randn(num_tokens, SMALL.hidden_size, device="cuda", dtype=torch.bfloat16, generator=generator)
    ids = make_workload(SMALL, SMALL_PROBLEM.parallel, num_tokens, "random", seed).topk_ids.cuda()
    ids[num_tokens // 2, :] = -1
    weights = torch.rand(ids.shape, device="cuda", generator=generator)
    given = x if hidden_states is None else hidden_states
    inputs = LayerInputs(given, scale, topk_ids=ids, topk_weights=weights)
    tactics = support.unfused(SMALL_PROBLEM, num_tokens)
    return support.Call(SMALL_PROBLEM, support.weights(SMALL_PROBLEM), inputs, tactics)


@pytest.mark.parametrize("num_tokens", [1, 2, 37, 512, 4099])
def test_permute_is_a_stable_sort_by_local_expert(num_tokens: int) -> None:
    call = small_call(num_tokens).run(Stage.PERMUTE)
    assert call.inputs.topk_ids is not None
    local = call.inputs.topk_ids.flatten().cpu().long() - SMALL_PROBLEM.local_expert_offset
    remote = SMALL_PROBLEM.num_local_experts
    local = torch.where((local >= 0) & (local < remote), local, remote)
    order = torch.argsort(local, stable=True)
    expected = torch.full_like(local, -1)
    slots = int((local < remote).sum())
    expected[order[:slots]] = torch.arange(slots)
    assert torch.equal(call.permuted_row.flatten().cpu().long(), expected)
    counts = torch.bincount(local, minlength=remote + 1)[:-1]
    offsets = call.region("expert_offsets", remote + 1, dtype=torch.int32).cpu()
    assert torch.equal(offsets[1:].long(), torch.cumsum(counts, 0)) and offsets[0] == 0


@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize("num_tokens", [1, 37, 4099])
def test_rows_know_whose_they_are_and_what_they_weigh(num_tokens: int, together: bool) -> None:
    call = small_call(num_tokens).run(Stage.PERMUTE | Stage.GATHER if together else Stage.PERMUTE)
    slots = num_tokens * SMALL.top_k
    origins = call.region("row_origins", slots, 2, dtype=torch.int32)
    local = (call.permuted_row.flatten() >= 0).nonzero().flatten()
    found = origins[call.permuted_row.flatten()[local].long()]
    assert call.inputs.topk_weights is not None
    assert torch.equal(found[:, 0].long(), local // SMALL.top_k)
    assert torch.equal(found[:, 1].contiguous().view(torch.float32), call.inputs.topk_weights.flatten()[local])


def gathered(call: support.Call) -> tuple[Tensor, Tensor, Tensor]:
    """(slots that are local, their e4m3 rows as bytes, their scales)"""
    call.run(Stage.PERMUTE | Stage.GATHER)
    slots = call.tokens * call.config.top_k
    rows = call.region("rows", slots, call.config.hidden_size, dtype=torch.uint8)
    scales = call.region("row_scales", slots, call.config.hidden_size // 128)
    local = (call.permuted_row.flatten() >= 0).nonzero().flatten()
    index = call.permuted_row.flatten()[local].long()
    return local, rows[index], scales[index]


@pytest.mark.parametrize("num_tokens", [1, 5, 700])
def test_gather_quantises_bit_for_bit(num_tokens: int) -> None:
    call = small_call(num_tokens)
    call.inputs.hidden_states[0, :128] = 0
    call.inputs.hidden_states[-1, 128:256] *= 1e4
    local, rows, scales = gathered(call)
    values, expected_scales = quantise_rows(call.inputs.hidden_states.cpu())
    token = (local // call.config.top_k).cpu()
    assert torch.equal(rows.cpu(), values.view(torch.uint8)[token])
    assert torch.equal(scales.cpu(), expected_scales[token])


@pytest.mark.parametrize("transposed", [False, True])
def test_gather_takes_quantised_tokens(transposed: bool) -> None:
    values, scale = quantise_rows(torch.randn(65, SMALL.hidden_size, device="cuda"))
    given = scale.T.contiguous().T if transposed else scale
    call = small_call(65, hidden_states=values, scale=given)
    local, rows, scales = gathered(call)
    token = local // call.config.top_k
    assert torch.equal(rows, values.view(torch.uint8)[token])
    assert torch.equal(scales, scale[token])


@pytest.mark.parametrize("clamp_limit", [None, 0.75])
@pytest.mark.parametrize("gate_first", [True, False])
def test_activation(gate_first: bool, clamp_limit: float | None) -> None:
    call = small_call(300).run(Stage.PERMUTE)
    inter, slots = SMALL.intermediate_size, 300 * SMALL.top_k
    rows = int(call.region("expert_offsets", SMALL_PROBLEM.num_local_experts + 1, dtype=torch.int32)[-1])
    gemm1 = call.region("gemm1_output", slots, 2 * inter, dtype=torch.bfloat16).normal_()
    call.arguments.gate_first = gate_first
    call.arguments.clamp_limit = clamp_limit or 0.0
    call.run(Stage.ACTIVATION)
    halves = gemm1[:rows].float().split(inter, 1)
    gate, up = halves if gate_first else halves[::-1]
    if clamp_limit:
        gate, up = gate.clamp(max=clamp_limit), up.clamp(-clamp_limit, clamp_limit)
    expected = dequantise_rows(*quantise_rows(torch.nn.functional.silu(gate) * up))
    out = dequantise_rows(
        call.region("activation", slots, inter, dtype=torch.float8_e4m3fn)[:rows],
        call.region("activation_scales", slots, inter // 128)[:rows],
    )
    # An exponential that differs in its last bits moves a few values to the neighbouring e4m3 code.
    assert relative_error(out, expected) <= 2e-3


@pytest.mark.parametrize("num_tokens", [1, 9, 700])
def test_combine(num_tokens: int) -> None:
    call = small_call(num_tokens).run(Stage.PERMUTE)
    rows = call.region("gemm2_output", num_tokens * SMALL.top_k, SMALL.hidden_size, dtype=torch.bfloat16).normal_()
    call.run(Stage.COMBINE)
    assert call.inputs.topk_weights is not None
    weight = torch.where(call.permuted_row >= 0, call.inputs.topk_weights, 0).double()
    expected = (rows.double()[call.permuted_row.clamp(min=0).long()] * weight.unsqueeze(-1)).sum(1)
    assert torch.allclose(call.output.double(), expected, rtol=2**-8, atol=1e-3)
    assert not call.output[num_tokens // 2].any()  # the token whose ids are all -1


def routing_inputs(config: MoEConfig, num_tokens: int, dtype: torch.dtype, quantised: bool = False) -> LayerInputs:
    x = torch.randn(num_tokens, config.hidden_size, device="cuda", dtype=torch.bfloat16)
    logits = torch.randn(num_tokens, config.num_routed_experts, device="cuda").to(dtype)
    biased = config.routing_method.reads_bias
    bias = torch.rand(config.num_routed_experts, device="cuda").to(dtype) * 0.2 if biased else None
    values, scale = quantise_rows(x) if quantised else (x, None)
    return LayerInputs(values, scale, routing_logits=logits, routing_bias=bias)


@pytest.mark.parametrize("num_tokens", [1, 6, 333])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(
    "config",
    [
        MoEConfig("renormalise", 256, 256, 128, 8),
        MoEConfig("mixtral", 256, 256, 8, 2),
        MoEConfig("r1", 256, 256, 256, 8, RoutingMethod.DeepSeekV3, 8, 4, 2.5),
        MoEConfig("kimi", 256, 256, 384, 8, RoutingMethod.DeepSeekV3, 1, 1, 2.827),
        MoEConfig("unequal", 256, 256, 60, 4, RoutingMethod.DeepSeekV3, 5, 2, 1.5),
        MoEConfig("many-groups", 256, 256, 256, 8, RoutingMethod.DeepSeekV3, 32, 8, 1.0),
        MoEConfig("default", 256, 256, 60, 4, RoutingMethod.Default),
        MoEConfig("naive", 256, 256, 512, 10, RoutingMethod.RenormalizeNaive),
        MoEConfig("most-slots", 256, 256, 512, 32, RoutingMethod.Renormalize),
        MoEConfig("maverick", 256, 256, 128, 1, RoutingMethod.Llama4),
        MoEConfig("sigmoid", 256, 256, 160, 6, RoutingMethod.SigmoidRenorm),
        MoEConfig("minimax", 256, 256, 256, 8, RoutingMethod.MiniMax2),
        MoEConfig("shared", 256, 256, 66, 6, num_fused_shared_experts=2),
        MoEConfig("r1-shared", 256, 256, 257, 9, RoutingMethod.DeepSeekV3, 8, 4, 2.5, num_fused_shared_experts=1),
    ],
    ids=lambda config: config.name,
)
def test_route(config: MoEConfig, dtype: torch.dtype, num_tokens: int) -> None:
    problem = MoEProblem(config, Parallel.parse("dep1"))
    inputs = routing_inputs(config, num_tokens, dtype)
    call = support.Call(problem, support.weights(problem), inputs).run(Stage.ROUTE)
    ids = call.region("topk_ids", num_tokens, config.top_k, dtype=torch.int32).cpu()
    weights = call.region("topk_weights", num_tokens, config.top_k).cpu()
    logits, bias = inputs.routing_logits, inputs.routing_bias
    assert logits is not None
    expected_ids, expected_weights = route(config, logits.cpu(), None if bias is None else bias.cpu())
    by_sigmoid = config.routing_method.reads_bias or config.routing_method == RoutingMethod.SigmoidRenorm
    same = (ids == expected_ids).all(1)
    # bf16 logits tie, and those must agree; a sigmoid's last bit may swap two neighbours in rare rows.
    assert same.float().mean() >= (0.98 if by_sigmoid and num_tokens > 100 else 1.0)
    assert torch.allclose(weights[same], expected_weights[same], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("num_tokens", [1, 8, 32, 33])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("quantised", [False, True], ids=["bf16", "e4m3"])
@pytest.mark.parametrize("preset", ["mixtral-8x7b", "qwen3-235b", "deepseek-r1", "kimi-k2"])
@pytest.mark.parametrize("fused", [False, True], ids=["rows", "gather-combine"])
def test_stages_together_leave_what_they_leave_apart(
    fused: bool, preset: str, quantised: bool, dtype: torch.dtype, num_tokens: int
) -> None:
    config = MoEConfig.preset(preset).scaled(hidden_size=1024, intermediate_size=128)
    problem = MoEProblem(config, Parallel.parse("ep4", rank=1))
    tactics = support.fused(problem) if fused else support.unfused(problem, num_tokens)
    inputs = routing_inputs(config, num_tokens, dtype, quantised)
    call = support.Call(problem, support.weights(problem), inputs, tactics)
    apart = left_by(call, Stage.ROUTE, Stage.PERMUTE, Stage.GATHER)
    for stages in ((Stage.ROUTE, Stage.PERMUTE | Stage.GATHER), (Stage.ROUTE | Stage.PERMUTE | Stage.GATHER,)):
        assert torch.equal(left_by(call, *stages), apart)
        # Where GEMM2 will add, what gathers leaves zeros.
        assert (call.output == 0).all() if fused else call.output.isnan().all()


def left_by(call: support.Call, *runs: Stage) -> Tensor:
    """The workspace, which holds what the stages write, ids and weights of the routing among it."""
    call.workspace.fill_(0xFF)
    call.output.fill_(torch.nan)
    for stages in runs:
        call.run(stages)
    return call.workspace.clone()
