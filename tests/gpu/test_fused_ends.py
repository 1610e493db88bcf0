"""Layers whose GEMM1 gathers and whose GEMM2 combines, against the same layers with a kernel for each stage."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import Tensor

from moe_runtime import FusedMoE, KernelError, MoEConfig, PackedWeights, Parallel
from moe_runtime.config import RoutingMethod
from moe_runtime.executors.base import LayerInputs, MoEProblem
from moe_runtime.formats import WeightLayout
from moe_runtime.formats.fp8_block import quantise_rows
from moe_runtime.kernels import library_path, load_library
from moe_runtime.ops import LayerCalls, PlanTable
from moe_runtime.reference import relative_error
from moe_runtime.weights import ExpertWeights, random_weights
from tests.gpu import support
from tests.gpu.test_layer import COMBINE_BOUND

# Without a GPU a library of an earlier checkout may lie here, which does not load.
VARIANTS = load_library("sm_90a").variants if torch.cuda.is_available() and library_path("sm_90a") else {}
COMBINE = [name for name, variant in VARIANTS.items() if variant.combines]
GATHER = [name for name, variant in VARIANTS.items() if variant.gathers]
FORMAT_OF = {
    WeightLayout.FP8_BLOCK: "fp8_block",
    WeightLayout.MXFP4: "mxfp8_mxfp4",
    WeightLayout.NVFP4: "nvfp4",
    WeightLayout.BF16: "bf16",
    WeightLayout.FP8_MXFP4: "fp8_mxfp4",
}
COUNTS = [1, 7, 100, 700]  # up to 16 one kernel routes, permutes and gathers; up to 128 one permutes and gathers
RENORMALISE = RoutingMethod.Renormalize


@functools.cache
def rank_of_two(
    format: str = "fp8_block", method: RoutingMethod = RENORMALISE, top_k: int = 8
) -> tuple[MoEProblem, ExpertWeights]:
    """The second half of 64 experts, with biases where the format has them."""
    config = MoEConfig(format, 512, 384, 64, top_k, method, format=format)
    problem = MoEProblem(config, Parallel.parse("ep2", 1))
    if format == "fp8_block":
        return problem, random_weights(problem, 7, "cuda")
    return problem, PackedWeights.random(config, problem.num_local_experts, 7, "cuda", extras=True)


def is_local(problem: MoEProblem, ids: Tensor) -> Tensor:
    first = problem.local_expert_offset
    return (ids >= first) & (ids < first + problem.num_local_experts)


def make_inputs(problem: MoEProblem, num_tokens: int) -> LayerInputs:
    """Ids of both ranks, of none (-1) and of no expert; the first token has a local expert, the middle one of several
    has none. Weights of slots that are not local are NaN, for nothing may read them."""
    config, generator = problem.config, torch.Generator("cuda").manual_seed(num_tokens)
    x = torch.randn(num_tokens, config.hidden_size, generator=generator, device="cuda").bfloat16()
    ids = torch.randint(
        -1, config.num_experts + 6, (num_tokens, config.top_k), generator=generator, device="cuda", dtype=torch.int32
    )
    ids[0, 0] = problem.local_expert_offset + 3
    if num_tokens > 1:
        ids[num_tokens // 2] = torch.arange(-1, config.top_k - 1, device="cuda")
    weights = torch.rand(ids.shape, generator=generator, device="cuda") + 0.1
    weights[~is_local(problem, ids)] = torch.nan
    return LayerInputs(x, topk_ids=ids, topk_weights=weights)


def run(problem: MoEProblem, weights: ExpertWeights, inputs: LayerInputs, tactics: tuple[str, str]) -> Tensor:
    """Into an output of NaN."""
    output = torch.full(
        (inputs.hidden_states.shape[0], problem.config.hidden_size), torch.nan, dtype=torch.bfloat16, device="cuda"
    )
    support.executor().run(problem, weights, inputs, tactics, output, None)
    return output


def unfused_twins(tactics: tuple[str, str]) -> tuple[str, str]:
    """The kernels that differ from these in nothing but that they neither gather nor combine."""
    gemm1, gemm2 = (name.removesuffix("_combine").replace("_gather_", "_") for name in tactics)
    assert not (VARIANTS[gemm1].gathers or VARIANTS[gemm2].combines)
    return gemm1, gemm2


@pytest.mark.parametrize("num_tokens", COUNTS)
@pytest.mark.parametrize("variant", COMBINE)
def test_combining_adds_up_what_the_stage_adds_up(variant: str, num_tokens: int) -> None:
    problem, weights = rank_of_two(FORMAT_OF[VARIANTS[variant].weights])
    inputs = make_inputs(problem, num_tokens)
    gemm1 = support.executor().default_tactic(problem, "gemm1", num_tokens)
    plain = run(problem, weights, inputs, (gemm1, support.executor().leaving_rows(variant)))
    combined = run(problem, weights, inputs, (gemm1, variant))
    assert plain.norm() > 0
    assert relative_error(combined, plain) <= COMBINE_BOUND
    assert inputs.topk_ids is not None
    remote = ~is_local(problem, inputs.topk_ids).any(1)
    assert remote.any() == (num_tokens > 1)
    assert (combined[remote] == 0).all()


@pytest.mark.parametrize("variant", COMBINE)
def test_one_row_a_token_is_combined_exactly(variant: str) -> None:
    """A row that weighs 1 is rounded once, whether it is stored or added to zero."""
    problem, weights = rank_of_two(FORMAT_OF[VARIANTS[variant].weights], top_k=1)
    inputs = make_inputs(problem, 200)
    assert inputs.topk_ids is not None and inputs.topk_weights is not None
    ones = torch.ones_like(inputs.topk_weights).where(is_local(problem, inputs.topk_ids), torch.nan)
    inputs = inputs._replace(topk_weights=ones)
    gemm1 = support.executor().default_tactic(problem, "gemm1", 200)
    plain = run(problem, weights, inputs, (gemm1, support.executor().leaving_rows(variant)))
    assert torch.equal(run(problem, weights, inputs, (gemm1, variant)), plain)


@pytest.mark.parametrize("quantised", [False, True], ids=["bf16", "e4m3"])
@pytest.mark.parametrize("num_tokens", COUNTS)
@pytest.mark.parametrize("variant", GATHER)
def test_gathering_changes_no_bit(variant: str, num_tokens: int, quantised: bool) -> None:
    problem, weights = rank_of_two()
    inputs = make_inputs(problem, num_tokens)
    if quantised:
        values, scale = quantise_rows(inputs.hidden_states)
        inputs = inputs._replace(hidden_states=values, hidden_states_scale=scale)
    gemm1, gemm2 = unfused_twins((variant, support.fused(problem)[1]))
    plain = run(problem, weights, inputs, (gemm1, gemm2))
    assert plain.norm() > 0 and plain.isfinite().all()
    assert torch.equal(run(problem, weights, inputs, (variant, gemm2)), plain)


@pytest.mark.parametrize("num_tokens", COUNTS)
@pytest.mark.parametrize("preset", ["qwen3-235b", "deepseek-r1", "kimi-k2"])
def test_both_ends_from_router_logits(preset: str, num_tokens: int) -> None:
    config = MoEConfig.preset(preset).scaled(hidden_size=512, intermediate_size=256)
    problem = MoEProblem(config, Parallel.parse("ep4", 1))
    weights, x = random_weights(problem, 7, "cuda"), make_inputs(problem, num_tokens).hidden_states
    inputs = LayerInputs(x, routing_logits=torch.randn(num_tokens, config.num_experts, device="cuda"))
    tactics = support.fused(problem)
    plain = run(problem, weights, inputs, unfused_twins(tactics))
    assert plain.isfinite().all()
    assert relative_error(run(problem, weights, inputs, tactics), plain) <= COMBINE_BOUND


@pytest.mark.parametrize("num_tokens", COUNTS)
@pytest.mark.parametrize("routed", [False, True], ids=["ids", "logits"])
def test_routing_that_weighs_the_experts_input(routed: bool, num_tokens: int) -> None:
    """What GEMM1 gathers is weighed already, and GEMM2 adds it as it is: one row a token, so not a bit differs."""
    problem, weights = rank_of_two(method=RoutingMethod.Llama4, top_k=1)
    inputs = make_inputs(problem, num_tokens)
    if routed:
        logits = torch.randn(num_tokens, problem.config.num_experts, device="cuda")
        logits[0, problem.local_expert_offset] = 9
        inputs = LayerInputs(inputs.hidden_states, routing_logits=logits)
    tactics = support.fused(problem)
    plain = run(problem, weights, inputs, unfused_twins(tactics))
    assert plain.norm() > 0
    assert torch.equal(run(problem, weights, inputs, tactics), plain)


def test_tokens_whose_experts_are_all_elsewhere_give_zeros() -> None:
    problem, weights = rank_of_two()
    inputs = make_inputs(problem, 50)
    assert inputs.topk_ids is not None
    remote = inputs._replace(topk_ids=torch.where(is_local(problem, inputs.topk_ids), -1, inputs.topk_ids))
    assert (run(problem, weights, remote, support.fused(problem)) == 0).all()


@pytest.mark.parametrize("format", FORMAT_OF.values())
def test_no_tokens(format: str) -> None:
    problem, weights = rank_of_two(format)
    layer, x, k = FusedMoE(problem.config, problem.parallel, weights), make_inputs(problem, 1).hidden_states[:0], 8
    ids, topk_weights = torch.empty(0, k, dtype=torch.int32, device="cuda"), torch.empty(0, k, device="cuda")
    assert layer(x, topk_ids=ids, topk_weights=topk_weights).shape == x.shape
    assert layer(x, torch.empty(0, 64, device="cuda")).shape == x.shape
    torch.cuda.synchronize()


@pytest.mark.parametrize("format", FORMAT_OF.values())
@pytest.mark.parametrize("num_tokens", COUNTS)
def test_a_deterministic_layer_repeats_bit_for_bit(format: str, num_tokens: int) -> None:
    problem, weights = rank_of_two(format)
    executor, inputs = support.executor(), make_inputs(problem, num_tokens)
    gemm1, gemm2 = support.default_tactics(problem, num_tokens)
    assert VARIANTS[gemm2].combines
    layer = FusedMoE(problem.config, problem.parallel, weights, deterministic=True)
    first, *others = (
        layer(inputs.hidden_states, topk_ids=inputs.topk_ids, topk_weights=inputs.topk_weights) for _ in range(10)
    )
    assert all(torch.equal(first, other) for other in others)
    assert torch.equal(first, run(problem, weights, inputs, (gemm1, executor.leaving_rows(gemm2))))
    default = FusedMoE(problem.config, problem.parallel, weights)
    output = default(inputs.hidden_states, topk_ids=inputs.topk_ids, topk_weights=inputs.topk_weights)
    assert relative_error(output, first) <= COMBINE_BOUND


def planned(problem: MoEProblem) -> tuple[tuple[str, str], PlanTable]:
    """Tactics that gather and combine, and a plan that has no others."""
    tactics = support.fused(problem)
    return tactics, ((1,), tactics)


@pytest.mark.parametrize("num_tokens", COUNTS)
def test_a_deterministic_layer_repeats_whatever_its_plan_has(num_tokens: int) -> None:
    problem, weights = rank_of_two()
    (gemm1, gemm2), table = planned(problem)
    inputs = make_inputs(problem, num_tokens)
    calls = LayerCalls(support.executor(), problem, table, deterministic=True)
    expected = run(problem, weights, inputs, (gemm1, support.executor().leaving_rows(gemm2)))
    for _ in range(5):
        assert torch.equal(calls.run(weights, inputs), expected)


@pytest.mark.parametrize("num_tokens", [0, *COUNTS])
def test_a_call_that_is_not_finalised_returns_its_rows(num_tokens: int) -> None:
    problem, weights = rank_of_two()
    _, table = planned(problem)
    some = make_inputs(problem, max(num_tokens, 1))
    assert some.topk_ids is not None and some.topk_weights is not None
    inputs = LayerInputs(
        some.hidden_states[:num_tokens],
        topk_ids=some.topk_ids[:num_tokens],
        topk_weights=some.topk_weights[:num_tokens],
    )
    calls, top_k = LayerCalls(support.executor(), problem, table), problem.config.top_k
    output = torch.full_like(inputs.hidden_states, torch.nan)
    rows, topk_weights, permuted_row = calls.run_unfinalised(weights, inputs, output)
    assert output.isnan().all()  # left alone
    assert (topk_weights.shape, permuted_row.shape) == ((num_tokens, top_k), (num_tokens * top_k,))
    if num_tokens == 0:
        return
    index = permuted_row.view(num_tokens, top_k).long()
    assert torch.equal(index >= 0, is_local(problem, some.topk_ids))
    weight = topk_weights.where(index >= 0, 0).double().unsqueeze(-1)
    # Rows that no slot has may hold anything.
    picked = rows[index.clamp(min=0)].double().where(index.unsqueeze(-1) >= 0, 0)
    assert relative_error(calls.run(weights, inputs), (picked * weight).sum(1)) <= COMBINE_BOUND


@pytest.mark.parametrize("num_tokens", COUNTS)
def test_a_graph_zeroes_the_output_on_every_replay(num_tokens: int) -> None:
    problem, weights = rank_of_two()
    executor, inputs, tactics = support.executor(), make_inputs(problem, num_tokens), support.fused(problem)
    plain = run(problem, weights, inputs, unfused_twins(tactics))
    size = executor.workspace_bytes(problem, num_tokens)
    workspace = torch.empty(size, dtype=torch.uint8, device="cuda")
    output = torch.full_like(plain, torch.nan)

    def call() -> None:
        executor.run(problem, weights, inputs, tactics, output, workspace)

    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    output.fill_(torch.nan)
    for _ in range(2):
        graph.replay()
        assert relative_error(output, plain) <= COMBINE_BOUND
    graph.replay()
    graph.replay()  # right behind: the zeros must wait for what the one before still adds
    assert relative_error(output, plain) <= COMBINE_BOUND


@pytest.mark.parametrize("num_tokens", COUNTS)
def test_calls_right_behind_each_other_share_an_output(num_tokens: int) -> None:
    """Each call zeroes what the one before added up."""
    problem, weights = rank_of_two()
    inputs, tactics = make_inputs(problem, num_tokens), support.fused(problem)
    plain = run(problem, weights, inputs, unfused_twins(tactics))
    output, workspace = (
        torch.full_like(plain, torch.nan),
        torch.empty(support.executor().workspace_bytes(problem, num_tokens), dtype=torch.uint8, device="cuda"),
    )
    for _ in range(50):
        support.executor().run(problem, weights, inputs, tactics, output, workspace)
    assert relative_error(output, plain) <= COMBINE_BOUND


def test_what_leaves_no_rows_is_refused_where_rows_are_asked_for() -> None:
    problem, weights = rank_of_two()
    inputs, output = make_inputs(problem, 4), torch.empty(4, 512, dtype=torch.bfloat16, device="cuda")
    with pytest.raises(KernelError, match="no such variant"):
        support.executor().run(problem, weights, inputs, support.fused(problem), output, None, finalize=False)


@pytest.mark.parametrize("end", [0, 1], ids=["gathers as gemm2", "combines as gemm1"])
def test_the_native_call_refuses_a_kernel_for_the_other_gemm(end: int) -> None:
    problem, weights = rank_of_two()
    fused = support.fused(problem)
    plain = unfused_twins(fused)
    tactics = (plain[0], fused[0]) if end == 0 else (fused[1], plain[1])
    with pytest.raises(KernelError, match="no such variant"):
        run(problem, weights, make_inputs(problem, 4), tactics)
