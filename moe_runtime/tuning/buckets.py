"""Which numbers of tokens per rank a plan tunes.

A call takes the largest bucket that is not above its tokens per rank, so a bucket's tactic serves every call up to the
next bucket. The best tile changes where experts outgrow a tile of tokens: a bucket starts there, for up to the next
tile the same tile is best. Elsewhere powers of two do.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Sequence
from itertools import pairwise

from ..executors.base import Executor, MoEProblem, rows_to_hold
from ..workload import buckets as powers_of_two
from .draws import mean_rows, number_of_draws, smears

MOST = 28
"""Every bucket costs a second or two of tuning and a line in the plan."""
NEAR = math.sqrt(2)
"""A power of two that is closer than this to a change of tile would split a range that one tile serves."""
SMEARED_GAP = 1.3
"""The ends of what a bucket serves must want the same tile. On an H200 with gaps of 1.5 the tile that was best on the
mean of both lost up to 1.2 % at the lower one to the default, which knows the rows of each call."""


def plan_buckets(
    problem: MoEProblem, executor: Executor, tune_max_num_tokens: int, distribution: str, placed: bool = False
) -> tuple[int, ...]:
    """The buckets of a plan that names none. Raises InvalidArgument for a tune_max_num_tokens below 1.

    placed: whether experts have a placement, here and below.
    """
    layout = problem.config.number_format.weight_layout
    tiles = {variant.token_tile for variant in executor.variants.values() if variant.weights == layout}
    return propose(problem, tune_max_num_tokens, sorted(tiles), smears(distribution, placed))


def propose(
    problem: MoEProblem, tune_max_num_tokens: int, token_tiles: Sequence[int], smeared: bool = False
) -> tuple[int, ...]:
    """At most `MOST` buckets up to tune_max_num_tokens, ascending from 1; powers of two where there are no token_tiles.

    token_tiles: tokens of one tile of each kernel. One tile or two of them an expert: beyond, padding matters little.
    smeared: experts get unequal rows, so a tile overflows expert by expert: it is outgrown before the mean fills it,
        and points halfway are added.
    """
    powers = powers_of_two(tune_max_num_tokens)
    hold: Callable[[float], float] = rows_to_hold if smeared else math.floor
    held = [hold(mean_rows(problem, tokens)) for tokens in range(tune_max_num_tokens + 1)]
    changes = sorted({bisect_right(held, tile * count) for tile in token_tiles for count in (1, 2)})
    changes = [tokens for tokens in changes if tokens <= tune_max_num_tokens]
    chosen = set(changes) | {p for p in powers if all(max(p / c, c / p) >= NEAR for c in changes)} | {1}
    if smeared and changes:
        # As many busy experts as 3 tokens bring fill waves unlike those of 2: on an H200, what won there lost 3 % here.
        chosen |= {3}.intersection(range(tune_max_num_tokens + 1))
        _halve_gaps(chosen, changes[0] // 2, changes[-1])
    while len(chosen) > MOST:
        ascending = sorted(chosen)
        # The bucket that reaches least far beyond the one before it.
        chosen.remove(min(ascending[1:], key=lambda tokens: tokens / ascending[ascending.index(tokens) - 1]))
    return tuple(sorted(chosen))


def served_range(bucket: int, buckets: Sequence[int], distribution: str, placed: bool = False) -> tuple[int, ...]:
    """The tokens at which a bucket's tactics are timed: its own, and where experts get unequal rows the most it serves.

    Smeared, tiles overflow one expert after the other on the way to the next bucket. On an H200 tactics tuned at the
    bucket alone took up to 20 % more than the best just below the next one.
    """
    later = [other for other in buckets if other > bucket]
    last = min(later) - 1 if smears(distribution, placed) and later else bucket
    return (bucket,) if last == bucket else (bucket, last)


def _halve_gaps(chosen: set[int], low: int, high: int) -> None:
    """Splits the widest gaps between low and high, by ratio, while they exceed `SMEARED_GAP` and `MOST` allows."""
    while len(chosen) < MOST:
        within = [tokens for tokens in sorted(chosen) if low <= tokens <= high]
        gaps = {second / first: (first, second) for first, second in pairwise(within)}
        widest = max(gaps, default=0.0)
        if widest <= SMEARED_GAP:
            return
        first, second = gaps[widest]
        middle = round(math.sqrt(first * second))
        if middle in chosen:
            return
        chosen.add(middle)


def tuning_work(problem: MoEProblem, bucket: int, distribution: str, placed: bool = False) -> float:
    """Relative time of tuning a bucket: what every workload takes, and a share by its rows."""
    return number_of_draws(problem, bucket, distribution, placed) * (problem.config.num_experts + bucket)


def by_usefulness(buckets: Sequence[int]) -> list[int]:
    """The middle first, then the middles of what is left on both sides, and so on.

    However early tuning stops, what is done is spread over the whole range of calls; and it starts where defaults,
    which are right for very few and very many tokens, are most often wrong.
    """
    order, ranges = [], [(0, len(buckets))]
    for low, high in ranges:
        if low < high:
            middle = (low + high) // 2
            order.append(buckets[middle])
            ranges += [(low, middle), (middle + 1, high)]
    return order
