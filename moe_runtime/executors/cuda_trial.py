"""One grouped GEMM, or one layer, at one workload on a GPU: the result to check, and interleaved timing."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Hashable, Sequence
from typing import TYPE_CHECKING, Generic, TypeVar

import torch
from torch import Tensor

from ..activation import swiglu
from ..formats import Tokens, Weights
from ..formats.fp8_block import BLOCK, dequantise_rows, rounding_of_rows
from ..formats.tokens import round_rows
from ..formats.weights import dequantise_weights
from ..kernels import LayerArguments, Stage
from ..reference import relative_error
from ..weights import ExpertWeights
from ..workload import Workload
from .base import GEMMS, Gemm, MoEProblem, TacticPair, able_tactics, random_inputs

if TYPE_CHECKING:
    from .cuda import CudaExecutor

T = TypeVar("T", bound=Hashable)

GRAPH_MICROSECONDS = 1000.0
"""Work captured in one graph: enough that the launch of the graph itself, about 8 us, is below 1 %."""
MAX_LAUNCHES_A_GRAPH = 40
ONE = int(torch.ones((), dtype=torch.float32).view(torch.int32))
SLACK = 2.0**-9
"""By how much of its size a value may be off before it is rounded to the tokens' encoding, and so round elsewhere."""
CHECKED_EXPERTS = 6
CHECKED_ROWS_AN_EXPERT = 16


