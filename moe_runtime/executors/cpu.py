"""The CPU executor: plain torch, with the CUDA path's quantisation points, so that both give the same layer.

A GEMM's operands are dequantised to fp32, which loses nothing against scaling e4m3 products, and accumulated there.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from itertools import accumulate
from typing import TypeVar

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from ..activation import swiglu
from ..errors import InvalidArgument
from ..formats import fp8_block
from ..kernels import KernelVariant
from ..reference import relative_error
from ..routing import route
from ..weights import FP8BlockWeights
from ..workload import Workload
from .base import Gemm, LayerInputs, MoEProblem, TacticPair, random_inputs

T = TypeVar("T", bound=Hashable)

# Largest padded operand that a batched tactic allocates at once; a skewed routing would otherwise need L times more.
_PADDED_BYTES = 256 << 20
# A segment grows while padding stays below this share of its rows.
_PADDING = 1.25
# Rows of a trial that the reference computes; more of them would take longer than the tactics.
_REFERENCE_ROWS = 128


def per_expert_loop(rows: Tensor, counts: list[int], weights: Tensor) -> Tensor:
    """One matmul an expert that has rows."""
    out = rows.new_empty(rows.shape[0], weights.shape[1], dtype=torch.bfloat16)
    for expert, (start, stop) in enumerate(_spans(counts)):
        if start < stop:
            out[start:stop] = rows[start:stop] @ weights[expert].T
    return out


def padded_batch(rows: Tensor, counts: list[int], weights: Tensor) -> Tensor:
    """One batched matmul over all experts, each padded to the rows of the fullest."""
    out = rows.new_empty(rows.shape[0], weights.shape[1], dtype=torch.bfloat16)
    height = max(counts)
    step = max(1, _PADDED_BYTES // max(1, height * sum(weights.shape[1:]) * rows.element_size()))
    spans = _spans(counts)
    for first in range(0, len(counts), step):
        last = min(first + step, len(counts))
        part = slice(spans[first][0], spans[last - 1][1])
        out[part] = _padded(rows[part], counts[first:last], weights[first:last], height)
    return out


def sorted_segments(rows: Tensor, counts: list[int], weights: Tensor) -> Tensor:
    """One batched matmul for each run of neighbouring experts with about as many rows; none for empty experts."""
    out = rows.new_empty(rows.shape[0], weights.shape[1], dtype=torch.bfloat16)
    spans = _spans(counts)
    budget = _PADDED_BYTES // (sum(weights.shape[1:]) * rows.element_size())
    for first, last in _segments(counts, budget):
        part, segment = slice(spans[first][0], spans[last - 1][1]), counts[first:last]
        height = max(segment)
        if min(segment) == height:
            batch = rows[part].view(last - first, height, -1)
            out[part] = torch.bmm(batch, weights[first:last].mT).flatten(0, 1)
        else:
            out[part] = _padded(rows[part], segment, weights[first:last], height)
    return out


def grouped_mm(rows: Tensor, counts: list[int], weights: Tensor) -> Tensor:
    """torch's own grouped matmul over row offsets."""
    if not rows.shape[0]:
        return rows.new_empty(0, weights.shape[1], dtype=torch.bfloat16)
    offsets = torch.tensor(list(accumulate(counts)), dtype=torch.int32)
    result: Tensor = torch._grouped_mm(rows, weights.mT, offs=offsets)
    return result.to(torch.bfloat16)


TACTICS: dict[str, Callable[[Tensor, list[int], Tensor], Tensor]] = {
    tactic.__name__: tactic for tactic in (per_expert_loop, padded_batch, sorted_segments, grouped_mm)
}


