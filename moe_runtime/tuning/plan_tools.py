"""What can be asked of plans that exist: how two differ, whether one fits here, and what several make together."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from msgspec.structs import replace

from ..config import MoEConfig, RoutingMethod
from ..errors import InvalidArgument, PlanRefused
from ..executors.base import GEMMS, Executor, Gemm, MoEProblem
from ..placement import Placements
from ..workload import Workload
from .buckets import served_range
from .draws import draw, draws
from .plan import GemmChoice, Plan, PlanEntry, PlanKey, plan_lock

SETTINGS = ("seed", "samples", "margin", "confidence")
"""What a plan says of how all its entries were measured and decided."""

MERGE_WAIT_SECONDS = 30.0
"""A merge holds the lock for milliseconds; a tuning run for minutes, and waiting for that is the user's to decide."""

LAYOUT_FIELDS = ("regime", "size", "tp_size")


def choices(entry: PlanEntry) -> tuple[tuple[Gemm, GemmChoice], ...]:
    return tuple(zip(GEMMS, (entry.gemm1, entry.gemm2), strict=True))


def serving_bucket(plan: Plan, tokens: int) -> int:
    """The bucket of calls with `tokens` tokens per rank: the largest up to that many, the smallest below all."""
    return plan.buckets[max(0, bisect_right(plan.buckets, tokens) - 1)]


def serving_entry(plan: Plan, tokens: int) -> PlanEntry | None:
    """The entry of `serving_bucket`; None where that bucket was not tuned."""
    bucket = serving_bucket(plan, tokens)
    return next((entry for entry in plan.entries if entry.bucket == bucket), None)


def config_of(key: PlanKey) -> MoEConfig:
    """The layer that a plan was tuned for, as far as its key names it: shapes, experts, routing and format.

    Raises PlanRefused for a key that names no layer.
    """
    name, _, groups = key.routing.partition(":")
    method, _, shared = name.partition("+")
    try:
        topk_group, n_group = map(int, groups.split("/")) if groups else (1, 1)
        return MoEConfig(
            name="plan",
            hidden_size=key.hidden_size,
            intermediate_size=key.intermediate_size,
            num_experts=key.num_experts,
            top_k=key.top_k,
            routing_method=RoutingMethod[method],
            n_group=n_group,
            topk_group=topk_group,
            format=key.format,
            activation=key.activation,
            num_fused_shared_experts=int(shared or 0),
            experts_are_slots=bool(key.placement),
        )
    except (KeyError, ValueError) as error:
        raise PlanRefused(f"plan: damaged, its key names no layer ({error}); tune again") from error


def timed_workloads(plan: Plan, bucket: int) -> list[Workload]:
    """What a bucket's times are the mean of, in the first sample and seen from rank 0; the bucket's own tokens first.

    Raises MoEError where a workload cannot be made again, as when a recorded distribution's file is gone.
    """
    key, placements = plan.key, placements_of(plan.key)
    ends = served_range(bucket, plan.buckets, key.distribution, placements is not None)
    problem = MoEProblem(config_of(key), key.parallel)
    return draws(problem, ends, key.distribution, plan.seed, dispatch=key.dispatch, placements=placements)


def first_workload(plan: Plan, tokens: int) -> Workload:
    """The first draw of the first sample, whatever else a bucket was timed on. Raises MoEError as `timed_workloads`."""
    key, problem = plan.key, MoEProblem(config_of(plan.key), plan.key.parallel)
    return draw(problem, tokens, key.distribution, plan.seed, key.dispatch, placements_of(key))


def placements_of(key: PlanKey) -> Placements | None:
    """The placement that a plan was tuned under. Raises InvalidArgument where its file is gone or another."""
    if not key.placement:
        return None
    placements = Placements.load(key.placement)
    if (found := placements.digest()) != key.placement_digest:
        accepted = f"the file that the plan was tuned under, with digest {key.placement_digest}"
        raise InvalidArgument("placement", f"{key.placement} with digest {found}", accepted)
    return placements


