"""The CPU executor: plain torch, with the CUDA path's quantisation points, so that both give the same layer.

A GEMM's operands are dequantised to fp32, which loses nothing against scaling products of codes, and accumulated there.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import TypeVar

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from ..activation import relu2, swiglu
from ..config import RoutingMethod
from ..errors import InvalidArgument
from ..formats import Tokens, Weights
from ..formats.tokens import dequantise_tokens, round_rows
from ..formats.weights import dequantise_weights
from ..kernels import KernelVariant
from ..reference import relative_error
from ..routing import route
from ..weights import ExpertWeights, LayerWeights, Operands
from ..workload import Workload
from .base import Gemm, LayerInputs, MoEProblem, TacticPair, random_inputs, version
from .cpu_tactics import TACTICS, per_expert_loop

T = TypeVar("T", bound=Hashable)

# Rows of a trial that the reference computes; more of them would take longer than the tactics.
_REFERENCE_ROWS = 128


class CpuExecutor:
    """Runs layers with plain torch; see `base.Executor` for the interface."""

    name = "cpu"
    device_name = "cpu"
    library_hash = f"torch-{torch.__version__}"
    sm_count = 0
    variants: Mapping[str, KernelVariant] = {}

    def __init__(self) -> None:
        # Dequantising takes longer than the GEMMs of a small batch, so it happens once. Weak keys: the fp32 copy is
        # two to eight times the size of the weights and must go when they go.
        self._dense = WeakTensorKeyDictionary()

    def free_bytes(self) -> None:
        """None: trials take little beside the weights."""

    def tactics(self, problem: MoEProblem, gemm: Gemm) -> tuple[str, ...]:
        return tuple(TACTICS)

    def default_tactic(self, problem: MoEProblem, gemm: Gemm, num_rows: int) -> str:
        """per_expert_loop: whatever the routing it neither pads nor reads the weights of an idle expert."""
        return per_expert_loop.__name__

    def leaving_rows(self, tactic: str) -> str:
        return tactic

    def can_implement(self, problem: MoEProblem, gemm: Gemm, tactic: str) -> str | None:
        if tactic not in TACTICS:
            return f"no such tactic on the CPU; there are {', '.join(TACTICS)}"
        if tactic == "grouped_mm" and not hasattr(torch, "_grouped_mm"):
            return f"torch {torch.__version__} has no _grouped_mm"
        return None

    def prepare(self, weights: LayerWeights) -> Operands:
        return weights.operands

    def workspace_bytes(self, problem: MoEProblem, num_tokens: int) -> int:
        return 0

    @torch.no_grad()
    def run(
        self,
        problem: MoEProblem,
        weights: LayerWeights,
        inputs: LayerInputs,
        tactics: tuple[str, str],
        output: Tensor,
        workspace: Tensor | None,
        finalize: bool = True,
    ) -> tuple[Tensor, Tensor, Tensor] | None:
        operands = self.prepare(weights)
        topk_ids, topk_weights = self._topk(problem, inputs)
        slots, permuted_row, counts = _permute(problem, topk_ids)
        expert_of_row = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
        weighs_input = RoutingMethod(problem.config.routing_method).weighs_input
        rows = _gather(problem, operands, inputs, slots, topk_weights if weighs_input else None)

        gate_up = self._matmul(problem, "gemm1", tactics[0], rows, counts, operands)
        kept = torch.float32 if problem.config.is_gated else torch.bfloat16  # as kernels that activate in place do
        gate_up = _scaled(gate_up, expert_of_row, operands.gemm1_scale, operands.gemm1_bias, kept)
        rows = _activate(problem, operands, gate_up, expert_of_row)
        result = self._matmul(problem, "gemm2", tactics[1], rows, counts, operands)
        result = _scaled(result, expert_of_row, operands.gemm2_scale, operands.gemm2_bias)
        if weighs_input:
            topk_weights = torch.ones_like(topk_weights)
        if not finalize:
            return result, topk_weights, permuted_row
        _combine(result, topk_weights, permuted_row, output)
        return None

    def gemm_trial(
        self, problem: MoEProblem, weights: ExpertWeights, workload: Workload, gemm: Gemm, seed: int
    ) -> CpuGemmTrial:
        counts: list[int] = workload.rows_per_expert.tolist()
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(sum(counts), problem.gemm_shape(gemm)[1], generator=generator)
        rows = round_rows(problem.config.number_format.tokens, x).float()
        encoding, values, scale = _matrix(problem, weights.operands, gemm)
        return CpuGemmTrial(rows, counts, encoding, values, scale, self._dequantised(encoding, values, scale))

    def layer_trial(self, problem: MoEProblem, weights: ExpertWeights, workload: Workload, seed: int) -> CpuLayerTrial:
        return CpuLayerTrial(self, problem, weights, random_inputs(problem, workload, seed, torch.device("cpu")))

    def _topk(self, problem: MoEProblem, inputs: LayerInputs) -> tuple[Tensor, Tensor]:
        if inputs.routing_logits is not None:
            return route(problem.config, inputs.routing_logits, inputs.routing_bias)
        assert inputs.topk_ids is not None and inputs.topk_weights is not None
        check_ids(inputs.topk_ids, problem.config.num_experts)
        return inputs.topk_ids, inputs.topk_weights

    def _matmul(
        self, problem: MoEProblem, gemm: Gemm, tactic: str, rows: Tensor, counts: list[int], operands: Operands
    ) -> Tensor:
        """Sums [M, N]: f32 where they are yet to be scaled, biased or gated, else rounded to bf16."""
        reason = self.can_implement(problem, gemm, tactic)
        if reason is not None:
            raise InvalidArgument("tactics", f"{tactic} for {gemm}", "a tactic that this machine runs", reason)
        follows = (
            (operands.gemm1_scale, operands.gemm1_bias)
            if gemm == "gemm1"
            else (operands.gemm2_scale, operands.gemm2_bias)
        )
        is_final = follows == (None, None) and not (gemm == "gemm1" and problem.config.is_gated)
        dtype = torch.bfloat16 if is_final else torch.float32
        return TACTICS[tactic](rows, counts, self._dequantised(*_matrix(problem, operands, gemm)), dtype)

    def _dequantised(self, encoding: Weights, values: Tensor, scale: Tensor | None) -> Tensor:
        state = (version(values), None if scale is None else version(scale))
        cached = self._dense.get(values)
        if cached is None or cached[0] is not scale or cached[1] != state:
            cached = (scale, state, dequantise_weights(encoding, values, scale))
            self._dense[values] = cached
        dense: Tensor = cached[2]
        return dense


class CpuGemmTrial:
    """One grouped GEMM with random rows; see `base.GemmTrial`."""

    def __init__(
        self,
        rows: Tensor,
        counts: list[int],
        encoding: Weights,
        values: Tensor,
        scale: Tensor | None,
        weights: Tensor,
    ) -> None:
        self._rows, self._counts, self._weights = rows, counts, weights
        self._encoding, self._values, self._scale = encoding, values, scale

    def run(self, tactic: str) -> Tensor:
        return TACTICS[tactic](self._rows, self._counts, self._weights, torch.bfloat16)

    def reference(self) -> tuple[Tensor, Tensor]:
        """At most 128 rows, spread evenly, in float64 on weights dequantised anew."""
        total = len(self._rows)
        index = torch.linspace(0, total - 1, min(total, _REFERENCE_ROWS)).round().long()
        expert_of_row = torch.repeat_interleave(torch.arange(len(self._counts)), torch.tensor(self._counts))
        values = torch.empty(len(index), self._values.shape[1])
        for expert in expert_of_row[index].unique().tolist():
            mine = expert_of_row[index] == expert
            scale = None if self._scale is None else self._scale[expert]
            weight = dequantise_weights(self._encoding, self._values[expert], scale, torch.float64)
            values[mine] = (self._rows[index[mine]].double() @ weight.T).float()
        return index, values

    def error(self, tactic: str, rows: Tensor, expected: Tensor) -> float:
        return relative_error(rows, expected)

    def time(self, tactics: Sequence[str], repeats: int) -> dict[str, list[float]]:
        return _timed(self.run, tactics, repeats)


class CpuLayerTrial:
    """`CpuExecutor.run` on random rows; see `base.LayerTrial`."""

    def __init__(self, executor: CpuExecutor, problem: MoEProblem, weights: LayerWeights, inputs: LayerInputs) -> None:
        self._executor, self._problem, self._weights, self._inputs = executor, problem, weights, inputs
        self._output = torch.empty_like(inputs.hidden_states)

    def time(self, pairs: Sequence[TacticPair], repeats: int) -> dict[TacticPair, list[float]]:
        return _timed(self._run, pairs, repeats)

    def _run(self, pair: TacticPair) -> None:
        self._executor.run(self._problem, self._weights, self._inputs, pair, self._output, None)


def check_ids(topk_ids: Tensor, num_experts: int) -> None:
    """Raises InvalidArgument for an id that is neither -1 nor an expert's."""
    bad = topk_ids[(topk_ids < -1) | (topk_ids >= num_experts)]
    if bad.numel():
        raise InvalidArgument("topk_ids", f"an id of {bad[0].item()}", f"-1 to {num_experts - 1}")


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


