"""Layers in every format on the GPU, against the float64 reference that rounds at the same points."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import pytest
import torch
from torch import Tensor

from moe_runtime import FusedMoE, MoEConfig, PackedWeights, Parallel
from moe_runtime.config import RoutingMethod
from moe_runtime.executors.base import GEMMS, Gemm, MoEProblem, able_tactics
from moe_runtime.formats import FORMATS, Tokens
from moe_runtime.formats.tokens import quantise_tokens
from moe_runtime.reference import reference_layer, relative_error
from moe_runtime.routing import route
from moe_runtime.tuning import tune
from moe_runtime.weights import ExpertWeights, random_weights
from moe_runtime.workload import make_workload
from tests.gpu import support
from tests.gpu.test_layer import LAYER_BOUND
from tests.test_flashinfer import FUNCTIONS, call_arguments, with_scalars

# Tensor cores add products of e4m3 with fewer bits than those of bf16; see test_layer.
BOUND = {name: LAYER_BOUND if name == "fp8_block" else 1e-2 for name in FORMATS}
GEMM_BOUND = 3e-3
PACKED = [name for name in FORMATS if name != "fp8_block"]
# Multiples of 32 and not of 128, as gpt-oss' 2880 is; the last is a tile and a half of K and of rows.
SIZES = [(160, 96), (224, 320), (192, 448)]
EXPERTS, TOP_K = 16, 4


def make_problem(format: str, sizes: tuple[int, int] = (224, 320), layout: str = "ep2", **changes: Any) -> MoEProblem:
    """The second rank's share."""
    if format == "fp8_block":
        sizes = (256, 128)
    config = MoEConfig(format, *sizes, EXPERTS, **{"top_k": TOP_K, "format": format, **changes})
    return MoEProblem(config, Parallel.parse(layout, 1))


@functools.lru_cache(maxsize=4)
def make_weights(problem: MoEProblem, extras: bool = True) -> ExpertWeights:
    if problem.config.format == "fp8_block":
        return random_weights(problem, 3, "cuda")
    return PackedWeights.random(problem.config, problem.num_local_experts, 3, "cuda", extras=extras)


def rows(problem: MoEProblem, tokens: int) -> Tensor:
    generator = torch.Generator("cuda").manual_seed(tokens)
    return torch.randn(tokens, problem.config.hidden_size, generator=generator, device="cuda").bfloat16()


def poisoned(layer: FusedMoE, x: Tensor, **call: Any) -> Tensor:
    """The layer's output, where what is left unwritten and what is read unwritten shows as NaN."""
    output = torch.full((x.shape[0], layer.problem.config.hidden_size), torch.nan, dtype=torch.bfloat16, device="cuda")
    workspace = torch.full((layer.workspace_bytes(x.shape[0]),), 0xFF, dtype=torch.uint8, device="cuda")
    layer(x, **call, output=output, workspace=workspace)
    return output


def check(problem: MoEProblem, weights: ExpertWeights, x: Tensor, ids: Tensor, topk_weights: Tensor) -> None:
    layer = FusedMoE(problem.config, problem.parallel, weights)
    found = poisoned(layer, x, topk_ids=ids, topk_weights=topk_weights)
    want = reference_layer(problem, weights, x, ids, topk_weights)
    assert found.isfinite().all()
    assert relative_error(found, want) <= BOUND[problem.config.format]


@pytest.mark.parametrize("tokens", [1, 7, 64, 300])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("format", FORMATS)
def test_layer(format: str, sizes: tuple[int, int], tokens: int) -> None:
    problem = make_problem(format, sizes)
    weights, x = make_weights(problem), rows(problem, tokens)
    layer = FusedMoE(problem.config, problem.parallel, weights)
    logits = torch.randn(tokens, EXPERTS, generator=torch.Generator().manual_seed(tokens)).cuda()
    found = poisoned(layer, x, router_logits=logits)
    ids, topk_weights = route(problem.config, logits)
    assert (
        relative_error(found, reference_layer(problem, weights, x, ids, topk_weights)) <= BOUND[problem.config.format]
    )


@pytest.mark.parametrize("format", FORMATS)
def test_bare_weights(format: str) -> None:
    """All factors null."""
    problem = make_problem(format)
    ids = make_workload(problem.config, problem.parallel, 50, "random", 0).topk_ids.cuda()
    check(problem, make_weights(problem, False), rows(problem, 50), ids, torch.rand(ids.shape, device="cuda"))


