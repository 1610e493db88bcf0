"""What repeated times say about tactics: how fast each is, how surely, and whether one beats another.

Times are arrays [samples, rounds] of microseconds: a row for each sampled workload, a column for each round, in which
the tactics took turns. So the entries of two tactics pair up: what disturbed a round disturbed both.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from ..errors import InvalidArgument
from .plan import OBJECTIVES, Objective, Timing

MARGIN = 0.01
"""A winner replaces the default only when it is faster by more than this share of the default's time. A difference
that is real but smaller is not worth a plan that may be wrong elsewhere."""
CONFIDENCE = 0.95
RESAMPLES = 1000

Times = NDArray[np.float64]
T = TypeVar("T", bound=Hashable)
"""What races: tactics, or pairs of them."""


@dataclass(frozen=True)
class Rule:
    """How times are judged. Raises InvalidArgument for an unknown objective or a value out of range.

    objective: over the samples of the median time of each. margin: the least gain over the default, as a share of its
    time. confidence: of the interval that must lie beyond the margin. seed: of the resampling.
    """

    objective: Objective = "mean"
    margin: float = MARGIN
    confidence: float = CONFIDENCE
    seed: int = 0

    def __post_init__(self) -> None:
        if self.objective not in OBJECTIVES:
            raise InvalidArgument("objective", repr(self.objective), " or ".join(OBJECTIVES))
        if not 0 <= self.margin < 1:
            raise InvalidArgument("margin", self.margin, "0 or more and below 1, such as 0.01 for 1 %")
        if not 0 < self.confidence < 1:
            raise InvalidArgument("confidence", self.confidence, "above 0 and below 1, such as 0.95")


def judge(times: Mapping[T, Times], rule: Rule) -> dict[T, Timing]:
    """The objective of each and its confidence interval."""
    return {name: _timing(array, rule) for name, array in times.items()}


def beats(candidate: Times, default: Times, rule: Rule) -> bool:
    """Whether the candidate is faster by more than the margin over the whole confidence interval of their ratio.

    candidate, default: times of the same samples and rounds.
    """
    ratios = _resampled(candidate, rule) / _resampled(default, rule)
    return _interval(ratios, rule.confidence)[1] < 1 - rule.margin


def winner(times: Mapping[T, Times], default: T, rule: Rule) -> T:
    """The default unless the fastest beats it; else, of those that beat it, the first that the fastest does not beat.

    Which of several equals is the fastest is chance, and another tune's chance is another: so the order in which they
    are given decides, the same in every tune.
    times: of the same samples and rounds. Where the default is not among them, none has to beat it.
    """
    fastest = min(times, key=lambda name: objective_us(times[name], rule.objective))
    if default in times and not beats(times[fastest], times[default], rule):
        return default
    able = [name for name in times if default not in times or beats(times[name], times[default], rule)]
    return next(name for name in able if not beats(times[fastest], times[name], rule))


def objective_us(times: Times, objective: Objective) -> float:
    return float(_objective(np.median(times, axis=-1), objective))


def _objective(us: Times, objective: Objective) -> Times:
    """[..., samples] -> [...]"""
    result: Times = np.mean(us, axis=-1) if objective == "mean" else np.quantile(us, 0.95, axis=-1)
    return result


def _timing(times: Times, rule: Rule) -> Timing:
    us = objective_us(times, rule.objective)
    low, high = _interval(_resampled(times, rule), rule.confidence)
    return Timing(us, min(low, us), max(high, us))


def _resampled(times: Times, rule: Rule) -> Times:
    """The objective of `RESAMPLES` draws, with replacement, of the samples and of the rounds.

    The draws depend on the seed and the shape only, so two tactics' draws pair up.
    """
    samples, rounds = times.shape
    random = np.random.default_rng(rule.seed)
    sample = random.integers(samples, size=(RESAMPLES, samples, 1))
    column = random.integers(rounds, size=(RESAMPLES, samples, rounds))
    return _objective(np.median(times[sample, column], axis=-1), rule.objective)


def _interval(values: Times, confidence: float) -> tuple[float, float]:
    low, high = np.quantile(values, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)
