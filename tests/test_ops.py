from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from moe_runtime import FP8BlockWeights, InvalidArgument, MoEConfig, Parallel, PlanRefused, ops
from moe_runtime.executors.base import MoEProblem
from moe_runtime.executors.cpu import CpuExecutor
from moe_runtime.flashinfer import fp8_block_scale_moe
from moe_runtime.formats.fp8_block import quantise_rows
from moe_runtime.ops import allocate
from moe_runtime.tuning import GemmChoice, Plan, PlanEntry, PlanKey
from moe_runtime.workload import buckets
from tests import reference
from tests.test_layer import CLAMPED, CONFIGS, DEEPSEEK, RENORMALISE, SAME_POINTS, WEIGHTS, logits, make_layer, tokens

IDS = torch.tensor([[0, 5], [-1, 3], [7, 7]], dtype=torch.int32)


@pytest.mark.parametrize(
    ("config", "inputs"),
    [
        (RENORMALISE, (tokens(RENORMALISE, 3), None, logits(RENORMALISE, 3), None, None, None)),
        (RENORMALISE, (tokens(RENORMALISE, 3), None, None, None, IDS, torch.rand(3, 2))),
        (RENORMALISE, (*quantise_rows(tokens(RENORMALISE, 3)), logits(RENORMALISE, 3), None, None, None)),
        (DEEPSEEK, (tokens(DEEPSEEK, 3), None, logits(DEEPSEEK, 3), torch.rand(16), None, None)),
        (CLAMPED, (tokens(CLAMPED, 0), None, logits(CLAMPED, 0), None, None, None)),
    ],
)
def test_opcheck(config: MoEConfig, inputs: tuple[Tensor | None, ...]) -> None:
    arguments = (*inputs, *make_layer(config)._op_arguments)
    # opcheck's own schema test multiplies its arguments, which torch cannot do with e4m3; the test below stands in.
    tests = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(torch.ops.moe_runtime.fp8_block_moe.default, arguments, test_utils=tests)


def test_allocation_takes_the_short_way_on_the_current_gpu_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: 1, raising=False)
    monkeypatch.setattr(ops, "_empty_strided_cuda", lambda *args: ("short", *args))
    monkeypatch.setattr(torch, "empty_strided", lambda *args, **others: ("dispatched", *args, *others.values()))
    described = ((2, 3), (3, 1), torch.bfloat16)
    assert allocate(*described, torch.device("cuda", 1)) == ("short", *described)
    for device in (torch.device("cuda", 0), torch.device("cpu")):
        assert allocate(*described, device) == ("dispatched", *described, device)


def test_op_changes_and_aliases_no_argument() -> None:
    layer = make_layer(RENORMALISE)
    values, scale = quantise_rows(tokens(RENORMALISE, 3))
    arguments = (values, scale, logits(RENORMALISE, 3), None, None, None, *layer._op_arguments)
    tensors = [argument for argument in arguments if isinstance(argument, Tensor)]
    before = [tensor.clone() for tensor in tensors]
    result = torch.ops.moe_runtime.fp8_block_moe(*arguments)
    assert all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in zip(tensors, before, strict=True))
    storages = {tensor.untyped_storage().data_ptr() for tensor in tensors}
    assert result.untyped_storage().data_ptr() not in storages


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_compiled_layer(config: MoEConfig, backend: str) -> None:
    layer = make_layer(config, "ep2", 1)

    def block(x: Tensor, router_logits: Tensor) -> Tensor:
        return torch.relu(layer(x * 2, router_logits)) + 1

    compiled = torch.compile(block, fullgraph=True, backend=backend, dynamic=True)
    for num_tokens in (5, 11):
        x, router_logits = tokens(config, num_tokens), logits(config, num_tokens)
        assert torch.equal(compiled(x, router_logits), block(x, router_logits))


def test_compiled_layer_writes_to_output() -> None:
    layer, x, router_logits = make_layer(RENORMALISE), tokens(RENORMALISE, 5), logits(RENORMALISE, 5)
    output = torch.full_like(x, torch.nan)
    compiled = torch.compile(lambda: layer(x, router_logits, output=output), fullgraph=True, backend="aot_eager")
    compiled()
    assert torch.equal(output, layer(x, router_logits))


def test_compiled_layer_is_one_op() -> None:
    layer, graphs = make_layer(RENORMALISE), []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    torch.compile(layer.__call__, fullgraph=True, backend=backend)(tokens(RENORMALISE, 2), logits(RENORMALISE, 2))
    calls = [node.target for node in graphs[0].graph.nodes if node.op == "call_function"]
    assert calls == [torch.ops.moe_runtime.fp8_block_moe]


