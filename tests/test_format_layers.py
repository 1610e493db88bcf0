"""Every format through the whole layer, with everything that may come beside its weights."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from moe_runtime import FusedMoE, InvalidArgument, MoEConfig, PackedWeights, Parallel
from moe_runtime.config import RoutingMethod
from moe_runtime.executors.base import GEMMS, LayerInputs, MoEProblem
from moe_runtime.executors.cpu import CpuExecutor
from moe_runtime.formats import FORMATS, Extra, Tokens
from moe_runtime.formats.tokens import quantise_tokens
from moe_runtime.reference import reference_layer
from moe_runtime.routing import route
from moe_runtime.tuning import tune
from moe_runtime.weights import ExpertWeights, random_weights
from moe_runtime.workload import make_workload
from tests import reference
from tests import reference_formats as exact

SAME_POINTS = 1e-2
PACKED = [name for name in FORMATS if name != "fp8_block"]
TOKENS = 5


def make_config(format: str, **changes: Any) -> MoEConfig:
    """The smallest layer of a format, of sizes that are multiples of no more than they must be."""
    sizes = (128, 128) if format == "fp8_block" else (96, 160)
    return MoEConfig(format, *sizes, 8, **{"top_k": 2, "format": format, **changes})


def make_problem(format: str, layout: str = "ep2", rank: int = 1, **changes: Any) -> MoEProblem:
    return MoEProblem(make_config(format, **changes), Parallel.parse(layout, rank))


def make_weights(problem: MoEProblem, extras: bool = True, seed: int = 3) -> ExpertWeights:
    if problem.config.format == "fp8_block":
        return random_weights(problem, seed)
    tp_size = problem.parallel.tp_size
    return PackedWeights.random(problem.config, problem.num_local_experts, seed, tp_size=tp_size, extras=extras)


def make_inputs(config: MoEConfig, tokens: int = TOKENS) -> tuple[Tensor, Tensor]:
    """Rows and router logits."""
    generator = torch.Generator().manual_seed(tokens)
    x = torch.randn(tokens, config.hidden_size, generator=generator).bfloat16()
    return x, torch.randn(tokens, config.num_experts, generator=generator)


def check(problem: MoEProblem, weights: ExpertWeights, bias: Tensor | None = None) -> None:
    config = problem.config
    x, logits = make_inputs(config)
    output = torch.full_like(x, torch.nan)
    FusedMoE(config, problem.parallel, weights)(x, logits, routing_bias=bias, output=output)
    ids, topk_weights = route(config, logits, bias)
    want = exact.layer(config, weights, problem.local_expert_offset, x, ids, topk_weights)
    assert want.norm() > 0
    assert reference.relative_error(output, want) <= SAME_POINTS
    plain = reference_layer(problem, weights, x, ids, topk_weights)
    assert reference.relative_error(plain, want) <= SAME_POINTS


DEEPSEEK = {"routing_method": RoutingMethod.DeepSeekV3, "n_group": 4, "topk_group": 2, "routed_scaling_factor": 2.5}
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "clamped": {"clamp_limit": 0.4},
    "deepseek": DEEPSEEK,
    "default": {"routing_method": RoutingMethod.Default},
    "minimax2": {"routing_method": RoutingMethod.MiniMax2},
    "llama4": {"routing_method": RoutingMethod.Llama4, "top_k": 1},
    "relu2": {"activation": "relu2"},
}


@pytest.mark.parametrize("extras", [False, True], ids=["bare", "extras"])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("format", FORMATS)
def test_layer(format: str, case: str, extras: bool) -> None:
    changes = CASES[case]
    if changes.get("activation", "swiglu") not in FORMATS[format].activations:
        with pytest.raises(InvalidArgument, match=rf"activation: got 'relu2'; accepted: swiglu for {format}"):
            make_config(format, **changes)
        return
    problem = make_problem(format, **changes)
    reads_bias = RoutingMethod(problem.config.routing_method).reads_bias
    check(problem, make_weights(problem, extras), torch.linspace(-1, 1, 8) if reads_bias else None)


@pytest.mark.parametrize("format", PACKED)
def test_up_before_gate(format: str) -> None:
    problem = make_problem(format)
    weights = make_weights(problem)
    assert isinstance(weights, PackedWeights)
    check(problem, dataclasses.replace(weights, gate_first=False))


@pytest.mark.parametrize("extra", ["gate_up_bias", "down_bias", "alpha", "beta", "clamp", "intermediate_scale"])
@pytest.mark.parametrize("format", PACKED)
def test_each_extra_alone(format: str, extra: str) -> None:
    """Each is read where the format takes it, and changes the layer."""
    problem = make_problem(format)
    all_extras, bare = make_weights(problem), make_weights(problem, extras=False)
    assert isinstance(all_extras, PackedWeights) and isinstance(bare, PackedWeights)
    value = getattr(all_extras, extra)
    if value is None or isinstance(value, float):
        given = torch.ones(4, problem.config.hidden_size if extra.endswith("bias") else 1).squeeze(1)
        with pytest.raises(InvalidArgument, match=extra):
            dataclasses.replace(bare, **{extra: given}).check(problem.config, 4)
        return
    weights = dataclasses.replace(bare, **{extra: value})
    check(problem, weights)
    x, logits = make_inputs(problem.config)
    layers = [FusedMoE(problem.config, problem.parallel, each)(x, logits) for each in (weights, bare)]
    assert reference.relative_error(*layers) > 0.02


@pytest.mark.parametrize("finalize", [True, False])
@pytest.mark.parametrize("format", FORMATS)
def test_executor_finalises_or_leaves_the_parts(format: str, finalize: bool) -> None:
    problem = make_problem(format)
    weights, (x, logits) = make_weights(problem), make_inputs(problem.config)
    executor, output = CpuExecutor(), torch.full_like(x, torch.nan)
    pair = (executor.default_tactic(problem, "gemm1", TOKENS), executor.default_tactic(problem, "gemm2", TOKENS))
    parts = executor.run(problem, weights, LayerInputs(x, None, logits), pair, output, None, finalize)
    want = exact.layer(problem.config, weights, problem.local_expert_offset, x, *route(problem.config, logits))
    if finalize:
        assert parts is None
        total = output.double()
    else:
        assert parts is not None and output.isnan().all()
        rows, topk_weights, permuted_row = parts
        total = torch.zeros(want.shape, dtype=torch.float64)
        for token, slot in (permuted_row >= 0).nonzero().tolist():
            total[token] += topk_weights[token, slot].double() * rows[permuted_row[token, slot]].double()
    assert reference.relative_error(total, want) <= SAME_POINTS


def test_unfinalised_weights_are_ones_where_they_were_spent_on_the_input() -> None:
    problem = make_problem("bf16", routing_method=RoutingMethod.Llama4, top_k=1)
    x, logits = make_inputs(problem.config)
    pair = ("per_expert_loop", "per_expert_loop")
    inputs = LayerInputs(x, None, logits)
    parts = CpuExecutor().run(problem, make_weights(problem), inputs, pair, torch.empty_like(x), None, finalize=False)
    assert parts is not None and (parts[1] == 1).all()


@pytest.mark.parametrize("llama4", [False, True])
@pytest.mark.parametrize("format", FORMATS)
def test_quantised_tokens_give_the_same_layer(format: str, llama4: bool) -> None:
    changes: dict[str, Any] = CASES["llama4"] if llama4 else {}
    problem = make_problem(format, **changes)
    config, tokens = problem.config, FORMATS[format].tokens
    weights, (x, logits) = make_weights(problem), make_inputs(config)
    layer = FusedMoE(config, problem.parallel, weights)
    # A power of two, so that the rows that were divided by it are bf16 still.
    scale = 0.5 if tokens.has_tensor_scale else 1.0
    if scale != 1:
        assert isinstance(weights, PackedWeights)
        layer = FusedMoE(config, problem.parallel, dataclasses.replace(weights, input_scale=scale))
    values, factors = quantise_tokens(tokens, x.float() / scale)
    if tokens == Tokens.BF16:
        with pytest.raises(
            InvalidArgument, match=r"hidden_states: got torch\.float8_e4m3fn; accepted: torch.bfloat16 for"
        ):
            layer(x.to(torch.float8_e4m3fn), logits)
        return
    found = layer(values, logits, hidden_states_scale=factors)
    if not llama4:
        assert torch.equal(found, layer(x, logits))
    elif tokens != Tokens.FP8_BLOCK:
        # Weighed and rounded a second time.
        assert reference.relative_error(found, layer(x, logits)) < 0.2
    wrong = torch.ones(TOKENS, 5)
    with pytest.raises(InvalidArgument, match="hidden_states"):
        layer(values, logits, hidden_states_scale=None if factors is not None else wrong)
    with pytest.raises(InvalidArgument, match="hidden_states"):
        layer(x.float(), logits)
    if factors is not None:
        with pytest.raises(InvalidArgument, match=r"hidden_states_scale: got shape \[5, 5\]"):
            layer(values, logits, hidden_states_scale=wrong)


@pytest.mark.parametrize("layout", ["ep4", "dep2", "tp5"])
@pytest.mark.parametrize("format", PACKED)
def test_ranks_add_up_to_the_whole(format: str, layout: str) -> None:
    config = make_config(format)
    whole = make_weights(MoEProblem(config, Parallel.parse("ep1")))
    assert isinstance(whole, PackedWeights)
    x, logits = make_inputs(config)
    total = torch.zeros(x.shape, dtype=torch.float64)
    for rank in range(Parallel.parse(layout).world_size):
        parallel = Parallel.parse(layout, rank)
        total += FusedMoE(config, parallel, share(whole, config, parallel))(x, logits).double()
    found = FusedMoE(config, Parallel.parse("ep1"), whole)(x, logits)
    # Under tensor parallelism GEMM2's partial sums are rounded to bf16 each.
    assert reference.relative_error(total, found) <= SAME_POINTS


def share(whole: PackedWeights, config: MoEConfig, parallel: Parallel) -> PackedWeights:
    """A rank's experts, or its slices of them, cut out of a layer's."""
    experts = parallel.shard(config.num_experts)
    inter = config.intermediate_size // parallel.tp_size
    first = parallel.tp_rank * inter

    def cut(values: Tensor | None, dimension: int, per: int = 1) -> Tensor | None:
        """The slice's part of a dimension of size I / per, for each of the halves of W1."""
        if values is None or parallel.tp_size == 1:
            return values
        raw = values.view(torch.uint8) if values.dtype == torch.float8_e4m3fn else values
        halves = raw.chunk(2, 1) if dimension == 1 else (raw,)
        parts = torch.cat([half.narrow(dimension, first // per, inter // per) for half in halves], dimension)
        return parts.contiguous().view(values.dtype)

    fields = {field.name: getattr(whole, field.name) for field in dataclasses.fields(whole)}
    local = {
        name: value[experts.start : experts.stop] if isinstance(value, Tensor) else value
        for name, value in fields.items()
    }
    per_byte = config.intermediate_size // whole.down.shape[2]
    for name, dimension, per in (
        ("gate_up", 1, 1), ("gate_up_scale", 1, 1), ("gate_up_bias", 1, 1), ("down", 2, per_byte),
        ("down_scale", 2, 0 if whole.down_scale is None else config.intermediate_size // whole.down_scale.shape[2]),
    ):  # fmt: skip
        local[name] = cut(local[name], dimension, per)
    if parallel.tp_rank:
        local["down_bias"] = None
    return PackedWeights(**local)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("format", FORMATS)
def test_compiled_layer_is_one_op(format: str, backend: str) -> None:
    torch._dynamo.reset()  # which compiles a line of source only so many times
    problem = make_problem(format)
    layer, (x, logits) = FusedMoE(problem.config, problem.parallel, make_weights(problem)), make_inputs(problem.config)
    compiled = torch.compile(lambda x: layer(x * 2, logits) + 1, fullgraph=True, backend=backend)
    assert torch.equal(compiled(x), layer(x * 2, logits) + 1)
    if FORMATS[format].tokens == Tokens.NVFP4:
        values, factors = quantise_tokens(Tokens.NVFP4, x)
        compiled = torch.compile(layer.__call__, fullgraph=True, backend=backend)
        found = compiled(values, logits, hidden_states_scale=factors)
        assert torch.equal(found, layer(values, logits, hidden_states_scale=factors))


@pytest.mark.parametrize("format", FORMATS)
def test_op_has_a_fake_of_its_own(format: str) -> None:
    problem = make_problem(format)
    layer, (x, logits) = FusedMoE(problem.config, problem.parallel, make_weights(problem)), make_inputs(problem.config)
    arguments = (x, None, logits, None, None, None, *layer._op_arguments)
    op = getattr(torch.ops.moe_runtime, f"{format}_moe").default
    tests = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(op, arguments, test_utils=tests)


@pytest.mark.parametrize("gemm", GEMMS)
@pytest.mark.parametrize("format", FORMATS)
def test_trial(format: str, gemm: Any) -> None:
    problem, executor = make_problem(format), CpuExecutor()
    workload = make_workload(problem.config, problem.parallel, 20, "random", 0)
    trial = executor.gemm_trial(problem, make_weights(problem), workload, gemm, seed=1)
    index, expected = trial.reference()
    assert len(index) > 4 and expected.shape[1] == problem.gemm_shape(gemm)[0]
    for tactic in executor.tactics(problem, gemm):
        assert reference.relative_error(trial.run(tactic)[index], expected) < 3e-3


@pytest.mark.parametrize("format", FORMATS)
def test_tuned_plan_serves_its_format_alone(format: str) -> None:
    problem = make_problem(format, "dep2", 0)
    weights = make_weights(problem)
    plan = tune(problem, weights, CpuExecutor(), 1, "random")
    assert plan.complete and plan.key.format == format and plan.key.activation == "swiglu"
    x, logits = make_inputs(problem.config)
    planned = FusedMoE(problem.config, problem.parallel, weights, plan)(x, logits)
    assert reference.relative_error(planned, FusedMoE(problem.config, problem.parallel, weights)(x, logits)) < 5e-3
    other = make_problem("bf16" if format != "bf16" else "nvfp4", "dep2", 0)
    reason = plan.fits(other, "cpu", CpuExecutor.library_hash)
    assert reason is not None and f"format {format}" in reason


def test_a_plan_is_for_one_activation() -> None:
    problem = make_problem("bf16", activation="relu2")
    plan = tune(problem, make_weights(problem), CpuExecutor(), 1, "balanced")
    reason = plan.fits(make_problem("bf16"), "cpu", CpuExecutor.library_hash)
    assert reason is not None and "activation relu2" in reason


def test_fp8_block_carries_no_extras() -> None:
    assert FORMATS["fp8_block"].extras == Extra.NONE
    with pytest.raises(InvalidArgument, match="weights: got weights of the format nvfp4; accepted: fp8_block"):
        FusedMoE(make_config("fp8_block"), Parallel("ep", 1), make_weights(make_problem("nvfp4")))
