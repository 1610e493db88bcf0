"""Why a plan runs the tactics that it runs at some number of tokens."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from statistics import fmean

from ..errors import MoEError
from ..executors.base import Gemm, MoEProblem
from ..roofs import ROOFS
from ..workload import Workload
from .cost import gemm_bytes
from .plan import GemmChoice, PairTiming, Plan, PlanEntry, Timing
from .plan_tools import choices, config_of, serving_bucket, serving_entry, timed_workloads


@dataclass(frozen=True)
class Candidate:
    """One tactic of one GEMM. timing: None where it was not timed. predicted: the cost model's microseconds.

    note: "chosen", "default", or why it was out of the race; "" for one that lost it.
    """

    tactic: str
    timing: Timing | None
    predicted: float | None
    note: str


@dataclass(frozen=True)
class Roof:
    """The least microseconds that a GEMM can take by the device's measured roofs.

    memory_us: to read the weights of experts with rows and all rows, and to write the result. flops_us: to multiply.
    """

    memory_us: float
    flops_us: float


@dataclass(frozen=True)
class GemmExplanation:
    """candidates: those timed, fastest first; then those pruned, by prediction; then those rejected.

    roof: None for a device without measured roofs, or a workload that cannot be made here.
    """

    gemm: Gemm
    tactic: str
    decision: str
    roof: Roof | None
    candidates: tuple[Candidate, ...]


@dataclass(frozen=True)
class LayerExplanation:
    """The race of pairs of tactics on the whole layer: which rule it was decided by, and all pairs, fastest first."""

    decision: str
    pairs: tuple[PairTiming, ...]


@dataclass(frozen=True)
class RowsPerExpert:
    """GEMM rows of this rank's experts in the bucket's first workload, seen from rank 0."""

    experts: int
    smallest: int
    mean: float
    largest: int


@dataclass(frozen=True)
class Explanation:
    """tokens: per rank, as asked. rows: GEMM rows that were tuned on; None where the bucket was not tuned.

    rows_per_expert: a sentence where the workload cannot be made here, such as a recorded file that is elsewhere.
    gemms: empty where the bucket was not tuned, and the default tactics run.
    layer: None where the GEMMs' own times decided.
    """

    tokens: int
    bucket: int
    rounding: str
    rows: int | None
    rows_per_expert: RowsPerExpert | str
    gemms: tuple[GemmExplanation, ...]
    layer: LayerExplanation | None


def explain(plan: Plan, tokens: int) -> Explanation:
    """What serves a call of `tokens` tokens per rank under the plan, and why. Raises PlanRefused for a damaged key."""
    key, bucket, entry = plan.key, serving_bucket(plan, tokens), serving_entry(plan, tokens)
    config_of(key)  # refuses a damaged key; a workload that cannot be made here is no reason to
    workloads: Sequence[Workload] = ()
    try:
        workloads = timed_workloads(plan, bucket)
        rows_per_expert: RowsPerExpert | str = _spread(workloads[0])
    except MoEError as error:
        rows_per_expert = f"unknown here: {error}"
    pairs = () if entry is None else tuple(sorted(entry.layer, key=lambda pair: pair.timing.us))
    raced = {tactic for pair in pairs for tactic in (pair.gemm1, pair.gemm2)}
    gemms = [
        GemmExplanation(
            gemm=gemm,
            tactic=choice.tactic,
            decision=_decision(plan, choice) if not pairs else "its own times left a doubt: the layer's decide",
            roof=_roof(key.device, workloads, gemm),
            candidates=tuple(_candidates(plan, choice, raced)),
        )
        for gemm, choice in (choices(entry) if entry is not None else ())
    ]
    return Explanation(
        tokens=tokens,
        bucket=bucket,
        rounding=_rounding(plan, tokens),
        rows=None if entry is None else entry.rows,
        rows_per_expert=rows_per_expert,
        gemms=tuple(gemms),
        layer=LayerExplanation(_pair_decision(plan, entry), pairs) if entry is not None and pairs else None,
    )


def _rounding(plan: Plan, tokens: int) -> str:
    bucket = serving_bucket(plan, tokens)
    if tokens == bucket:
        return "a bucket of its own"
    if tokens < bucket:
        return f"fewer than the smallest bucket, which serves it: {bucket}"
    if bucket == plan.buckets[-1]:
        return f"more than the largest bucket, which serves it: {bucket}"
    above = plan.buckets[plan.buckets.index(bucket) + 1]
    return f"between two buckets, {bucket} and {above}: the lower one serves it"


def _spread(workload: Workload) -> RowsPerExpert:
    rows = workload.rows_per_expert
    return RowsPerExpert(rows.numel(), int(rows.min()), float(rows.float().mean()), int(rows.max()))


def _roof(device: str, workloads: Sequence[Workload], gemm: Gemm) -> Roof | None:
    """The mean over the workloads, as times are; gemm1's are with the activation, so it must write no more."""
    roofs = ROOFS.get(device)
    if roofs is None or not workloads:
        return None
    shape = MoEProblem(workloads[0].config, workloads[0].parallel).gemm_shape(gemm)
    layout, fused = workloads[0].config.number_format.weight_layout, gemm == "gemm1"
    moved = fmean(gemm_bytes(each.rows_per_expert.tolist(), shape, fused, layout) for each in workloads)
    flops = fmean(2 * workload.local_slots * shape[0] * shape[1] for workload in workloads)
    return Roof(memory_us=moved / roofs.read_tbps / 1e6, flops_us=flops / roofs.tflops(layout) / 1e6)


