"""Every compiled fp8_block variant against a float64 reference at ragged group sizes, on both GEMMs of two models."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import Tensor

from moe_runtime.executors.base import GEMMS, Gemm, MoEProblem
from moe_runtime.executors.cuda_trial import CudaGemmTrial
from moe_runtime.formats import WeightLayout
from moe_runtime.kernels import library_path, load_library
from moe_runtime.reference import relative_error
from tests.gpu import support

# Without a GPU a library of an earlier checkout may lie here, which does not load.
LOADED = load_library("sm_90a").variants if torch.cuda.is_available() and library_path("sm_90a") else {}
VARIANTS = {name: variant for name, variant in LOADED.items() if variant.weights == WeightLayout.FP8_BLOCK}
CASES = [
    (name, gemm)
    for gemm in GEMMS
    for name, variant in VARIANTS.items()
    if not (variant.combines if gemm == "gemm1" else variant.swiglu)
]


def make_trial(problem: MoEProblem, gemm: Gemm, sizes: tuple[int, ...], seed: int) -> tuple[CudaGemmTrial, Tensor]:
    """A GEMM of groups of these sizes, and its result in float64."""
    weights, workload = support.weights(problem), support.ragged_workload(problem, sizes)
    trial = CudaGemmTrial(support.executor(), problem, weights, workload, gemm, seed=seed)
    weight, scale = (weights.gate_up, weights.gate_up_scale) if gemm == "gemm1" else (weights.down, weights.down_scale)
    return trial, support.grouped_reference(trial.tokens, trial.scales, weight, scale, workload.rows_per_expert)


@functools.lru_cache(maxsize=1)
def trial_and_reference(problem_name: str, gemm: Gemm) -> tuple[CudaGemmTrial, Tensor]:
    return make_trial(support.PROBLEMS[problem_name], gemm, support.RAGGED, seed=2)


@pytest.mark.parametrize("problem_name", support.PROBLEMS)
@pytest.mark.parametrize(("variant", "gemm"), CASES)
def test_ragged_groups(problem_name: str, gemm: Gemm, variant: str) -> None:
    trial, reference = trial_and_reference(problem_name, gemm)
    out = trial.run(variant)
    assert trial.error(variant, out, reference) <= 3e-3
    if VARIANTS[variant].swiglu:  # a worst element of e4m3 says nothing of the GEMM
        return
    worst = ((out.double() - reference).abs() / reference.abs().clamp(min=reference.std().item())).max().item()
    assert worst <= 2e-2


@pytest.mark.parametrize("problem_name", support.PROBLEMS)
def test_trial_reference_agrees(problem_name: str) -> None:
    trial, reference = trial_and_reference(problem_name, "gemm1")
    index, values = trial.reference()
    assert len(index) >= 16
    assert relative_error(values, reference[index]) <= 1e-5


@pytest.mark.parametrize("sizes", [(0,), (0, 1), (1,), (513, 0, 0, 0)], ids=str)
@pytest.mark.parametrize(("variant", "gemm"), CASES)
def test_sparse_groups(variant: str, gemm: Gemm, sizes: tuple[int, ...]) -> None:
    trial, reference = make_trial(support.PROBLEMS["qwen3-235b-dep2"], gemm, sizes, seed=3)
    out = trial.run(variant)
    torch.cuda.synchronize()
    assert len(out) == len(reference)
    if sizes != (0,):
        assert trial.error(variant, out, reference) <= 3e-3
