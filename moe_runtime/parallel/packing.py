"""Token rows as they travel: encoded, and grouped by the rank that they go to.

`TorchPacking` serves every device; `native.NativePacking` does the same in the kernels of a layer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ..config import MoEConfig
from ..formats import Tokens
from ..formats.registry import find_format
from ..formats.tokens import quantise_tokens
from ..routing import route
from .sends import SendOrder, add_up, send_order


class Rows(NamedTuple):
    """Rows in the encoding in which they travel.

    values: e4m3 [n, H] with scale f32 [n, H/128], of an fp8_block layer; bf16 [n, H] without a scale, of any other.
    """

    values: Tensor
    scale: Tensor | None


class Packed(Protocol):
    """One call's rows on their way."""

    @property
    def counts(self) -> Tensor:
        """[R] integers, rows of each destination."""
        ...

    def rows(self, total: int) -> tuple[Rows, Tensor]:
        """The `total` rows in the order in which they are sent, and each one's token, int64 or int32 [total]."""
        ...

    def returned(self, total: int) -> Tensor:
        """bf16 [total, H], where what was computed of those rows is to be written, in the same order."""
        ...

    def add_up(self) -> Tensor:
        """bf16 [n, H]: each token's returned rows, added up in f32 by destination, always in the same order."""
        ...


class Packing(Protocol):
    """What a dispatcher does on a rank's own tokens."""

    def route(self, logits: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        """As `routing.route`."""
        ...

    def encode(self, x: Tensor) -> Rows:
        """x: bf16 [n, H]."""
        ...

    def pack(self, x: Tensor, reached: Tensor) -> Packed:
        """x: bf16 [n, H]. reached: as `sends.reached_ranks` has it."""
        ...


class TorchPacking:
    """In plain torch, on any device."""

    def __init__(self, config: MoEConfig) -> None:
        self._config = config
        self._encoding = find_format(travelling_format(config)).tokens

    def route(self, logits: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        return route(self._config, logits, bias)

    def encode(self, x: Tensor) -> Rows:
        return Rows(*quantise_tokens(self._encoding, x))

    def pack(self, x: Tensor, reached: Tensor) -> Packed:
        return _TorchPacked(self.encode(x), send_order(reached))


def travelling_format(config: MoEConfig) -> str:
    """fp8_block, half the bytes of bf16, where that is what the experts read; bf16 elsewhere."""
    return "fp8_block" if config.number_format.tokens == Tokens.FP8_BLOCK else "bf16"


@dataclass
class _TorchPacked:
    by_token: Rows
    order: SendOrder
    _returned: Tensor | None = None

    @property
    def counts(self) -> Tensor:
        return self.order.counts

    def rows(self, total: int) -> tuple[Rows, Tensor]:
        tokens, (values, scale) = self.order.tokens[:total], self.by_token
        return Rows(take_rows(values, tokens), None if scale is None else scale[tokens]), tokens

    def returned(self, total: int) -> Tensor:
        width = self.by_token.values.shape[1]
        self._returned = self.order.rows.new_empty((total + 1, width), dtype=torch.bfloat16)
        self._returned[total] = 0
        return self._returned[:total]

    def add_up(self) -> Tensor:
        assert self._returned is not None
        return add_up(self._returned, self.order.rows)


def take_rows(values: Tensor, index: Tensor) -> Tensor:
    """values[index], also of e4m3, which torch does not index on every device."""
    return values.view(torch.uint8)[index].view(values.dtype) if values.dtype == torch.float8_e4m3fn else values[index]
