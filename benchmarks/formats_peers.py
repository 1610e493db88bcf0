"""Are our layers of MXFP4 weights as fast as other libraries', in the same process and in turns?

    python -m benchmarks.formats_peers --check
    python -m benchmarks.formats_peers --json FILE [--cases gpt-oss-120b:tp1] [--tokens 1,64] [--only marlin]

A whole layer from ready top-k ids on balanced workloads: bf16_mxfp4 and fp8_mxfp4 with their fastest pairs of tactics,
and every peer of benchmarks/peer_formats.py, on the same codes and rows, as CUDA graphs that take turns. errors: of a
few tokens against the float reference. A peer that is not installed, fails or is implausible is listed with the reason.

--check only runs each peer on small layers, in seconds, and needs no kernels of ours. The file is written anew after
each point.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from benchmarks.common import cuda_executor, parse_counts, provenance, survey, survey_layer, write_json
from benchmarks.formats import TOKENS, problem_of, sampled_error
from benchmarks.peer_formats import PEERS, PackedCase, as_gpt_oss
from benchmarks.peer_kernels import Peer
from benchmarks.peers import Raced, entrant, failures_table, race, split
from moe_runtime import MoEConfig, Parallel
from moe_runtime.executors.base import GEMMS, MoEProblem, random_inputs
from moe_runtime.executors.cuda import CudaExecutor
from moe_runtime.weights import PackedWeights
from moe_runtime.workload import Workload, make_workload

CASES = ("qwen3-235b:dep2", "deepseek-r1:dep8", "gpt-oss-120b:tp1")
FORMATS = ("bf16_mxfp4", "fp8_mxfp4")
"""Ours. Peers take the rows as they are, as the first does."""
WHOLE = tuple(peer.name for peer in PEERS if peer.whole)
CHECKED = ((1024, 512), (2880, 2880))
"""Hidden and intermediate sizes, with and without a whole number of 128s."""
CHECKED_EXPERTS, CHECKED_TOP_K, CHECKED_TOKENS = 8, 4, (4, 512)


@dataclass(frozen=True)
class Point:
    """One layer. tactics, errors: of ours by format. raced: also has our times, by format."""

    case: str
    tokens: int
    tactics: Mapping[str, tuple[str, str]]
    errors: Mapping[str, float]
    raced: Raced

    @property
    def place(self) -> str:
        return f"{self.case} {self.tokens}"

    @property
    def ratios(self) -> dict[str, dict[str, float]]:
        """By format, our time over each peer's: below 1 where we are faster."""
        us = self.raced.us
        return {format: {peer: us[format] / us[peer] for peer in self.raced.errors} for format in self.tactics}

    def worst(self, format: str) -> float | None:
        """Our time over that of the fastest peer that does all that we do, if any ran."""
        return max((ratio for peer, ratio in self.ratios[format].items() if peer in WHOLE), default=None)


def measure(
    executor: CudaExecutor,
    weights: Mapping[str, PackedWeights],
    case: str,
    tokens: int,
    peers: Sequence[Peer[PackedCase]],
) -> Point:
    calls: dict[str, Callable[[], None]] = {}
    layers, tactics, errors = {}, {}, {}
    for format, ours in weights.items():
        shape = problem_of(case, format)
        workload = make_workload(shape.config, shape.parallel, tokens, "balanced")
        surveys = [survey(executor, shape, ours, workload, gemm) for gemm in GEMMS]
        tactics[format] = next(iter(survey_layer(executor, shape, ours, workload, surveys)))
        layers[format] = packed_case(shape, ours, workload)
        calls[format], errors[format] = our_layer(executor, layers[format], tactics[format])
    return Point(case, tokens, tactics, errors, race(calls, peers, layers[FORMATS[0]]))


def packed_case(shape: MoEProblem, weights: PackedWeights, workload: Workload) -> PackedCase:
    return PackedCase(shape, weights, random_inputs(shape, workload, 0, weights.device))


def our_layer(executor: CudaExecutor, case: PackedCase, pair: tuple[str, str]) -> tuple[Callable[[], None], float]:
    """What is to be timed, and its error."""
    rows = case.inputs.hidden_states
    output = torch.full_like(rows, torch.nan)
    workspace = torch.empty(executor.workspace_bytes(case.shape, len(rows)), dtype=torch.uint8, device=rows.device)

    def call() -> None:
        executor.run(case.shape, case.weights, case.inputs, pair, output, workspace)

    call()
    return call, sampled_error(case.shape, case.weights, case.inputs, output)


