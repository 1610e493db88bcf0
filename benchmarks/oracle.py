"""The fastest tactic on several draws of a workload, as who has to name one for all of them can know it.

With few tokens the draw decides which tactic is fastest (`tuning.draws`): who picks it on the draw that it is timed on
is right by hindsight. On one H200 two layouts at 4 and at 12 tokens drew 27 busy experts, and a plan's regret was 4.5 %
at both; with 22 busy experts the tactic that had lost there won by 3 %.
"""

from __future__ import annotations

import statistics
from collections.abc import Collection, Hashable, Mapping, Sequence
from typing import Any, TypeVar

from benchmarks.common import medians
from moe_runtime.tuning.profiler import Trial

T = TypeVar("T", bound=Hashable)
Draws = list[float]
"""Median microseconds on each draw; with few rows, ascending by busy experts."""
SCOUT_ROUNDS, LEAST_ROUNDS = 2, 3
SCOUTED = 4
"""Of so many draws one is scouted: two where rows are few, so that waves that one of them fills do not decide."""
NEAR = 1.2
"""Who is this far behind the fastest after the scouting rounds is not the fastest: those are good to a few percent, and
tell the scouted draws, from which the mean of all differs by a few more."""


def by_draw(trials: Sequence[Trial[T]], names: Sequence[T], rounds: int) -> dict[T, Draws]:
    """trials: one of each draw."""
    each = [medians(trial.time(names, rounds)) for trial in trials]
    return {name: [us[name] for us in each] for name in names}


def race(trials: Sequence[Trial[T]], names: Sequence[T], rounds: int) -> dict[T, Draws]:
    """rounds: that the draws share, though each has a few."""
    return by_draw(trials, names, max(LEAST_ROUNDS, rounds // len(trials)))


def survey(trials: Sequence[Trial[T]], names: Sequence[T], wanted: Collection[T], rounds: int) -> dict[T, Draws]:
    """Times of those near the fastest and of those wanted, whatever they take; empty without trials."""
    if not trials:
        return {}
    scouted = means(by_draw(trials[len(trials) // SCOUTED :: SCOUTED], names, SCOUT_ROUNDS))
    limit = NEAR * min(scouted.values())
    return race(trials, [name for name in names if scouted[name] <= limit or name in wanted], rounds)


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


def summary(points: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Of the regret at points, and of its bound, which is regret with hindsight."""
    return {
        "mean": statistics.fmean(point["regret"] for point in points),
        "worst": max(point["regret"] for point in points),
        "mean_bound": statistics.fmean(point["bound"] for point in points),
        "worst_bound": max(point["bound"] for point in points),
    }
