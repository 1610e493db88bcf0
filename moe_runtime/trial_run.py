"""One layer run for show: random rows, the time of a call, and its error against the plain reference."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass

import torch

from .executors.base import GEMMS, MoEProblem
from .layer import FusedMoE
from .reference import reference_layer, relative_error
from .routing import route
from .tuning.plan import Plan
from .weights import ExpertWeights
from .workload import kernel_rows

REPEATS = 7
REFERENCE_TOKENS = 64
"""Tokens that the float64 reference computes, spread evenly: it takes far longer than the layer."""


@dataclass(frozen=True)
class RunResult:
    """rows: of the call. tactics: those that ran, (gemm1, gemm2). us: median microseconds of a call.

    error: against the reference that quantises where the kernels do. format_error: against the same layer on unrounded
    activations, which adds what the format costs.
    """

    rows: int
    tactics: tuple[str, str]
    us: float
    error: float
    format_error: float


def run_once(
    problem: MoEProblem, weights: ExpertWeights, plan: Plan | None, num_tokens: int, seed: int = 0
) -> RunResult:
    """Runs the layer on the rows that `num_tokens` tokens per rank bring, routed by random logits over all experts."""
    layer = FusedMoE(problem.config, problem.parallel, weights, plan)
    rows, device = kernel_rows(num_tokens, problem.parallel), weights.device
    planned = plan.lookup(rows) if plan is not None else None
    gemm1, gemm2 = planned or (layer.executor.default_tactic(problem, gemm, rows) for gemm in GEMMS)

    generator = torch.Generator(device).manual_seed(seed)
    x = torch.randn(rows, problem.config.hidden_size, generator=generator, device=device).to(torch.bfloat16)
    logits = torch.randn(rows, problem.config.num_experts, generator=generator, device=device)
    output = torch.full_like(x, torch.nan)
    layer(x, logits, output=output)

    sample = torch.linspace(0, rows - 1, min(rows, REFERENCE_TOKENS), device=device).round().long()
    ids, topk_weights = route(problem.config, logits[sample])
    error, format_error = (
        relative_error(output[sample], reference_layer(problem, weights, x[sample], ids, topk_weights, quantise))
        for quantise in (True, False)
    )
    us = statistics.median(_timed(layer, x, logits, output) for _ in range(REPEATS))
    return RunResult(rows, (gemm1, gemm2), us, error, format_error)


def _timed(layer: FusedMoE, x: torch.Tensor, logits: torch.Tensor, output: torch.Tensor) -> float:
    on_gpu = x.device.type == "cuda"
    if on_gpu:
        torch.cuda.synchronize()
    start = time.perf_counter()
    layer(x, logits, output=output)
    if on_gpu:
        torch.cuda.synchronize()
    return (time.perf_counter() - start) * 1e6
