"""What the benchmarks share: timing by CUDA graphs, measured roofs, provenance, and the reference points."""

from __future__ import annotations

import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from moe_runtime import MoEConfig, Parallel
from moe_runtime.executors import get_executor
from moe_runtime.executors.base import MoEProblem
from moe_runtime.executors.cuda import CudaExecutor
from moe_runtime.roofs import ROOFS

READ_ROOF_TBPS = ROOFS["NVIDIA H200"].read_tbps
REST_SECONDS = 0.25
REFERENCE_POINTS = Path(__file__).with_name("reference_points_h200.json")
_ROOT = Path(__file__).resolve().parent.parent


def cuda_executor() -> CudaExecutor:
    executor = get_executor("cuda")
    assert isinstance(executor, CudaExecutor)
    return executor


def problem(model: str, parallel: str) -> MoEProblem:
    return MoEProblem(MoEConfig.preset(model), Parallel.parse(parallel))


def parse_tokens(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def capture(call: Callable[[], object], launches: int) -> torch.cuda.CUDAGraph:
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(launches):
            call()
    graph.replay()
    return graph


def time_rested(calls: Mapping[str, Callable[[], object]]) -> dict[str, float]:
    """As time_graphs, but each call alone and after a rest.

    Under sustained load the card's power limit slows large GEMMs by up to 15 %; the reference points were not.
    """
    times = {}
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
    driver = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
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


def write_json(path: Path | None, payload: dict[str, Any]) -> None:
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(payload, indent=1) + "\n")
