"""The fastest tactic on several draws of a workload, as who has to name one for all of them can know it.

With few tokens the draw decides which tactic is fastest (`tuning.draws`): who picks it on the draw that it is timed on
is right by hindsight. On one H200 two layouts at 4 and at 12 tokens drew 27 busy experts, and a plan's regret was 4.5 %
at both; with 22 busy experts the tactic that had lost there won by 3 %.
"""

from __future__ import annotations

import statistics
from collections.abc import Hashable, Mapping, Sequence
from typing import TypeVar

from moe_runtime.tuning.profiler import Trial

T = TypeVar("T", bound=Hashable)
Draws = list[float]
"""Median microseconds on each draw; with few rows, ascending by busy experts."""


def medians(times: Mapping[T, Sequence[float]]) -> dict[T, float]:
    return {name: statistics.median(us) for name, us in times.items()}


def by_draw(trials: Sequence[Trial[T]], names: Sequence[T], rounds: int) -> dict[T, Draws]:
    """trials: one of each draw."""
    each = [medians(trial.time(names, rounds)) for trial in trials]
    return {name: [us[name] for us in each] for name in names}


def means(times: Mapping[T, Draws]) -> dict[T, float]:
    return {name: statistics.fmean(us) for name, us in times.items()}


def with_hindsight(times: Mapping[T, Draws]) -> float:
    """Mean microseconds of the fastest, picked and timed on all draws: never more than the truth, but for noise."""
    return min(means(times).values())


def without_hindsight(times: Mapping[T, Draws]) -> float:
    """Of the fastest, picked on every other draw, on the draws between, and the other way round.

    Who picks on half of the draws may miss the fastest, so this is rather more than the truth.
    """
    halves = [{name: us[start::2] for name, us in times.items()} for start in (0, 1)]
    if not all(halves[1].values()):
        return with_hindsight(times)
    found = []
    for picking, timing in (halves, halves[::-1]):
        known = means(picking)
        found += timing[min(known, key=lambda name: known[name])]
    return statistics.fmean(found)
