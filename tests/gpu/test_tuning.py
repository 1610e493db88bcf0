"""The tuner on the compiled kernels: every choice is checked, timed beside the default, and serves the layer."""

from __future__ import annotations

import pytest
import torch

from moe_runtime import FP8BlockWeights, FusedMoE, MoEConfig, Parallel, PlanRefused
from moe_runtime.executors.base import GEMMS, Gemm, MoEProblem, able_tactics
from moe_runtime.reference import reference_layer, relative_error
from moe_runtime.routing import route
from moe_runtime.tuning import tune
from moe_runtime.tuning.quarantine import vetting
from moe_runtime.workload import kernel_rows, make_workload
from tests.gpu import support
from tests.gpu.test_layer import LAYER_BOUND

CONFIG = MoEConfig("small", 512, 384, 32, 4)
REFUSALS = ("multiple", "only gemm1", "only gemm2")


@pytest.mark.parametrize("layout", ["dep2", "ep2"])
def test_a_tuned_plan_serves_the_layer(layout: str) -> None:
    problem = MoEProblem(CONFIG, Parallel.parse(layout))
    weights = FP8BlockWeights.random(CONFIG, problem.num_local_experts, device="cuda")
    executor = support.executor()
    plan = tune(problem, weights, executor, 32, "random")
    assert plan.complete and not plan.quarantined
    for entry in plan.entries:
        pairs = [(pair.gemm1, pair.gemm2) for pair in entry.layer]
        assert not pairs or {entry.pair, entry.default_pair} <= set(pairs)
        for choice in (entry.gemm1, entry.gemm2):
            assert all(any(part in why for part in REFUSALS) for why in choice.rejected.values())
            assert choice.default_tactic in choice.timings
            assert choice.us is not None and choice.default_us is not None
            assert pairs or choice.us <= choice.default_us

    rows = kernel_rows(32, problem.parallel)
    x = torch.randn(rows, CONFIG.hidden_size, device="cuda", dtype=torch.bfloat16)
    logits = torch.randn(rows, CONFIG.num_experts, device="cuda")
    out = FusedMoE(CONFIG, problem.parallel, weights, plan)(x, logits)
    assert relative_error(out, reference_layer(problem, weights, x, *route(CONFIG, logits))) <= LAYER_BOUND

    other = Parallel.parse("ep2" if layout == "dep2" else "dep2")
    with pytest.raises(PlanRefused, match="regime"):
        FusedMoE(CONFIG, other, weights, plan)


@pytest.mark.parametrize("tokens", [1, 256])
def test_a_layer_takes_longer_than_its_gemms(tokens: int) -> None:
    problem = MoEProblem(CONFIG, Parallel.parse("dep2"))
    weights = FP8BlockWeights.random(CONFIG, problem.num_local_experts, device="cuda")
    executor, workload = support.executor(), make_workload(CONFIG, problem.parallel, tokens, "random")
    able = able_tactics(executor, problem, "gemm2")
    first, second, *_ = (name for name in able if executor.variants[name].stores_rows)
    layer = executor.layer_trial(problem, weights, workload, 0).time([(first, second), (second, first)], 5)
    assert {pair: len(us) for pair, us in layer.items()} == {(first, second): 5, (second, first): 5}
    gemm1 = executor.gemm_trial(problem, weights, workload, "gemm1", 0)
    assert min(gemm1.time([first], 5)[first]) < min(layer[first, second])


@pytest.mark.parametrize("gemm", GEMMS)
def test_every_variant_passes_in_the_worker(gemm: Gemm) -> None:
    problem = MoEProblem(CONFIG, Parallel.parse("ep2"))
    tactics = able_tactics(support.executor(), problem, gemm)
    assert len(tactics) >= 10
    workload = make_workload(CONFIG, problem.parallel, 64, "random")
    with vetting(problem, "cuda", timeout_seconds=120) as vet:
        assert vet(workload, gemm, tactics) == {}
