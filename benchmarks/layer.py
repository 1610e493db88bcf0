"""How long does a whole layer take, where does the time go, and how does it compare?

    python -m benchmarks.layer --model deepseek-r1 --parallel dep8 --tokens 1,8,32,128,512,2048,8192 --json FILE

The rank receives a balanced workload with ready top-k ids, as behind a dispatch; tactics are the fastest measured
here for that workload: the two best of each GEMM, then the best of their pairs in the layer. Layers are timed after a
rest, as in benchmarks/gemm.py. Stages are timed alone, so they add up to more than the layer, in which they overlap;
activation and combine are the kernels that a gemm1 and a gemm2 which fuse them spare. Few tokens are permuted and
gathered by one kernel. outside_gemms_us is what the layer takes beside both GEMMs with what they fuse.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from benchmarks.common import (
    cuda_executor,
    default_pair,
    measured_roofs,
    parse_counts,
    problem,
    provenance,
    reference_points,
    time_graphs,
    time_rested,
    write_json,
)
from moe_runtime import FP8BlockWeights
from moe_runtime.executors.base import GEMMS, Gemm, LayerInputs, MoEProblem, TacticPair, able_tactics
from moe_runtime.executors.cuda import CudaExecutor
from moe_runtime.kernels import Stage
from moe_runtime.weights import random_weights
from moe_runtime.workload import Workload, kernel_rows, make_workload

LAYER = ~Stage.ROUTE
STAGES = {
    "permute": Stage.PERMUTE,
    "gather": Stage.GATHER,
    "permute and gather": Stage.PERMUTE | Stage.GATHER,
    "gemm1": Stage.GEMM1,
    "activation": Stage.ACTIVATION,
    "gemm2": Stage.GEMM2,
    "combine": Stage.COMBINE,
}
BANDWIDTH_BOUND = ("gather", "activation", "combine")


def stage_bytes(shape: MoEProblem, workload: Workload) -> dict[Stage, int]:
    """Fewest bytes that a bandwidth-bound stage moves: each input read once, each output written once."""
    hidden, inter = shape.config.hidden_size, shape.config.intermediate_size
    rows, tokens = workload.local_slots, workload.num_tokens
    scaled = 1 + 4 / 128  # an e4m3 value and its share of the scale
    return {
        Stage.GATHER: int(tokens * hidden * 2 + rows * hidden * scaled),
        Stage.ACTIVATION: int(rows * 2 * inter * 2 + rows * inter * scaled),
        Stage.COMBINE: rows * hidden * 2 + tokens * hidden * 2,
    }


@dataclass(frozen=True)
class Point:
    """One number of tokens: microseconds of the layer and its stages, tactics, bytes by stage."""

    times: dict[str, float]
    tactics: TacticPair
    default_tactics: TacticPair
    rows: int
    traffic: dict[str, int]


def measure(executor: CudaExecutor, shape: MoEProblem, weights: FP8BlockWeights, n: int, distribution: str) -> Point:
    workload = make_workload(shape.config, shape.parallel, n, distribution)
    default = default_pair(executor, shape, kernel_rows(n, shape.parallel))
    tactics = _fastest(executor, shape, weights, workload, default)
    ids = workload.topk_ids.cuda()
    x = torch.randn(n, shape.config.hidden_size, device="cuda", dtype=torch.bfloat16)
    logits = torch.randn(n, shape.config.num_experts, device="cuda")
    ready = LayerInputs(x, topk_ids=ids, topk_weights=torch.full(ids.shape, 0.125, device="cuda"))
    output = torch.empty_like(x)
    workspace = torch.empty(executor.workspace_bytes(shape, n), dtype=torch.uint8, device="cuda")

    def call(stages: Stage, names: TacticPair, inputs: LayerInputs = ready) -> Callable[[], None]:
        args = executor.arguments(shape, weights, inputs, names, output, workspace)
        return lambda: executor.launch(args, stages)

    calls = {"layer": call(LAYER, tactics), "default": call(LAYER, default)}
    # Routing over all experts makes another workload than a balanced one, so only its own stage is timed.
    calls["route"] = call(Stage.ROUTE, tactics, LayerInputs(x, routing_logits=logits))
    rows = executor.leaving_rows(default[1])  # leaves activation and combine to kernels of their own
    alone = {
        name: call(stage, (rows, rows) if name in ("activation", "combine") else tactics)
        for name, stage in STAGES.items()
        if name != "gemm2"
    }
    combines = executor.variants[tactics[1]].combines
    alone["gemm2"] = call(Stage.GEMM2 | Stage.COMBINE if combines else Stage.GEMM2, tactics)
    times = time_rested(calls) | time_graphs(alone)
    traffic = {str(stage.name).lower(): size for stage, size in stage_bytes(shape, workload).items()}
    return Point(times, tactics, default, workload.local_slots, traffic)


def main(
    model: str = "deepseek-r1",
    parallel: str = "dep8",
    tokens: str = "1,8,32,128,512,2048,8192",
    json: Annotated[Path | None, typer.Option()] = None,
    distribution: str = "balanced",
) -> None:
    executor, roofs, shape = cuda_executor(), measured_roofs(), problem(model, parallel)
    weights = random_weights(shape, device="cuda")
    peer = reference_points()["vllm_triton_layer"].get(f"{model}-{parallel}", {})
    results: dict[str, Any] = {}
    columns = ("tokens", "layer us", "vLLM us", "ratio", "default us", "route us", "stages us", *BANDWIDTH_BOUND)
    table = Table(*columns)
    for n in parse_counts(tokens):
        point = measure(executor, shape, weights, n, distribution)
        layer_us = point.times["layer"]
        peer_us = peer.get(str(n), {}).get("layer_us")
        rates = {name: size / point.times[name] / 1e6 for name, size in point.traffic.items()}
        results[str(n)] = {
            "us": {name: round(value, 2) for name, value in point.times.items()},
            "vllm_us": peer_us,
            "gemm_tactics": point.tactics,
            "default_tactics": point.default_tactics,
            "outside_gemms_us": round(layer_us - point.times["gemm1"] - point.times["gemm2"], 2),
            "rows_per_expert": point.rows / shape.num_local_experts,
            "bytes": point.traffic,
            "TBps": {name: round(rate, 3) for name, rate in rates.items()},
            "of_copy_roof": {name: round(rate / roofs["copy_TBps"], 3) for name, rate in rates.items()},
        }
        table.add_row(
            str(n),
            f"{layer_us:.1f}",
            f"{peer_us:.1f}" if peer_us else "-",
            f"{layer_us / peer_us:.3f}" if peer_us else "-",
            f"{point.times['default']:.1f}",
            f"{point.times['route']:.1f}",
            " ".join(f"{point.times[name]:.1f}" for name in STAGES),
            *(f"{rates[name]:.2f} ({rates[name] / roofs['copy_TBps']:.0%})" for name in BANDWIDTH_BOUND),
        )
    console = Console(width=170)
    console.print(f"{model} {parallel}, {distribution}; stages: {', '.join(STAGES)}; TB/s (of the copy roof)")
    console.print({name: round(value, 2) for name, value in roofs.items()})
    console.print(table)
    payload = {"benchmark": "layer", "model": model, "parallel": parallel, "distribution": distribution}
    write_json(json, payload | {"environment": provenance(executor), "roofs": roofs, "results": results})


def _fastest(
    executor: CudaExecutor, shape: MoEProblem, weights: FP8BlockWeights, workload: Workload, default: TacticPair
) -> TacticPair:
    """Of the fastest three of either GEMM and the default: whole layers differ from what their GEMMs add up to."""
    one, other = (_contenders(executor, shape, weights, workload, gemm) for gemm in GEMMS)
    pairs = dict.fromkeys([*product(one, other), default])
    times = executor.layer_trial(shape, weights, workload, seed=0).time(list(pairs), 15)
    return min(times, key=lambda pair: statistics.median(times[pair]))


def _contenders(
    executor: CudaExecutor, shape: MoEProblem, weights: FP8BlockWeights, workload: Workload, gemm: Gemm
) -> list[str]:
    able = able_tactics(executor, shape, gemm)
    samples = executor.gemm_trial(shape, weights, workload, gemm, seed=0).time(able, 9)
    return sorted(able, key=lambda name: statistics.median(samples[name]))[:3]


if __name__ == "__main__":
    typer.run(main)
