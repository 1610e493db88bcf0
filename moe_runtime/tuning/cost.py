"""What a kernel variant should cost at one workload, from bytes, FLOPs, and how its tiles fill the GPU.

A grouped GEMM cuts each expert's [rows, N] output into tiles; each SM works on one tile at a time, so tiles go in
waves, of which kernels that halve tiles may end with half a one. A tile costs its FLOPs at the rate of a tensor core,
or its operands' bytes at the rate at which L2 feeds an SM, whichever takes longer. All of it takes at least as long as
memory needs for what must be read and written once.

The model leaves out latency, epilogues and the change of tensor maps between experts, so it is a lower bound, and a
useful one: it prunes variants whose least time is beyond what the best of the others could reasonably need.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from ..executors.base import Executor, Gemm, MoEProblem
from ..formats import WeightLayout
from ..formats.fp8_block import BLOCK
from ..kernels import KernelVariant
from ..roofs import ROOFS, Roofs
from ..workload import Workload

HEADROOM = 1.35
"""How far above the least prediction a variant may lie and still race. Over all sizes in benchmarks/results/h200, no
variant is faster than predicted, and the fastest takes at most 1.3 times the least prediction: a variant predicted
above that is slower than the fastest. The rest is for workloads that were not measured. Of CUTLASS' collectives alone
the fastest takes up to 1.69 times the least prediction; even so, none within 3 % of it is predicted above 1.35."""


def gemm_bytes(
    rows_per_expert: Sequence[int],
    shape: tuple[int, int],
    swiglu: bool = False,
    weights: WeightLayout = WeightLayout.FP8_BLOCK,
) -> float:
    """Fewest bytes a grouped GEMM moves: each busy expert's weights and each row once, and the results.

    shape: (N, K) of an expert's weights, with their scales. Rows [K] are e4m3, of fp8_block with a float per 128
    values, or bf16; results [N] bf16, or with swiglu activations [N/2] like rows.
    """
    (n, k), rows, busy = shape, sum(rows_per_expert), sum(rows > 0 for rows in rows_per_expert)
    row_bytes = weights.token_bytes + (4 / BLOCK if weights == WeightLayout.FP8_BLOCK else 0)
    result = n / 2 * row_bytes if swiglu else 2 * n
    return busy * n * k * weights.encoding.bytes_per_value + rows * (k * row_bytes + result)


@dataclass(frozen=True)
class Cost:
    """Microseconds of one variant at one workload.

    memory_us: weights of experts with rows, rows and outputs, once through memory. tiles_us: `waves` waves of tiles.
    """

    memory_us: float
    tiles_us: float
    tiles: int
    waves: float

    @property
    def us(self) -> float:
        return max(self.memory_us, self.tiles_us)


def cost(
    variant: KernelVariant, rows_per_expert: Sequence[int], shape: tuple[int, int], sm_count: int, roofs: Roofs
) -> Cost:
    """The cost of a grouped GEMM with these rows per local expert. shape: (N, K) of its weights."""
    n, k = shape
    token_tile, weight_tile = variant.token_tile, variant.weight_tile
    cluster_tokens, cluster_weights = reversed(variant.cluster) if variant.swap_ab else variant.cluster
    occupied = [rows for rows in rows_per_expert if rows > 0]

    # Every thread block of a cluster holds its SM, also where its own tile lies outside the expert's rows.
    across = cluster_weights * math.ceil(n / (weight_tile * cluster_weights))
    tiles = across * sum(cluster_tokens * math.ceil(rows / (token_tile * cluster_tokens)) for rows in occupied)
    cluster_size = cluster_tokens * cluster_weights

    # Scales of 128x128 blocks are nothing beside the values, those of 16 or 32 are something.
    layout = variant.weights
    weight_bytes = 1.0 if layout == WeightLayout.FP8_BLOCK else layout.encoding.bytes_per_value
    token_bytes, tflops = layout.token_bytes, roofs.tflops(layout)

    def us_of_tile(tokens: int) -> float:
        flops = 2 * tokens * weight_tile * k
        # A cluster reads what its blocks share once: the tokens of its weight tiles, the weights of its token tiles.
        loaded = k * (token_bytes * tokens / cluster_weights + weight_bytes * weight_tile / cluster_tokens)
        return sm_count * max(flops / tflops, loaded / roofs.l2_tbps) / 1e6

    tile_us = us_of_tile(token_tile)
    if variant.halves:
        halves = across * sum(0 < rows % token_tile <= token_tile // 2 for rows in occupied)
        half = us_of_tile(token_tile // 2) / tile_us
        waves = math.ceil(2 * (tiles - halves + half * halves) / sm_count) / 2
    else:
        waves = math.ceil(tiles / (sm_count // cluster_size * cluster_size))

    memory_us = gemm_bytes(rows_per_expert, shape, variant.swiglu, variant.weights) / roofs.read_tbps / 1e6
    return Cost(memory_us, waves * tile_us, tiles, waves)


def predict(
    executor: Executor, problem: MoEProblem, gemm: Gemm, workloads: Iterable[Workload]
) -> dict[str, list[float]]:
    """Microseconds by tactic, one for each workload; empty where there are no roofs: on CPUs, and other GPUs."""
    roofs, shape = ROOFS.get(executor.device_name), problem.gemm_shape(gemm)
    if roofs is None:
        return {}
    loads = [workload.rows_per_expert.tolist() for workload in workloads]
    return {
        name: [cost(variant, rows, shape, executor.sm_count, roofs).us for rows in loads]
        for name, variant in executor.variants.items()
        if variant.weights == problem.config.number_format.weight_layout
    }


def promising(predicted: Mapping[str, float]) -> set[str]:
    """The tactics that may still win by their predictions."""
    limit = HEADROOM * min(predicted.values(), default=math.inf)
    return {tactic for tactic, us in predicted.items() if us <= limit}