class CudaGemmTrial:
    """Rows are random, quantised by the layer's own stages; the reference reads them back and dequantises.

    gemm1 is timed with the activation and gemm2 with the weighted sum, in kernels of their own where the tactic fuses
    neither. alone: without those kernels.
    """

    def __init__(
        self,
        executor: CudaExecutor,
        problem: MoEProblem,
        weights: ExpertWeights,
        workload: Workload,
        gemm: Gemm,
        seed: int,
        alone: bool = False,
    ) -> None:
        self._workload, self._problem, self._variants = workload, problem, executor.variants
        self._gemm, self._operands, self._formats = gemm, weights.operands, problem.config.number_format
        tokens, device = workload.num_rows, executor.device
        inputs = random_inputs(problem, workload, seed, device)
        workspace = torch.empty(executor.workspace_bytes(problem, tokens), dtype=torch.uint8, device=device)
        output = torch.empty_like(inputs.hidden_states)
        self._kept = (weights, inputs, workspace, output)  # of which the arguments hold addresses

        def call(gemm1: str, gemm2: str) -> LayerArguments:
            return executor.arguments(problem, weights, inputs, (gemm1, gemm2), output, workspace)

        # Runs as either GEMM and fuses nothing, so that the preparing stages leave their own results.
        plain = next(name for name in able_tactics(executor, problem, "gemm2") if executor.variants[name].stores_rows)
        arguments = {
            name: call(name, plain) if gemm == "gemm1" else call(plain, name)
            for name in able_tactics(executor, problem, gemm)
        }
        n, k = problem.gemm_shape(gemm)
        rows, slots = workload.local_slots, tokens * problem.config.top_k

        def view(region: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
            return executor.view(problem, workspace, tokens, region, shape, dtype)[:rows]

        def quantised(region: str, scales: str, width: int) -> tuple[Tensor, Tensor | None]:
            dtype = torch.float8_e4m3fn if self._formats.weight_layout.multiplies_e4m3 else torch.bfloat16
            values = view(region, (slots, width), dtype)
            if self._formats.tokens != Tokens.FP8_BLOCK:
                return values, None
            return values, view(scales, (slots, width // BLOCK), torch.float32)

        prepare = Stage.PERMUTE | Stage.GATHER
        self._origins = view("row_origins", (slots, 2), torch.int32)
        if gemm == "gemm1":
            self.tokens, self.scales = quantised("rows", "row_scales", k)
            self._output = view("gemm1_output", (slots, n), torch.bfloat16)
            inter = problem.local_intermediate_size
            self._activation, self._activation_scales = quantised("activation", "activation_scales", inter)
        else:
            generator = torch.Generator(device).manual_seed(seed)
            width = problem.gemm_shape("gemm1")[0]
            view("gemm1_output", (slots, width), torch.bfloat16).normal_(generator=generator)
            self.tokens, self.scales = quantised("activation", "activation_scales", k)
            self._output = view("gemm2_output", (slots, n), torch.bfloat16)
            prepare |= Stage.ACTIVATION
        executor.launch(call(plain, plain), prepare)
        stages, after = (Stage.GEMM1, Stage.ACTIVATION) if gemm == "gemm1" else (Stage.GEMM2, Stage.COMBINE)
        whole = stages | after
        if not alone:
            stages = whole

        def launch(tactic: str) -> None:
            executor.launch(arguments[tactic], whole if executor.variants[tactic].combines else stages)

        self._arguments, self._launch = arguments, functools.partial(executor.launch, stages=whole)
        weights_bytes = workload.busy_experts * n * k * self._formats.weights.bytes_per_value
        self._timer = _Timer(launch, weights_bytes, device)

    def run(self, tactic: str) -> Tensor:
        """Poisons the output first, so that an element left unwritten shows as NaN."""
        variant, args = self._variants[tactic], LayerArguments.from_buffer_copy(self._arguments[tactic])
        origins = self._origins.clone()
        if variant.gathers or variant.combines:
            # Every row as a token of its own, with weight 1: then gemm1 gathers the rows that lie here, and what gemm2
            # adds to zeros is a row's result.
            self._origins[:, 0] = torch.arange(len(origins), device=origins.device)
            self._origins[:, 1] = ONE
            args.output = self._output.data_ptr()
        self._output.fill_(0.0 if variant.combines else float("nan"))
        if not variant.swiglu:
            self._launch(args)
            self._origins.copy_(origins)
            return self._output
        scales = self._activation_scales
        self._activation.view(torch.uint8).fill_(0xFF)  # a NaN of e4m3, and of bf16
        if scales is not None:
            scales.fill_(float("nan"))
        self._launch(args)
        self._origins.copy_(origins)
        return self._activation.float() if scales is None else dequantise_rows(self._activation, scales)

    def reference(self) -> tuple[Tensor, Tensor]:
        """Rows of a few experts, the fullest and the emptiest among them, in float32 on dequantised operands.

        Of packed gate_up with a gated activation, whose kernels all activate, the activations.
        """
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
            index.append(rows)
            values.append(self._product(expert, rows))
        return torch.cat(index), torch.cat(values)

    def _product(self, expert: int, rows: Tensor) -> Tensor:
        """The rows' exact results f32, with the expert's scale and bias, and activated where every kernel does that."""
        if self.scales is None:
            tokens = self.tokens[rows].float()
        else:
            codes = self.tokens.view(torch.uint8)[rows].view(torch.float8_e4m3fn)
            tokens = dequantise_rows(codes, self.scales[rows])
        o, first = self._operands, self._gemm == "gemm1"
        values, scales = (o.gate_up, o.gate_up_scale) if first else (o.down, o.down_scale)
        factor, bias = (o.gemm1_scale, o.gemm1_bias) if first else (o.gemm2_scale, o.gemm2_bias)
        weight = dequantise_weights(self._formats.weights, values[expert], None if scales is None else scales[expert])
        product = tokens @ weight.T
        if factor is not None:
            product = product * factor[expert]
        if bias is not None:
            product = product + bias[expert]
        if not first or self._formats.weights == Weights.FP8_BLOCK or not self._problem.config.is_gated:
            return product
        clamp = self._problem.config.clamp_limit if o.clamp is None else o.clamp[expert]
        alpha, beta = (None if values is None else values[expert] for values in (o.alpha, o.beta))
        activation = swiglu(product, o.gate_first, clamp, alpha, beta)
        return activation if o.activation_multiplier is None else activation * o.activation_multiplier[expert]

    def error(self, tactic: str, rows: Tensor, expected: Tensor) -> float:
        tokens = self._formats.tokens
        if not self._variants[tactic].swiglu or tokens == Tokens.BF16:
            return relative_error(rows, expected)
        if tokens == Tokens.FP8_BLOCK:
            expected = swiglu(expected, self._operands.gate_first, self._problem.config.clamp_limit)
            beyond = ((rows - expected).abs() - rounding_of_rows(expected)).clamp(min=0)
        else:
            near = [round_rows(tokens, expected * (1 + slack)).float() for slack in (-SLACK, 0.0, SLACK)]
            low, high = torch.stack(near).aminmax(dim=0)
            beyond = (low - rows).clamp(min=0) + (rows - high).clamp(min=0)
        return float(beyond.norm() / expected.norm())

    def time(self, tactics: Sequence[str], repeats: int) -> dict[str, list[float]]:
        return self._timer.time(tactics, repeats)


class CudaLayerTrial:
    """`CudaExecutor.run` on random rows; see `base.LayerTrial`."""

    def __init__(
        self, executor: CudaExecutor, problem: MoEProblem, weights: ExpertWeights, workload: Workload, seed: int
    ) -> None:
        inputs = random_inputs(problem, workload, seed, executor.device)
        output = torch.empty_like(inputs.hidden_states)
        size = executor.workspace_bytes(problem, workload.num_rows)
        workspace = torch.empty(size, dtype=torch.uint8, device=executor.device)

        def launch(pair: TacticPair) -> None:
            executor.run(problem, weights, inputs, pair, output, workspace)

        values = sum(math.prod(problem.gemm_shape(gemm)) for gemm in GEMMS)
        weights_bytes = workload.busy_experts * values * problem.config.number_format.weights.bytes_per_value
        self._timer = _Timer(launch, weights_bytes, executor.device)

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

    def __init__(self, launch: Callable[[T], object], weights_bytes: float, device: torch.device) -> None:
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
