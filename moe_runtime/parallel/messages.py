"""A token row as it travels: one message of bytes, so that one collective moves all that belongs to it.

A message is the row's values, the f32 scales of its blocks of 128 where the layer reads fp8_block, its top_k ids and as
many weights, padded to a multiple of 16 bytes. What arrives is read where it lies: the kernels take rows and scales
with strides. `MoeMessages` in templates/abi.h is the same layout.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..config import MoEConfig
from ..executors.base import LayerInputs
from ..formats import Tokens
from ..formats.fp8_block import BLOCK

ALIGNMENT = 16
"""Bytes of a load: rows begin at multiples of it."""


def travelling_format(config: MoEConfig) -> str:
    """fp8_block, half the bytes of bf16, where that is what the experts read; bf16 elsewhere."""
    return "fp8_block" if config.number_format.tokens == Tokens.FP8_BLOCK else "bf16"


@dataclass(frozen=True)
class MessageLayout:
    """Of rows of `hidden_size` values: e4m3 with a scale for each block, or bf16. Messages are uint8 [m, pitch]."""

    hidden_size: int
    top_k: int
    is_fp8_block: bool

    @classmethod
    def of(cls, config: MoEConfig) -> MessageLayout:
        return cls(config.hidden_size, config.top_k, travelling_format(config) == "fp8_block")

    @property
    def value_bytes(self) -> int:
        return self.hidden_size * (1 if self.is_fp8_block else 2)

    @property
    def scale_bytes(self) -> int:
        return self.hidden_size // BLOCK * 4 if self.is_fp8_block else 0

    @property
    def slots_offset(self) -> int:
        """Bytes before the ids, behind which the weights are."""
        return self.value_bytes + self.scale_bytes

    @property
    def pitch(self) -> int:
        """Bytes from message to message."""
        used = self.slots_offset + 8 * self.top_k
        return -(-used // ALIGNMENT) * ALIGNMENT

    def empty(self, count: int, device: torch.device, absent_from: int | None = None) -> Tensor:
        """uint8 [count, pitch]. absent_from: messages from there on hold ids of -1, and values that are not read."""
        messages = torch.empty((count, self.pitch), dtype=torch.uint8, device=device)
        if absent_from is not None and absent_from < count:
            messages[absent_from:] = 255
        return messages

    def values(self, messages: Tensor) -> Tensor:
        """e4m3 or bf16 [m, H], a view."""
        dtype = torch.float8_e4m3fn if self.is_fp8_block else torch.bfloat16
        return messages[:, : self.value_bytes].view(dtype)

    def scales(self, messages: Tensor) -> Tensor | None:
        """f32 [m, H/128], a view; None of bf16 rows."""
        if not self.is_fp8_block:
            return None
        return messages[:, self.value_bytes : self.slots_offset].view(torch.float32)

    def slots(self, messages: Tensor) -> tuple[Tensor, Tensor]:
        """Ids int32 and weights f32, both [m, top_k], views."""
        first, size = self.slots_offset, 4 * self.top_k
        ids, weights = messages[:, first : first + size], messages[:, first + size : first + 2 * size]
        return ids.view(torch.int32), weights.view(torch.float32)

    def inputs(self, messages: Tensor) -> LayerInputs:
        """What a layer takes; values and scales stay where they are."""
        ids, weights = self.slots(messages)
        return LayerInputs(
            self.values(messages),
            self.scales(messages),
            topk_ids=ids.contiguous(),
            topk_weights=weights.contiguous(),
        )
