"""Tunes one layer: for every bucket the workload that one rank sees, and for each of its GEMMs the best tactic."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ..errors import InvalidArgument, Unsupported
from ..executors.base import GEMMS, Executor, Gemm, MoEProblem
from ..weights import FP8BlockWeights
from ..workload import Workload, default_distribution, kernel_rows, make_workload
from ..workload import buckets as all_buckets
from .plan import GemmChoice, Plan, PlanEntry, PlanKey
from .profiler import profile, winner

TOLERANCE = {"cuda": 3e-3, "cpu": 2e-2}
"""Relative error of one GEMM against its reference; CPU tactics may accumulate in bf16."""

OnBucket = Callable[[Plan], None]
OnStep = Callable[[float, str], None]


def tune(
    problem: MoEProblem,
    weights: FP8BlockWeights,
    executor: Executor,
    tune_max_num_tokens: int,
    distribution: str | None = None,
    seed: int = 0,
    *,
    buckets: Sequence[int] | None = None,
    resume: Plan | None = None,
    on_bucket: OnBucket | None = None,
    on_step: OnStep | None = None,
) -> Plan:
    """Tunes the layer's buckets and returns the plan.

    buckets: those to tune, of `workload.buckets(tune_max_num_tokens)`; None for all. A plan of some is not `complete`.
    resume: an earlier, incomplete plan; its buckets are kept where its key and seed are those asked for.
    on_bucket: called with the plan so far after each bucket, so that an interruption loses one bucket at most.
    on_step: called before each step with the share of the work that is done, 0 to 1, and what comes next.

    Raises InvalidArgument for a bucket that does not exist, Unsupported when no tactic of a GEMM gives a right result.
    """
    distribution = default_distribution() if distribution is None else distribution
    every = all_buckets(tune_max_num_tokens)
    wanted = every if buckets is None else sorted(set(buckets))
    if not set(wanted) <= set(every):
        raise InvalidArgument("buckets", list(wanted), f"some of {every}")
    key = PlanKey.of(problem, distribution, tune_max_num_tokens, executor.device_name, executor.library_hash)
    kept = resume is not None and (resume.key, resume.seed, resume.complete) == (key, seed, False)
    entries = {entry.bucket: entry for entry in resume.entries} if resume is not None and kept else {}

    def plan() -> Plan:
        ascending = tuple(entries[bucket] for bucket in sorted(entries))
        return Plan(key=key, seed=seed, complete=len(ascending) == len(every), entries=ascending)

    missing = [bucket for bucket in wanted if bucket not in entries]
    work = [_expected_work(problem, bucket) for bucket in missing]
    for index, bucket in enumerate(missing):
        workload = make_workload(problem.config, problem.parallel, bucket, distribution, seed)
        choices: dict[str, GemmChoice] = {}
        for half, gemm in enumerate(GEMMS):
            if on_step is not None:
                done = sum(work[:index]) + work[index] * half / len(GEMMS)
                on_step(done / sum(work), f"{bucket} tokens, {gemm}")
            choices[gemm] = _choose(problem, weights, executor, workload, gemm, seed)
        entries[bucket] = PlanEntry(bucket=bucket, rows=workload.local_slots, **choices)
        if on_bucket is not None:
            on_bucket(plan())
    return plan()


def _choose(
    problem: MoEProblem, weights: FP8BlockWeights, executor: Executor, workload: Workload, gemm: Gemm, seed: int
) -> GemmChoice:
    default = executor.default_tactic(problem, gemm, kernel_rows(workload.num_tokens, problem.parallel))
    if workload.local_slots == 0:
        return GemmChoice(tactic=default, us=None, default_tactic=default, default_us=None)
    tactics = executor.tactics(problem, gemm)
    refused = {tactic: executor.can_implement(problem, gemm, tactic) for tactic in tactics}
    runnable = [tactic for tactic in tactics if refused[tactic] is None]
    trial = executor.gemm_trial(problem, weights, workload, gemm, seed)
    measured = profile(trial, runnable, default, TOLERANCE[executor.name])
    rejected = {tactic: reason for tactic, reason in refused.items() if reason is not None} | dict(measured.rejected)
    if not measured.us:
        reasons = "; ".join(f"{tactic}: {reason}" for tactic, reason in rejected.items())
        raise Unsupported(f"no tactic of {gemm} works at {workload.num_tokens} tokens: {reasons}")
    best = winner(measured.us, default)
    return GemmChoice(
        tactic=best,
        us=measured.us[best],
        default_tactic=default,
        default_us=measured.us.get(default),
        rejected=rejected,
    )


def _expected_work(problem: MoEProblem, bucket: int) -> float:
    """Relative cost of tuning a bucket, for the time left: what every bucket costs, and a share by its rows."""
    return problem.config.num_experts + bucket
