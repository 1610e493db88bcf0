"""Tunes one layer: for every bucket the workloads that one rank sees, and for its two GEMMs the best tactics."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING

import msgspec
import numpy as np
import torch

from ..errors import InvalidArgument, Unsupported
from ..executors.base import GEMMS, Executor, Gemm, MoEProblem
from ..placement import Placements
from ..weights import ExpertWeights
from ..workload import Workload, check_dispatch, check_distribution, default_distribution, kernel_rows
from .buckets import by_usefulness, plan_buckets, served_range, tuning_work
from .cost import predict, promising
from .draws import draws
from .measure import CONFIDENCE, MARGIN, Rule, T, objective_us
from .pairs import doubtful_pairs, race_pairs
from .plan import GemmChoice, Objective, Plan, PlanEntry, PlanKey, check_buckets
from .profiler import NO_MEMORY, OutOfTime, profile

if TYPE_CHECKING:
    from .quarantine import Vet

TOLERANCE = {"cuda": 3e-3, "cpu": 2e-2}
"""Relative error of one GEMM against its reference; CPU tactics may accumulate in bf16."""

OnBucket = Callable[[Plan], None]
OnStep = Callable[[float, str], None]


def tune(
    problem: MoEProblem,
    weights: ExpertWeights,
    executor: Executor,
    tune_max_num_tokens: int,
    distribution: str | None = None,
    seed: int = 0,
    *,
    dispatch: str = "compact",
    objective: Objective = "mean",
    samples: int = 1,
    margin: float = MARGIN,
    confidence: float = CONFIDENCE,
    budget_seconds: float | None = None,
    buckets: Sequence[int] | None = None,
    resume: Plan | None = None,
    on_bucket: OnBucket | None = None,
    on_step: OnStep | None = None,
    vet: Vet | None = None,
    placement: str = "",
) -> Plan:
    """Tunes the layer's buckets and returns the plan.

    samples: workloads drawn per bucket, with seeds seed, seed + 1, ..., or what stands for them (see `draws`).
        objective: over their times.
    margin, confidence: how surely a winner must beat the default; see `measure.Rule`.
    budget_seconds: cap on the time; buckets that do not fit are left out and keep the default, smallest cost for most
        use first. None: no cap.
    buckets: tokens per rank, ascending; None for `buckets.plan_buckets`.
    resume: an earlier, incomplete plan; its buckets are kept where it was tuned as this one is to be.
    on_bucket: called with the plan so far after each bucket, so that an interruption loses one bucket at most.
    on_step: called before each step with the share of the work that is done, 0 to 1, and what comes next.
    vet: says which tactics fault, from where they can do no harm; see `quarantine.vetting`.
    placement: file of the `Placements` that the problem's config is the `physical_config` of; "" for none.

    Raises InvalidArgument for what is out of range, and a budget that holds no bucket; Unsupported when no tactic of a
    GEMM gives a right result, and while a CUDA graph is captured.
    """
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        raise Unsupported("tuning inside a CUDA-graph capture: it times and synchronises. Tune before the capture")
    if samples < 1:
        raise InvalidArgument("samples", samples, "1 or more")
    if budget_seconds is not None and not budget_seconds > 0:
        raise InvalidArgument("budget", f"{budget_seconds:g} s", "more than 0 seconds")
    distribution = default_distribution() if distribution is None else check_distribution(distribution)
    check_dispatch(dispatch)
    rule = Rule(objective, margin, confidence, seed)
    placements = Placements.load(placement) if placement else None
    if placements is not None:
        placements.check_problem(problem.config, problem.parallel)
    if buckets is None:
        wanted = plan_buckets(problem, executor, tune_max_num_tokens, distribution, placements is not None)
    else:
        wanted = check_buckets(buckets, tune_max_num_tokens)
    blank = Plan(
        key=PlanKey.of(
            problem,
            distribution,
            tune_max_num_tokens,
            executor.device_name,
            executor.library_hash,
            dispatch,
            objective,
            placement=placement,
            placement_digest="" if placements is None else placements.digest(),
        ),
        seed=seed,
        samples=samples,
        margin=margin,
        confidence=confidence,
        complete=False,
        buckets=wanted,
        entries=(),
    )
    kept = resume if resume is not None and _same_settings(resume, blank) else blank
    entries = {entry.bucket: entry for entry in kept.entries if entry.bucket in wanted}
    task = _Task(
        problem, weights, executor, distribution, dispatch, placements, samples, seed, rule, vet, wanted,
        dict(kept.quarantined),
    )  # fmt: skip

    missing = [bucket for bucket in wanted if bucket not in entries]
    order = missing[:1] + by_usefulness(missing[1:])  # the smallest takes least time, so it shows what a budget holds
    clock = _Clock(time.monotonic(), budget_seconds, sum(map(task.work, missing)))
    for bucket in order:
        if entries and not clock.holds(task.work(bucket)):
            continue
        try:
            entry = task.entry(bucket, clock if entries else clock.without_deadline(), on_step)
        except OutOfTime:
            continue
        clock.done += task.work(bucket)
        if not entries and clock.overdrawn():
            least = f"{1.2 * clock.elapsed():.1f} s or more, for the smallest bucket alone took {clock.elapsed():.1f} s"
            raise InvalidArgument("budget", f"{budget_seconds:g} s", least)
        entries[bucket] = entry
        if on_bucket is not None:
            on_bucket(assemble(blank, entries, task.quarantined))
    return assemble(blank, entries, task.quarantined)


@dataclass
class _Clock:
    """The time of one tuning run. begin: on time.monotonic's clock. work: of all buckets. done: of those tuned."""

    begin: float
    budget_seconds: float | None
    work: float
    done: float = 0.0

    @property
    def deadline(self) -> float:
        return math.inf if self.budget_seconds is None else self.begin + self.budget_seconds

    def without_deadline(self) -> _Clock:
        return _Clock(self.begin, None, self.work, self.done)

    def elapsed(self) -> float:
        return time.monotonic() - self.begin

    def overdrawn(self) -> bool:
        return time.monotonic() > self.deadline

    def holds(self, work: float) -> bool:
        """Whether a bucket of that much work, taking as long as those before it, ends before the deadline."""
        expected = self.elapsed() / self.done * work if self.done else 0.0
        return time.monotonic() + expected <= self.deadline