def _candidates(plan: Plan, choice: GemmChoice, raced: Set[str]) -> Iterator[Candidate]:
    """raced: tactics of the pairs that raced on the layer."""
    out = choice.rejected | {tactic: f"quarantined: {reason}" for tactic, reason in plan.quarantined.items()}
    for tactic in sorted(choice.timings, key=lambda tactic: choice.timings[tactic].us):
        note = _note(choice, tactic, out, raced)
        yield Candidate(tactic, choice.timings[tactic], choice.predicted.get(tactic), note)
    pruned = choice.predicted.keys() - choice.timings.keys() - out.keys()
    for tactic in sorted(pruned, key=lambda tactic: choice.predicted[tactic]):
        yield Candidate(tactic, None, choice.predicted[tactic], "not timed: the cost model ruled it out")
    for tactic in sorted(out.keys() - choice.timings.keys()):
        yield Candidate(tactic, None, choice.predicted.get(tactic), out[tactic])


def _note(choice: GemmChoice, tactic: str, out: Mapping[str, str], raced: Set[str]) -> str:
    if tactic in out:
        return out[tactic]
    marks = [mark for mark, name in (("chosen", choice.tactic), ("default", choice.default_tactic)) if name == tactic]
    chosen = choice.timings.get(choice.tactic)
    if tactic in raced and tactic != choice.tactic:
        marks.append("lost on the layer")
    # Else the default is chosen, or the first of the final that no other beats: who looks faster did not beat it there,
    # or was in earlier heats only.
    elif chosen is not None and choice.tactic != choice.default_tactic and choice.timings[tactic].us < chosen.us:
        marks.append("not surely faster")
    return ", ".join(marks)


def _decision(plan: Plan, choice: GemmChoice) -> str:
    """Which rule made the choice of a GEMM by its own times, in a sentence."""
    timings, default = choice.timings, choice.default_tactic
    if not timings:
        why = next(iter(choice.rejected.values()), "no row reaches the rank in this bucket")
        return f"nothing was timed ({why}): the default stays"
    withdrawn = sorted(timings.keys() & choice.rejected.keys())  # a fault found before the race leaves no time
    if withdrawn:
        successor = "the default" if choice.tactic == default else "the fastest of the others"
        return f"{', '.join(withdrawn)} faulted after the race: {successor} runs instead"
    if default not in timings:
        reason = choice.rejected.get(default) or plan.quarantined.get(default) or "not timed"
        return f"the default, {default}, is out ({reason}): the fastest of the {len(timings)} timed runs"
    fastest = min(timings, key=lambda tactic: timings[tactic].us)
    if choice.tactic == default == fastest:
        return f"the default is the fastest of {len(timings)} timed"
    saved = 1 - timings[fastest if choice.tactic == default else choice.tactic].us / timings[default].us
    if choice.tactic == default:
        return f"the default stays: {fastest} took {saved:.1%} less time, but none beat it by more than {_rule(plan)}"
    return f"took {saved:.1%} less time than the default, and beat it by more than {_rule(plan)}"


def _pair_decision(plan: Plan, entry: PlanEntry) -> str:
    """The same of both GEMMs' choices by the layer's times."""
    us, default = {(pair.gemm1, pair.gemm2): pair.timing.us for pair in entry.layer}, entry.default_pair
    withdrawn = {tactic for _, choice in choices(entry) for tactic in choice.timings.keys() & choice.rejected.keys()}
    if withdrawn:
        successor = "the default pair" if entry.pair == default else "the fastest pair of the others"
        return f"{', '.join(sorted(withdrawn))} faulted after the race: {successor} runs instead"
    fastest = min(us, key=lambda pair: us[pair])
    if entry.pair == fastest:
        saved = f", {1 - us[fastest] / us[default]:.1%} below the default pair" if default in us else ""
        return f"the fastest of {len(us)} pairs{saved if fastest != default else ''}"
    return (
        f"the fastest of {len(us)} pairs took {1 - us[fastest] / us[entry.pair]:.1%} less time, but replaces "
        "the default, what each GEMM's own times chose and pairs before it only where it beats them by more than "
        f"{_rule(plan)}"
    )


def _rule(plan: Plan) -> str:
    return f"the margin of {plan.margin:.1%} over the whole {plan.confidence:.0%} confidence interval"
