"""What a report says about plans, as numbers: gains, regret, rows per expert, arithmetic intensity. Draws nothing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import fmean
from string import ascii_uppercase
from typing import NamedTuple

import torch

from ..errors import MoEError
from ..executors.base import GEMMS, Gemm, MoEProblem
from ..placement import Placements
from ..tuning import GemmChoice, Plan, PlanKey
from ..tuning.cost import gemm_bytes
from ..tuning.plan_tools import choices, config_of, first_workload, placements_of, serving_bucket, timed_workloads


class Range(NamedTuple):
    """A value with the ends of its interval."""

    value: float
    low: float
    high: float


class Point(NamedTuple):
    """One GEMM in one bucket on the roofline: FLOP per byte, and achieved TFLOP/s of the chosen tactic."""

    bucket: int
    intensity: float
    tflops: float


@dataclass(frozen=True)
class Tuned:
    """A plan under the name that the report gives it."""

    label: str
    plan: Plan

    @cached_property
    def problem(self) -> MoEProblem:
        return MoEProblem(config_of(self.plan.key), self.plan.key.parallel)

    @cached_property
    def placements(self) -> Placements | str | None:
        """What the plan was tuned under, or why that cannot be read; None where experts have no placement."""
        try:
            return placements_of(self.plan.key)
        except MoEError as error:
            return str(error)

    def choices(self, gemm: Gemm) -> list[tuple[int, GemmChoice]]:
        """(bucket, choice) by ascending bucket."""
        return [(entry.bucket, getattr(entry, gemm)) for entry in self.plan.entries]

    def every_choice(self) -> Iterator[tuple[int, Gemm, GemmChoice]]:
        for entry in self.plan.entries:
            for gemm, choice in choices(entry):
                yield entry.bucket, gemm, choice

    def choice_at(self, num_tokens: int, gemm: Gemm) -> GemmChoice | None:
        """The choice that serves a call with that many tokens per rank; None where its bucket was not tuned."""
        return dict(self.choices(gemm)).get(serving_bucket(self.plan, num_tokens))

    @cached_property
    def rows_per_expert(self) -> dict[int, torch.Tensor]:
        """int32 [L] by bucket: GEMM rows of each local expert of rank 0 in the plan's first workload sample.

        Raises MoEError where the workload cannot be made again, as when a recorded distribution's file is gone.
        """
        return {entry.bucket: first_workload(self.plan, entry.bucket).rows_per_expert for entry in self.plan.entries}

    @cached_property
    def workload_error(self) -> str | None:
        """Why `rows_per_expert` cannot be had, else None."""
        try:
            self.rows_per_expert  # noqa: B018  computed once, kept
        except MoEError as error:
            return str(error)
        return None

    def roofline(self, gemm: Gemm) -> list[Point]:
        """Points of the buckets that were timed. Empty where the workload cannot be made again."""
        if self.workload_error is not None:
            return []
        columns, depth = self.problem.gemm_shape(gemm)
        fused = gemm == "gemm1"  # its times are with the activation, whose results are all that it must write
        layout = self.problem.config.number_format.weight_layout
        points = []
        for bucket, choice in self.choices(gemm):
            timed = timed_workloads(self.plan, bucket)  # means, as times are
            flops = 2 * fmean(workload.local_slots for workload in timed) * columns * depth
            if choice.us is not None and flops:
                moved = fmean(
                    gemm_bytes(each.rows_per_expert.tolist(), (columns, depth), fused, layout) for each in timed
                )
                points.append(Point(bucket, flops / moved, flops / choice.us * 1e-6))
        return points


def named(plans: Sequence[Plan]) -> list[Tuned]:
    """Labels the plans by layout, and by what else tells them apart where the layout does not."""
    layouts = [str(plan.key.parallel) for plan in plans]
    shown = ["dispatch", "distribution", "placement_digest", "objective", "tune_max_num_tokens", "device"]
    shown += ["hidden_size", "num_experts"]
    telling = [field for field in shown if len({getattr(plan.key, field) for plan in plans}) > 1]
    labels = [
        " ".join([layout, *(_word(plan.key, field) for field in telling)]) if layouts.count(layout) > 1 else layout
        for layout, plan in zip(layouts, plans, strict=True)
    ]
    return [
        Tuned(f"{label} ({labels[: index + 1].count(label)})" if labels.count(label) > 1 else label, plan)
        for index, (label, plan) in enumerate(zip(labels, plans, strict=True))
    ]


def _word(key: PlanKey, field: str) -> str:
    if field == "placement_digest":
        return f"placed {key.placement_digest[:8]}" if key.placement else "unplaced"
    return str(getattr(key, field))


def letters(tuned: Sequence[Tuned]) -> dict[str, str]:
    """A letter by chosen tactic, in order of first use from few tokens to many: A ... Z, AA, AB ..."""
    uses = sorted(
        (bucket, gemm, index, choice.tactic)
        for index, one in enumerate(tuned)
        for bucket, gemm, choice in one.every_choice()
    )
    tactics = dict.fromkeys(tactic for *_, tactic in uses)
    return {tactic: _letter(index) for index, tactic in enumerate(tactics)}


def _letter(index: int) -> str:
    first, second = divmod(index, len(ascii_uppercase))
    return (ascii_uppercase[first - 1] if first else "") + ascii_uppercase[second]


def gain(choice: GemmChoice) -> Range | None:
    """default / chosen - 1. The interval takes the worst and the best ends of both; None where either was not timed."""
    if choice.default_us is None or choice.us is None:
        return None
    if choice.tactic == choice.default_tactic:
        return Range(0.0, 0.0, 0.0)
    chosen, default = choice.timings[choice.tactic], choice.timings[choice.default_tactic]
    return Range(default.us / chosen.us - 1, default.low / chosen.high - 1, default.high / chosen.low - 1)


def layer_gain(one: Tuned, bucket: int) -> float | None:
    """Gain of both GEMMs together in a bucket; None where one was not timed."""
    choices = [choice for at, _, choice in one.every_choice() if at == bucket]
    default = [choice.default_us for choice in choices if choice.default_us is not None]
    chosen = [choice.us for choice in choices if choice.us is not None]
    return sum(default) / sum(chosen) - 1 if len(default) == len(chosen) == len(GEMMS) else None


def regret(choice: GemmChoice) -> float | None:
    """chosen / fastest measured - 1: what margin or layer kept from a faster tactic. None: nothing timed."""
    return None if choice.us is None else choice.us / min(timing.us for timing in choice.timings.values()) - 1


def comparable(one: Tuned, other: Tuned) -> bool:
    """Whether the plans hold the same tactics for the same GEMMs, so that one's choice has a time in the other."""
    gemms = [(at.plan.key.format, at.plan.key.device, at.plan.key.library_hash) for at in (one, other)]
    shapes = [[at.problem.gemm_shape(gemm) for gemm in GEMMS] for at in (one, other)]
    return gemms[0] == gemms[1] and shapes[0] == shapes[1]


def cost_of_other(one: Tuned, other: Tuned, bucket: int) -> float | None:
    """How much slower `one`'s layer would be in a bucket with the tactics that `other` chose: 0.1 is 10 %.

    From `one`'s own times of both GEMMs; None where a tactic of `other` was not timed there.
    """
    own, theirs = 0.0, 0.0
    for at, gemm, choice in one.every_choice():
        if at != bucket:
            continue
        foreign = other.choice_at(bucket, gemm)
        timing = None if foreign is None else choice.timings.get(foreign.tactic)
        if choice.us is None or timing is None:
            return None
        own, theirs = own + choice.us, theirs + timing.us
    return theirs / own - 1