@pytest.mark.parametrize(
    "sizes", [support.RAGGED, (0, 0, 0, 9), (0, 0, 0, 0, 0, 0, 0, 300), (1,)], ids=["ragged", "few", "one", "each"]
)
@pytest.mark.parametrize("format", FORMATS)
def test_uneven_and_empty_experts(format: str, sizes: tuple[int, ...]) -> None:
    problem = make_problem(format)
    ids = support.ragged_workload(problem, sizes).topk_ids.cuda()
    check(problem, make_weights(problem), rows(problem, len(ids)), ids, torch.rand(ids.shape, device="cuda"))


@pytest.mark.parametrize("tokens", [0, 1, 65])
@pytest.mark.parametrize("format", FORMATS)
def test_remote_and_absent_slots_add_nothing(format: str, tokens: int) -> None:
    problem = make_problem(format)
    layer = FusedMoE(problem.config, problem.parallel, make_weights(problem))
    ids = torch.full((tokens, TOP_K), -1, dtype=torch.int32, device="cuda")
    ids[:, 1:] = torch.arange(TOP_K - 1, device="cuda")  # of the first rank
    weights = torch.full(ids.shape, torch.nan, device="cuda")
    found = poisoned(layer, rows(problem, tokens), topk_ids=ids, topk_weights=weights)
    assert found.shape[0] == tokens and not found.any()


CASES: dict[str, dict[str, Any]] = {
    "clamped": {"clamp_limit": 0.4},
    "relu2": {"activation": "relu2"},
    "llama4": {"routing_method": RoutingMethod.Llama4, "top_k": 1},
    "deepseek": {
        "routing_method": RoutingMethod.DeepSeekV3, "n_group": 4, "topk_group": 2, "routed_scaling_factor": 2.5,
    },
}  # fmt: skip


@pytest.mark.parametrize("extras", [False, True], ids=["bare", "extras"])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("format", PACKED)
def test_activations_and_routing(format: str, case: str, extras: bool) -> None:
    problem = make_problem(format, **CASES[case])
    weights, x = make_weights(problem, extras), rows(problem, 40)
    logits = torch.randn(40, EXPERTS, generator=torch.Generator().manual_seed(1)).cuda()
    found = poisoned(FusedMoE(problem.config, problem.parallel, weights), x, router_logits=logits)
    ids, topk_weights = route(problem.config, logits)
    assert (
        relative_error(found, reference_layer(problem, weights, x, ids, topk_weights)) <= BOUND[problem.config.format]
    )


@pytest.mark.parametrize("format", PACKED)
def test_up_before_gate(format: str) -> None:
    problem = make_problem(format)
    weights = make_weights(problem)
    assert isinstance(weights, PackedWeights)
    turned = dataclasses.replace(weights, gate_first=False)
    ids = make_workload(problem.config, problem.parallel, 20, "random", 0).topk_ids.cuda()
    check(problem, turned, rows(problem, 20), ids, torch.rand(ids.shape, device="cuda"))


@pytest.mark.parametrize("format", [name for name in FORMATS if FORMATS[name].tokens != Tokens.BF16])
def test_quantised_tokens_give_the_same_layer(format: str) -> None:
    problem, tokens = make_problem(format), FORMATS[format].tokens
    weights, x = make_weights(problem), rows(problem, 33)
    scale = 0.5 if tokens.has_tensor_scale else 1.0  # by which bf16 rows are divided exactly
    if isinstance(weights, PackedWeights):
        weights = dataclasses.replace(weights, input_scale=scale)
    layer = FusedMoE(problem.config, problem.parallel, weights, deterministic=True)
    logits = torch.randn(33, EXPERTS, device="cuda")
    values, factors = quantise_tokens(tokens, x.float() / scale)
    found = poisoned(layer, values, router_logits=logits, hidden_states_scale=factors)
    assert torch.equal(found, layer(x, logits))


@pytest.mark.parametrize("tokens", [8, 200])
@pytest.mark.parametrize("activation", ["swiglu", "relu2"])
@pytest.mark.parametrize("format", PACKED)
def test_every_kernel_of_the_format(format: str, activation: str, tokens: int) -> None:
    problem, executor = make_problem(format, activation=activation), support.executor()
    weights, x = make_weights(problem), rows(problem, tokens)
    ids = make_workload(problem.config, problem.parallel, tokens, "random", 0).topk_ids.cuda()
    topk_weights = torch.rand(ids.shape, device="cuda")
    want = reference_layer(problem, weights, x, ids, topk_weights)
    inputs = support.LayerInputs(x, topk_ids=ids, topk_weights=topk_weights)
    firsts, seconds = (able_tactics(executor, problem, gemm) for gemm in GEMMS)
    assert len(seconds) > len(firsts) >= 6  # some of them combine
    assert {executor.variants[name].swiglu for name in firsts} == {activation == "swiglu"}
    for place, second in enumerate(seconds):
        output = torch.full_like(x, torch.nan)
        pair = (firsts[place % len(firsts)], second)
        executor.run(problem, weights, inputs, pair, output, None)
        assert relative_error(output, want) <= BOUND[format], pair