def with_placement(plans: Sequence[Plan], paths: Sequence[Path]) -> list[Plan]:
    """The plans, with the placement of each read from that of the paths which holds it.

    Raises InvalidArgument for a file that is no placement, or that no plan was tuned under.
    """
    places = {Placements.load(path).digest(): str(path) for path in paths}
    tuned_under = {plan.key.placement_digest for plan in plans}
    for digest, path in places.items():
        if digest not in tuned_under:
            known = ", ".join(sorted(filter(None, tuned_under))) or "none"
            raise InvalidArgument("placement", f"{path} with digest {digest}", f"what a plan was tuned under: {known}")
    return [
        replace(plan, key=replace(plan.key, placement=places.get(plan.key.placement_digest, plan.key.placement)))
        for plan in plans
    ]


Verdict = Literal["matters", "noise", "unknown"]


@dataclass(frozen=True)
class Loss:
    """What one plan's own times say of the other plan's tactic: `relative` 0.03 is 3 % slower than its own choice.

    clear: the two confidence intervals lie apart. Times of different runs are never compared with each other.
    """

    relative: float
    clear: bool


@dataclass(frozen=True)
class TacticDifference:
    """Calls of `tokens` tokens per rank get different tactics. Each pair is (first plan's, second plan's).

    losses: each plan's view of the other's tactic; None where that plan did not time both.
    verdict: `matters` where a plan's intervals lie apart, `noise` where no plan's do, `unknown` where none timed both.
    """

    tokens: int
    gemm: Gemm
    buckets: tuple[int, int]
    tactics: tuple[str, str]
    losses: tuple[Loss | None, Loss | None]
    verdict: Verdict


@dataclass(frozen=True)
class PlanDiff:
    """key, settings: (first, second) by field that differs. untuned: numbers of tokens that only the other serves."""

    key: Mapping[str, tuple[Any, Any]]
    settings: Mapping[str, tuple[Any, Any]]
    untuned: tuple[tuple[int, ...], tuple[int, ...]]
    tactics: tuple[TacticDifference, ...]

    @property
    def differ(self) -> bool:
        return bool(self.key or self.settings or any(self.untuned) or self.tactics)


def diff(first: Plan, second: Plan) -> PlanDiff:
    """How two plans differ, times and dates apart.

    Tactics are compared at every bucket of either plan, each plan answering with the bucket that serves it there.
    """
    points = sorted({*first.buckets, *second.buckets})
    served = [(tokens, serving_entry(first, tokens), serving_entry(second, tokens)) for tokens in points]
    settings = _differences(first, second, (*SETTINGS, "buckets"))
    if first.quarantined.keys() != second.quarantined.keys():
        settings["quarantined"] = (sorted(first.quarantined), sorted(second.quarantined))
    return PlanDiff(
        key=_differences(first.key, second.key, PlanKey.__struct_fields__),
        settings=settings,
        untuned=(
            tuple(tokens for tokens, a, b in served if a is None and b is not None),
            tuple(tokens for tokens, a, b in served if a is not None and b is None),
        ),
        tactics=tuple(
            _tactic_difference(tokens, gemm, (a.bucket, b.bucket), mine, other)
            for tokens, a, b in served
            if a is not None and b is not None
            for (gemm, mine), (_, other) in zip(choices(a), choices(b), strict=True)
            if mine.tactic != other.tactic
        ),
    )


def _differences(first: object, second: object, fields: Sequence[str]) -> dict[str, tuple[Any, Any]]:
    pairs = {field: (getattr(first, field), getattr(second, field)) for field in fields}
    return {field: pair for field, pair in pairs.items() if pair[0] != pair[1]}