class CpuExecutor:
    """Runs layers with plain torch; see `base.Executor` for the interface."""

    name = "cpu"
    device_name = "cpu"
    library_hash = f"torch-{torch.__version__}"
    sm_count = 0
    variants: Mapping[str, KernelVariant] = {}

    def __init__(self) -> None:
        # Dequantising takes longer than the GEMMs of a small batch, so it happens once. Weak keys: the fp32 copy is
        # four times the size of the weights and must go when they go.
        self._dense = WeakTensorKeyDictionary()

    def free_bytes(self) -> None:
        """None: trials take little beside the weights."""

    def tactics(self, problem: MoEProblem, gemm: Gemm) -> tuple[str, ...]:
        return tuple(TACTICS)

    def default_tactic(self, problem: MoEProblem, gemm: Gemm, num_rows: int) -> str:
        """per_expert_loop: whatever the routing it neither pads nor reads the weights of an idle expert."""
        return per_expert_loop.__name__

    def can_implement(self, problem: MoEProblem, gemm: Gemm, tactic: str) -> str | None:
        if tactic not in TACTICS:
            return f"no such tactic on the CPU; there are {', '.join(TACTICS)}"
        if tactic == grouped_mm.__name__ and not hasattr(torch, "_grouped_mm"):
            return f"torch {torch.__version__} has no _grouped_mm"
        return None

    def workspace_bytes(self, problem: MoEProblem, num_tokens: int) -> int:
        return 0

    @torch.no_grad()
    def run(
        self,
        problem: MoEProblem,
        weights: FP8BlockWeights,
        inputs: LayerInputs,
        tactics: tuple[str, str],
        output: Tensor,
        workspace: Tensor | None,
        finalize: bool = True,
    ) -> tuple[Tensor, Tensor, Tensor] | None:
        topk_ids, topk_weights = self._topk(problem, inputs)
        slots, permuted_row, counts = _permute(problem, topk_ids)
        if inputs.hidden_states_scale is None:
            values, scale = fp8_block.quantise_rows(inputs.hidden_states)
        else:
            values, scale = inputs.hidden_states, inputs.hidden_states_scale
        rows = fp8_block.dequantise_rows(values, scale)[slots // topk_ids.shape[1]]

        gate_up = self._matmul(problem, "gemm1", tactics[0], rows, counts, weights.gate_up, weights.gate_up_scale)
        activation = swiglu(gate_up, weights.gate_first, problem.config.clamp_limit)
        rows = fp8_block.dequantise_rows(*fp8_block.quantise_rows(activation))
        result = self._matmul(problem, "gemm2", tactics[1], rows, counts, weights.down, weights.down_scale)
        if not finalize:
            return result, topk_weights, permuted_row
        _combine(result, topk_weights, permuted_row, output)
        return None

    def gemm_trial(
        self, problem: MoEProblem, weights: FP8BlockWeights, workload: Workload, gemm: Gemm, seed: int
    ) -> CpuGemmTrial:
        counts: list[int] = workload.rows_per_expert.tolist()
        values, scale = (
            (weights.gate_up, weights.gate_up_scale) if gemm == "gemm1" else (weights.down, weights.down_scale)
        )
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(sum(counts), values.shape[2], generator=generator)
        rows = fp8_block.dequantise_rows(*fp8_block.quantise_rows(x))
        return CpuGemmTrial(rows, counts, values, scale, self._dequantised(values, scale))

    def layer_trial(
        self, problem: MoEProblem, weights: FP8BlockWeights, workload: Workload, seed: int
    ) -> CpuLayerTrial:
        return CpuLayerTrial(self, problem, weights, random_inputs(problem, workload, seed, torch.device("cpu")))

    def _topk(self, problem: MoEProblem, inputs: LayerInputs) -> tuple[Tensor, Tensor]:
        if inputs.routing_logits is not None:
            return route(problem.config, inputs.routing_logits, inputs.routing_bias)
        assert inputs.topk_ids is not None and inputs.topk_weights is not None
        experts = problem.config.num_experts
        bad = inputs.topk_ids[(inputs.topk_ids < -1) | (inputs.topk_ids >= experts)]
        if bad.numel():
            raise InvalidArgument("topk_ids", f"an id of {bad[0].item()}", f"-1 to {experts - 1}")
        return inputs.topk_ids, inputs.topk_weights

    def _matmul(
        self,
        problem: MoEProblem,
        gemm: Gemm,
        tactic: str,
        rows: Tensor,
        counts: list[int],
        values: Tensor,
        scale: Tensor,
    ) -> Tensor:
        reason = self.can_implement(problem, gemm, tactic)
        if reason is not None:
            raise InvalidArgument("tactics", f"{tactic} for {gemm}", "a tactic that this machine runs", reason)
        return TACTICS[tactic](rows, counts, self._dequantised(values, scale))

    def _dequantised(self, values: Tensor, scale: Tensor) -> Tensor:
        state = (_version(values), _version(scale))
        cached = self._dense.get(values)
        if cached is None or cached[0] is not scale or cached[1] != state:
            cached = (scale, state, fp8_block.dequantise_blocks(values, scale))
            self._dense[values] = cached
        dense: Tensor = cached[2]
        return dense


class CpuGemmTrial:
    """One grouped GEMM with random rows; see `base.GemmTrial`."""

    def __init__(self, rows: Tensor, counts: list[int], values: Tensor, scale: Tensor, weights: Tensor) -> None:
        self._rows, self._counts, self._weights = rows, counts, weights
        self._values, self._scale = values, scale

    def run(self, tactic: str) -> Tensor:
        return TACTICS[tactic](self._rows, self._counts, self._weights)

    def reference(self) -> tuple[Tensor, Tensor]:
        """At most 128 rows, spread evenly, in float64 on weights dequantised anew."""
        total = len(self._rows)
        index = torch.linspace(0, total - 1, min(total, _REFERENCE_ROWS)).round().long()
        expert_of_row = torch.repeat_interleave(torch.arange(len(self._counts)), torch.tensor(self._counts))
        values = torch.empty(len(index), self._values.shape[1])
        for expert in expert_of_row[index].unique().tolist():
            mine = expert_of_row[index] == expert
            weight = fp8_block.dequantise_blocks(self._values[expert], self._scale[expert], torch.float64)
            values[mine] = (self._rows[index[mine]].double() @ weight.T).float()
        return index, values

    def error(self, tactic: str, rows: Tensor, expected: Tensor) -> float:
        return relative_error(rows, expected)

    def time(self, tactics: Sequence[str], repeats: int) -> dict[str, list[float]]:
        return _timed(self.run, tactics, repeats)


class CpuLayerTrial:
    """`CpuExecutor.run` on random rows; see `base.LayerTrial`."""

    def __init__(
        self, executor: CpuExecutor, problem: MoEProblem, weights: FP8BlockWeights, inputs: LayerInputs
    ) -> None:
        self._executor, self._problem, self._weights, self._inputs = executor, problem, weights, inputs
        self._output = torch.empty_like(inputs.hidden_states)

    def time(self, pairs: Sequence[TacticPair], repeats: int) -> dict[TacticPair, list[float]]:
        return _timed(self._run, pairs, repeats)

    def _run(self, pair: TacticPair) -> None:
        self._executor.run(self._problem, self._weights, self._inputs, pair, self._output, None)


def _timed(run: Callable[[T], object], names: Sequence[T], repeats: int) -> dict[T, list[float]]:
    """Microseconds of each repeat by name, in turns, after one run of each."""
    for name in names:
        run(name)
    times: dict[T, list[float]] = {name: [] for name in names}
    for _ in range(repeats):
        for name in names:
            start = time.perf_counter()
            run(name)
            times[name].append((time.perf_counter() - start) * 1e6)
    return times


def _version(tensor: Tensor) -> int:
    """Grows when the tensor is written to in place; inference tensors do not count."""
    return 0 if tensor.is_inference() else tensor._version


def _permute(problem: MoEProblem, topk_ids: Tensor) -> tuple[Tensor, Tensor, list[int]]:
    """(slots [rows] of the local ids, grouped by expert; permuted_row [T, k] int32; rows of each local expert)."""
    num_local = problem.num_local_experts
    local = topk_ids.flatten().long() - problem.local_expert_offset
    local = torch.where((local >= 0) & (local < num_local), local, num_local)
    counts = torch.bincount(local, minlength=num_local + 1)[:num_local]
    slots = local.argsort(stable=True)[: int(counts.sum())]
    permuted_row = torch.full_like(topk_ids, -1)
    permuted_row.view(-1)[slots] = torch.arange(len(slots), dtype=torch.int32)
    return slots, permuted_row, counts.tolist()


def _combine(rows: Tensor, topk_weights: Tensor, permuted_row: Tensor, output: Tensor) -> None:
    """output[t] = sum over the local slots of weight * row, in fp32, slot by slot: always in the same order."""
    weights = topk_weights.masked_fill(permuted_row < 0, 0.0)
    padded = torch.cat([rows, rows.new_zeros(1, rows.shape[1])])  # row -1, which remote slots read
    total = torch.zeros(output.shape)
    for slot in range(permuted_row.shape[1]):
        total += weights[:, slot, None] * padded[permuted_row[:, slot]]
    output.copy_(total)


def _spans(counts: list[int]) -> list[tuple[int, int]]:
    """First and last + 1 row of each expert."""
    ends = list(accumulate(counts))
    return [(end - count, end) for end, count in zip(ends, counts, strict=True)]


def _padded(rows: Tensor, counts: list[int], weights: Tensor, height: int) -> Tensor:
    """rows [sum(counts), K] x weights [n, N, K] -> [sum(counts), N] by one batched matmul of [n, height, K]."""
    taken = torch.arange(height) < torch.tensor(counts)[:, None]
    batch = rows.new_zeros(len(counts), height, rows.shape[1])
    batch[taken] = rows
    return torch.bmm(batch, weights.mT)[taken]


def _segments(counts: list[int], max_rows: int) -> Iterator[tuple[int, int]]:
    """Runs (first, last + 1) of experts that have rows, within the padding and memory limits."""
    first, height, rows = 0, 0, 0
    for expert, count in enumerate(counts):
        taller = max(height, count)
        padded = (expert + 1 - first) * taller
        if rows and (count == 0 or padded > _PADDING * (rows + count) or padded > max_rows):
            yield first, expert
            rows, taller = 0, count
        if rows == 0:
            first = expert
        height, rows = taller, rows + count
    if rows:
        yield first, len(counts)
