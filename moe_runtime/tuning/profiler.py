"""Which tactic of one GEMM wins at one workload: results are checked first, then the tactics race."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from ..executors.base import GemmTrial

MARGIN = 0.02
"""A winner replaces the default only when it is faster by more than this. Medians of two runs of one tactic lie
up to 2 % apart, and a plan that follows such noise loses to the default elsewhere."""

SCOUT_REPEATS = 2
OUT_OF_RACE = 2.0
"""A tactic whose best scouted time is this many times the fastest's leaves the race: noise does not bridge that."""

RACE_SECONDS = 0.5
MIN_REPEATS, MAX_REPEATS = 5, 31
"""Repeats of the race: as many as RACE_SECONDS holds, enough for a median, and no more than steady it."""


@dataclass(frozen=True)
class Profile:
    """us: median microseconds by tactic that raced. rejected: reason by tactic that cannot run or is wrong."""

    us: Mapping[str, float]
    rejected: Mapping[str, str]


def profile(trial: GemmTrial, tactics: Sequence[str], default: str, tolerance: float) -> Profile:
    """Checks every tactic's result, then times those that passed; the default is timed to the end.

    tolerance: largest accepted ||result - reference|| / ||reference||.
    """
    reference = trial.reference()
    verdicts = {tactic: _check(trial, tactic, reference, tolerance) for tactic in tactics}
    rejected = {tactic: reason for tactic, reason in verdicts.items() if reason is not None}
    sound = [tactic for tactic in tactics if tactic not in rejected]
    if not sound:
        return Profile({}, rejected)
    scouted = {tactic: min(times) for tactic, times in trial.time(sound, SCOUT_REPEATS).items()}
    limit = OUT_OF_RACE * min(scouted.values())
    racing = [tactic for tactic in sound if scouted[tactic] <= limit or tactic == default]
    round_seconds = sum(scouted[tactic] for tactic in racing) * 1e-6
    repeats = max(MIN_REPEATS, min(MAX_REPEATS, int(RACE_SECONDS / round_seconds)))
    times = trial.time(racing, repeats)
    return Profile({tactic: statistics.median(times[tactic]) for tactic in racing}, rejected)


def winner(us: Mapping[str, float], default: str) -> str:
    """The fastest tactic, or the default where nothing beats it by more than `MARGIN`."""
    fastest = min(us, key=lambda tactic: us[tactic])
    if default in us and us[fastest] > us[default] * (1 - MARGIN):
        return default
    return fastest


def _check(trial: GemmTrial, tactic: str, reference: tuple[Tensor, Tensor], tolerance: float) -> str | None:
    row_index, expected = reference
    try:
        result = trial.run(tactic)
        # The reference holds a sample of the rows; what was left unwritten elsewhere shows as NaN.
        if not result.isfinite().all():
            return "wrong result: not finite, or left unwritten, somewhere"
        error = float((result[row_index].float() - expected).norm() / expected.norm())
    except Exception as failure:  # whatever a candidate raises disqualifies it, and only it
        return f"raised {type(failure).__name__}: {failure}"
    if not error <= tolerance:  # NaN must not pass
        return f"wrong result: relative error {error:.2g}, accepted {tolerance:.2g}"
    return None
