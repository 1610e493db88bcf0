"""Expert weights of one rank: one class for fp8_block, one for all other formats."""

from __future__ import annotations

import torch

from ..executors.base import MoEProblem
from .base import NUM_OPERAND_TENSORS, BoundWeights, ExpertWeights, LayerWeights, Operands
from .fp8_block import FP8BlockWeights
from .packed import PackedWeights, deinterleave

__all__ = [
    "NUM_OPERAND_TENSORS",
    "BoundWeights",
    "ExpertWeights",
    "FP8BlockWeights",
    "LayerWeights",
    "Operands",
    "PackedWeights",
    "deinterleave",
    "random_weights",
]


def random_weights(problem: MoEProblem, seed: int = 0, device: torch.device | str = "cpu") -> ExpertWeights:
    """Random weights of one rank's share of a layer, in the layer's format."""
    kind = FP8BlockWeights if problem.config.format == FP8BlockWeights.format else PackedWeights
    return kind.random(problem.config, problem.num_local_experts, seed, device, tp_size=problem.parallel.tp_size)