def _matrix(problem: MoEProblem, operands: Operands, gemm: Gemm) -> tuple[Weights, Tensor, Tensor | None]:
    """(encoding, values, scale) of a GEMM's weights."""
    encoding = problem.config.number_format.weights
    if gemm == "gemm1":
        return encoding, operands.gate_up, operands.gate_up_scale
    return encoding, operands.down, operands.down_scale


def _gather(
    problem: MoEProblem, operands: Operands, inputs: LayerInputs, slots: Tensor, input_weights: Tensor | None
) -> Tensor:
    """Rows [M, H] f32 of the slots, rounded through the encoding. input_weights: [T, 1], which multiply the input."""
    tokens, top_k = problem.config.number_format.tokens, problem.config.top_k
    x, is_quantised = inputs.hidden_states, inputs.hidden_states.dtype != torch.bfloat16
    if is_quantised:
        rows = dequantise_tokens(tokens, x, inputs.hidden_states_scale)
    if input_weights is not None and tokens != Tokens.FP8_BLOCK:
        # One product of both factors, as the kernels take it.
        factor = input_weights if is_quantised else input_weights / operands.input_scale
        rows = round_rows(tokens, (rows if is_quantised else x.float()) * factor)
    elif not is_quantised:
        rows = round_rows(tokens, x, operands.input_scale)
    rows = rows.float()
    if input_weights is not None and tokens == Tokens.FP8_BLOCK:
        rows = rows * input_weights  # its scales take them, and codes stay as they are
    return rows[slots // top_k]


def _scaled(
    sums: Tensor,
    expert_of_row: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """scale * sums + bias, each expert's own, in dtype."""
    if scale is not None:
        sums = sums * scale[expert_of_row, None]
    if bias is not None:
        sums = sums + bias[expert_of_row]
    return sums.to(dtype)


def _activate(problem: MoEProblem, operands: Operands, gate_up: Tensor, expert_of_row: Tensor) -> Tensor:
    """gate_up [M, N1] -> rows [M, I] f32 of GEMM2, rounded through the encoding."""
    config = problem.config

    def of_row(values: Tensor | None) -> Tensor | None:
        return None if values is None else values[expert_of_row, None]

    if config.is_gated:
        clamp = of_row(operands.clamp)
        rows = swiglu(
            gate_up,
            operands.gate_first,
            config.clamp_limit if clamp is None else clamp,
            of_row(operands.alpha),
            of_row(operands.beta),
        )
    else:
        rows = relu2(gate_up)
    multiplier = of_row(operands.activation_multiplier)
    return round_rows(config.number_format.tokens, rows if multiplier is None else rows * multiplier).float()


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
