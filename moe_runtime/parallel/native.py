"""`packing.Packing` in the compiled kernels of a layer.

To group a rank's tokens by destination is what a layer does by expert, so its stages serve with ranks in the experts'
place: PERMUTE and GATHER encode each row once and write a message of it for every destination, COMBINE adds up what
comes back, in f32 and by rank. In torch the same is some twenty kernels, of which those of the fp8 encoding each read
or write the rows in f32.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..config import MoEConfig
from ..executors.base import LayerInputs, MoEProblem
from ..executors.cuda import CudaExecutor
from ..formats.registry import find_format
from ..kernels import MoeMessages, MoeUnpack, Stage
from ..weights import BoundWeights, Operands
from .layout import Parallel
from .messages import travelling_format
from .packing import Packed, TorchPacking

MAX_RANKS = 32
"""Destinations that the kernels tell apart: their largest top_k."""
_ALONE = Parallel("ep", 1)


class NativePacking(TorchPacking):
    """On a GPU with kernels. Calls without tokens, for which no kernel runs, go through torch."""

    def __init__(self, problem: MoEProblem, executor: CudaExecutor, device: torch.device) -> None:
        super().__init__(problem)
        config = problem.config
        least = config.number_format.multiple
        # Routing depends on neither size; the workspace that a call needs does on both.
        self._routing = MoEProblem(config.scaled(hidden_size=least, intermediate_size=least), _ALONE)
        self._stages = _Stages(executor, device)
        self._to_ranks, self._to_all = _exchange(config, self._num_ranks), _exchange(config, 1)

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

    def encode(self, x: Tensor, ids: Tensor, weights: Tensor, capacity: int) -> Tensor:
        if len(x) == 0:
            return super().encode(x, ids, weights, capacity)
        messages = self.layout.empty(capacity, x.device, absent_from=len(x))
        asked = MoeMessages(messages.data_ptr(), ids=ids.data_ptr(), weights=weights.data_ptr())
        self._write(self._to_all, x, asked)
        return messages

    def pack(self, x: Tensor, ids: Tensor, weights: Tensor, later: int) -> Packed:
        if len(x) == 0:
            return super().pack(x, ids, weights, later)
        messages = self.layout.empty(len(x) * self._num_ranks, x.device)
        notices = torch.empty((2, self._num_ranks, 3), dtype=torch.int64, device=x.device)
        asked = MoeMessages(messages.data_ptr(), ids=ids.data_ptr(), weights=weights.data_ptr())
        asked.experts_per_rank, asked.notice, asked.later = self._experts_per_rank, notices.data_ptr(), later
        workspace = self._write(self._to_ranks, x, asked)
        return _NativePacked(self._stages, self._to_ranks, x, workspace, messages, notices)

    def unpack(self, messages: Tensor, came: int) -> LayerInputs:
        layout, count = self.layout, len(messages)
        if count == 0:
            return super().unpack(messages, came)
        ids = torch.empty((count, layout.top_k), dtype=torch.int32, device=messages.device)
        weights = torch.empty(ids.shape, dtype=torch.float32, device=messages.device)
        slots = layout.pitch, layout.slots_offset, count, came, layout.top_k
        self._stages.executor.unpack(MoeUnpack(messages.data_ptr(), *slots, ids.data_ptr(), weights.data_ptr()))
        return LayerInputs(layout.values(messages), layout.scales(messages), topk_ids=ids, topk_weights=weights)

    def _write(self, exchange: MoEProblem, x: Tensor, asked: MoeMessages) -> Tensor:
        """The workspace, which says where each message is."""
        asked.pitch, asked.slots = self.layout.pitch, self.layout.top_k
        workspace = self._stages.workspace(exchange, len(x))
        self._stages.launch(Stage.PERMUTE | Stage.GATHER, exchange, LayerInputs(x), workspace, messages=asked)
        return workspace


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
        self,
        stages: Stage,
        problem: MoEProblem,
        inputs: LayerInputs,
        workspace: Tensor,
        output: Tensor | None = None,
        messages: MoeMessages | None = None,
    ) -> None:
        args = self.executor.arguments(problem, self._no_weights, inputs, self._tactics, output, workspace)
        if messages is not None:
            args.messages = messages
        self.executor.launch(args, stages)


@dataclass(frozen=True)
class _NativePacked:
    """x: the tokens. sent: messages, as many as there are at most."""

    stages: _Stages
    problem: MoEProblem
    x: Tensor
    workspace: Tensor
    sent: Tensor
    notices: Tensor

    def messages(self, total: int) -> Tensor:
        return self.sent[:total]

    def returned(self, total: int) -> Tensor:
        shape = total, self.x.shape[1]
        return self.stages.executor.view(
            self.problem, self.workspace, len(self.x), "gemm2_output", shape, torch.bfloat16
        )

    def add_up(self) -> Tensor:
        output = torch.empty_like(self.x)
        self.stages.launch(Stage.COMBINE, self.problem, LayerInputs(self.x), self.workspace, output)
        return output
