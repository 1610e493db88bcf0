from __future__ import annotations

import dataclasses
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moe_runtime import FP8BlockWeights, FusedMoE, InvalidArgument, MoEConfig, Parallel, PlanRefused, fused_moe
from moe_runtime.config import RoutingMethod
from moe_runtime.executors.cpu import CpuExecutor
from moe_runtime.formats.fp8_block import quantise_rows
from moe_runtime.tuning import GemmChoice, Plan, PlanEntry, PlanKey
from moe_runtime.workload import buckets
from tests import reference

SAME_POINTS = 1e-2
FORMAT_ERROR = 0.06

RENORMALISE = MoEConfig("renormalise", 256, 128, 8, 2)
DEEPSEEK = MoEConfig("deepseek", 128, 256, 16, 4, RoutingMethod.DeepSeekV3, 4, 2, 2.5)
CLAMPED = dataclasses.replace(RENORMALISE, name="clamped", clamp_limit=0.4)
CONFIGS = {config.name: config for config in (RENORMALISE, DEEPSEEK, CLAMPED)}
WEIGHTS = {name: FP8BlockWeights.random(config, config.num_experts, seed=1) for name, config in CONFIGS.items()}


def shard(config: MoEConfig, parallel: Parallel) -> FP8BlockWeights:
    first = parallel.local_expert_offset(config.num_experts)
    local = slice(first, first + parallel.num_local_experts(config.num_experts))
    whole = WEIGHTS[config.name]
    return FP8BlockWeights(whole.gate_up[local], whole.gate_up_scale[local], whole.down[local], whole.down_scale[local])


def make_layer(config: MoEConfig, text: str = "ep1", rank: int = 0, plan: Plan | None = None) -> FusedMoE:
    parallel = Parallel.parse(text, rank)
    return FusedMoE(config, parallel, shard(config, parallel), plan)


def tokens(config: MoEConfig, count: int, seed: int = 0) -> Tensor:
    return torch.randn(count, config.hidden_size, generator=torch.Generator().manual_seed(seed)).bfloat16()


def logits(config: MoEConfig, count: int, seed: int = 0) -> Tensor:
    return torch.randn(count, config.num_experts, generator=torch.Generator().manual_seed(seed + 1000))


def expected(layer: FusedMoE, x: Tensor, ids: Any, weights: Any, quantised: bool = True) -> Tensor:
    problem = layer.problem
    return reference.layer(
        problem.config, layer._weights.operands, problem.local_expert_offset, x, ids, weights, quantised=quantised
    )


@pytest.mark.parametrize("num_tokens", [1, 3, 25])
@pytest.mark.parametrize("layout", [("ep1", 0), ("ep4", 3), ("dep2", 1)], ids=str)
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_router_logits(config: MoEConfig, layout: tuple[str, int], num_tokens: int) -> None:
    layer = make_layer(config, *layout)
    x, router_logits = tokens(config, num_tokens), logits(config, num_tokens)
    output = torch.full_like(x, torch.nan)
    assert layer(x, router_logits, output=output) is output
    want = expected(layer, x, *reference.route(config, router_logits))
    if want.norm() == 0:
        assert (output == 0).all()
    else:
        assert reference.relative_error(output, want) <= SAME_POINTS


def test_error_of_the_format_itself() -> None:
    layer = make_layer(RENORMALISE)
    x, router_logits = tokens(RENORMALISE, 40), logits(RENORMALISE, 40)
    exact = expected(layer, x, *reference.route(RENORMALISE, router_logits), quantised=False)
    assert 0.01 < reference.relative_error(layer(x, router_logits), exact) <= FORMAT_ERROR


def test_routing_bias() -> None:
    layer = make_layer(DEEPSEEK)
    x, router_logits = tokens(DEEPSEEK, 20), logits(DEEPSEEK, 20)
    bias = torch.randn(16, generator=torch.Generator().manual_seed(3)).bfloat16()
    want = expected(layer, x, *reference.route(DEEPSEEK, router_logits, bias))
    assert reference.relative_error(layer(x, router_logits, routing_bias=bias), want) <= SAME_POINTS