@dataclass(frozen=True)
class _Task:
    """What is the same for all buckets. quarantined: reason by tactic that faulted, of which there may come more."""

    problem: MoEProblem
    weights: ExpertWeights
    executor: Executor
    distribution: str
    dispatch: str
    placements: Placements | None
    samples: int
    seed: int
    rule: Rule
    vet: Vet | None
    buckets: tuple[int, ...]
    quarantined: dict[str, str]

    def work(self, bucket: int) -> float:
        return tuning_work(self.problem, bucket, self.distribution, self.placements is not None)

    def entry(self, bucket: int, clock: _Clock, on_step: OnStep | None) -> PlanEntry:
        ends = served_range(bucket, self.buckets, self.distribution, self.placements is not None)
        samples = [
            draws(self.problem, ends, self.distribution, self.seed, sample, self.dispatch, self.placements)
            for sample in range(self.samples)
        ]
        steps = (*GEMMS, "both")

        def report(step: str) -> None:
            if on_step is not None:
                done = clock.done + self.work(bucket) * steps.index(step) / len(steps)
                on_step(done / clock.work, f"{bucket} tokens, {step}")

        choices = []
        for gemm in GEMMS:
            report(gemm)
            choices.append(self.choose(samples, gemm, clock.deadline))
        gemm1, gemm2 = choices
        entry = PlanEntry(bucket=bucket, rows=samples[0][0].local_slots, gemm1=gemm1, gemm2=gemm2)
        pairs = doubtful_pairs(entry, self.quarantined.keys())
        if not pairs:
            return entry
        report("both")
        trials = [
            [self.executor.layer_trial(self.problem, self.weights, each, self.seed) for each in sample]
            for sample in _busy(samples)
        ]
        try:
            return race_pairs(entry, trials, pairs, self.rule, clock.deadline)
        except OutOfTime:
            return entry  # what each GEMM's own times say stands

    def choose(self, samples: Sequence[Sequence[Workload]], gemm: Gemm, deadline: float) -> GemmChoice:
        """samples: of each the workloads at the ends of what the bucket serves, of which a time is the mean."""
        problem, executor, tokens = self.problem, self.executor, samples[0][0].num_tokens
        default = executor.default_tactic(problem, gemm, kernel_rows(tokens, problem.parallel))
        samples = _busy(samples)
        workloads = [workload for sample in samples for workload in sample]
        if not workloads:
            return GemmChoice(tactic=default, default_tactic=default)
        tactics = executor.tactics(problem, gemm)
        too_large = self._too_large(workloads)
        if too_large is not None:
            rejected = {tactic: too_large for tactic in tactics if tactic != default}
            return GemmChoice(tactic=default, default_tactic=default, rejected=rejected)

        refused = {tactic: executor.can_implement(problem, gemm, tactic) for tactic in tactics}
        rejected = {tactic: reason for tactic, reason in refused.items() if reason is not None}
        rejected |= {tactic: self.quarantined[tactic] for tactic in tactics if tactic in self.quarantined}
        by_sample = [predict(executor, problem, gemm, sample) for sample in samples]
        predicted = {
            tactic: objective_us(np.array([[fmean(us[tactic])] for us in by_sample]), self.rule.objective)
            for tactic in by_sample[0]
            if tactic not in rejected
        }
        pruned = predicted.keys() - promising(predicted) - {default}
        candidates = [tactic for tactic in tactics if tactic not in rejected and tactic not in pruned]
        if self.vet is not None and candidates:
            faults = self.vet(workloads[0], gemm, candidates)
            self.quarantined.update(faults)
            rejected |= faults
            candidates = [tactic for tactic in candidates if tactic not in faults]
        trials = [
            [executor.gemm_trial(problem, self.weights, each, gemm, self.seed) for each in sample] for sample in samples
        ]
        measured = profile(trials, candidates, default, TOLERANCE[executor.name], self.rule, deadline)
        self.quarantined.update({t: why for t, why in measured.rejected.items() if not why.startswith(NO_MEMORY)})
        rejected |= measured.rejected
        if measured.tactic is None:
            reasons = "; ".join(f"{tactic}: {reason}" for tactic, reason in rejected.items())
            raise Unsupported(f"no tactic of {gemm} works at {tokens} tokens: {reasons}")
        return GemmChoice(
            tactic=measured.tactic,
            default_tactic=default,
            timings=dict(measured.timings),
            rejected=rejected,
            predicted=predicted,
        )

    def _too_large(self, workloads: Sequence[Workload]) -> str | None:
        """Why the trials of the workloads, which are held together, do not fit in memory."""
        free = self.executor.free_bytes()
        if free is None:
            return None
        needed = sum(
            self.executor.workspace_bytes(self.problem, workload.num_rows)
            + 4 * workload.num_rows * self.problem.config.hidden_size  # rows that come in, and rows that go out
            for workload in workloads
        )
        if needed <= free:
            return None
        return f"{NO_MEMORY}: timing it needs {needed / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free"