def _tactic_difference(
    tokens: int, gemm: Gemm, buckets: tuple[int, int], first: GemmChoice, second: GemmChoice
) -> TacticDifference:
    losses = (_loss(first, second.tactic), _loss(second, first.tactic))
    known = [loss for loss in losses if loss is not None]
    verdict: Verdict = "unknown" if not known else "matters" if any(loss.clear for loss in known) else "noise"
    return TacticDifference(tokens, gemm, buckets, (first.tactic, second.tactic), losses, verdict)


def _loss(choice: GemmChoice, other: str) -> Loss | None:
    mine, its = choice.timings.get(choice.tactic), choice.timings.get(other)
    if mine is None or its is None:
        return None
    return Loss(its.us / mine.us - 1, clear=its.low > mine.high or its.high < mine.low)


@dataclass(frozen=True)
class Finding:
    """Something about a plan here, and what to do. refused: it keeps the plan from use; else some of it is missing."""

    what: str
    todo: str
    refused: bool


def check(plan: Plan, executor: Executor, problem: MoEProblem | None = None) -> tuple[Finding, ...]:
    """Everything that keeps the plan from serving `problem` on `executor`; nothing where it fits and is complete.

    problem: None for the layer and the layout that the plan itself names.
    """
    return tuple(_findings(plan, executor, problem))


def _findings(plan: Plan, executor: Executor, problem: MoEProblem | None) -> Iterator[Finding]:
    key = plan.key
    if problem is not None:
        yield from _layer_findings(key, problem)
    if key.device != executor.device_name:
        todo = "tune on this device, or name the plan that was tuned on it"
        yield Finding(f"tuned on {key.device}; this device is {executor.device_name}", todo, refused=True)
    elif key.library_hash != executor.library_hash:
        what = f"tuned with kernel library {key.library_hash}; the one here is {executor.library_hash}"
        todo = "tune again; or, where that library still exists, name its file in MOE_RUNTIME_LIBRARY"
        yield Finding(what, todo, refused=True)
    else:
        yield from _unknown_tactics(plan, executor, MoEProblem(config_of(key), key.parallel))
    tuned = {entry.bucket for entry in plan.entries}
    missing = [bucket for bucket in plan.buckets if bucket not in tuned]
    if missing:
        what = f"{len(missing)} of {len(plan.buckets)} buckets are not tuned: {', '.join(map(str, missing))}"
        todo = "run the same `moe-runtime tune` again, it goes on from there; until then they run the default tactics"
        yield Finding(what, todo, refused=False)


def _layer_findings(key: PlanKey, problem: MoEProblem) -> Iterator[Finding]:
    asked = PlanKey.of(
        problem, key.distribution, key.tune_max_num_tokens, key.device, key.library_hash, key.dispatch, key.objective,
        placement=key.placement, placement_digest=key.placement_digest,
    )  # fmt: skip
    found = _differences(key, asked, PlanKey.__struct_fields__)
    if not found.keys().isdisjoint(LAYOUT_FIELDS):
        what = f"tuned for {key.parallel}, asked for {problem.parallel}: the rows per expert are others"
        todo = f"tune with --parallel {problem.parallel}, or name the plan of that layout"
        yield Finding(what, todo, refused=True)
    for field, (tuned, here) in found.items():
        if field in LAYOUT_FIELDS:
            continue
        todo = "tune this layer, or name the --model (with its --scale or --small) that the plan was tuned for"
        yield Finding(f"tuned for {field} {tuned}; the layer asked for has {here}", todo, refused=True)


def _unknown_tactics(plan: Plan, executor: Executor, problem: MoEProblem) -> Iterator[Finding]:
    for gemm in GEMMS:
        chosen = {choice.tactic for entry in plan.entries for name, choice in choices(entry) if name == gemm}
        for tactic in sorted(chosen.difference(executor.tactics(problem, gemm))):
            yield Finding(f"{gemm} names {tactic}, which the library here lacks", "tune again", refused=True)


@dataclass(frozen=True)
class Merged:
    """plan; sources: name of the plan that each bucket came from; dropped: why by bucket that no plan could give."""

    plan: Plan
    sources: Mapping[int, str]
    dropped: Mapping[int, str]