@pytest.mark.parametrize("text", ["ep4", "dep2"])
def test_ranks_add_up_to_the_whole(text: str) -> None:
    x, router_logits = tokens(DEEPSEEK, 10), logits(DEEPSEEK, 10)
    size = Parallel.parse(text).size
    total = sum(make_layer(DEEPSEEK, text, rank)(x, router_logits).double() for rank in range(size))
    assert isinstance(total, Tensor)
    assert reference.relative_error(total, make_layer(DEEPSEEK)(x, router_logits)) <= 5e-3


@settings(max_examples=25)
@given(st.data(), st.integers(0, 6), st.sampled_from(["ep1", "ep2", "dep4", "ep8"]))
def test_any_ids(data: st.DataObject, num_tokens: int, text: str) -> None:
    """Repeated, absent and remote ids, empty experts, no tokens."""
    rank = data.draw(st.integers(0, Parallel.parse(text).size - 1))
    drawn = data.draw(st.lists(st.integers(-1, 7), min_size=2 * num_tokens, max_size=2 * num_tokens))
    ids = torch.tensor(drawn, dtype=torch.int32).view(num_tokens, 2)
    weights = torch.rand(ids.shape, generator=torch.Generator().manual_seed(num_tokens))
    layer, x = make_layer(RENORMALISE, text, rank), tokens(RENORMALISE, num_tokens)
    output = layer(x, topk_ids=ids, topk_weights=weights)
    want = expected(layer, x, ids, weights)
    assert output.shape == want.shape and output.isfinite().all()
    assert (output.double() - want).norm() <= SAME_POINTS * want.norm()


def test_remote_rows_are_zeros_whatever_their_weight() -> None:
    layer, x = make_layer(RENORMALISE, "ep4", 2), tokens(RENORMALISE, 3)
    ids = torch.tensor([[0, 1], [-1, -1], [7, 3]], dtype=torch.int32)
    output = torch.full_like(x, torch.nan)
    layer(x, topk_ids=ids, topk_weights=torch.full((3, 2), torch.nan), output=output)
    assert (output == 0).all()


def test_no_tokens() -> None:
    layer = make_layer(RENORMALISE)
    output = layer(tokens(RENORMALISE, 0), logits(RENORMALISE, 0))
    assert (output.shape, output.dtype) == ((0, 256), torch.bfloat16)


def test_up_before_gate() -> None:
    config, weights = RENORMALISE, WEIGHTS["renormalise"]
    swapped = FP8BlockWeights(
        torch.cat([part.view(torch.uint8) for part in weights.gate_up.chunk(2, 1)[::-1]], 1).view(torch.float8_e4m3fn),
        torch.cat(weights.gate_up_scale.chunk(2, 1)[::-1], 1),
        weights.down,
        weights.down_scale,
        gate_first=False,
    )
    x, router_logits = tokens(config, 5), logits(config, 5)
    plain = make_layer(config)(x, router_logits)
    assert torch.equal(FusedMoE(config, Parallel("ep", 1), swapped)(x, router_logits), plain)


@pytest.mark.parametrize("column_major", [False, True])
def test_quantised_tokens_give_the_same_layer(column_major: bool) -> None:
    layer, x, router_logits = make_layer(RENORMALISE), tokens(RENORMALISE, 9), logits(RENORMALISE, 9)
    values, scale = quantise_rows(x)
    if column_major:
        scale = scale.T.contiguous().T
    assert torch.equal(layer(values, router_logits, hidden_states_scale=scale), layer(x, router_logits))


@pytest.mark.parametrize("is_quantised", [False, True])
def test_rows_that_lie_apart_give_the_same_layer(is_quantised: bool) -> None:
    """As they do in the messages of an exchange, with their scales behind them."""
    layer, x, router_logits = make_layer(RENORMALISE), tokens(RENORMALISE, 9), logits(RENORMALISE, 9)
    values, scale = quantise_rows(x) if is_quantised else (x, None)
    apart = torch.zeros(9, x.shape[1] + 16, dtype=torch.float32).to(values.dtype)[:, : x.shape[1]].copy_(values)
    assert not apart.is_contiguous()
    assert torch.equal(layer(apart, router_logits, hidden_states_scale=scale), layer(x, router_logits))


