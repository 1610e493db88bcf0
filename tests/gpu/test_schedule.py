"""What direct kernels do beside plain tiles: halves of tiles, tiles that blocks take from a counter, a GEMM1 that
starts while slots are sorted, and a GEMM2 that starts while GEMM1 runs."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from moe_runtime import MoEConfig, Parallel
from moe_runtime.config import RoutingMethod
from moe_runtime.executors.base import Gemm, LayerInputs, MoEProblem, able_tactics
from moe_runtime.kernels import Stage
from moe_runtime.reference import relative_error
from tests.gpu import support, test_gemm
from tests.gpu.test_gemm import VARIANTS
from tests.gpu.test_layer import COMBINE_BOUND

HALVING = [(name, gemm) for name, gemm in test_gemm.CASES if VARIANTS[name].halves]
EDGES = [rows + more for rows in (0, 64, 128, 192, 256, 320, 448) for more in (-1, 0, 1) if rows + more >= 0]
HIDDEN = (1024, 7168)  # halves beside a whole tile are computed as such only where K is short


def problem_of(hidden: int, experts: int) -> MoEProblem:
    """n of gate_up is 1280, so that tiles of 256 weights are five: an odd number."""
    config = MoEConfig("scheduled", hidden, 640, experts, 8, RoutingMethod.Renormalize)
    return MoEProblem(config, Parallel.parse("tp1"))


def check(variant: str, gemm: Gemm, problem: MoEProblem, sizes: tuple[int, ...]) -> None:
    if variant not in able_tactics(support.executor(), problem, gemm):
        pytest.skip("tiles of 256 weights do not divide this GEMM")
    trial, reference = test_gemm.make_trial(problem, gemm, sizes, seed=4)
    results = [trial.run(variant).clone() for _ in range(3)]  # each finds the counter as the one before left it
    for result in results:
        assert trial.error(variant, result, reference) <= 3e-3
    if not VARIANTS[variant].combines:  # whose sums have no fixed order
        assert all(torch.equal(one.view(torch.uint8), other.view(torch.uint8)) for one, other in pairwise(results))


@pytest.mark.parametrize("hidden", HIDDEN)
@pytest.mark.parametrize(("variant", "gemm"), HALVING)
def test_rows_at_the_edges_of_tiles_and_of_halves(variant: str, gemm: Gemm, hidden: int) -> None:
    check(variant, gemm, problem_of(hidden, len(EDGES)), tuple(EDGES))


@pytest.mark.parametrize("experts", [1, 2, 30, 150])
@pytest.mark.parametrize(("variant", "gemm"), test_gemm.CASES)
def test_last_rounds_of_any_length(variant: str, gemm: Gemm, experts: int) -> None:
    """From fewer tiles than SMs, which share them, to several rounds."""
    problem = problem_of(1024, max(8, experts))
    check(variant, gemm, problem, tuple(100 if e < experts else 0 for e in range(problem.num_local_experts)))


def one_after_another(call: support.Call) -> Tensor:
    """The layer's output with a launch for each of its stages, none of which starts before the last has ended."""
    for stage in (Stage.PERMUTE | Stage.GATHER, Stage.GEMM1 | Stage.ACTIVATION, Stage.GEMM2 | Stage.COMBINE):
        call.run(stage)
        torch.cuda.synchronize()
    return call.output.clone()


@pytest.mark.parametrize("parallel", ["tp1", "ep2"])
@pytest.mark.parametrize("tokens", [1, 8, 21, 40, 170, 300, 3000])
@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("halves", [False, True])
def test_gemms_start_before_what_they_read_is_there(tokens: int, in_place: bool, parallel: str, halves: bool) -> None:
    """Many times, over buffers that hold the ids and results of other tokens: what is read too early would be those.
    Of up to 1,024 slots, 170 tokens, GEMM1 starts while they are sorted; where both halve, GEMM2 while GEMM1 runs."""
    config = MoEConfig("overlapped", 2048, 512, 24, 6, RoutingMethod.Renormalize)
    problem = MoEProblem(config, Parallel.parse(parallel))
    able = {gemm: able_tactics(support.executor(), problem, gemm) for gemm in ("gemm1", "gemm2")}
    tactics = (
        next(name for name in able["gemm1"] if VARIANTS[name].halves == halves and VARIANTS[name].swiglu),
        next(name for name in able["gemm2"] if VARIANTS[name].halves == halves and VARIANTS[name].combines),
    )
    weights, generator = support.weights(problem), torch.Generator("cuda").manual_seed(tokens)
    x = torch.empty(tokens, 2048, device="cuda", dtype=torch.bfloat16)
    ids = torch.empty(tokens, 6, device="cuda", dtype=torch.int32)
    slot_weights = torch.rand(tokens, 6, generator=generator, device="cuda")
    inputs = LayerInputs(x, topk_ids=ids, topk_weights=slot_weights)
    call = support.Call(problem, weights, inputs, tactics)
    if in_place:
        call.output = x
        call.arguments = call.executor.arguments(problem, weights, inputs, tactics, x, call.workspace)
    for _ in range(10):
        # Squared, so that some experts get many rows and some get none.
        ids.copy_((torch.rand(ids.shape, generator=generator, device="cuda") ** 2 * 24).int())
        given = torch.randn(x.shape, generator=generator, device="cuda").bfloat16()
        x.copy_(given)
        expected = one_after_another(call)
        x.copy_(given)
        call.run(Stage.PERMUTE | Stage.GATHER | Stage.GEMM1 | Stage.ACTIVATION | Stage.GEMM2 | Stage.COMBINE)
        assert relative_error(call.output, expected) <= COMBINE_BOUND
