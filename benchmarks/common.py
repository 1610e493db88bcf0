"""What the benchmarks share: timing by CUDA graphs, measured roofs, provenance, and the reference points."""

from __future__ import annotations

import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, TypeVar

import torch

from moe_runtime import FP8BlockWeights, MoEConfig, Parallel
from moe_runtime.executors import get_executor
from moe_runtime.executors.base import GEMMS, Executor, Gemm, MoEProblem, TacticPair, able_tactics
from moe_runtime.executors.cuda import CudaExecutor
from moe_runtime.files import replacing
from moe_runtime.roofs import ROOFS
from moe_runtime.tuning import GemmChoice, Plan, PlanEntry, PlanKey
from moe_runtime.tuning.cost import predict
from moe_runtime.tuning.profiler import Trial
from moe_runtime.workload import Workload

READ_ROOF_TBPS = ROOFS["NVIDIA H200"].read_tbps
REST_SECONDS = 0.25
SCOUT_ROUNDS = 2
HOPELESS = 1.5
"""Slower than the fastest by this after scouting, a tactic is not timed further."""
UNLIKELY = 2.0
"""Nor scouted where it is predicted at this many times the least prediction: predictions are lower bounds, which the
fastest exceeds by at most 1.3, so it would be hopeless."""
ROUND_US, TACTIC_US = 1000.0, 10_000.0
"""What a round of a tactic takes at least, as a graph; what all its rounds should take together."""
FEWEST_ROUNDS = 3
PAIR_NEAR = 1.02
"""How near to the fastest alone a GEMM's second tactic must be to race in the layer: there, differences shrink."""
REFERENCE_POINTS = Path(__file__).with_name("reference_points_h200.json")
_ROOT = Path(__file__).resolve().parent.parent

T = TypeVar("T", bound=Hashable)


def cuda_executor() -> CudaExecutor:
    executor = get_executor("cuda")
    assert isinstance(executor, CudaExecutor)
    return executor


def problem(model: str, parallel: str) -> MoEProblem:
    return MoEProblem(MoEConfig.preset(model), Parallel.parse(parallel))