def test_functional_form() -> None:
    x, router_logits = tokens(RENORMALISE, 9), logits(RENORMALISE, 9)
    parallel = Parallel("ep", 2, 1)
    result = fused_moe(x, shard(RENORMALISE, parallel), RENORMALISE, parallel, router_logits)
    assert torch.equal(result, make_layer(RENORMALISE, "ep2", 1)(x, router_logits))


def test_no_gradient_is_recorded() -> None:
    x = tokens(RENORMALISE, 2).requires_grad_()
    assert not make_layer(RENORMALISE)(x, logits(RENORMALISE, 2)).requires_grad


def make_plan(layer: FusedMoE, tuned: list[int]) -> Plan:
    def choice(tactic: str) -> GemmChoice:
        return GemmChoice(tactic=tactic, default_tactic="per_expert_loop")

    by_size = {size: ("padded_batch", "grouped_mm") if size < 16 else ("sorted_segments",) * 2 for size in tuned}
    return Plan(
        key=PlanKey.of(layer.problem, "balanced", 64, "cpu", CpuExecutor.library_hash),
        seed=0,
        samples=1,
        margin=0.02,
        confidence=0.95,
        complete=tuned == buckets(64),
        buckets=tuple(buckets(64)),
        entries=tuple(
            PlanEntry(bucket=size, rows=size, gemm1=choice(first), gemm2=choice(second))
            for size, (first, second) in by_size.items()
        ),
    )


