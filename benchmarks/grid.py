"""Which kernels are worth having, and what of a layer is not GEMM?

    python -m benchmarks.grid --json FILE [--models deepseek-r1:dep8,qwen3-30b] [--tokens 1,64] [--distributions random]

Every tactic of both GEMMs over models, layouts, tokens per rank and distributions, then the layer with the fastest
pair. For each kernel: at how many of these places it is the fastest, or within 1 % of it, and what the library would
lose without it, all others kept. Of two kernels that are alike neither is missed alone, so remove one at a time.

Times are medians of about 10 ms of measuring a tactic, in turns; see `common.survey` for who is timed how well. Those
of gemm1 include the activation, whether the kernel fuses it or not, so what is outside of both GEMMs is permuting,
gathering and combining, less what overlaps. The file is written anew after each layout and distribution.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from benchmarks.common import (
    Survey,
    cuda_executor,
    parse_counts,
    problem,
    provenance,
    survey,
    survey_layer,
    write_json,
)
from moe_runtime import FP8BlockWeights
from moe_runtime.executors.base import GEMMS, Executor, Gemm, MoEProblem, TacticPair
from moe_runtime.weights import random_weights
from moe_runtime.workload import make_workload

CASES = (
    "deepseek-r1:dep8",
    "deepseek-r1:ep8",
    "qwen3-235b:dep2",
    "qwen3-235b:ep2",
    "qwen3-235b:tp4",
    "qwen3-30b:tp1",
)
TOKENS = tuple(1 << power for power in range(15))
DISTRIBUTIONS = ("balanced", "random", "zipf:1.0")
CLOSE = 1.01


@dataclass(frozen=True)
class Point:
    """One layer at one workload. rows: of its GEMMs, over `busy` experts. outside: share of the layer."""

    case: str
    distribution: str
    tokens: int
    rows: int
    busy: int
    gemms: Mapping[Gemm, Survey]
    pair: TacticPair
    layer_us: float
    outside: float


@dataclass(frozen=True)
class Place:
    """A GEMM of a point: microseconds by tactic, the rough ones of hopeless tactics among them."""

    name: str
    gemm: Gemm
    us: Mapping[str, float]

    @property
    def best(self) -> float:
        return min(self.us.values())

    def lost_without(self, variant: str) -> float | None:
        """The share of time lost without a variant; None where no other was timed."""
        others = [us for name, us in self.us.items() if name != variant]
        return min(others) / self.best - 1 if others else None


@dataclass(frozen=True)
class Worth:
    """Of one variant: places where it is the fastest, or close to it, and what is lost without it.

    mean: over all places, 0 where it is not the fastest. worst_at: the place of the worst loss, "" where nothing is
    lost. alone: places where nothing else was timed, which the losses leave out.
    """

    best: Mapping[Gemm, int]
    close: Mapping[Gemm, int]
    worst: float
    worst_at: str
    mean: float
    alone: int


def measure(
    executor: Executor, shape: MoEProblem, weights: FP8BlockWeights, case: str, distribution: str, tokens: int
) -> Point | None:
    """None where the workload brings the rank no rows."""
    workload = make_workload(shape.config, shape.parallel, tokens, distribution)
    if not workload.local_slots:
        return None
    gemms = {gemm: survey(executor, shape, weights, workload, gemm) for gemm in GEMMS}
    layer = survey_layer(executor, shape, weights, workload, list(gemms.values()))
    pair, layer_us = next(iter(layer.items()))
    inside = sum(found.us[tactic] for found, tactic in zip(gemms.values(), pair, strict=True))
    rows, busy, outside = workload.local_slots, workload.busy_experts, 1 - inside / layer_us
    return Point(case, distribution, tokens, rows, busy, gemms, pair, layer_us, outside)


def places(points: Sequence[Point]) -> list[Place]:
    return [
        Place(f"{point.case} {point.distribution} {point.tokens} {gemm}", gemm, {**found.scouted, **found.us})
        for point in points
        for gemm, found in point.gemms.items()
    ]


def worth(variant: str, found: Sequence[Place]) -> Worth:
    def count(factor: float) -> dict[Gemm, int]:
        """Places where the variant takes at most so much of the fastest."""
        there = [place.gemm for place in found if variant in place.us and place.us[variant] <= factor * place.best]
        return {gemm: there.count(gemm) for gemm in GEMMS}

    losses = {place.name: place.lost_without(variant) for place in found}
    known = {name: lost for name, lost in losses.items() if lost is not None}
    worst = max(known.values(), default=0.0)
    return Worth(
        best=count(1.0),
        close=count(CLOSE),
        worst=worst,
        worst_at=next(name for name, lost in known.items() if lost == worst) if worst else "",
        mean=statistics.fmean(known.values()) if known else 0.0,
        alone=len(losses) - len(known),
    )


def judge(tactics: Iterable[str], points: Sequence[Point]) -> dict[str, Worth]:
    """Every tactic's worth, the most missed first."""
    found = places(points)
    judged = {name: worth(name, found) for name in tactics}
    return dict(sorted(judged.items(), key=lambda item: (-item[1].worst, -sum(item[1].close.values()))))


