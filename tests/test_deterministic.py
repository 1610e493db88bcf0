"""Who gets rows added up in a fixed order: layers that ask for it, and calls that are not finalised."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from moe_runtime import FusedMoE, MoEConfig, Parallel
from moe_runtime.executors.base import Gemm, LayerInputs, MoEProblem, TacticPair
from moe_runtime.executors.cpu import CpuExecutor
from moe_runtime.ops import NO_PLAN, LayerCalls, PlanTable, shared_calls
from tests.test_layer import CONFIGS, RENORMALISE, make_layer, shard
from tests.test_layer import logits as make_logits
from tests.test_layer import tokens as make_tokens

FIRST = "padded_batch"
COMBINES = {"sorted_segments_combine": "sorted_segments", "grouped_mm_combine": "grouped_mm"}
DEFAULT, PLANNED = COMBINES
PLAN: PlanTable = ((1, 4), (FIRST, PLANNED, "", ""))
"""Of which the second bucket was not tuned."""


class CombiningExecutor(CpuExecutor):
    """Stands in for one whose gemm2 tactics combine, as their names alone say; notes down the tactics of each run."""

    def __init__(self) -> None:
        super().__init__()
        self.ran: list[TacticPair] = []

    def default_tactic(self, problem: MoEProblem, gemm: Gemm, num_rows: int) -> str:
        return FIRST if gemm == "gemm1" else DEFAULT

    def leaving_rows(self, tactic: str) -> str:
        return COMBINES.get(tactic, tactic)

    def run(
        self, problem: MoEProblem, weights: Any, inputs: LayerInputs, tactics: TacticPair, *rest: Any, **others: Any
    ) -> tuple[Tensor, Tensor, Tensor] | None:
        self.ran.append(tactics)
        plain = tactics[0], self.leaving_rows(tactics[1])
        return super().run(problem, weights, inputs, plain, *rest, **others)


@pytest.fixture
def executor(monkeypatch: pytest.MonkeyPatch) -> Iterator[CombiningExecutor]:
    made = CombiningExecutor()
    for module in ("layer", "ops"):
        monkeypatch.setattr(f"moe_runtime.{module}.get_executor", lambda _: made)
    shared_calls.cache_clear()  # which keeps the executors of devices
    yield made
    shared_calls.cache_clear()


def combining_layer(deterministic: bool) -> FusedMoE:
    plain = make_layer(RENORMALISE, "ep2", 1)
    return FusedMoE(
        RENORMALISE,
        plain.problem.parallel,
        shard(plain.problem.config, plain.problem.parallel),
        deterministic=deterministic,
    )


def inputs(num_tokens: int) -> tuple[Tensor, Tensor]:
    return make_tokens(RENORMALISE, num_tokens), make_logits(RENORMALISE, num_tokens)


CASES = [(NO_PLAN, 2, DEFAULT), (PLAN, 2, PLANNED), (PLAN, 9, DEFAULT)]
CASE_IDS = ["default", "planned", "default of a plan"]


@pytest.mark.parametrize(("table", "num_tokens", "chosen"), CASES, ids=CASE_IDS)
@pytest.mark.parametrize("deterministic", [False, True])
def test_only_a_deterministic_layer_leaves_rows(
    table: PlanTable, num_tokens: int, chosen: str, deterministic: bool
) -> None:
    executor, problem = CombiningExecutor(), make_layer(RENORMALISE).problem
    calls = LayerCalls(executor, problem, table, deterministic)
    x, logits = inputs(num_tokens)
    for _ in range(2):
        calls.run(shard(RENORMALISE, problem.parallel), LayerInputs(x, None, logits))
    assert executor.ran == [(FIRST, COMBINES[chosen] if deterministic else chosen)] * 2


@pytest.mark.parametrize(("table", "num_tokens", "chosen"), CASES, ids=CASE_IDS)
@pytest.mark.parametrize("deterministic", [False, True])
def test_a_call_that_is_not_finalised_leaves_rows(
    table: PlanTable, num_tokens: int, chosen: str, deterministic: bool
) -> None:
    executor, problem = CombiningExecutor(), make_layer(RENORMALISE).problem
    calls, (x, logits) = LayerCalls(executor, problem, table, deterministic), inputs(num_tokens)
    weights = shard(RENORMALISE, problem.parallel)
    rows, topk_weights, permuted_row = calls.run_unfinalised(weights, LayerInputs(x, None, logits), None)
    assert executor.ran == [(FIRST, COMBINES[chosen])]
    index = permuted_row.view(num_tokens, RENORMALISE.top_k).long()
    total = (rows[index].double() * topk_weights.unsqueeze(-1)).sum(1)
    finalised = calls.run(weights, LayerInputs(x, None, logits))
    torch.testing.assert_close(finalised.double(), total, rtol=2**-8, atol=1e-6)
    assert executor.ran[1] == (FIRST, COMBINES[chosen] if deterministic else chosen)


@pytest.mark.parametrize("deterministic", [False, True])
def test_a_layer_says_whether_it_is_deterministic(executor: CombiningExecutor, deterministic: bool) -> None:
    combining_layer(deterministic)(*inputs(3))
    assert executor.ran == [(FIRST, COMBINES[DEFAULT] if deterministic else DEFAULT)]


def test_a_layer_is_not_deterministic_unless_asked(executor: CombiningExecutor) -> None:
    make_layer(RENORMALISE)(*inputs(3))
    assert executor.ran == [(FIRST, DEFAULT)]


def test_the_op_of_a_compiled_layer_carries_it(executor: CombiningExecutor) -> None:
    """Two layers that differ in nothing else, in either order: what one asks for is not kept for the other."""
    for deterministic in (False, True, False):
        compiled = torch.compile(combining_layer(deterministic).__call__, fullgraph=True, backend="aot_eager")
        compiled(*inputs(3))
    assert executor.ran == [(FIRST, DEFAULT), (FIRST, COMBINES[DEFAULT]), (FIRST, DEFAULT)]


@pytest.mark.parametrize("deterministic", [False, True])
def test_the_place_of_deterministic_among_the_op_s_arguments(deterministic: bool) -> None:
    parallel = Parallel.parse("ep1")
    layer = FusedMoE(RENORMALISE, parallel, shard(RENORMALISE, parallel), None, deterministic)
    names = [argument.name for argument in torch.ops.moe_runtime.fp8_block_moe.default._schema.arguments]
    of_the_call = len(names) - len(layer._op_arguments)
    given = dict(zip(names[of_the_call:], layer._op_arguments, strict=True))
    assert names[of_the_call] == "operands"
    assert given["deterministic"] is deterministic
    assert (given["rank"], given["bucket_starts"], given["tactics"]) == (0, [], [])


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_on_the_cpu_every_layer_is(config: MoEConfig) -> None:
    plain = make_layer(config, "ep2", 1)
    layer = FusedMoE(
        config, plain.problem.parallel, shard(plain.problem.config, plain.problem.parallel), deterministic=True
    )
    x, logits = make_tokens(config, 11), make_logits(config, 11)
    assert torch.equal(layer(x, logits), plain(x, logits))
    assert torch.equal(layer(x, logits), layer(x, logits))
