"""One plan tuned by several ranks of equal GPUs: the buckets are shared out, and all get the same plan or an error."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
import torch

from ..errors import Unsupported
from ..executors.base import Executor, MoEProblem
from ..weights import ExpertWeights
from ..workload import default_distribution
from .buckets import plan_buckets, tuning_work
from .meeting import Meeting, RankError, meeting
from .plan import Plan
from .quarantine import Vet
from .tuner import OnBucket, OnStep, assemble, tune

TIMEOUT_SECONDS = 300.0
"""The longest that a rank may take to join, or for one step of its tuning."""


def launched() -> bool:
    """Whether a launcher such as torchrun started this process as one of several."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def is_writer() -> bool:
    """Whether this is the rank that writes the plan's file and prints: rank 0, or the only one."""
    return os.environ.get("RANK", "0") == "0"


def use_local_gpu() -> None:
    """Makes the GPU of LOCAL_RANK this process's current one, on a machine with GPUs.

    Raises Unsupported where there are fewer.
    """
    index, there = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if there == 0:
        return
    if index >= there:
        raise Unsupported(f"LOCAL_RANK {index}, but torch sees {there} GPUs: start one process a GPU, or --device cpu")
    torch.cuda.set_device(index)


def tune_over_ranks(
    problem: MoEProblem,
    weights: ExpertWeights,
    executor: Executor,
    tune_max_num_tokens: int,
    distribution: str | None = None,
    seed: int = 0,
    *,
    buckets: Sequence[int] | None = None,
    resume: Plan | None = None,
    on_bucket: OnBucket | None = None,
    on_step: OnStep | None = None,
    vet: Vet | None = None,
    placement: str = "",
    timeout_seconds: float = TIMEOUT_SECONDS,
    **settings: Any,
) -> Plan:
    """`tune`, called on every rank alike: each tunes a share of the buckets, and all return the same plan.

    Every rank profiles the shard that `problem` names, whatever its own rank is, because ranks of equal shards share a
    plan. The number of ranks that tune need not be that of the layout: two GPUs can tune dep8.

    resume: rank 0's counts, the others' is ignored. on_bucket: called on rank 0 only, with what all ranks have done.
    on_step: of this rank's own share. vet: this rank's own. settings: further keywords of `tune`.
    timeout_seconds: how long a rank may give no sign of life; it gives one before every step of its tuning.

    Raises RankError on every rank when one is missing, late, dead or stuck beyond the time-out, has another GPU,
    library or arguments, failed, or ended with another plan; the rank that failed raises what `tune` raised.
    """
    distribution = default_distribution() if distribution is None else distribution
    if buckets is None:
        buckets = plan_buckets(problem, executor, tune_max_num_tokens, distribution, bool(placement))
    every = tuple(buckets)
    facts = {
        "device": executor.device_name,
        "library_hash": executor.library_hash,
        "torch": torch.__version__,
        "config": problem.config,
        "parallel": f"{problem.parallel} rank {problem.parallel.rank}",
        "tune_max_num_tokens": tune_max_num_tokens,
        "distribution": distribution,
        "seed": seed,
        "buckets": every,
        "placement": placement,
        **settings,
    }
    with meeting(timeout_seconds) as ranks:
        earlier = resume if resume is not None and not resume.complete and ranks.rank == 0 else None
        joining = _Joining({name: str(fact) for name, fact in facts.items()}, earlier)
        joined = [msgspec.json.decode(text, type=_Joining) for text in ranks.exchange("joining", _text(joining))]
        _require_alike([each.facts for each in joined])
        earlier = joined[0].earlier
        reported = 0 if earlier is None else len(earlier.entries)

        def report() -> None:
            nonlocal reported
            if ranks.rank or on_bucket is None:
                return
            parts = [part for part in ranks.latest("so far") if part is not None]
            if parts and len((so_far := _merged(every, parts)).entries) > reported:
                reported = len(so_far.entries)
                on_bucket(so_far)

        def publish(part: Plan) -> None:
            ranks.put("so far", _text(part))
            report()

        def step(done: float, what: str) -> None:
            ranks.sign()
            report()
            if on_step is not None:
                on_step(done, what)

        work = {bucket: tuning_work(problem, bucket, distribution, bool(placement)) for bucket in every}
        mine = _share(work, earlier, ranks)
        part = _only(earlier, mine) if mine else None
        # What an earlier plan has comes first and at once, so that nothing that rank 0 saves lacks it.
        known = [bucket for bucket in mine if part is not None and bucket in {entry.bucket for entry in part.entries}]
        for some in filter(None, (known, mine)):
            part = tune(
                problem,
                weights,
                executor,
                tune_max_num_tokens,
                distribution,
                seed,
                buckets=some,
                resume=_only(part, some),
                on_bucket=publish,
                on_step=step,
                vet=vet,
                placement=placement,
                **settings,
            )
            publish(part)
        if on_step is not None:
            on_step(1.0, "waiting for the other ranks")
        plan = _merged(every, [part for part in ranks.exchange("tuning", _text(part), report) if part])
        digests = ranks.exchange("agreeing", plan.digest())
        others = [f"rank {rank} {digest[:12]}" for rank, digest in enumerate(digests) if digest != digests[0]]
        if others:
            raise RankError(
                f"agreeing: rank 0 ended with plan {digests[0][:12]}, but {', '.join(others)}; start all ranks again"
            )
        return plan


