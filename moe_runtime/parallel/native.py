"""`packing.Packing` in the compiled kernels of a layer.

To group a rank's tokens by destination is what a layer does by expert, so its stages serve with ranks in the experts'
place: PERMUTE and GATHER encode each row once and write it to its place for every destination, COMBINE adds up what
comes back, in f32 and by rank. In torch the same is some twenty kernels, of which those of the fp8 encoding each read
or write the rows in f32.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from ..config import MoEConfig
from ..executors.base import LayerInputs, MoEProblem
from ..executors.cuda import CudaExecutor
from ..formats import Tokens
from ..formats.registry import find_format
from ..kernels import Stage
from ..weights import BoundWeights, Operands
from .layout import Parallel
from .packing import Packed, Rows, TorchPacking, travelling_format

MAX_RANKS = 32
"""Destinations that the kernels tell apart: their largest top_k."""
_ALONE = Parallel("ep", 1)


class NativePacking(TorchPacking):
    """On a GPU with kernels. Calls without tokens, for which no kernel runs, go through torch."""

    def __init__(self, config: MoEConfig, executor: CudaExecutor, device: torch.device) -> None:
        super().__init__(config)
        least = config.number_format.multiple
        # Routing depends on neither size; the workspace that a call needs does on both.
        self._routing = MoEProblem(config.scaled(hidden_size=least, intermediate_size=least), _ALONE)
        self._stages = _Stages(executor, device)
        self._exchange = functools.lru_cache(maxsize=None)(functools.partial(_exchange, config))

    def route(self, logits: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        num_tokens, config = len(logits), self._routing.config
        if num_tokens == 0:
            return super().route(logits, bias)
        ids = torch.empty((num_tokens, config.top_k), dtype=torch.int32, device=logits.device)
        weights = torch.empty(ids.shape, dtype=torch.float32, device=logits.device)
        no_rows = torch.empty((num_tokens, 0), dtype=torch.bfloat16, device=logits.device)
        inputs = LayerInputs(no_rows, None, logits, bias, ids, weights)
        self._stages.launch(Stage.ROUTE, self._routing, inputs, self._stages.workspace(self._routing, num_tokens))
        return ids, weights

    def encode(self, x: Tensor) -> Rows:
        if len(x) == 0 or self._encoding == Tokens.BF16:
            return super().encode(x)
        everything = torch.ones((len(x), 1), dtype=torch.bool, device=x.device)
        rows, _ = self.pack(x, everything).rows(len(x))
        return rows

    def pack(self, x: Tensor, reached: Tensor) -> Packed:
        if len(x) == 0:
            return super().pack(x, reached)
        problem = self._exchange(reached.shape[1])
        ranks = torch.arange(reached.shape[1], dtype=torch.int32, device=x.device)
        ids = torch.where(reached, ranks, -1)
        inputs = LayerInputs(x, topk_ids=ids, topk_weights=torch.ones(ids.shape, device=x.device))
        packed = _NativePacked(self._stages, problem, inputs, self._stages.workspace(problem, len(x)))
        self._stages.launch(Stage.PERMUTE | Stage.GATHER, problem, inputs, packed.workspace)
        return packed


def _exchange(config: MoEConfig, num_ranks: int) -> MoEProblem:
    """Ranks as experts, of which a token may go to all."""
    format = travelling_format(config)
    least = find_format(format).multiple
    return MoEProblem(MoEConfig("exchange", config.hidden_size, least, num_ranks, num_ranks, format=format), _ALONE)


class _Stages:
    """Stages of a layer that read no weights."""

    def __init__(self, executor: CudaExecutor, device: torch.device) -> None:
        self.executor = executor
        nothing = torch.empty(1, device=device)
        self._no_weights = BoundWeights(Operands(nothing, nothing, nothing, nothing))
        # All that these stages ask of the tactics is that the GEMMs would take and leave rows slot by slot.
        plain = next(name for name, variant in executor.variants.items() if variant.stores_rows and not variant.gathers)
        self._tactics = plain, plain
        self._device = device

    def workspace(self, problem: MoEProblem, num_tokens: int) -> Tensor:
        size = self.executor.workspace_bytes(problem, num_tokens)
        return torch.empty(size, dtype=torch.uint8, device=self._device)

    def launch(
        self, stages: Stage, problem: MoEProblem, inputs: LayerInputs, workspace: Tensor, output: Tensor | None = None
    ) -> None:
        args = self.executor.arguments(problem, self._no_weights, inputs, self._tactics, output, workspace)
        self.executor.launch(args, stages)


@dataclass(frozen=True)
class _NativePacked:
    """Rows in the regions of a layer's workspace."""

    stages: _Stages
    problem: MoEProblem
    inputs: LayerInputs
    workspace: Tensor

    @property
    def counts(self) -> Tensor:
        return self._region("expert_offsets", (self.problem.num_local_experts + 1,), torch.int32).diff()

    def rows(self, total: int) -> tuple[Rows, Tensor]:
        hidden, scales = self.problem.config.hidden_size, self.problem.quantised_tokens.scales
        tokens = self._region("row_origins", (total, 2), torch.int32)[:, 0]
        if scales is None:
            return Rows(self._region("rows", (total, hidden), torch.bfloat16), None), tokens
        values = self._region("rows", (total, hidden), torch.float8_e4m3fn)
        return Rows(values, self._region("row_scales", (total, scales), torch.float32)), tokens

    def returned(self, total: int) -> Tensor:
        return self._region("gemm2_output", (total, self.problem.config.hidden_size), torch.bfloat16)

    def add_up(self) -> Tensor:
        output = torch.empty_like(self.inputs.hidden_states)
        self.stages.launch(Stage.COMBINE, self.problem, self.inputs, self.workspace, output)
        return output

    def _region(self, region: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        num_tokens = len(self.inputs.hidden_states)
        return self.stages.executor.view(self.problem, self.workspace, num_tokens, region, shape, dtype)
