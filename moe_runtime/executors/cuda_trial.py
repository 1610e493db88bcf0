"""One grouped GEMM, or one layer, at one workload on a GPU: the result to check, and interleaved timing."""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Sequence
from typing import TYPE_CHECKING, Generic, TypeVar

import torch
from torch import Tensor

from ..activation import swiglu
from ..formats.fp8_block import BLOCK, dequantise_blocks, dequantise_rows, rounding_of_rows
from ..kernels import LayerArguments, Stage
from ..reference import relative_error
from ..weights import FP8BlockWeights
from ..workload import Workload
from .base import Gemm, MoEProblem, TacticPair, able_tactics, random_inputs

if TYPE_CHECKING:
    from .cuda import CudaExecutor

T = TypeVar("T", bound=Hashable)

GRAPH_MICROSECONDS = 1000.0
"""Work captured in one graph: enough that the launch of the graph itself, about 8 us, is below 1 %."""
MAX_LAUNCHES_A_GRAPH = 40
CHECKED_EXPERTS = 6
CHECKED_ROWS_AN_EXPERT = 16


class CudaGemmTrial:
    """Rows are random, quantised by the layer's own stages; the reference reads them back and dequantises.

    alone: times a gemm1 that fuses no activation without the activation's kernel.
    """

    def __init__(
        self,
        executor: CudaExecutor,
        problem: MoEProblem,
        weights: FP8BlockWeights,
        workload: Workload,
        gemm: Gemm,
        seed: int,
        alone: bool = False,
    ) -> None:
        self._workload, self._problem, self._variants = workload, problem, executor.variants
        self._gate_first = weights.gate_first
        tokens, device = workload.num_rows, executor.device
        inputs = random_inputs(problem, workload, seed, device)
        workspace = torch.empty(executor.workspace_bytes(problem, tokens), dtype=torch.uint8, device=device)
        self._kept = (weights, inputs, workspace)  # of which the arguments hold addresses

        def call(gemm1: str, gemm2: str) -> LayerArguments:
            return executor.arguments(problem, weights, inputs, (gemm1, gemm2), None, workspace)

        # Runs as either GEMM and fuses nothing, so that the preparing stages leave their own results.
        plain = next(name for name, variant in executor.variants.items() if not variant.swiglu)
        arguments = {
            name: call(name, plain) if gemm == "gemm1" else call(plain, name)
            for name in able_tactics(executor, problem, gemm)
        }
        n, k = problem.gemm_shape(gemm)
        rows, slots = workload.local_slots, tokens * problem.config.top_k

        def view(region: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
            return executor.view(problem, workspace, tokens, region, shape, dtype)[:rows]

        prepare = Stage.PERMUTE | Stage.GATHER
        if gemm == "gemm1":
            self.tokens = view("rows", (slots, k), torch.float8_e4m3fn)
            self.scales = view("row_scales", (slots, k // BLOCK), torch.float32)
            self._output = view("gemm1_output", (slots, n), torch.bfloat16)
            self._activation = view("activation", (slots, n // 2), torch.float8_e4m3fn)
            self._activation_scales = view("activation_scales", (slots, n // 2 // BLOCK), torch.float32)
            self._expert_weights, self._expert_scales = weights.gate_up, weights.gate_up_scale
        else:
            generator = torch.Generator(device).manual_seed(seed)
            view("gemm1_output", (slots, 2 * k), torch.bfloat16).normal_(generator=generator)
            self.tokens = view("activation", (slots, k), torch.float8_e4m3fn)
            self.scales = view("activation_scales", (slots, k // BLOCK), torch.float32)
            self._output = view("gemm2_output", (slots, n), torch.bfloat16)
            self._expert_weights, self._expert_scales = weights.down, weights.down_scale
            prepare |= Stage.ACTIVATION
        executor.launch(call(plain, plain), prepare)
        stages = Stage.GEMM1 if gemm == "gemm1" else Stage.GEMM2
        if gemm == "gemm1" and not alone:
            stages |= Stage.ACTIVATION

        def launch(tactic: str) -> None:
            executor.launch(arguments[tactic], stages)

        self._launch = launch
        self._timer = _Timer(launch, workload.busy_experts * n * k, device)

    def run(self, tactic: str) -> Tensor:
        """Poisons the output first, so that an element left unwritten shows as NaN."""
        if self._variants[tactic].swiglu:
            self._activation.view(torch.uint8).fill_(0x7F)  # e4m3's NaN
            self._activation_scales.fill_(float("nan"))
            self._launch(tactic)
            return dequantise_rows(self._activation, self._activation_scales)
        self._output.fill_(float("nan"))
        self._launch(tactic)
        return self._output

    def reference(self) -> tuple[Tensor, Tensor]:
        """Rows of a few experts, the fullest and the emptiest among them, in float32 on dequantised operands."""
        counts = self._workload.rows_per_expert.long()
        first_rows = torch.cumsum(counts, 0) - counts
        order = torch.argsort(counts, descending=True, stable=True)
        occupied = order[counts[order] > 0]
        chosen = torch.unique(torch.linspace(0, len(occupied) - 1, min(CHECKED_EXPERTS, len(occupied))).round().long())
        index, values = [], []
        for expert in occupied[chosen].tolist():
            count, first = int(counts[expert]), int(first_rows[expert])
            picks = torch.unique(torch.linspace(0, count - 1, min(CHECKED_ROWS_AN_EXPERT, count)).round().long())
            rows = (first + picks).to(self.tokens.device)
            tokens = dequantise_rows(self.tokens.view(torch.uint8)[rows].view(torch.float8_e4m3fn), self.scales[rows])
            weight = dequantise_blocks(self._expert_weights[expert], self._expert_scales[expert])
            index.append(rows)
            values.append(tokens @ weight.T)
        return torch.cat(index), torch.cat(values)

    def error(self, tactic: str, rows: Tensor, expected: Tensor) -> float:
        if not self._variants[tactic].swiglu:
            return relative_error(rows, expected)
        exact = swiglu(expected, self._gate_first, self._problem.config.clamp_limit)
        beyond = ((rows - exact).abs() - rounding_of_rows(exact)).clamp(min=0)
        return float(beyond.norm() / exact.norm())

    def time(self, tactics: Sequence[str], repeats: int) -> dict[str, list[float]]:
        return self._timer.time(tactics, repeats)


class CudaLayerTrial:
    """`CudaExecutor.run` on random rows; see `base.LayerTrial`."""

    def __init__(
        self, executor: CudaExecutor, problem: MoEProblem, weights: FP8BlockWeights, workload: Workload, seed: int
    ) -> None:
        inputs = random_inputs(problem, workload, seed, executor.device)
        output = torch.empty_like(inputs.hidden_states)
        size = executor.workspace_bytes(problem, workload.num_rows)
        workspace = torch.empty(size, dtype=torch.uint8, device=executor.device)

        def launch(pair: TacticPair) -> None:
            executor.run(problem, weights, inputs, pair, output, workspace)

        hidden, inter = problem.gemm_shape("gemm2")
        self._timer = _Timer(launch, workload.busy_experts * 3 * hidden * inter, executor.device)

    def time(self, pairs: Sequence[TacticPair], repeats: int) -> dict[TacticPair, list[float]]:
        return self._timer.time(pairs, repeats)


@functools.cache
def _flush_buffer(device: torch.device) -> Tensor:
    """Four times L2: overwriting it takes about as long as the host needs to launch a layer."""
    return torch.empty(4 * torch.cuda.get_device_properties(device).L2_cache_size, dtype=torch.uint8, device=device)


class _Timer(Generic[T]):
    """Microseconds of launches by name, in turns.

    Weights larger than the L2 cache are read from memory on every launch, as in a layer; tokens stay in L2, as there.
    Where the weights of the experts with rows are less than a few times L2, launches in a row would find a part of them
    there, which a layer never does, for other layers run in between. Then each launch is timed alone, after L2 was
    overwritten.

    weights_bytes: that a launch reads. launch: holds no reference to who holds the timer, for such a circle would keep
    gigabytes until the garbage collector comes by.
    """

    def __init__(self, launch: Callable[[T], object], weights_bytes: int, device: torch.device) -> None:
        self._launch = launch
        # Kept from heat to heat: to estimate, capture and warm up takes as long as three rounds.
        self._graphs: dict[T, tuple[torch.cuda.CUDAGraph, int]] = {}
        flush = _flush_buffer(device)
        self._flush = flush if weights_bytes < flush.nbytes else None

    def time(self, names: Sequence[T], repeats: int) -> dict[T, list[float]]:
        if self._flush is not None:
            return self._time_cold(names, repeats, self._flush)
        for name in names:
            if name not in self._graphs:
                self._graphs[name] = self._capture(name)
        events: dict[T, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {name: [] for name in names}
        for _ in range(repeats):
            for name in names:
                begin, end = _events()
                begin.record()
                self._graphs[name][0].replay()
                end.record()
                events[name].append((begin, end))
        torch.cuda.synchronize()
        return {
            name: [1000 * begin.elapsed_time(end) / self._graphs[name][1] for begin, end in events[name]]
            for name in names
        }

    def _time_cold(self, names: Sequence[T], repeats: int, flush: Tensor) -> dict[T, list[float]]:
        """Without a graph: overwriting L2 keeps the GPU busy while the host launches, so no launch is waited for."""
        for name in names:
            self._launch(name)
        events: dict[T, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {name: [] for name in names}
        for _ in range(repeats):
            for name in names:
                begin, end = _events()
                flush.zero_()
                begin.record()
                self._launch(name)
                end.record()
                events[name].append((begin, end))
        torch.cuda.synchronize()
        return {name: [1000 * begin.elapsed_time(end) for begin, end in events[name]] for name in names}

    def _capture(self, name: T) -> tuple[torch.cuda.CUDAGraph, int]:
        launches = max(1, min(MAX_LAUNCHES_A_GRAPH, round(GRAPH_MICROSECONDS / self._estimate(name))))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(launches):
                self._launch(name)
        graph.replay()
        return graph, launches

    def _estimate(self, name: T) -> float:
        """The faster of two launches: the first may have to load the kernel."""
        samples = []
        for _ in range(2):
            begin, end = _events()
            begin.record()
            self._launch(name)
            end.record()
            end.synchronize()
            samples.append(1000 * begin.elapsed_time(end))
        return max(1.0, min(samples))


def _events() -> tuple[torch.cuda.Event, torch.cuda.Event]:
    return torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