def variants_table(judged: Mapping[str, Worth], places_of_a_gemm: int) -> Table:
    title = f"Of {places_of_a_gemm} places of each GEMM, as gemm1 / gemm2"
    table = Table("variant", "fastest", f"within {CLOSE - 1:.0%}", "lost without it: worst", "mean", "at", title=title)
    for name, found in judged.items():
        table.add_row(
            name,
            " / ".join(map(str, found.best.values())),
            " / ".join(map(str, found.close.values())),
            f"{found.worst:.1%}" + (f", no other at {found.alone}" if found.alone else ""),
            f"{found.mean:.2%}",
            found.worst_at if found.worst else "",
        )
    return table


def outside_table(points: Sequence[Point]) -> Table:
    """Microseconds of the layer and the share outside of its GEMMs, by case and tokens, of the first distribution."""
    distribution = points[0].distribution
    chosen = [point for point in points if point.distribution == distribution]
    tokens = sorted({point.tokens for point in chosen})
    title = f"Layer, us (share outside of GEMMs and activation), {distribution}"
    cases = list(dict.fromkeys(point.case for point in chosen))
    table = Table("tokens", *cases, title=title)
    by_place = {(point.case, point.tokens): point for point in chosen}
    for count in tokens:
        found = [by_place.get((case, count)) for case in cases]
        cells = [f"{point.layer_us:.1f} ({point.outside:.0%})" if point else "" for point in found]
        table.add_row(str(count), *cells)
    return table


def chosen_cases(models: str) -> list[str]:
    """Of `CASES`, those named in a list of MODEL and MODEL:LAYOUT; all of them for "". Raises typer.BadParameter."""
    names = models.split(",") if models else list(CASES)
    for name in names:
        if not any(name in (case, case.split(":")[0]) for case in CASES):
            raise typer.BadParameter(f"{name} is none of {', '.join(CASES)}, nor a model of theirs")
    return [case for case in CASES if case in names or case.split(":")[0] in names]


def run(
    executor: Executor, shapes: Mapping[str, MoEProblem], tokens: Sequence[int], distributions: Sequence[str]
) -> Iterator[list[Point]]:
    """The points of each case and distribution; the weights of a case are made once."""
    for case, shape in shapes.items():
        weights = random_weights(shape, device=executor.name)
        for distribution in distributions:
            found = [measure(executor, shape, weights, case, distribution, count) for count in tokens]
            yield [point for point in found if point is not None]


def main(
    json: Annotated[Path | None, typer.Option()] = None,
    models: Annotated[str, typer.Option(help=f"MODEL or MODEL:LAYOUT, of {', '.join(CASES)}.")] = "",
    tokens: str = "",
    distributions: str = "",
) -> None:
    executor, console = cuda_executor(), Console(width=200)
    counts = parse_counts(tokens) if tokens else TOKENS
    laws = distributions.split(",") if distributions else DISTRIBUTIONS
    shapes = {case: problem(*case.split(":")) for case in chosen_cases(models)}
    tactics = dict.fromkeys(
        name for shape in shapes.values() for gemm in GEMMS for name in executor.tactics(shape, gemm)
    )
    points: list[Point] = []
    judged: dict[str, Worth] = {}
    environment, begin = provenance(executor), time.perf_counter()
    for found in run(executor, shapes, counts, laws):
        points += found
        judged = judge(tactics, points)
        seconds = time.perf_counter() - begin
        for point in found[-1:]:
            console.print(f"{seconds:6.1f} s: {point.case} {point.distribution} done, {len(points)} points so far")
        payload = {
            "benchmark": "grid",
            "environment": environment,
            "seconds": seconds,
            "variants": {name: dataclasses.asdict(value) for name, value in judged.items()},
            "points": [dataclasses.asdict(point) for point in points],
        }
        write_json(json, payload)
    if points:
        console.print(outside_table(points))
        console.print(variants_table(judged, len(points)))


if __name__ == "__main__":
    typer.run(main)