def merge(plans: Mapping[str, Plan]) -> Merged:
    """One plan out of several, by name, of one key and one way of measuring.

    A bucket is taken whole from one plan, so that no choice rests on times of different runs and the two GEMMs stay
    those that were chosen together: from the plan that has it, or of several from the one whose chosen and default
    tactics have the narrowest confidence intervals; the first of equals. A tactic that any of the plans quarantined is
    not taken; a bucket for which no other choice is left is dropped, to be tuned again.

    Raises InvalidArgument for no plan, PlanRefused with the fields where keys or `SETTINGS` differ.
    """
    if not plans:
        raise InvalidArgument("plans", "none", "one plan or more")
    (first_name, first), *others = plans.items()
    for name, other in others:
        found = _differences(first.key, other.key, PlanKey.__struct_fields__) | _differences(first, other, SETTINGS)
        if found:
            fields = ", ".join(f"{field} {a} and {b}" for field, (a, b) in found.items())
            raise PlanRefused(f"{first_name} and {name} differ in {fields}: a plan has one of each, keep them apart")
    quarantined: dict[str, str] = {}
    for plan in reversed(list(plans.values())):  # so that the first plan's reason stays
        quarantined |= plan.quarantined
    wanted = tuple(sorted({bucket for plan in plans.values() for bucket in plan.buckets}))
    entries: list[PlanEntry] = []
    sources, dropped = {}, {}
    for bucket in wanted:
        offers = {name: entry for name, plan in plans.items() for entry in plan.entries if entry.bucket == bucket}
        faults = {name: _faulty(entry, quarantined) for name, entry in offers.items()}
        sound = [name for name in offers if not faults[name]]
        if sound:
            sources[bucket] = min(sound, key=lambda name: _uncertainty(offers[name]))
            entries.append(offers[sources[bucket]])
        elif offers:
            chosen = "; ".join(f"{name} chose {', '.join(faulty)}" for name, faulty in faults.items())
            dropped[bucket] = f"what was chosen faulted elsewhere: {chosen}"
    plan = Plan(
        key=first.key,
        seed=first.seed,
        samples=first.samples,
        margin=first.margin,
        confidence=first.confidence,
        complete=len(entries) == len(wanted),
        buckets=wanted,
        entries=tuple(entries),
        quarantined=quarantined,
    )
    return Merged(plan, sources, dropped)


def _faulty(entry: PlanEntry, quarantined: Mapping[str, str]) -> list[str]:
    """The entry's tactics that are quarantined, each with the reason."""
    chosen = [choice.tactic for _, choice in choices(entry)]
    return [f"{tactic} ({quarantined[tactic]})" for tactic in dict.fromkeys(chosen) if tactic in quarantined]


def _uncertainty(entry: PlanEntry) -> float:
    """The widest confidence interval, relative to its time, among the tactics that the entry's choices rest on."""
    return max(_width(choice) for _, choice in choices(entry))


def _width(choice: GemmChoice) -> float:
    timings = [choice.timings[tactic] for tactic in (choice.tactic, choice.default_tactic) if tactic in choice.timings]
    if choice.tactic not in choice.timings:
        return math.inf
    return max((timing.high - timing.low) / timing.us for timing in timings)


def merge_into(output: Path, paths: Sequence[Path]) -> Merged:
    """`merge` of the plans at `paths`, and of the one at `output` where there is one, written to `output`.

    Reads and writes under the plan's lock: of several processes that merge into one file, each adds to what the others
    wrote. Raises as `merge`, and PlanRefused for a file that is no plan, InvalidArgument where `output` cannot be
    written or stays locked for `MERGE_WAIT_SECONDS`; whatever was at `output` is then still there.
    """
    with plan_lock(output, MERGE_WAIT_SECONDS):
        earlier = [output] if output.exists() else []
        merged = merge({str(path): Plan.load(path) for path in (*earlier, *paths)})
        merged.plan.save(output)
    return merged