def test_compiled_layer_keeps_its_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = make_layer(RENORMALISE, plan=make_plan(make_layer(RENORMALISE).problem))
    seen = spy_on_tactics(monkeypatch)
    compiled = torch.compile(layer.__call__, fullgraph=True, backend="aot_eager")
    compiled(tokens(RENORMALISE, 5), logits(RENORMALISE, 5))
    assert seen == [("padded_batch", "grouped_mm")]


def make_plan(problem: MoEProblem, tune_max: int = 64) -> Plan:
    def choice(tactic: str) -> GemmChoice:
        return GemmChoice(tactic=tactic, default_tactic="per_expert_loop")

    return Plan(
        key=PlanKey.of(problem, "balanced", tune_max, "cpu", CpuExecutor.library_hash),
        seed=0,
        samples=1,
        margin=0.02,
        confidence=0.95,
        complete=True,
        buckets=tuple(buckets(tune_max)),
        entries=tuple(
            PlanEntry(bucket=size, rows=size, gemm1=choice("padded_batch"), gemm2=choice("grouped_mm"))
            for size in buckets(tune_max)
        ),
    )


def spy_on_tactics(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    seen: list[tuple[str, str]] = []
    run = CpuExecutor.run

    def spy(self: CpuExecutor, problem: Any, weights: Any, inputs: Any, tactics: Any, *rest: Any) -> Any:
        seen.append(tactics)
        return run(self, problem, weights, inputs, tactics, *rest)

    monkeypatch.setattr(CpuExecutor, "run", spy)
    return seen


def call_arguments(
    config: MoEConfig, num_tokens: int, local: slice = slice(None), bf16: bool = False
) -> dict[str, Any]:
    """What a caller of FlashInfer's function has at hand."""
    weights, x = WEIGHTS[config.name], tokens(config, num_tokens)
    values, scale = quantise_rows(x)
    experts = range(config.num_experts)[local]
    return {
        "routing_logits": logits(config, num_tokens),
        "routing_bias": None,
        "hidden_states": x if bf16 else values,
        "hidden_states_scale": None if bf16 else scale.T.contiguous(),
        "gemm1_weights": weights.gate_up[local],
        "gemm1_weights_scale": weights.gate_up_scale[local],
        "gemm2_weights": weights.down[local],
        "gemm2_weights_scale": weights.down_scale[local],
        "num_experts": config.num_experts,
        "top_k": config.top_k,
        "n_group": config.n_group,
        "topk_group": config.topk_group,
        "intermediate_size": config.intermediate_size,
        "local_expert_offset": experts[0],
        "local_num_experts": len(experts),
        "routed_scaling_factor": config.routed_scaling_factor,
        "routing_method_type": int(config.routing_method),
    }


def expected(config: MoEConfig, arguments: dict[str, Any], num_tokens: int) -> Tensor:
    # FlashInfer's rows are [up; gate]: the second half goes through SiLU.
    names = ("gemm1_weights", "gemm1_weights_scale", "gemm2_weights", "gemm2_weights_scale")
    weights = FP8BlockWeights(*(arguments[name] for name in names), gate_first=False)
    ids, topk_weights = reference.route(config, arguments["routing_logits"], arguments["routing_bias"])
    offset = arguments["local_expert_offset"]
    return reference.layer(config, weights, offset, tokens(config, num_tokens), ids, topk_weights, quantised=True)


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("local", [slice(None), slice(4, 8)], ids=str)
@pytest.mark.parametrize("config", [RENORMALISE, DEEPSEEK], ids=lambda config: config.name)
def test_fp8_block_scale_moe(config: MoEConfig, local: slice, bf16: bool) -> None:
    arguments = call_arguments(config, 20, local, bf16)
    output = torch.full((20, config.hidden_size), torch.nan, dtype=torch.bfloat16)
    assert fp8_block_scale_moe(**arguments, output=output) is output
    assert reference.relative_error(output, expected(config, arguments, 20)) <= SAME_POINTS


def test_positional_arguments_in_flashinfer_s_order() -> None:
    arguments = call_arguments(DEEPSEEK, 6)
    result = fp8_block_scale_moe(*arguments.values(), use_shuffled_weight=False, weight_layout=0, enable_pdl=True)
    assert isinstance(result, Tensor)
    assert torch.equal(result, fp8_block_scale_moe(**arguments))  # type: ignore[arg-type]


def test_absent_groups_and_scaling() -> None:
    arguments = call_arguments(RENORMALISE, 4)
    absent = {**arguments, "n_group": None, "topk_group": 0, "routed_scaling_factor": None}
    assert torch.equal(fp8_block_scale_moe(**absent), fp8_block_scale_moe(**arguments))  # type: ignore[arg-type]


def test_routing_bias() -> None:
    arguments = {**call_arguments(DEEPSEEK, 12), "routing_bias": torch.linspace(-1, 1, 16)}
    result = fp8_block_scale_moe(**arguments)
    assert isinstance(result, Tensor)
    assert reference.relative_error(result, expected(DEEPSEEK, arguments, 12)) <= SAME_POINTS


@pytest.mark.parametrize("num_tokens", [0, 7])
def test_without_finalize(num_tokens: int) -> None:
    arguments = call_arguments(RENORMALISE, num_tokens, slice(4, 8))
    parts = fp8_block_scale_moe(**arguments, do_finalize=False)
    assert isinstance(parts, list)
    rows, weights, row_of_slot = parts
    assert (weights.shape, row_of_slot.shape) == ((num_tokens, 2), (2 * num_tokens,))
    total = torch.zeros(num_tokens, 256, dtype=torch.float64)
    for slot, row in enumerate(row_of_slot.tolist()):
        if row >= 0:
            total[slot // 2] += weights.flatten()[slot].double() * rows[row].double()
    finalised = fp8_block_scale_moe(**arguments)
    assert isinstance(finalised, Tensor)
    torch.testing.assert_close(finalised.double(), total, rtol=2**-8, atol=1e-6)


def test_compiled_function() -> None:
    arguments = call_arguments(DEEPSEEK, 6)
    compiled = torch.compile(fp8_block_scale_moe, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(**arguments), fp8_block_scale_moe(**arguments))
    output = torch.full((6, 128), torch.nan, dtype=torch.bfloat16)
    compiled(**arguments, output=output)
    assert torch.equal(output, fp8_block_scale_moe(**arguments))  # type: ignore[arg-type]


def test_compiled_function_breaks_the_graph_for_what_the_op_cannot_say() -> None:
    arguments = call_arguments(RENORMALISE, 6)
    compiled = torch.compile(fp8_block_scale_moe, backend="eager")
    for parts in zip(
        compiled(**arguments, do_finalize=False), fp8_block_scale_moe(**arguments, do_finalize=False), strict=True
    ):
        assert torch.equal(*parts)
    planned = {**arguments, "plan": make_plan(MoEProblem(RENORMALISE, Parallel("ep", 1))), "tune_max_num_tokens": 64}
    assert torch.equal(compiled(**planned), fp8_block_scale_moe(**planned))


def test_plan_serves_its_own_regime_only(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = make_plan(MoEProblem(DEEPSEEK, Parallel("dep", 2)))
    seen = spy_on_tactics(monkeypatch)
    arguments = {**call_arguments(DEEPSEEK, 6, slice(8, 16)), "plan": plan, "tune_max_num_tokens": 64}
    for _ in range(2):
        fp8_block_scale_moe(**arguments, use_dp=True)
    assert seen == [("padded_batch", "grouped_mm")] * 2
    with pytest.raises(PlanRefused, match="regime dep"):
        fp8_block_scale_moe(**arguments, use_dp=False)
    with pytest.raises(PlanRefused, match="tune_max_num_tokens 64"):
        fp8_block_scale_moe(**{**arguments, "tune_max_num_tokens": 8192}, use_dp=True)


@pytest.mark.parametrize(
    ("argument", "changes"),
    [
        ("local_num_experts", {"local_num_experts": 3}),
        ("local_num_experts", {"local_num_experts": 0}),
        ("local_expert_offset", {"local_num_experts": 4, "local_expert_offset": 2}),
        ("local_expert_offset", {"local_expert_offset": 8}),
        ("routing_method_type", {"routing_method_type": 5}),
        ("routing_method_type", {"routing_method_type": 9}),
        ("top_k", {"top_k": 9}),
        ("n_group", {"n_group": 2}),
        ("gemm1_weights", {"intermediate_size": 256}),
        ("gemm1_weights", {"gemm1_weights": torch.zeros(8, 256, 256)}),
        ("gemm1_weights_scale", {"gemm1_weights_scale": torch.zeros(8, 2, 1)}),
        ("gemm2_weights_scale", {"gemm2_weights_scale": torch.zeros(8, 2, 1).half()}),
        ("hidden_states_scale", {"hidden_states_scale": torch.zeros(4, 2)}),
        ("routing_logits", {"routing_logits": torch.zeros(4, 9)}),
        ("use_shuffled_weight", {"use_shuffled_weight": True}),
        ("weight_layout", {"weight_layout": 2}),
        ("fp8_quantization_type", {"fp8_quantization_type": 2}),
        ("gemm1_alpha", {"gemm1_alpha": 1.702}),
    ],
)
def test_bad_argument_is_named(argument: str, changes: dict[str, Any]) -> None:
    with pytest.raises(InvalidArgument) as error:
        fp8_block_scale_moe(**{**call_arguments(RENORMALISE, 4), **changes})
    assert error.value.argument == argument


def test_unknown_argument_is_a_type_error() -> None:
    with pytest.raises(TypeError, match="tile_tokens_dim"):
        fp8_block_scale_moe(**call_arguments(RENORMALISE, 4), tile_tokens_dim=8)