def parse_counts(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def capture(call: Callable[[], object], launches: int) -> torch.cuda.CUDAGraph:
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    # Of this thread alone: NCCL's watchdog asks for its events meanwhile, which would end a capture of all threads.
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        for _ in range(launches):
            call()
    graph.replay()
    return graph


def time_rested(calls: Mapping[str, Callable[[], object]]) -> dict[str, float]:
    """As time_graphs, but each call alone and after a rest.

    Under sustained load the card's power limit slows large GEMMs by up to 15 %; the reference points were not.
    """
    times: dict[str, float] = {}
    for name, call in calls.items():
        time.sleep(REST_SECONDS)
        times |= time_graphs({name: call})
    return times


def time_graphs(
    calls: Mapping[str, Callable[[], object]], repeats: int = 30, window_us: float = 1500.0
) -> dict[str, float]:
    """Median microseconds of one call by name; a graph holds enough calls to fill the window, and graphs take turns."""
    graphs, counts = {}, {}
    for name, call in calls.items():
        counts[name] = max(1, min(40, int(window_us / max(1.0, _once(call)))))
        graphs[name] = capture(call, counts[name])
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, graph in graphs.items():
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            graph.replay()
            end.record()
            end.synchronize()
            samples[name].append(1000 * begin.elapsed_time(end) / counts[name])
    return {name: statistics.median(times) for name, times in samples.items()}


def _once(call: Callable[[], object]) -> float:
    times = []
    for _ in range(3):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        call()
        end.record()
        end.synchronize()
        times.append(1000 * begin.elapsed_time(end))
    return min(times)


@dataclass(frozen=True)
class Survey:
    """Microseconds of one GEMM at one workload by tactic.

    us: of those that are about as fast as the fastest. scouted: rough times of those that scouting found hopeless.
    """

    us: Mapping[str, float]
    scouted: Mapping[str, float]

    @property
    def fastest(self) -> list[str]:
        return sorted(self.us, key=self.us.__getitem__)


def survey(executor: Executor, shape: MoEProblem, weights: FP8BlockWeights, workload: Workload, gemm: Gemm) -> Survey:
    """All tactics of a GEMM in a few milliseconds each; gemm1's with the activation, as `GemmTrial.time` has it."""
    trial = executor.gemm_trial(shape, weights, workload, gemm, seed=0)
    scouted = medians(trial.time(likely_tactics(executor, shape, workload, gemm), SCOUT_ROUNDS))
    limit = HOPELESS * min(scouted.values())
    near = [tactic for tactic, us in scouted.items() if us <= limit]
    return Survey(_steady(trial, near, scouted), {name: us for name, us in scouted.items() if us > limit})


def survey_layer(
    executor: Executor,
    shape: MoEProblem,
    weights: FP8BlockWeights,
    workload: Workload,
    surveys: Sequence[Survey],
    *others: TacticPair,
) -> dict[TacticPair, float]:
    """Microseconds of the layer by pairs of the fastest tactics of its GEMMs, and by other pairs, the fastest first."""
    contenders = []
    for found in surveys:
        first, *second = found.fastest[:2]
        contenders.append([first, *(name for name in second if found.us[name] <= PAIR_NEAR * found.us[first])])
    pairs = list(dict.fromkeys([*((one, two) for one, two in product(*contenders)), *others]))
    trial = executor.layer_trial(shape, weights, workload, seed=0)
    times = _steady(trial, pairs, medians(trial.time(pairs, SCOUT_ROUNDS)))
    return dict(sorted(times.items(), key=lambda item: item[1]))


def default_pair(executor: Executor, shape: MoEProblem, num_rows: int) -> TacticPair:
    gemm1, gemm2 = (executor.default_tactic(shape, gemm, num_rows) for gemm in GEMMS)
    return gemm1, gemm2


def medians(times: Mapping[T, Sequence[float]]) -> dict[T, float]:
    return {name: statistics.median(us) for name, us in times.items()}


def likely_tactics(executor: Executor, shape: MoEProblem, workload: Workload, gemm: Gemm) -> list[str]:
    """Those that can run here and that the cost model, where there is one, does not rule out."""
    able = able_tactics(executor, shape, gemm)
    predicted = {name: us[0] for name, us in predict(executor, shape, gemm, [workload]).items() if name in able}
    limit = UNLIKELY * min(predicted.values(), default=0.0)
    return [name for name in able if predicted.get(name, 0.0) <= limit]


def _steady(trial: Trial[T], names: Sequence[T], scouted: Mapping[T, float]) -> dict[T, float]:
    round_us = max(ROUND_US, statistics.fmean(scouted[name] for name in names))
    return medians(trial.time(names, max(FEWEST_ROUNDS, int(TACTIC_US / round_us))))


def measured_roofs() -> dict[str, float]:
    """Copy bandwidth (read plus write, TB/s) and cuBLAS' dense e4m3 rate (TFLOP/s) of this run, on random data."""
    source = torch.randint(-(1 << 31), 1 << 31, (1 << 30,), dtype=torch.int32, device="cuda")
    target = torch.empty_like(source)
    size = 8192
    a = torch.randn(size, size, device="cuda").to(torch.float8_e4m3fn)
    b = torch.randn(size, size, device="cuda").to(torch.float8_e4m3fn).T
    one = torch.ones((), device="cuda")

    def matmul() -> None:
        torch._scaled_mm(a, b, scale_a=one, scale_b=one, out_dtype=torch.bfloat16, use_fast_accum=True)

    # An elementwise kernel: torch hands a plain copy to the driver, whose copies reach 2.7 TB/s only.
    times = time_graphs({"copy": lambda: torch.bitwise_not(source, out=target), "matmul": matmul}, repeats=20)
    return {
        "copy_TBps": 2 * source.nbytes / times["copy"] / 1e6,
        "cublas_fp8_TFLOPS": 2 * size**3 / times["matmul"] / 1e6,
        "read_TBps": READ_ROOF_TBPS,
    }


def provenance(executor: CudaExecutor) -> dict[str, Any]:
    driver = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").split()[0]  # a line a GPU
    return {
        "gpu": executor.device_name,
        "sms": torch.cuda.get_device_properties(executor.device).multi_processor_count,
        "driver": driver,
        "cuda": torch.version.cuda,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "library_hash": executor.library_hash,
        "commit": _commit(),
    }


def _commit() -> str:
    # A copy of the tree without its history says which commit it is in this file, if at all.
    stamp = _ROOT / "COMMIT"
    if stamp.exists():
        return stamp.read_text().strip()
    return _output("git", "-C", str(_ROOT), "describe", "--always", "--dirty")


def _output(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def reference_points() -> dict[str, Any]:
    points: dict[str, Any] = json.loads(REFERENCE_POINTS.read_text())
    return points


def pinned(problem: MoEProblem, executor: Executor, pair: TacticPair) -> Plan:
    """A plan that runs every call with one pair of tactics."""
    gemm1, gemm2 = (GemmChoice(tactic=tactic, default_tactic=tactic) for tactic in pair)
    return Plan(
        key=PlanKey.of(problem, "random", 1, executor.device_name, executor.library_hash),
        seed=0,
        samples=1,
        margin=0.01,
        confidence=0.95,
        complete=True,
        buckets=(1,),
        entries=(PlanEntry(bucket=1, rows=1, gemm1=gemm1, gemm2=gemm2),),
    )


def write_json(path: Path | None, payload: dict[str, Any]) -> None:
    """At once: whoever is stopped in the middle leaves the file as it was before."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as unfinished:
            unfinished.write_text(json.dumps(payload, indent=1) + "\n")
