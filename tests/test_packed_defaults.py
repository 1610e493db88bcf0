"""The default tile of packed weights, against tiles counted on drawn rows and the times that an H200 took."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from moe_runtime import MoEConfig, Parallel
from moe_runtime.executors.base import GEMMS, Gemm, MoEProblem
from moe_runtime.executors.default_tactic import _tiles, default_variant, packed_tile_time
from moe_runtime.formats import WeightLayout
from moe_runtime.kernels import KernelVariant

TILES = (8, 16, 32, 64, 128, 256)
# us of one tile of tokens an expert: gate_up of Qwen3-235B, dep2, in mxfp8_mxfp4; both GEMMs of DeepSeek-R1, dep8, in
# fp8_mxfp4.
MEASURED = {
    WeightLayout.MXFP4: {16: 127, 32: 147, 64: 190, 128: 310, 256: 600},
    WeightLayout.FP8_MXFP4: {8: 202, 16: 207, 32: 228, 64: 272, 128: 411, 192: 523, 256: 652},
}


def library(gemm: Gemm, layout: WeightLayout) -> list[KernelVariant]:
    ends = {"gemm1": ("_swiglu",), "gemm2": ("", "_combine")}[gemm]
    return [
        KernelVariant(
            index, f"mixed_{tile}{end}", (128, tile, 128), (1, 1), True, 4, 0, end == "_swiglu", layout,
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


@pytest.mark.parametrize("layout", MEASURED, ids=lambda layout: layout.name)
def test_times_are_near_the_measured_ones(layout: WeightLayout) -> None:
    measured = MEASURED[layout]
    unit = measured[64] / packed_tile_time(64, layout)
    for tile, us in measured.items():
        assert packed_tile_time(tile, layout) * unit == pytest.approx(us, rel=0.15)


@pytest.mark.parametrize("gemm", GEMMS)
@pytest.mark.parametrize(
    ("format", "tokens", "tile"),
    [
        ("mxfp8_mxfp4", tokens, tile)
        for tokens, tile in [
            (1, 8), (32, 8), (64, 16), (192, 32), (384, 64), (512, 64), (768, 128), (1024, 128), (65536, 256)
        ]
    ] + [
        ("fp8_mxfp4", tokens, tile)
        for tokens, tile in [(1, 8), (32, 8), (64, 16), (384, 64), (768, 128), (65536, 256)]
    ],
)  # fmt: skip
def test_defaults(gemm: Gemm, format: str, tokens: int, tile: int) -> None:
    """Tokens per rank of Qwen3-235B under dep2, with 1/8 as many rows an expert."""
    config = dataclasses.replace(MoEConfig.preset("qwen3-235b"), format=format)
    problem = MoEProblem(config, Parallel.parse("dep2"))
    chosen = default_variant(library(gemm, config.number_format.weight_layout), problem, gemm, 2 * tokens, 132)
    assert chosen.name == f"mixed_{tile}" + {"gemm1": "_swiglu", "gemm2": "_combine"}[gemm]
