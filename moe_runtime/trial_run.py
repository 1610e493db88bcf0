"""One layer run for show: random rows, the time of a call, and its error against the plain reference."""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from .executors.base import GEMMS, LayerInputs, MoEProblem, random_inputs
from .layer import FusedMoE
from .placement import Placements
from .reference import reference_layer, relative_error
from .routing import route
from .tuning.draws import draw
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
    problem: MoEProblem,
    weights: ExpertWeights,
    plan: Plan | None,
    num_tokens: int,
    seed: int = 0,
    placements: Placements | None = None,
) -> RunResult:
    """Runs the layer on the rows that `num_tokens` tokens per rank bring, routed by random logits over all experts.

    placements: of which the problem's config is the physical one. Its layer takes no logits: rows then come with the
    ids of slots, drawn at random over the experts.
    """
    layer = FusedMoE(problem.config, problem.parallel, weights, plan)
    config, device = problem.config, weights.device
    if placements is None:
        rows, generator = kernel_rows(num_tokens, problem.parallel), torch.Generator(device).manual_seed(seed)
        x = torch.randn(rows, config.hidden_size, generator=generator, device=device).to(torch.bfloat16)
        inputs = LayerInputs(x, None, torch.randn(rows, config.num_experts, generator=generator, device=device))
    else:
        inputs = random_inputs(problem, draw(problem, num_tokens, "random", seed, placements=placements), seed, device)
    x, _, logits, _, ids, topk_weights = inputs
    rows, output = len(x), torch.full_like(x, torch.nan)
    planned = plan.lookup(rows) if plan is not None else None
    gemm1, gemm2 = planned or (layer.executor.default_tactic(problem, gemm, rows) for gemm in GEMMS)
    call = functools.partial(layer, x, logits, topk_ids=ids, topk_weights=topk_weights, output=output)
    call()

    sample = torch.linspace(0, rows - 1, min(rows, REFERENCE_TOKENS), device=device).round().long()
    if logits is not None:
        ids, topk_weights = route(config, logits[sample])
    else:
        assert ids is not None and topk_weights is not None
        ids, topk_weights = ids[sample], topk_weights[sample]
    error, format_error = (
        relative_error(output[sample], reference_layer(problem, weights, x[sample], ids, topk_weights, quantise))
        for quantise in (True, False)
    )
    us = statistics.median(_timed(call, device) for _ in range(REPEATS))
    return RunResult(rows, (gemm1, gemm2), us, error, format_error)


def _timed(call: Callable[[], object], device: torch.device) -> float:
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    if on_gpu:
        torch.cuda.synchronize()
    return (time.perf_counter() - start) * 1e6