@pytest.mark.parametrize(
    ("text", "num_tokens", "tactics"),
    [
        ("ep2", 1, ("per_expert_loop", "per_expert_loop")),
        ("ep2", 9, ("padded_batch", "grouped_mm")),
        ("ep2", 16, ("sorted_segments", "sorted_segments")),
        ("ep2", 500, ("sorted_segments", "sorted_segments")),
        ("dep2", 31, ("padded_batch", "grouped_mm")),
        ("dep2", 32, ("sorted_segments", "sorted_segments")),
    ],
)
def test_plan_chooses_the_tactics(
    text: str, num_tokens: int, tactics: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = make_plan(make_layer(RENORMALISE, text), buckets(64)[1:])
    layer = make_layer(RENORMALISE, text, plan=plan)
    seen = []
    run = CpuExecutor.run

    def spy(self: CpuExecutor, problem: Any, weights: Any, inputs: Any, tactics: Any, *rest: Any) -> Any:
        seen.append(tactics)
        return run(self, problem, weights, inputs, tactics, *rest)

    monkeypatch.setattr(CpuExecutor, "run", spy)
    layer(tokens(RENORMALISE, num_tokens), logits(RENORMALISE, num_tokens))
    assert seen == [tactics]


@pytest.mark.parametrize(("text", "reason"), [("dep2", "regime ep"), ("ep4", "size 2")])
def test_plan_of_another_layout_is_refused(text: str, reason: str) -> None:
    plan = make_plan(make_layer(RENORMALISE, "ep2"), buckets(64))
    with pytest.raises(PlanRefused, match=reason):
        make_layer(RENORMALISE, text, plan=plan)


def test_weights_must_fit_the_shard() -> None:
    with pytest.raises(InvalidArgument, match=r"gate_up: got shape \[8, 256, 256\]"):
        FusedMoE(RENORMALISE, Parallel("ep", 2), WEIGHTS["renormalise"])


IDS = torch.zeros(4, 2, dtype=torch.int32)
TOPK_WEIGHTS = torch.rand(4, 2)
X = tokens(RENORMALISE, 4)
LOGITS = logits(RENORMALISE, 4)


BAD_INPUTS: list[tuple[str, dict[str, Any]]] = [
    ("hidden_states", {"x": X.float()}),
    ("hidden_states", {"x": X.half()}),
    ("hidden_states", {"x": X[0]}),
    ("hidden_states", {"x": X[:, :128]}),
    ("hidden_states", {"x": torch.zeros(256, 4, dtype=torch.bfloat16).T}),
    ("hidden_states", {"x": X.to("meta"), "router_logits": LOGITS.to("meta")}),
    ("hidden_states", {"x": X, "hidden_states_scale": torch.ones(4, 2)}),
    ("hidden_states", {"x": quantise_rows(X)[0]}),
    ("hidden_states_scale", {"x": quantise_rows(X)[0], "hidden_states_scale": torch.ones(2, 4)}),
    ("hidden_states_scale", {"x": quantise_rows(X)[0], "hidden_states_scale": torch.ones(4, 2).half()}),
    ("routing_logits", {"router_logits": LOGITS[:3]}),
    ("routing_logits", {"router_logits": LOGITS.double()}),
    ("routing_logits", {"router_logits": LOGITS.to("meta")}),
    ("routing_logits", {"router_logits": torch.zeros(8, 4).T}),
    ("routing_bias", {"routing_bias": torch.zeros(8)}),
    ("topk_ids", {"topk_ids": IDS, "topk_weights": TOPK_WEIGHTS}),
    ("topk_ids", {"router_logits": None}),
    ("topk_ids", {"router_logits": None, "topk_weights": TOPK_WEIGHTS}),
    ("topk_weights", {"router_logits": None, "topk_ids": IDS}),
    ("topk_ids", {"router_logits": None, "topk_ids": IDS.long(), "topk_weights": TOPK_WEIGHTS}),
    ("topk_ids", {"router_logits": None, "topk_ids": IDS[:, :1], "topk_weights": TOPK_WEIGHTS}),
    ("topk_ids", {"router_logits": None, "topk_ids": IDS + 8, "topk_weights": TOPK_WEIGHTS}),
    ("topk_ids", {"router_logits": None, "topk_ids": IDS - 2, "topk_weights": TOPK_WEIGHTS}),
    ("topk_weights", {"router_logits": None, "topk_ids": IDS, "topk_weights": TOPK_WEIGHTS.bfloat16()}),
    ("routing_bias", {"router_logits": None, "topk_ids": IDS, "topk_weights": TOPK_WEIGHTS, "routing_bias": X}),
    ("output", {"output": torch.empty(4, 256)}),
    ("output", {"output": torch.empty(3, 256, dtype=torch.bfloat16)}),
    ("output", {"output": torch.empty(256, 4, dtype=torch.bfloat16).T}),
    ("hidden_states", {"x": X.to("meta")}),
    ("hidden_states", {"x": torch.zeros(4, 512, dtype=torch.bfloat16)[:, ::2]}),
    ("hidden_states", {"x": torch.zeros(4, 260, dtype=torch.bfloat16)[:, :256]}),
    ("hidden_states", {"x": torch.zeros(4, 264, dtype=torch.bfloat16)[:, 4:260]}),
    ("hidden_states", {"x": X[:1].expand(4, 256)}),
    ("hidden_states", {"x": X[:, None]}),
    ("hidden_states_scale", {"x": quantise_rows(X)[0], "hidden_states_scale": torch.ones(4, 2, device="meta")}),
    ("routing_logits", {"router_logits": torch.zeros(4, 16)[:, ::2]}),
    ("topk_ids", {"router_logits": None, "topk_ids": IDS.to("meta"), "topk_weights": TOPK_WEIGHTS}),
    (
        "topk_ids",
        {"router_logits": None, "topk_ids": torch.zeros(2, 4, dtype=torch.int32).T, "topk_weights": TOPK_WEIGHTS},
    ),
    ("topk_weights", {"router_logits": None, "topk_ids": IDS, "topk_weights": TOPK_WEIGHTS.to("meta")}),
    ("topk_weights", {"router_logits": None, "topk_ids": IDS, "topk_weights": TOPK_WEIGHTS[:3]}),
    ("output", {"output": torch.empty(4, 256, dtype=torch.bfloat16, device="meta")}),
]


@pytest.mark.parametrize(("argument", "call"), BAD_INPUTS)
def test_bad_input_names_the_argument(argument: str, call: dict[str, Any]) -> None:
    with pytest.raises(InvalidArgument) as error:
        make_layer(RENORMALISE)(**{"x": X, "router_logits": LOGITS, **call})
    assert error.value.argument == argument


def test_what_was_accepted_before_lets_nothing_else_through() -> None:
    layer, (values, scale), output = make_layer(RENORMALISE), quantise_rows(X), torch.empty_like(X)
    want = layer(X, LOGITS)
    for argument, call in BAD_INPUTS:
        layer(X, topk_ids=IDS, topk_weights=TOPK_WEIGHTS)
        layer(values, LOGITS, hidden_states_scale=scale)
        assert torch.equal(layer(X, LOGITS, output=output), want)
        with pytest.raises(InvalidArgument) as error:
            layer(**{"x": X, "router_logits": LOGITS, **call})
        assert error.value.argument == argument


@pytest.mark.parametrize(
    ("argument", "change"),
    [
        ("hidden_states", lambda x, _: x.t_()),
        ("hidden_states", lambda x, _: x.resize_(4, 128)),
        ("hidden_states", lambda x, _: x.set_(torch.zeros(4, 512, dtype=torch.bfloat16)[:, ::2])),
        ("hidden_states", lambda x, _: setattr(x, "data", x.float())),
        ("routing_logits", lambda x, _: x.resize_(3, 256)),
        ("routing_logits", lambda _, y: y.resize_(5, 8)),
        ("routing_logits", lambda _, y: setattr(y, "data", y.double())),
    ],
)
def test_an_accepted_tensor_that_changes_is_looked_at_again(
    argument: str, change: Callable[[Tensor, Tensor], object]
) -> None:
    layer, x, router_logits = make_layer(RENORMALISE), X.clone(), LOGITS.clone()
    layer(x, router_logits)
    change(x, router_logits)
    with pytest.raises(InvalidArgument) as error:
        layer(x, router_logits)
    assert error.value.argument == argument


def test_threads_share_a_layer() -> None:
    layer = make_layer(RENORMALISE, plan=make_plan(make_layer(RENORMALISE), buckets(64)))
    calls = [(tokens(RENORMALISE, count, seed=count), logits(RENORMALISE, count, seed=count)) for count in range(1, 25)]
    want = [layer(*call) for call in calls]
    fresh = make_layer(RENORMALISE, plan=make_plan(layer, buckets(64)))
    with ThreadPoolExecutor(2) as pool:
        got = list(pool.map(lambda call: fresh(*call), calls * 4))
    assert all(torch.equal(*pair) for pair in zip(got, want * 4, strict=True))


def test_deepseek_bias_must_fit() -> None:
    with pytest.raises(InvalidArgument, match=r"routing_bias: got shape \[8\]"):
        make_layer(DEEPSEEK)(tokens(DEEPSEEK, 2), logits(DEEPSEEK, 2), routing_bias=torch.zeros(8))


@pytest.fixture
def hungry_layer(monkeypatch: pytest.MonkeyPatch) -> FusedMoE:
    """A layer whose executor asks for 1000 bytes a token and fails unless it gets them."""
    run = CpuExecutor.run

    def checked(self: CpuExecutor, *args: Any) -> Any:
        workspace, num_tokens = args[5], args[4].shape[0]
        assert workspace.nbytes >= 1000 * num_tokens
        return run(self, *args)

    monkeypatch.setattr(CpuExecutor, "workspace_bytes", lambda self, problem, num_tokens: 1000 * num_tokens)
    monkeypatch.setattr(CpuExecutor, "run", checked)
    return make_layer(RENORMALISE)


def aligned(num_bytes: int) -> Tensor:
    buffer = torch.empty(num_bytes + 256, dtype=torch.uint8)
    return buffer[-buffer.data_ptr() % 256 :][:num_bytes]


def test_workspace_is_the_caller_s_or_made(hungry_layer: FusedMoE) -> None:
    assert hungry_layer.workspace_bytes(4) == 4000
    assert torch.equal(hungry_layer(X, LOGITS, workspace=aligned(4000)), hungry_layer(X, LOGITS))


def test_bad_workspace(hungry_layer: FusedMoE) -> None:
    with pytest.raises(InvalidArgument, match=r"workspace: got 3999 bytes; accepted: 4000 bytes"):
        hungry_layer(X, LOGITS, workspace=aligned(3999))
    with pytest.raises(InvalidArgument, match="workspace: got address"):
        hungry_layer(X, LOGITS, workspace=aligned(5000)[1:])
    with pytest.raises(InvalidArgument, match="workspace: got a tensor on meta"):
        hungry_layer(X, LOGITS, workspace=torch.empty(4000, device="meta"))
    with pytest.raises(InvalidArgument, match="workspace: got strides"):
        hungry_layer(X, LOGITS, workspace=aligned(9000)[::2])
