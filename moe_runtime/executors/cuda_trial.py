"""One grouped GEMM at one workload on a GPU: the result to check, and interleaved timing by CUDA graphs."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..formats.fp8_block import BLOCK, dequantise_blocks, dequantise_rows
from ..kernels import LayerArguments, Stage
from ..weights import FP8BlockWeights
from ..workload import Workload
from .base import Gemm, LayerInputs, MoEProblem

if TYPE_CHECKING:
    from .cuda import CudaExecutor

GRAPH_MICROSECONDS = 2000.0
"""Work captured in one graph: enough that the launch of the graph itself, about 8 us, is below 1 %."""
MAX_LAUNCHES_A_GRAPH = 40
CHECKED_EXPERTS = 6
CHECKED_ROWS_AN_EXPERT = 16


class CudaGemmTrial:
    """Rows are random, quantised by the layer's own stages; the reference reads them back and dequantises.

    Weights larger than the L2 cache are read from memory on every launch, as in a layer; tokens stay in L2, as there.
    Where the weights of the experts with rows fit in L2, launches in a row would find them there, which a layer never
    does, for other layers run in between. Then each launch is timed alone, after L2 was overwritten.
    """

    def __init__(
        self,
        executor: CudaExecutor,
        problem: MoEProblem,
        weights: FP8BlockWeights,
        workload: Workload,
        gemm: Gemm,
        seed: int,
    ) -> None:
        self._executor, self._weights, self._workload = executor, weights, workload
        self._stage = Stage.GEMM1 if gemm == "gemm1" else Stage.GEMM2
        config, tokens, device = problem.config, workload.num_rows, executor.device
        generator = torch.Generator(device).manual_seed(seed)
        ids = workload.topk_ids.to(device)
        self._inputs = LayerInputs(
            torch.randn(tokens, config.hidden_size, generator=generator, device=device, dtype=torch.bfloat16),
            topk_ids=ids,
            topk_weights=torch.ones(ids.shape, device=device),
        )
        self._workspace = torch.empty(executor.workspace_bytes(problem, tokens), dtype=torch.uint8, device=device)
        names = executor.tactics(problem, gemm)
        self._arguments: dict[str, LayerArguments] = {
            name: executor.arguments(problem, weights, self._inputs, (name, name), None, self._workspace)
            for name in names
        }
        n, k = problem.gemm_shape(gemm)
        self._rows = workload.local_slots
        slots = tokens * config.top_k

        def view(region: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
            return executor.view(problem, self._workspace, tokens, region, shape, dtype)[: self._rows]

        prepare = Stage.PERMUTE | Stage.GATHER
        if gemm == "gemm1":
            self.tokens = view("rows", (slots, k), torch.float8_e4m3fn)
            self.scales = view("row_scales", (slots, k // BLOCK), torch.float32)
            self._output = view("gemm1_output", (slots, n), torch.bfloat16)
            self._expert_weights, self._expert_scales = weights.gate_up, weights.gate_up_scale
        else:
            view("gemm1_output", (slots, 2 * k), torch.bfloat16).normal_(generator=generator)
            self.tokens = view("activation", (slots, k), torch.float8_e4m3fn)
            self.scales = view("activation_scales", (slots, k // BLOCK), torch.float32)
            self._output = view("gemm2_output", (slots, n), torch.bfloat16)
            self._expert_weights, self._expert_scales = weights.down, weights.down_scale
            prepare |= Stage.ACTIVATION
        executor.launch(self._arguments[names[0]], prepare)
        l2_bytes = torch.cuda.get_device_properties(device).L2_cache_size
        weights_bytes = int((workload.rows_per_expert > 0).sum()) * n * k
        self._flush = torch.empty(2 * l2_bytes, dtype=torch.uint8, device=device) if weights_bytes < l2_bytes else None

    def run(self, tactic: str) -> Tensor:
        """Poisons the output first, so that an element left unwritten shows as NaN."""
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

    def time(self, tactics: Sequence[str], repeats: int) -> dict[str, list[float]]:
        if self._flush is not None:
            return self._time_cold(tactics, repeats, self._flush)
        graphs = {tactic: self._capture(tactic) for tactic in tactics}
        events = {
            tactic: [
                (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)
            ]
            for tactic in tactics
        }
        for repeat in range(repeats):
            for tactic in tactics:
                begin, end = events[tactic][repeat]
                begin.record()
                graphs[tactic][0].replay()
                end.record()
        torch.cuda.synchronize()
        return {
            tactic: [1000 * begin.elapsed_time(end) / graphs[tactic][1] for begin, end in events[tactic]]
            for tactic in tactics
        }

    def _time_cold(self, tactics: Sequence[str], repeats: int, flush: Tensor) -> dict[str, list[float]]:
        """Without a graph: overwriting L2 keeps the GPU busy while the host launches, so no launch is waited for."""
        for tactic in tactics:
            self._launch(tactic)
        events: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {tactic: [] for tactic in tactics}
        for _ in range(repeats):
            for tactic in tactics:
                begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                flush.zero_()
                begin.record()
                self._launch(tactic)
                end.record()
                events[tactic].append((begin, end))
        torch.cuda.synchronize()
        return {tactic: [1000 * begin.elapsed_time(end) for begin, end in events[tactic]] for tactic in tactics}

    def _launch(self, tactic: str) -> None:
        self._executor.launch(self._arguments[tactic], self._stage)

    def _capture(self, tactic: str) -> tuple[torch.cuda.CUDAGraph, int]:
        launches = max(1, min(MAX_LAUNCHES_A_GRAPH, round(GRAPH_MICROSECONDS / self._estimate(tactic))))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(launches):
                self._launch(tactic)
        graph.replay()
        return graph, launches

    def _estimate(self, tactic: str) -> float:
        samples = []
        for _ in range(3):
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            self._launch(tactic)
            end.record()
            end.synchronize()
            samples.append(1000 * begin.elapsed_time(end))
        return max(1.0, statistics.median(samples))