@pytest.mark.parametrize("activation", ["swiglu", "relu2"])
@pytest.mark.parametrize("gemm", GEMMS)
@pytest.mark.parametrize("format", PACKED)
def test_trials(format: str, gemm: Gemm, activation: str) -> None:
    problem, executor = make_problem(format, activation=activation), support.executor()
    trial = executor.gemm_trial(problem, make_weights(problem), support.ragged_workload(problem), gemm, 0)
    index, expected = trial.reference()
    tactics = able_tactics(executor, problem, gemm)
    for tactic in tactics:
        assert trial.error(tactic, trial.run(tactic)[index], expected) <= GEMM_BOUND, tactic
    times = trial.time(tactics, 3)
    assert all(us > 0 for series in times.values() for us in series)


@pytest.mark.parametrize("format", PACKED)
def test_a_tuned_plan_serves_the_layer(format: str) -> None:
    problem = make_problem(format, layout="dep2")
    weights = make_weights(problem)
    plan = tune(problem, weights, support.executor(), 32, "random")
    assert plan.complete and not plan.quarantined and plan.key.format == format
    layer = FusedMoE(problem.config, problem.parallel, weights, plan)
    x, logits = rows(problem, 64), torch.randn(64, EXPERTS, device="cuda")
    want = reference_layer(problem, weights, x, *route(problem.config, logits))
    assert relative_error(poisoned(layer, x, router_logits=logits), want) <= BOUND[problem.config.format]


@pytest.mark.parametrize("format", FORMATS)
def test_graph_and_compiled_call(format: str) -> None:
    problem = make_problem(format)
    layer = FusedMoE(problem.config, problem.parallel, make_weights(problem), deterministic=True)
    x, logits = rows(problem, 12), torch.randn(12, EXPERTS, device="cuda")
    want = layer(x, logits)
    torch._dynamo.reset()
    compiled = torch.compile(layer.__call__, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x, logits), want)
    output, graph = torch.full_like(want, torch.nan), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        layer(x, logits, output=output)
    graph.replay()
    assert torch.equal(output, want)


@pytest.mark.parametrize("finalize", [True, False])
@pytest.mark.parametrize("quantised", [False, True], ids=["bf16", "quantised"])
@pytest.mark.parametrize("format", [name for name in FUNCTIONS if name != "fp8_block"])
def test_function(format: str, quantised: bool, finalize: bool) -> None:
    problem = make_problem(format, (160, 96))
    weights, scalars = with_scalars(format, MoEProblem(problem.config, problem.parallel))
    arguments = call_arguments(format, problem, weights, scalars, quantised)
    on_gpu = {name: value.cuda() if isinstance(value, Tensor) else value for name, value in arguments.items()}
    x = call_arguments(format, problem, weights, scalars)["hidden_states"]
    ids, topk_weights = route(problem.config, arguments["routing_logits"])
    want = reference_layer(problem, weights, x, ids, topk_weights)
    for _ in range(2):  # the second time on weights that are packed already
        result = FUNCTIONS[format](**on_gpu, do_finalize=finalize)
        if finalize:
            total = result.double().cpu()
        else:
            values, slot_weights, row_of_slot = (part.cpu() for part in result)
            weight = slot_weights.flatten().double().masked_fill(row_of_slot < 0, 0)
            total = (values.double()[row_of_slot.clamp(min=0).long()].nan_to_num() * weight[:, None]).unflatten(
                0, (-1, TOP_K)
            )
            total = total.sum(1)
        assert relative_error(total, want) <= BOUND[problem.config.format]


def test_gpt_oss_at_its_own_size() -> None:
    problem = MoEProblem(MoEConfig.preset("gpt-oss-20b"), Parallel.parse("ep8", 3))
    weights = make_weights(problem)
    x, logits = rows(problem, 64), torch.randn(64, 32, device="cuda")
    found = poisoned(FusedMoE(problem.config, problem.parallel, weights), x, router_logits=logits)
    want = reference_layer(problem, weights, x, *route(problem.config, logits))
    assert relative_error(found, want) <= BOUND[problem.config.format]
