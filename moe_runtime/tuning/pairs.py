"""GEMM1 and GEMM2 chosen together: where their own times leave a doubt, pairs of tactics race on the whole layer.

A GEMM's own time leaves out what its tactic does to the rest of the layer: under which tail the next kernel starts,
what it leaves in L2, what its epilogue takes over from the stage after it. So a GEMM's time says which tactics may be
best, and the layer's time which of them is.
"""

from __future__ import annotations

from collections.abc import Sequence, Set
from itertools import product

import msgspec

from ..executors.base import LayerTrial, TacticPair
from .measure import Rule, beats, judge, objective_us, winner
from .plan import GemmChoice, PairTiming, PlanEntry
from .profiler import SCOUT_ROUNDS, final, race, scouts

CONTENDERS = 2
"""Tactics of one GEMM that race in pairs: two of each make four pairs, and the default pair may be a fifth."""
NEAR = 1.05
"""What a GEMM may take beside the chosen tactic and still be best in the layer: the activation alone, which an epilogue
could take over, is 1 to 9 % of GEMM1 on an H200."""


def doubtful_pairs(entry: PlanEntry, faulty: Set[str]) -> list[TacticPair]:
    """The pairs that a race on the layer must tell apart, the default pair among them; empty where one is left.

    faulty: tactics that must not run any more.
    """
    found = list(product(_contenders(entry.gemm1), _contenders(entry.gemm2)))
    if len(found) < 2:
        return []
    if entry.gemm1.default_us is not None and entry.gemm2.default_us is not None:
        found = [entry.default_pair, *found]
    sound = [pair for pair in dict.fromkeys(found) if faulty.isdisjoint(pair)]
    return sound if len(sound) > 1 else []


def _contenders(choice: GemmChoice) -> list[str]:
    """The chosen tactic, then the fastest others that may be as good, where anything was timed."""
    if choice.us is None:
        return []
    limit = NEAR * choice.us
    others = sorted(choice.timings.keys() - {choice.tactic}, key=lambda tactic: choice.timings[tactic].us)
    return [choice.tactic, *[tactic for tactic in others if choice.timings[tactic].low <= limit]][:CONTENDERS]


def race_pairs(
    entry: PlanEntry,
    trials: Sequence[Sequence[LayerTrial]],
    pairs: Sequence[TacticPair],
    rule: Rule,
    deadline: float,
) -> PlanEntry:
    """The entry with the pair that its layer is to run, and the times of all.

    What the GEMMs' own times chose stays, unless the winner by the rule that also judges each GEMM beats that by the
    same rule: one percent of a GEMM is worth having, but is less than one of the layer. It goes, too, where the layer
    takes longer with it than with the default pair.
    trials: of the workloads of each sample. Raises OutOfTime.
    """
    scouted = race(scouts(trials), pairs, SCOUT_ROUNDS, deadline)
    times = final(trials, pairs, scouted, deadline)
    best = winner(times, entry.default_pair, rule)
    us = {pair: objective_us(samples, rule.objective) for pair, samples in times.items()}
    stays = (
        entry.pair in times
        and not beats(times[best], times[entry.pair], rule)
        and us[entry.pair] <= us.get(entry.default_pair, us[entry.pair])
    )
    gemm1, gemm2 = entry.pair if stays else best
    return msgspec.structs.replace(
        entry,
        gemm1=msgspec.structs.replace(entry.gemm1, tactic=gemm1),
        gemm2=msgspec.structs.replace(entry.gemm2, tactic=gemm2),
        layer=tuple(PairTiming(*pair, timing) for pair, timing in judge(times, rule).items()),
    )
