"""How do our kernels compare with other libraries', in the same process and in turns?

    python -m benchmarks.peers --json FILE [--rows 1,64,1024] [--only deepgemm-masked,torch-grouped]

Both GEMMs of DeepSeek-R1 on 8 ranks and Qwen3-235B on 2, balanced rows: our fastest kernels beside every peer of
benchmarks/peer_kernels.py that is installed, as CUDA graphs that take turns. Ours is the fastest kernel that leaves
what the peers leave, [rows, N] in bf16; of gemm1, the fastest that activates as well is listed beside it. Where a peer
computes whole layers, so do we. A peer that is not installed, fails, or gives a result that its own numerics cannot
explain is listed with the reason. A peer that breaks the GPU's context ends the run: leave it out with --only.

DeepGEMM compiles each kernel at its first use, about 10 s each with nvcc, into DG_JIT_CACHE_DIR (version 2.8.1; a list
of folders, the first of which is written to). vLLM's wheel has it in vllm/third_party; on PYTHONPATH under its own name
it serves here. The file is written anew after each size.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, Protocol

import torch
import typer
from rich.console import Console
from rich.table import Table

from benchmarks.common import (
    REST_SECONDS,
    capture,
    cuda_executor,
    likely_tactics,
    measured_roofs,
    parse_counts,
    problem,
    provenance,
    survey,
    survey_layer,
    time_graphs,
    write_json,
)
from benchmarks.gemm import CASES
from benchmarks.peer_kernels import GEMM_PEERS, LAYER_PEERS, C, Call, GemmCase, LayerCase, Peer, describe
from moe_runtime import FP8BlockWeights
from moe_runtime.executors.base import GEMMS, Gemm, MoEProblem, random_inputs
from moe_runtime.executors.cuda import CudaExecutor
from moe_runtime.formats.fp8_block import BLOCK
from moe_runtime.kernels import Stage
from moe_runtime.tuning.cost import gemm_bytes
from moe_runtime.weights import random_weights
from moe_runtime.workload import Workload, make_workload

ROWS_PER_EXPERT = (1, 4, 16, 32, 64, 128, 256, 512, 1024, 2048)
FINALISTS = 3
PREFIX = "sm90a_fp8_block_"


@dataclass(frozen=True)
class Raced:
    """us: of ours and of the peers by name. errors: of the peers that ran. failures: reasons of those that did not."""

    us: Mapping[str, float]
    errors: Mapping[str, float]
    failures: Mapping[str, str]


@dataclass(frozen=True)
class Row:
    """One GEMM, or layer, at so many rows per expert.

    ours: the variant, or the pair, that leaves what the peers leave. swiglu_us: of the fastest that activates as well.
    """

    label: str
    each: int
    ours: str
    us: float
    swiglu_us: float | None
    tflops: float
    tbps: float
    raced: Raced

    @property
    def place(self) -> str:
        return f"{self.label} {self.each}"

    @property
    def ratios(self) -> dict[str, float]:
        """Our time over each peer's: below 1 where we are faster."""
        return {name: self.us / us for name, us in self.raced.us.items() if name in self.raced.errors}


@dataclass(frozen=True)
class OurGemm:
    """calls: by variant. case: the operands that they read. kept: what the calls hold addresses of."""

    calls: Mapping[str, Callable[[], None]]
    case: GemmCase
    kept: object


def entrant(peer: Peer[C], case: C) -> tuple[Call, float] | str:
    """What is to be timed of a peer and its error, once that is plausible and it runs as a graph; else why not."""
    try:
        call = peer.prepare(case)
        error = peer.error(case, call())
        capture(call, 1)
    except Exception as failure:  # whatever a peer raises costs only itself
        failure.add_note(f"in {peer.name}")
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # raises where nothing can run any more
        return describe(failure)
    if not error <= peer.tolerance:  # NaN must not pass
        return f"implausible result: relative error {error:.2g}, accepted {peer.tolerance}"
    return call, error


def race(ours: Mapping[str, Callable[[], object]], peers: Sequence[Peer[C]], case: C) -> Raced:
    calls, errors, failures = dict(ours), {}, {}
    for peer in peers:
        entered = entrant(peer, case)
        if isinstance(entered, str):
            failures[peer.name] = entered
        else:
            calls[peer.name], errors[peer.name] = entered
    time.sleep(REST_SECONDS)
    return Raced(time_graphs(calls, repeats=15), errors, failures)