def points(
    executor: CudaExecutor, cases: Sequence[str], tokens: Sequence[int], peers: Sequence[Peer[PackedCase]]
) -> Iterator[Point]:
    for case in cases:
        weights = our_weights(problem_of(case, FORMATS[0]), "cuda")
        for count in tokens:
            yield measure(executor, weights, case, count, peers)


def our_weights(shape: MoEProblem, device: str) -> dict[str, PackedWeights]:
    """The same codes and factors in each of our formats."""
    weights = PackedWeights.random(shape.config, shape.num_local_experts, device=device, tp_size=shape.parallel.tp_size)
    return {format: dataclasses.replace(as_gpt_oss(weights), format=format) for format in FORMATS}


def check(peers: Sequence[Peer[PackedCase]], device: str = "cuda") -> Iterator[tuple[str, str, str, float]]:
    """(peer, layer, relative error or reason, seconds) of each peer on each small layer."""
    for hidden, inter in CHECKED:
        config = MoEConfig("small", hidden, inter, CHECKED_EXPERTS, CHECKED_TOP_K, format=FORMATS[0])
        shape = MoEProblem(config, Parallel.parse("tp1"))
        weights = our_weights(shape, device)[FORMATS[0]]
        for count in CHECKED_TOKENS:
            case = packed_case(shape, weights, make_workload(config, shape.parallel, count, "balanced"))
            for peer in peers:
                begin = time.perf_counter()
                entered = entrant(peer, case)
                result = entered if isinstance(entered, str) else f"error {entered[1]:.1e}"
                yield peer.name, f"{hidden} x {inter}, {count} tokens", result, time.perf_counter() - begin


def results_table(done: Sequence[Point]) -> Table:
    peers = list(dict.fromkeys(peer for point in done for peer in point.raced.errors))
    timed = [*FORMATS, *peers]
    table = Table("case", "tokens", *(f"{name} us" for name in timed), *(f"{name} / fastest peer" for name in FORMATS))
    for point in done:
        us, worst = point.raced.us, [point.worst(format) for format in FORMATS]
        table.add_row(
            point.case,
            str(point.tokens),
            *(f"{us[name]:.1f}" if name in us else "-" for name in timed),
            *("-" if ratio is None else f"{ratio:.2f}" for ratio in worst),
        )
    return table


def as_json(point: Point) -> dict[str, Any]:
    return {
        "case": point.case,
        "tokens": point.tokens,
        "us": {name: round(us, 2) for name, us in point.raced.us.items()},
        "ratios": {
            format: {peer: round(ratio, 4) for peer, ratio in ratios.items()} for format, ratios in point.ratios.items()
        },
        "errors": {**point.errors, **point.raced.errors},
        "tactics": dict(point.tactics),
        "failures": dict(point.raced.failures),
    }


def main(
    json: Annotated[Path | None, typer.Option()] = None,
    cases: str = ",".join(CASES),
    tokens: str = ",".join(map(str, TOKENS)),
    only: Annotated[str, typer.Option(help="Names of peers; all others are left out.")] = "",
    only_check: Annotated[bool, typer.Option("--check", help="Run the peers on small layers; time nothing.")] = False,
) -> None:
    console, names = Console(width=200), only.split(",") if only else []
    numerics = {peer.name: peer.numerics for peer in PEERS}
    if unknown := set(names) - set(numerics):
        raise typer.BadParameter(f"{', '.join(unknown)}: no such peer; there are {', '.join(numerics)}")
    peers, unavailable = split(PEERS, names)
    console.print(failures_table(unavailable, []))
    if only_check:
        for peer, layer, result, seconds in check(peers) if peers else ():
            console.print(f"{peer}, {layer}: {result} ({seconds:.1f} s)")
        return
    executor, begin = cuda_executor(), time.perf_counter()
    environment = provenance(executor)
    done: list[Point] = []
    for point in points(executor, cases.split(","), parse_counts(tokens), peers):
        done.append(point)
        seconds = time.perf_counter() - begin
        times = ", ".join(f"{name} {us:.1f}" for name, us in point.raced.us.items())
        console.print(f"{seconds:6.1f} s: {point.place}: {times}")
        payload = {
            "benchmark": "formats_peers",
            "environment": environment,
            "numerics": numerics,
            "unavailable": unavailable,
            "points": [as_json(one) for one in done],
            "seconds": seconds,
        }
        write_json(json, payload)
    console.print(results_table(done))
    console.print(numerics)
    console.print(failures_table(unavailable, done))


if __name__ == "__main__":
    typer.run(main)
