"""How do the number formats compare: time of a layer, its roofs, and its error?

    python -m benchmarks.formats --json FILE [--formats nvfp4,bf16] [--cases deepseek-r1:dep8] [--tokens 1,64]

Every format on every case, on balanced workloads with ready top-k ids, with the fastest pair of tactics and with the
defaults. byte_roof: the busy experts' weights, read once at the card's 4.45 TB/s, over the layer's time. rate_roof: the
FLOPs at the dense rate of the instruction that multiplies (cuBLAS, bf16 or e4m3, in this run) over the layer's time.
error: of a few tokens against `reference_layer`, which rounds where the kernels do.

fp8_block is left out where its blocks of 128 do not divide the model's sizes.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.common import (
    READ_ROOF_TBPS,
    cuda_executor,
    default_pair,
    measured_roofs,
    parse_counts,
    provenance,
    survey,
    survey_layer,
    time_graphs,
    write_json,
)
from moe_runtime import MoEConfig, Parallel
from moe_runtime.errors import MoEError
from moe_runtime.executors.base import GEMMS, LayerInputs, MoEProblem, random_inputs
from moe_runtime.executors.cuda import CudaExecutor
from moe_runtime.formats import FORMATS
from moe_runtime.reference import reference_layer, relative_error
from moe_runtime.weights import ExpertWeights, random_weights
from moe_runtime.workload import kernel_rows, make_workload

CASES = ("qwen3-235b:dep2", "deepseek-r1:dep8", "gpt-oss-120b:tp1", "gpt-oss-120b:ep4")
TOKENS = (1, 8, 32, 128, 512, 2048, 8192)
CHECKED_TOKENS = 8


@dataclass(frozen=True)
class Point:
    """One layer. us, default_us: of the fastest pair of tactics and of the defaults. The roofs' shares are of us."""

    format: str
    case: str
    tokens: int
    us: float
    default_us: float
    byte_roof: float
    rate_roof: float
    error: float
    tactics: tuple[str, str]


def dense_bf16_tflops() -> float:
    """cuBLAS, on random data."""
    size = 8192
    a, b = (torch.randn(size, size, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    return 2 * size**3 / time_graphs({"matmul": lambda: a @ b}, repeats=10)["matmul"] / 1e6


def problem_of(case: str, format: str) -> MoEProblem:
    """Raises InvalidArgument where the format does not serve the model's sizes."""
    model, layout = case.split(":")
    return MoEProblem(dataclasses.replace(MoEConfig.preset(model), format=format), Parallel.parse(layout))


def error_of(
    executor: CudaExecutor, shape: MoEProblem, weights: ExpertWeights, tokens: int, pair: tuple[str, str]
) -> float:
    workload = make_workload(shape.config, shape.parallel, tokens, "balanced")
    inputs = random_inputs(shape, workload, 0, executor.device)
    output = torch.full_like(inputs.hidden_states, torch.nan)
    executor.run(shape, weights, inputs, pair, output, None)
    return sampled_error(shape, weights, inputs, output)


def sampled_error(shape: MoEProblem, weights: ExpertWeights, inputs: LayerInputs, output: Tensor) -> float:
    """Of a few tokens of a layer's output [T, H], against the float reference."""
    assert inputs.topk_ids is not None and inputs.topk_weights is not None
    tokens = len(output)
    some = torch.linspace(0, tokens - 1, min(CHECKED_TOKENS, tokens), device=output.device).long().unique()
    rows, ids, scales = (tensor[some] for tensor in (inputs.hidden_states, inputs.topk_ids, inputs.topk_weights))
    return relative_error(output[some], reference_layer(shape, weights, rows, ids, scales))


def measure(
    executor: CudaExecutor, shape: MoEProblem, weights: ExpertWeights, case: str, tokens: int, tflops: float
) -> Point:
    workload = make_workload(shape.config, shape.parallel, tokens, "balanced")
    surveys = [survey(executor, shape, weights, workload, gemm) for gemm in GEMMS]
    default = default_pair(executor, shape, kernel_rows(tokens, shape.parallel))
    times = survey_layer(executor, shape, weights, workload, surveys, default)
    pair = next(iter(times))
    values = sum(n * k for n, k in map(shape.gemm_shape, GEMMS))
    size = workload.busy_experts * values * shape.config.number_format.weights.bytes_per_value
    us = times[pair]
    return Point(
        shape.config.format,
        case,
        tokens,
        us,
        times[default],
        size / READ_ROOF_TBPS / 1e6 / us,
        2 * workload.local_slots * values / tflops / 1e6 / us,
        error_of(executor, shape, weights, tokens, pair),
        pair,
    )


def run(
    executor: CudaExecutor, cases: list[str], formats: list[str], tokens: list[int], rates: dict[bool, float]
) -> Iterator[Point]:
    for case in cases:
        for format in formats:
            try:
                shape = problem_of(case, format)
            except MoEError:
                continue
            weights = random_weights(shape, device="cuda")
            tflops = rates[shape.config.number_format.weight_layout.multiplies_e4m3]
            for count in tokens:
                yield measure(executor, shape, weights, case, count, tflops)
            del weights


def main(
    json: Annotated[Path | None, typer.Option()] = None,
    cases: str = ",".join(CASES),
    formats: str = ",".join(FORMATS),
    tokens: str = ",".join(map(str, TOKENS)),
) -> None:
    begin = time.perf_counter()
    executor = cuda_executor()
    rates = {True: measured_roofs()["cublas_fp8_TFLOPS"], False: dense_bf16_tflops()}
    points = list(run(executor, cases.split(","), formats.split(","), parse_counts(tokens), rates))
    table = Table("case", "format", "tokens", "us", "default us", "of byte roof", "of rate roof", "error")
    for point in points:
        table.add_row(
            point.case,
            point.format,
            str(point.tokens),
            f"{point.us:.1f}",
            f"{point.default_us:.1f}",
            f"{point.byte_roof:.0%}",
            f"{point.rate_roof:.0%}",
            f"{point.error:.1e}",
        )
    Console(width=120).print(table)
    write_json(
        json,
        {
            "benchmark": "formats",
            "environment": provenance(executor),
            "seconds": time.perf_counter() - begin,
            "dense_tflops": {"e4m3": rates[True], "bf16": rates[False]},
            "points": [dataclasses.asdict(point) for point in points],
        },
    )


if __name__ == "__main__":
    typer.run(main)
