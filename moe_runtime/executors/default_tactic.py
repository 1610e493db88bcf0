"""Which compiled kernel serves a GEMM when there is no plan."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from ..formats import WeightLayout
from ..kernels import KernelVariant
from .base import Gemm, MoEProblem, rows_to_hold

NARROW = 32
"""Tokens of a tile up to which a GEMM is bound by reading weights, and fusing the activation costs it nothing."""

MANY = 128
"""Of fp8_block: tokens of the widest tile that a default has. One of 192 takes 0.83 of the time of two at 160 to 192
rows of every expert, but 1.28 of that of one at 128, and up to 1.2 of many: it is for the tuner."""

WAVES = 2
"""Of fp8_block: tiles an SM from which on wide ones fill the GPU. 12 experts of Qwen3-235B with 43 rows each have 1.1
wide tiles an SM, and narrow ones take 0.86 of the time."""


def packed_tile_time(tokens: int, layout: WeightLayout) -> float:
    """Of a tile of packed weights by that many tokens, in no unit: bound by decoding up to 64, then by multiplying.

    Within 15 % of what tiles of 16 to 256 take on an H200.
    """
    if layout.multiplies_e4m3:
        return max(192.0 + 1.25 * tokens, 133.0 + 2.17 * tokens)
    return max(70.0 + tokens, 14.0 + 1.53 * tokens)


def default_variant(
    able: Sequence[KernelVariant], problem: MoEProblem, gemm: Gemm, num_rows: int, sm_count: int
) -> KernelVariant:
    """Of the variants that can run a GEMM of a call with num_rows rows, the one to run without having measured.

    Of fp8_block: the least tile of tokens that holds an expert's rows and their spread, but from 33 rows on the tile
    for many, where it fills the GPU; with SwiGLU fused where that pays, and in gemm2 the twin that combines: at the
    median it takes 8 % less than its plain kernel and the sum after it. Kernels that gather win 2 % where rows are few
    and lose up to 60 % where some experts get many: those are for the tuner.

    Both GEMMs with their defaults against the fastest of each, over benchmarks/results/h200/grid.json (held by a test):
    random routing is 0.5 % slower on average and 6 % at worst, balanced 0.8 and 6 %, zipf:1.0 1.3 and 8 %.
    """
    mean = problem.mean_rows(num_rows)
    rows = rows_to_hold(mean)
    if able[0].weights != WeightLayout.FP8_BLOCK:
        return _default_of_packed(able, gemm, mean)
    plain = [variant for variant in able if variant.stores_rows]
    tiles = sorted({variant.token_tile for variant in plain if variant.token_tile <= MANY})
    tile = next((tile for tile in tiles if tile >= rows), tiles[-1])
    # Of experts with a Poisson number of rows, those that have any.
    busy = problem.num_local_experts * -math.expm1(-mean)
    columns, _ = problem.gemm_shape(gemm)

    def tiles_of(variant: KernelVariant) -> float:
        return busy * columns / variant.weight_tile * max(1.0, mean / variant.token_tile)

    widest = max(plain, key=lambda variant: variant.weight_tile)
    fills = tiles_of(widest) >= WAVES * sm_count
    if fills and NARROW < tile < MANY and MANY in tiles:
        tile = MANY  # whose kernels compute up to half as many rows in half the time
    suited = [variant for variant in plain if variant.token_tile == tile]

    def pays(variant: KernelVariant) -> bool:
        """Fusing halves the tiles: where they no longer fill the GPU, the activation's own kernel costs less."""
        holds = rows <= variant.token_tile <= NARROW or (variant.token_tile == tile and not variant.swap_ab)
        return holds and tiles_of(variant) >= sm_count / 2

    fused = [variant for variant in able if variant.swiglu and not variant.gathers and pays(variant)]
    if fused:
        return min(fused, key=lambda variant: variant.token_tile)
    # One tile an expert, or few in all: narrow ones fill the GPU more evenly; a wide one reads the tokens less often.
    chosen = (max if rows > MANY and fills else min)(suited, key=lambda variant: variant.weight_tile)
    return twin(chosen, able, "", "combine")


def _default_of_packed(able: Sequence[KernelVariant], gemm: Gemm, mean: float) -> KernelVariant:
    """The tile by which an expert's rows take the least time. A gated gemm1 has only kernels that activate, which of
    another activation are none; gemm2 combines."""
    suited = [variant for variant in able if not variant.combines or gemm == "gemm2"]
    variant = min(suited, key=lambda v: packed_tile_time(v.token_tile, v.weights) * _tiles(mean, v.token_tile))
    return twin(variant, able, "", "combine") if gemm == "gemm2" else variant


def _tiles(mean: float, tile: int) -> float:
    """Tiles that an expert takes on average, of those that have any, where rows are spread as by random routing."""
    spread = math.sqrt(2 * max(mean, 1e-9))
    last = math.ceil((mean + 4 * spread) / tile)
    return 1 + sum(math.erfc((tile * full + 0.5 - mean) / spread) / 2 for full in range(1, last + 1))


def twin(variant: KernelVariant, others: Iterable[KernelVariant], end: str, other_end: str) -> KernelVariant:
    """The one of `others` whose name has another end, such as "combine" or "" for none; the variant itself where there
    is none."""
    name = "_".join(filter(None, (variant.name.removesuffix(end).removesuffix("_"), other_end)))
    return next((other for other in others if variant.name.endswith(end) and other.name == name), variant)
