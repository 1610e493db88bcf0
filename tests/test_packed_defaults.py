"""The default tile of packed weights, against tiles counted on drawn rows and the times that an H200 took."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from moe_runtime import MoEConfig, Parallel
from moe_runtime.executors.base import GEMMS, Gemm, MoEProblem
from moe_runtime.executors.default_tactic import _tiles, default_variant, packed_tile_time
from moe_runtime.formats import Weights
from moe_runtime.kernels import KernelVariant

TILES = (8, 16, 32, 64, 128, 256)
# us of gate_up in mxfp8_mxfp4, Qwen3-235B under dep2, one tile of tokens an expert.
MEASURED = {16: 127, 32: 147, 64: 190, 128: 310, 256: 600}


def library(gemm: Gemm) -> list[KernelVariant]:
    ends = {"gemm1": ("_swiglu",), "gemm2": ("", "_combine")}[gemm]
    return [
        KernelVariant(
            index, f"mixed_{tile}{end}", (128, tile, 128), (1, 1), True, 4, 0, end == "_swiglu", Weights.MXFP4,
            combines=end == "_combine",
        )
        for index, (tile, end) in enumerate((tile, end) for tile in TILES for end in ends)
    ]  # fmt: skip


@pytest.mark.parametrize("mean", [0.5, 7, 16, 31, 64, 100, 700])
@pytest.mark.parametrize("tile", TILES)
def test_tiles_are_those_of_poisson_rows(mean: float, tile: int) -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.poisson(torch.full((200_000,), float(mean)), generator=generator)
    counted = (rows[rows > 0] / tile).ceil().mean()
    assert _tiles(mean, tile) == pytest.approx(float(counted), rel=0.04)


def test_times_are_near_the_measured_ones() -> None:
    unit = MEASURED[64] / packed_tile_time(64)
    for tile, us in MEASURED.items():
        assert packed_tile_time(tile) * unit == pytest.approx(us, rel=0.15)


@pytest.mark.parametrize("gemm", GEMMS)
@pytest.mark.parametrize(
    ("tokens", "tile"),
    [(1, 8), (32, 8), (64, 16), (192, 32), (384, 64), (512, 64), (768, 128), (1024, 128), (65536, 256)],
)
def test_defaults(gemm: Gemm, tokens: int, tile: int) -> None:
    """Tokens per rank of Qwen3-235B under dep2, with 1/8 as many rows an expert."""
    config = dataclasses.replace(MoEConfig.preset("qwen3-235b"), format="mxfp8_mxfp4")
    problem = MoEProblem(config, Parallel.parse("dep2"))
    chosen = default_variant(library(gemm), problem, gemm, 2 * tokens, 132)
    assert chosen.name == f"mixed_{tile}" + {"gemm1": "_swiglu", "gemm2": "_combine"}[gemm]