def _busy(samples: Sequence[Sequence[Workload]]) -> list[list[Workload]]:
    """The samples without the workloads that bring this rank no rows."""
    busy = [[workload for workload in sample if workload.local_slots] for sample in samples]
    return [sample for sample in busy if sample]


def _same_settings(resume: Plan, blank: Plan) -> bool:
    """Whether an incomplete plan was tuned as the blank one is to be."""
    settings = ("key", "seed", "samples", "margin", "confidence", "complete")
    return all(getattr(resume, name) == getattr(blank, name) for name in settings)


def assemble(blank: Plan, entries: Mapping[int, PlanEntry], quarantined: Mapping[str, str]) -> Plan:
    amended = [_amended(entries[bucket], quarantined) for bucket in sorted(entries)]
    left = tuple(entry for entry in amended if entry is not None)
    return msgspec.structs.replace(
        blank, complete=len(left) == len(blank.buckets), entries=left, quarantined=dict(quarantined)
    )


def _amended(entry: PlanEntry, quarantined: Mapping[str, str]) -> PlanEntry | None:
    """The entry without tactics that faulted after they were chosen; None where nothing is left to choose."""
    if quarantined.keys().isdisjoint(entry.pair):
        return entry
    raced = {(pair.gemm1, pair.gemm2): pair.timing.us for pair in entry.layer}
    sound = {pair: us for pair, us in raced.items() if quarantined.keys().isdisjoint(pair)}
    first, second = _next(sound, entry.default_pair) or (None, None)
    gemm1, gemm2 = _without(entry.gemm1, quarantined, first), _without(entry.gemm2, quarantined, second)
    if gemm1 is None or gemm2 is None:
        return None
    return msgspec.structs.replace(entry, gemm1=gemm1, gemm2=gemm2, layer=entry.layer if sound else ())


def _without(choice: GemmChoice, quarantined: Mapping[str, str], instead: str | None) -> GemmChoice | None:
    """The choice of `instead`, or where that is None of what is left; None where nothing is."""
    if choice.tactic not in quarantined:
        return choice if instead is None else msgspec.structs.replace(choice, tactic=instead)
    sound = {tactic: timing.us for tactic, timing in choice.timings.items() if tactic not in quarantined}
    tactic = instead or _next(sound, choice.default_tactic)
    if tactic is None:
        return None
    faulted = {name: reason for name, reason in quarantined.items() if name in choice.timings}
    return msgspec.structs.replace(choice, tactic=tactic, rejected=choice.rejected | faulted)


def _next(us: Mapping[T, float], default: T) -> T | None:
    """The default where it is left, else the fastest: without the rounds no other can be said to beat it."""
    return default if default in us else min(us, key=lambda name: us[name], default=None)
