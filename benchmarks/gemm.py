"""Which variant is fastest at how many rows per expert, and how near to the roofs?

    python -m benchmarks.gemm --json FILE

Both GEMMs of DeepSeek-R1 on 8 ranks and Qwen3-235B on 2, balanced rows, CUDA graphs: the kernel alone, of which those
named swiglu do the activation as well. Races whatever the library holds (`python -m codegen build --yardsticks` adds
CUTLASS' collectives), interleaved; then the three fastest are timed again one by one after a rest, because under
sustained load the card's power limit slows large GEMMs by up to 15 %, and neither the reference points nor a layer keep
it under such load.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from benchmarks.common import (
    READ_ROOF_TBPS,
    REST_SECONDS,
    cuda_executor,
    measured_roofs,
    parse_counts,
    problem,
    provenance,
    reference_points,
    write_json,
)
from moe_runtime.executors.base import GEMMS, GemmTrial, able_tactics
from moe_runtime.executors.cuda_trial import CudaGemmTrial
from moe_runtime.weights import random_weights
from moe_runtime.workload import make_workload

CASES = {"DSR1-EP8": ("deepseek-r1", "dep8"), "Qwen3-EP2": ("qwen3-235b", "dep2")}
FINALISTS = 3
ROWS_PER_EXPERT = (1, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048)


def main(json: Annotated[Path | None, typer.Option()] = None, rows: str = "", repeats: int = 15) -> None:
    executor, roofs = cuda_executor(), measured_roofs()
    chosen_rows = parse_counts(rows) if rows else ROWS_PER_EXPERT
    prototype = reference_points()["cutlass_collective_prototype"]
    results: dict[str, Any] = {}
    table = Table(
        "GEMM",
        "rows/expert",
        "best variant",
        "us",
        "prototype us",
        "ratio",
        "TFLOP/s",
        "of cuBLAS",
        "weights TB/s",
        "of roof",
    )
    for case, (model, parallel) in CASES.items():
        shape = problem(model, parallel)
        weights = random_weights(shape, device="cuda")
        for index, gemm in enumerate(GEMMS, 1):
            n, k = shape.gemm_shape(gemm)
            label, groups = f"{case} g{index}", shape.num_local_experts
            measured: dict[str, Any] = {}
            for m in chosen_rows:
                workload = make_workload(shape.config, shape.parallel, m * groups // shape.config.top_k, "balanced")
                assert set(workload.rows_per_expert.tolist()) == {m}
                trial = CudaGemmTrial(executor, shape, weights, workload, gemm, seed=0, alone=True)
                samples = trial.time(able_tactics(executor, shape, gemm), repeats)
                times = {name: round(statistics.median(values), 2) for name, values in samples.items()}
                rested = _rested(trial, sorted(times, key=times.__getitem__)[:FINALISTS])
                best = min(rested, key=rested.__getitem__)
                reference = min(prototype[label]["us_by_rows_per_expert"][str(m)].values())
                tflops = 2 * groups * m * n * k / rested[best] / 1e6
                bandwidth = groups * n * k / rested[best] / 1e6
                measured[str(m)] = {
                    "best": best,
                    "us": rested[best],
                    "prototype_us": reference,
                    "rested_us": rested,
                    "interleaved_us": times,
                    "TFLOPS": round(tflops, 1),
                    "weights_TBps": round(bandwidth, 3),
                }
                table.add_row(
                    label,
                    str(m),
                    best.removeprefix("sm90a_fp8_block_"),
                    f"{rested[best]:.1f}",
                    f"{reference:.1f}",
                    f"{rested[best] / reference:.3f}",
                    f"{tflops:.0f}",
                    f"{tflops / roofs['cublas_fp8_TFLOPS']:.0%}",
                    f"{bandwidth:.2f}",
                    f"{bandwidth / READ_ROOF_TBPS:.0%}",
                )
            results[label] = {"groups": groups, "N": n, "K": k, "by_rows_per_expert": measured}
    Console(width=160).print(table)
    write_json(json, {"benchmark": "gemm", "environment": provenance(executor), "roofs": roofs, "results": results})


def _rested(trial: GemmTrial, tactics: Sequence[str]) -> dict[str, float]:
    times = {}
    for tactic in tactics:
        time.sleep(REST_SECONDS)
        times[tactic] = round(statistics.median(trial.time([tactic], 25)[tactic]), 2)
    return times


if __name__ == "__main__":
    typer.run(main)