class _Joining(msgspec.Struct):
    """What a rank says when it joins. facts: what must be the same on all ranks, as text. earlier: to go on with."""

    facts: dict[str, str]
    earlier: Plan | None


def _text(record: msgspec.Struct | None) -> str:
    return "" if record is None else msgspec.json.encode(record).decode()


def _require_alike(facts: Sequence[Mapping[str, str]]) -> None:
    differences = [
        f"rank {rank} has {name} {theirs.get(name)} (rank 0: {expected})"
        for rank, theirs in enumerate(facts)
        for name, expected in facts[0].items()
        if theirs.get(name) != expected
    ]
    if differences:
        raise RankError(
            f"joining: the ranks differ: {'; '.join(differences)}; start one command on equal GPUs with one library"
        )


def _share(work: Mapping[int, float], done: Plan | None, ranks: Meeting) -> list[int]:
    """This rank's buckets, ascending. The costliest first, each goes to the rank that has least to do so far.

    work: of every bucket.
    """
    finished = set() if done is None else {entry.bucket for entry in done.entries}
    loads, shares = [0.0] * ranks.size, [list[int]() for _ in range(ranks.size)]
    for bucket in sorted(work, key=lambda bucket: work[bucket], reverse=True):
        least = loads.index(min(loads))
        shares[least].append(bucket)
        # 1 for one that is there, so that all get some.
        loads[least] += 1 if bucket in finished else work[bucket]
    return sorted(shares[ranks.rank])


def _only(plan: Plan | None, buckets: Sequence[int]) -> Plan | None:
    """What a plan has of these buckets, to go on with."""
    if plan is None:
        return None
    entries = tuple(entry for entry in plan.entries if entry.bucket in buckets)
    return msgspec.structs.replace(plan, complete=False, buckets=tuple(buckets), entries=entries)


def _merged(buckets: tuple[int, ...], parts: Sequence[str]) -> Plan:
    """The plan of one share or more. The same on every rank, `created` included.

    A fault that one rank found rules the tactic out for all: where another rank chose it, `assemble` chooses again.
    """
    plans = [msgspec.json.decode(part, type=Plan) for part in parts]
    entries = {entry.bucket: entry for plan in plans for entry in plan.entries}
    quarantined = {tactic: reason for plan in reversed(plans) for tactic, reason in plan.quarantined.items()}
    blank = msgspec.structs.replace(plans[0], created=max(plan.created for plan in plans), buckets=buckets)
    return assemble(blank, entries, dict(sorted(quarantined.items())))
