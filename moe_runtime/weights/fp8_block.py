"""Expert weights of one rank in the fp8_block format."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..config import MoEConfig
from ..errors import InvalidArgument
from ..executors.base import check_tensor
from ..formats import Weights, fp8_block
from ..formats.weights import quantise_experts
from .base import Operands


# eq=False: two sets of weights are the same only if they are one object, and comparing tensors is no bool.
@dataclass(frozen=True, eq=False)
class FP8BlockWeights:
    """The L local experts of one layer. Contiguous, on one device, and not changed after the first call.

    I is the rank's intermediate size: under tensor parallelism its slice of each expert's.

    gate_up: [L, 2I, H] e4m3, rows [gate; up], or [up; gate] with gate_first=False.
    gate_up_scale: [L, 2I/128, H/128] f32.
    down: [L, H, I] e4m3.
    down_scale: [L, H/128, I/128] f32.
    """

    format: ClassVar[str] = "fp8_block"

    gate_up: Tensor
    gate_up_scale: Tensor
    down: Tensor
    down_scale: Tensor
    gate_first: bool = True

    @cached_property
    def operands(self) -> Operands:
        return Operands(self.gate_up, self.gate_up_scale, self.down, self.down_scale, gate_first=self.gate_first)

    @property
    def tiled_operands(self) -> Operands:
        """`operands`: the kernels read the format as it is defined."""
        return self.operands

    @property
    def device(self) -> torch.device:
        return self.gate_up.device

    def check(
        self, config: MoEConfig, num_local_experts: int, names: Mapping[str, str] | None = None, *, tp_size: int = 1
    ) -> None:
        """As `ExpertWeights.check`. Reads no tensor's values."""
        if config.format != self.format:
            raise InvalidArgument("weights", f"weights of the format {self.format}", config.format)
        hidden, inter = config.hidden_size, config.intermediate_size // tp_size
        names = names or {}
        for field, shape in (
            ("gate_up", (num_local_experts, 2 * inter, hidden)),
            ("down", (num_local_experts, hidden, inter)),
        ):
            blocks = (shape[0], shape[1] // fp8_block.BLOCK, shape[2] // fp8_block.BLOCK)
            scale = f"{field}_scale"
            check_tensor(names.get(field, field), getattr(self, field), shape, (torch.float8_e4m3fn,), self.device)
            check_tensor(names.get(scale, scale), getattr(self, scale), blocks, (torch.float32,), self.device)

    def to(self, device: torch.device | str) -> FP8BlockWeights:
        moved: dict[str, Any] = {field.name: getattr(self, field.name) for field in fields(self)}
        for name, value in moved.items():
            if isinstance(value, Tensor):
                moved[name] = value.to(device)
        return FP8BlockWeights(**moved)

    @classmethod
    def quantise_bf16(cls, gate_up: Tensor, down: Tensor, gate_first: bool = True) -> FP8BlockWeights:
        """gate_up [L, 2I, H] and down [L, H, I], bf16 or f32, to fp8_block."""
        values, scale, _ = quantise_experts(Weights.FP8_BLOCK, gate_up, "gate_up")
        down_values, down_scale, _ = quantise_experts(Weights.FP8_BLOCK, down, "down")
        assert scale is not None and down_scale is not None
        return cls(values, scale, down_values, down_scale, gate_first)

    @classmethod
    def random(
        cls,
        config: MoEConfig,
        num_local_experts: int,
        seed: int = 0,
        device: torch.device | str = "cpu",
        *,
        tp_size: int = 1,
    ) -> FP8BlockWeights:
        """Every finite e4m3 code alike, scaled so that a row of unit variance keeps about that through a GEMM.

        tp_size: ranks that share each expert; the weights are one rank's, of 1 / tp_size of the intermediate size.
        """
        generator = torch.Generator(device).manual_seed(seed)

        def draw(rows: int, columns: int) -> tuple[Tensor, Tensor]:
            shape = (num_local_experts, rows, columns)
            values = torch.randint(0, 254, shape, dtype=torch.uint8, device=device, generator=generator)
            values += values >= 127  # 127 and 255 are the two NaNs
            scale_shape = (num_local_experts, rows // fp8_block.BLOCK, columns // fp8_block.BLOCK)
            spread = torch.rand(scale_shape, device=device, generator=generator) + 0.5
            return values.view(torch.float8_e4m3fn), spread / (_CODE_RMS * math.sqrt(columns))

        inter = config.intermediate_size // tp_size
        gate_up, gate_up_scale = draw(2 * inter, config.hidden_size)
        down, down_scale = draw(config.hidden_size, inter)
        return cls(gate_up, gate_up_scale, down, down_scale)


# Root mean square of the 254 finite e4m3 codes.
_CODE_RMS = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).double().square().mean().sqrt().item()
