"""A rank's own tokens as they travel: encoded, and grouped by the rank that they go to.

`TorchPacking` serves every device; `native.NativePacking` does the same in the kernels of a layer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ..executors.base import LayerInputs, MoEProblem
from ..formats.registry import find_format
from ..formats.tokens import quantise_tokens
from ..routing import route
from .messages import MessageLayout, travelling_format
from .sends import SendOrder, add_up, reached_ranks, send_order


class Packed(Protocol):
    """One call's rows on their way."""

    @property
    def notices(self) -> Tensor:
        """int64 [2, R, 3]. First what each rank is to be told: its rows, this rank's tokens, and those still to come.

        Then room for what the ranks tell this one.
        """
        ...

    def messages(self, total: int) -> Tensor:
        """The `total` messages, uint8 [total, pitch], in the order in which they are sent."""
        ...

    def returned(self, total: int) -> Tensor:
        """bf16 [total, H], where what was computed of those rows is to be written, in the same order."""
        ...

    def add_up(self) -> Tensor:
        """bf16 [n, H]: each token's returned rows, added up in f32 by destination, always in the same order."""
        ...


class Packing(Protocol):
    """What a dispatcher does on a rank's own tokens.

    x: bf16 [n, H]. ids, weights: [n, top_k], which travel with the rows.
    """

    layout: MessageLayout

    def route(self, logits: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        """As `routing.route`."""
        ...

    def encode(self, x: Tensor, ids: Tensor, weights: Tensor, capacity: int) -> Tensor:
        """Messages [capacity, pitch] of all tokens, and then absent ones."""
        ...

    def pack(self, x: Tensor, ids: Tensor, weights: Tensor, later: int) -> Packed:
        """A message of each token for every rank that holds one of its experts. later: tokens still to come."""
        ...

    def unpack(self, messages: Tensor, came: int) -> LayerInputs:
        """What a layer takes of messages [m, pitch], of which those from `came` on hold nothing and become absent."""
        ...


class TorchPacking:
    """In plain torch, on any device."""

    def __init__(self, problem: MoEProblem) -> None:
        self._config, self._num_ranks = problem.config, problem.parallel.size
        self._experts_per_rank = problem.num_local_experts
        self.layout = MessageLayout.of(problem.config)
        self._encoding = find_format(travelling_format(problem.config)).tokens

    def route(self, logits: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        return route(self._config, logits, bias)

    def encode(self, x: Tensor, ids: Tensor, weights: Tensor, capacity: int) -> Tensor:
        messages = self.layout.empty(capacity, x.device, absent_from=len(x))
        own = messages[: len(x)]
        values, scales = quantise_tokens(self._encoding, x)
        parts = zip((self.layout.values(own), *self.layout.slots(own)), (values, ids, weights), strict=True)
        for to, part in parts:
            to.copy_(part)
        own_scales = self.layout.scales(own)
        if scales is not None and own_scales is not None:
            own_scales.copy_(scales)
        return messages

    def pack(self, x: Tensor, ids: Tensor, weights: Tensor, later: int) -> Packed:
        order = send_order(reached_ranks(ids, self._experts_per_rank, self._num_ranks))
        notices = order.counts.new_empty((2, self._num_ranks, 3))
        notices[0, :, 0], notices[0, :, 1], notices[0, :, 2] = order.counts, len(x), later
        return _TorchPacked(self.encode(x, ids, weights, len(x)), x.shape[1], order, notices)

    def unpack(self, messages: Tensor, came: int) -> LayerInputs:
        inputs = self.layout.inputs(messages)
        assert inputs.topk_ids is not None
        inputs.topk_ids[came:] = -1
        return inputs


@dataclass
class _TorchPacked:
    by_token: Tensor
    hidden_size: int
    order: SendOrder
    notices: Tensor
    _returned: Tensor | None = None

    def messages(self, total: int) -> Tensor:
        return self.by_token[self.order.tokens[:total]]

    def returned(self, total: int) -> Tensor:
        self._returned = self.order.rows.new_empty((total + 1, self.hidden_size), dtype=torch.bfloat16)
        self._returned[total] = 0
        return self._returned[:total]

    def add_up(self) -> Tensor:
        assert self._returned is not None
        return add_up(self._returned, self.order.rows)