def our_gemm(
    executor: CudaExecutor, shape: MoEProblem, weights: FP8BlockWeights, workload: Workload, gemm: Gemm
) -> OurGemm:
    """Our likely kernels, on rows that our own stages quantised."""
    inputs = random_inputs(shape, workload, 0, executor.device)
    tokens, slots = workload.num_rows, workload.local_slots
    workspace = torch.empty(executor.workspace_bytes(shape, tokens), dtype=torch.uint8, device=executor.device)
    plain = next(name for name in executor.tactics(shape, "gemm2") if executor.variants[name].stores_rows)

    def call(gemm1: str, gemm2: str, stages: Stage) -> Callable[[], None]:
        args = executor.arguments(shape, weights, inputs, (gemm1, gemm2), None, workspace)
        return lambda: executor.launch(args, stages)

    def view(region: str, columns: int, dtype: torch.dtype) -> torch.Tensor:
        return executor.view(shape, workspace, tokens, region, (slots, columns), dtype)

    call(plain, plain, Stage.PERMUTE | Stage.GATHER | Stage.GEMM1 | Stage.ACTIVATION)()
    _, k = shape.gemm_shape(gemm)
    rows, scales, values, value_scales = (
        ("rows", "row_scales", weights.gate_up, weights.gate_up_scale)
        if gemm == "gemm1"
        else ("activation", "activation_scales", weights.down, weights.down_scale)
    )
    # Copies: our own kernels that activate write over the activation's regions.
    case = GemmCase(
        shape,
        slots // shape.num_local_experts,
        view(rows, k, torch.float8_e4m3fn).clone(),
        view(scales, k // BLOCK, torch.float32).clone(),
        values,
        value_scales,
    )
    tactics = likely_tactics(executor, shape, workload, gemm)
    if gemm == "gemm1":
        calls = {name: call(name, plain, Stage.GEMM1) for name in tactics}
    else:
        calls = {name: call(plain, name, Stage.GEMM2) for name in tactics if executor.variants[name].stores_rows}
    return OurGemm(calls, case, kept=(inputs, workspace))


def race_gemm(
    executor: CudaExecutor,
    shape: MoEProblem,
    weights: FP8BlockWeights,
    gemm: Gemm,
    label: str,
    each: int,
    peers: Sequence[Peer[GemmCase]],
) -> Row:
    ours = our_gemm(executor, shape, weights, _workload(shape, each), gemm)
    scouted = time_graphs(ours.calls, repeats=3, window_us=500.0)
    ranked = sorted(scouted, key=scouted.__getitem__)
    fused = [name for name in ranked if executor.variants[name].swiglu]
    finalists = [name for name in ranked if name not in fused][:FINALISTS]
    raced = race({name: ours.calls[name] for name in finalists + fused[:1]}, peers, ours.case)
    best = min(finalists, key=raced.us.__getitem__)
    n, k = shape.gemm_shape(gemm)
    return Row(
        label,
        each,
        best,
        raced.us[best],
        raced.us[fused[0]] if fused else None,
        tflops=2 * shape.num_local_experts * each * n * k / raced.us[best] / 1e6,
        tbps=gemm_bytes([each] * shape.num_local_experts, (n, k)) / raced.us[best] / 1e6,
        raced=raced,
    )


def race_layer(
    executor: CudaExecutor,
    shape: MoEProblem,
    weights: FP8BlockWeights,
    label: str,
    each: int,
    peers: Sequence[Peer[LayerCase]],
) -> Row:
    workload = _workload(shape, each)
    surveys = [survey(executor, shape, weights, workload, gemm) for gemm in GEMMS]
    pair = next(iter(survey_layer(executor, shape, weights, workload, surveys)))
    inputs = random_inputs(shape, workload, 0, executor.device)
    output = torch.empty_like(inputs.hidden_states)
    workspace = torch.empty(executor.workspace_bytes(shape, workload.num_rows), dtype=torch.uint8, device=output.device)
    name = " + ".join(pair)

    def ours() -> None:
        executor.run(shape, weights, inputs, pair, output, workspace)

    raced = race({name: ours}, peers, LayerCase(shape, weights, inputs))
    us, gemms = raced.us[name], [shape.gemm_shape(gemm) for gemm in GEMMS]
    flops = sum(2 * workload.local_slots * n * k for n, k in gemms)
    size = sum(gemm_bytes([each] * shape.num_local_experts, gemm) for gemm in gemms)
    return Row(label, each, name, us, None, flops / us / 1e6, size / us / 1e6, raced)


def _workload(shape: MoEProblem, each: int) -> Workload:
    workload = make_workload(
        shape.config, shape.parallel, each * shape.num_local_experts // shape.config.top_k, "balanced"
    )
    assert set(workload.rows_per_expert.tolist()) == {each}
    return workload


def rows_of(
    executor: CudaExecutor,
    each: Sequence[int],
    gemm_peers: Sequence[Peer[GemmCase]],
    layer_peers: Sequence[Peer[LayerCase]],
) -> Iterator[Row]:
    for case, (model, parallel) in CASES.items():
        shape = problem(model, parallel)
        weights = random_weights(shape, device="cuda")
        for index, gemm in enumerate(GEMMS, 1):
            for count in each:
                yield race_gemm(executor, shape, weights, gemm, f"{case} g{index}", count, gemm_peers)
        for count in each if layer_peers else ():
            yield race_layer(executor, shape, weights, f"{case} layer", count, layer_peers)


def split(peers: Sequence[Peer[C]], only: Sequence[str]) -> tuple[list[Peer[C]], dict[str, str]]:
    """Those that can run here, and of the others the reasons."""
    reasons = {peer.name: "left out by --only" for peer in peers if only and peer.name not in only}
    asked = [peer for peer in peers if peer.name not in reasons]
    reasons |= {peer.name: reason for peer in asked if (reason := peer.available()) is not None}
    return [peer for peer in peers if peer.name not in reasons], reasons


def results_table(rows: Sequence[Row]) -> Table:
    peers = list(dict.fromkeys(name for row in rows for name in row.ratios))
    columns = ("GEMM", "rows/expert", "ours", "us", "TFLOP/s", "TB/s", "with SwiGLU us")
    table = Table(*columns, *(f"{name}: us (ours / it)" for name in peers))
    for row in rows:
        table.add_row(
            row.label,
            str(row.each),
            row.ours.replace(PREFIX, ""),
            f"{row.us:.1f}",
            f"{row.tflops:.0f}",
            f"{row.tbps:.2f}",
            f"{row.swiglu_us:.1f}" if row.swiglu_us else "",
            *(f"{row.raced.us[name]:.1f} ({row.ratios[name]:.2f})" if name in row.ratios else "-" for name in peers),
        )
    return table


class Result(Protocol):
    """Where peers raced, and what came of it."""

    @property
    def place(self) -> str: ...

    @property
    def raced(self) -> Raced: ...


def failures_table(unavailable: Mapping[str, str], rows: Sequence[Result]) -> Table:
    """Every peer that did not run, or not everywhere, once for each reason."""
    table = Table("peer", "where", "why not")
    for name, reason in unavailable.items():
        table.add_row(name, "everywhere", reason)
    places: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        for failure in row.raced.failures.items():
            places.setdefault(failure, []).append(row.place)
    for (name, reason), where in places.items():
        table.add_row(name, ", ".join(islice(where, 3)) + (f" and {len(where) - 3} more" * (len(where) > 3)), reason)
    return table


def as_json(row: Row) -> dict[str, Any]:
    return {
        "label": row.label,
        "rows_per_expert": row.each,
        "ours": row.ours,
        "us": round(row.us, 2),
        "swiglu_us": row.swiglu_us and round(row.swiglu_us, 2),
        "TFLOPS": round(row.tflops, 1),
        "TBps": round(row.tbps, 3),
        "ratios": {name: round(ratio, 4) for name, ratio in row.ratios.items()},
        "raced_us": {name: round(us, 2) for name, us in row.raced.us.items()},
        "errors": dict(row.raced.errors),
        "failures": dict(row.raced.failures),
    }


def main(
    json: Annotated[Path | None, typer.Option()] = None,
    rows: str = "",
    only: Annotated[str, typer.Option(help="Names of peers; all others are left out.")] = "",
) -> None:
    executor, console = cuda_executor(), Console(width=240)
    each = parse_counts(rows) if rows else ROWS_PER_EXPERT
    names = only.split(",") if only else []
    numerics = {peer.name: peer.numerics for peer in GEMM_PEERS} | {peer.name: peer.numerics for peer in LAYER_PEERS}
    if unknown := set(names) - set(numerics):
        raise typer.BadParameter(f"{', '.join(unknown)}: no such peer; there are {', '.join(numerics)}")
    gemm_peers, unavailable = split(GEMM_PEERS, names)
    layer_peers, missing = split(LAYER_PEERS, names)
    unavailable |= missing
    console.print(failures_table(unavailable, []))
    roofs, environment, begin = measured_roofs(), provenance(executor), time.perf_counter()
    done: list[Row] = []
    for row in rows_of(executor, each, gemm_peers, layer_peers):
        done.append(row)
        ratios = ", ".join(f"{name} {ratio:.2f}" for name, ratio in row.ratios.items())
        seconds = time.perf_counter() - begin
        console.print(f"{seconds:6.1f} s: {row.label}, {row.each} rows: {row.us:.1f} us; of {ratios or 'no peer'}")
        payload = {
            "benchmark": "peers",
            "environment": environment,
            "roofs": roofs,
            "numerics": numerics,
            "unavailable": unavailable,
            "results": [as_json(row) for row in done],
            "seconds": seconds,
        }
        write_json(json, payload)
    console.print(results_table(done))
    console.print(numerics)
    console.print(failures_table(unavailable, done))


if __name__ == "__main__":
    typer.run(main)
