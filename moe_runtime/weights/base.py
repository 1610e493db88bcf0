"""What layers, executors and the tuner ask of expert weights, whatever their format."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ..config import MoEConfig


class Operands(NamedTuple):
    """What an executor reads of one layer's weights. L local experts, N1 rows of W1, H hidden size; None is neutral.

    gate_up, down: the values, in the format's own layout or as `tiled_operands` has them.
    gate_up_scale, down_scale: scales of blocks; None where there are none or where the tiles hold them.
    gemm1_scale, gemm2_scale: f32 [L], which multiply an expert's sums before the bias is added.
    gemm1_bias: f32 [L, N1]. gemm2_bias: f32 [L, H].
    alpha, beta, clamp: f32 [L], of the gated activation.
    activation_multiplier: f32 [L], which multiplies an expert's activations before they are quantised.
    gate_first: rows of W1 are [gate; up], not [up; gate].
    input_scale: by which token rows are divided before they are quantised.
    """

    gate_up: Tensor
    gate_up_scale: Tensor | None
    down: Tensor
    down_scale: Tensor | None
    gemm1_scale: Tensor | None = None
    gemm1_bias: Tensor | None = None
    alpha: Tensor | None = None
    beta: Tensor | None = None
    clamp: Tensor | None = None
    activation_multiplier: Tensor | None = None
    gemm2_scale: Tensor | None = None
    gemm2_bias: Tensor | None = None
    gate_first: bool = True
    input_scale: float = 1.0


NUM_OPERAND_TENSORS = len(Operands._fields) - 2


class LayerWeights(Protocol):
    """Weights as executors read them."""

    @property
    def device(self) -> torch.device: ...

    @property
    def operands(self) -> Operands:
        """In the layout of the format's definition, which the CPU executor reads."""
        ...

    @property
    def tiled_operands(self) -> Operands:
        """In the layout that the format's CUDA kernels read; made once."""
        ...


class ExpertWeights(LayerWeights, Protocol):
    """The L local experts of one layer in the format of that name."""

    @property
    def format(self) -> str: ...

    def check(
        self, config: MoEConfig, num_local_experts: int, names: Mapping[str, str] | None = None, *, tp_size: int = 1
    ) -> None:
        """Raises InvalidArgument for a wrong shape, dtype, device, layout or factor, or another format.

        names: what the caller knows the fields as, where they differ. tp_size: ranks that share each expert.
        """
        ...

    def to(self, device: torch.device | str) -> ExpertWeights: ...


class BoundWeights:
    """Operands alone, in whichever layout the executor of their device reads: what a graph carries of weights."""

    def __init__(self, operands: Operands) -> None:
        self.operands = self.tiled_operands = operands

    @property
    def device(self) -> torch.device:
        return self.operands.gate_up.device
