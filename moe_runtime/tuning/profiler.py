"""Which tactic of one GEMM wins at one bucket: results are checked first, then the tactics race."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from ..executors.base import GemmTrial
from .measure import Rule, T, Times, judge, objective_us, winner
from .plan import Timing

SCOUT_ROUNDS = 2
FINALISTS = 3
NEAR = 1.05
"""A heat keeps its faster half, and whoever is within this of the fastest: few rounds cannot tell those apart."""
HOPELESS = 2.0
"""Slower than the fastest by this, a tactic leaves whichever half it is in: noise does not bridge that."""

SCOUTED = 4
"""Workloads of a sample that heats before the final race on: those only rule out what is far behind."""
RACE_SECONDS = 0.3
MIN_ROUNDS, MAX_ROUNDS, MOST_TIMES = 3, 21, 30
"""Rounds of the final: as many as RACE_SECONDS a workload holds, enough for a median, and no more than steady it. Many
workloads steady it as well, so that MOST_TIMES of a tactic on those of a sample are enough."""


class OutOfTime(Exception):
    """The deadline passed before the race was decided."""


@dataclass(frozen=True)
class Profile:
    """timings: by tactic that was timed. rejected: reason by tactic that cannot run or is wrong.

    tactic: the winner; None where every tactic was rejected.
    """

    tactic: str | None
    timings: Mapping[str, Timing]
    rejected: Mapping[str, str]


def profile(
    trials: Sequence[Sequence[GemmTrial]],
    tactics: Sequence[str],
    default: str,
    tolerance: float,
    rule: Rule,
    deadline: float = math.inf,
) -> Profile:
    """Checks every tactic's result, then times those that passed in heats; the default stays to the end.

    trials: of the workloads of each sample; results are checked on the very first. tolerance: largest accepted
    ||result - reference|| / ||reference||. deadline: on time.monotonic's clock.

    The final's times alone decide: in earlier heats the luckiest of many looks best, and is not.
    Raises OutOfTime.
    """
    rejected = _check_all(trials[0][0], tactics, tolerance, deadline)
    racing = [tactic for tactic in tactics if tactic not in rejected]
    if not racing:
        return Profile(None, {}, rejected)
    times: dict[str, Times] = {}
    rounds, decided = SCOUT_ROUNDS, False
    while not decided:
        times |= race(scouts(trials), racing, rounds, deadline)
        us = {tactic: objective_us(times[tactic], rule.objective) for tactic in racing}
        stay = _stay(us, default) if len(racing) > FINALISTS else racing
        decided = len(stay) <= FINALISTS or len(stay) == len(racing)
        racing, rounds = stay, 2 * rounds
    last = final(trials, racing, times, deadline)
    return Profile(winner(last, default, rule), judge(times | last, rule), rejected)


def _stay(us: Mapping[str, float], default: str) -> list[str]:
    """Who stays after a heat, in the order given."""
    best, half = min(us.values()), sorted(us.values())[(len(us) - 1) // 2]
    limit = max(min(half, HOPELESS * best), NEAR * best)
    return [tactic for tactic in us if us[tactic] <= limit or tactic == default]


class Trial(Protocol[T]):
    """A `GemmTrial` or a `LayerTrial`."""

    def time(self, names: Sequence[T], repeats: int, /) -> dict[T, list[float]]: ...


def race(trials: Sequence[Sequence[Trial[T]]], names: Sequence[T], rounds: int, deadline: float) -> dict[T, Times]:
    """Microseconds [samples, rounds] by name: the mean over a sample's trials. Raises OutOfTime.

    The mean, as of one trial: a bucket serves both ends of its range and all draws, so confidence must not depend on
    which of them were resampled.
    """
    if time.monotonic() > deadline:
        raise OutOfTime
    by_sample = [[trial.time(names, rounds) for trial in sample] for sample in trials]
    return {name: np.array([np.mean([us[name] for us in each], axis=0) for each in by_sample]) for name in names}


def scouts(trials: Sequence[Sequence[Trial[T]]]) -> list[Sequence[Trial[T]]]:
    """Of each sample `SCOUTED` trials or a few more, evenly spread."""
    return [sample[:: max(1, len(sample) // SCOUTED)] for sample in trials]


def final(
    trials: Sequence[Sequence[Trial[T]]], names: Sequence[T], before: Mapping[T, Times], deadline: float
) -> dict[T, Times]:
    """The race that decides, of a length that suits the times from before. Raises OutOfTime."""
    workloads = sum(map(len, trials))
    round_seconds = 1e-6 * workloads * sum(float(before[name][:, -1].mean()) for name in names)
    seconds = min(RACE_SECONDS * workloads, deadline - time.monotonic())
    rounds = min(MAX_ROUNDS, MOST_TIMES * len(trials) // workloads, int(seconds / round_seconds))
    return race(trials, names, max(MIN_ROUNDS, rounds), deadline)


def _check_all(trial: GemmTrial, tactics: Sequence[str], tolerance: float, deadline: float) -> dict[str, str]:
    reference = trial.reference()
    reasons = {}
    for tactic in tactics:
        if time.monotonic() > deadline:
            raise OutOfTime
        reason = check(trial, tactic, reference, tolerance)
        if reason is not None:
            reasons[tactic] = reason
    return reasons


def check(trial: GemmTrial, tactic: str, reference: tuple[Tensor, Tensor], tolerance: float) -> str | None:
    """None when the tactic's result is right, else the reason. tolerance: of ||result - reference|| / ||reference||."""
    row_index, expected = reference
    try:
        result = trial.run(tactic)
        # The reference holds a sample of the rows; what was left unwritten elsewhere shows as NaN.
        if not result.isfinite().all():
            return "wrong result: not finite, or left unwritten, somewhere"
        error = trial.error(tactic, result[row_index], expected)
    except torch.OutOfMemoryError as failure:
        return f"{NO_MEMORY}: {failure}"
    except Exception as failure:  # whatever a candidate raises disqualifies it, and only it
        return f"raised {type(failure).__name__}: {failure}"
    if not error <= tolerance:  # NaN must not pass
        return f"wrong result: relative error {error:.2g}, accepted {tolerance:.2g}"
    return None


NO_MEMORY = "no memory"
"""How the reason begins where a tactic or its trial did not fit: that is no fault of the tactic's."""
