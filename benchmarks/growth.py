"""Does a layer's time grow as its work does, or are there cliffs?

    python -m benchmarks.growth --json FILE [--png FOLDER] [--series tokens,experts,ranks]
    python -m benchmarks.growth --read FILE --png FOLDER    # draws what was measured, on any machine

The layer with the fastest pair of tactics, and with the default's, on balanced rows:

- tokens: 1 to 16,384 tokens per rank, and 3/4 of each power of two;
- experts: 8 to 512 experts, and 3/4 of each power, all on one rank, at 64 and at 1,024 tokens;
- ranks: the experts over 1 to 64 ranks under dep and ep, at 64 and at 1,024 tokens per rank.

What explains a time is the sum of each GEMM's least prediction by the tuner's cost model, which counts whole tiles and
whole waves of them, the bytes of gather, activation and combine, and LAYER_US. A cliff is where the times of two
neighbours differ by more than FACTOR beyond what their explanations do, in either direction: the larger one then takes
too long, or the smaller one does.
"""

from __future__ import annotations

import dataclasses
import json as json_module
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from benchmarks.common import cuda_executor, default_pair, problem, provenance, survey, survey_layer, write_json
from benchmarks.layer import stage_bytes
from moe_runtime import FP8BlockWeights, MoEConfig, Parallel
from moe_runtime.executors.base import GEMMS, Executor, MoEProblem, TacticPair, able_tactics
from moe_runtime.kernels import Stage
from moe_runtime.roofs import ROOFS
from moe_runtime.tuning.cost import predict
from moe_runtime.weights import random_weights
from moe_runtime.workload import Workload, kernel_rows, make_workload

FACTOR = 1.25
"""Layers in benchmarks/results/h200 take 0.92 to 1.17 times what explains them, so that neighbours differ by less."""
LAYER_US = 18.0
"""What a layer takes on an H200 beyond its bytes where these are few: launches that wait for each other."""
TOKEN_CASES = ("deepseek-r1:dep8", "qwen3-235b:dep2")
FIXED_TOKENS = (64, 1024)
EXPERTS_OF, RANKS_OF = "qwen3-235b", "deepseek-r1"
KINDS = ("tokens", "experts", "ranks")


def sizes(least: int, most: int) -> list[int]:
    """Powers of two, and the 3/4 of them that are whole."""
    powers = [1 << power for power in range(most.bit_length())]
    return [size for size in sorted({*powers, *(3 * power // 4 for power in powers[2:])}) if least <= size <= most]


@dataclass(frozen=True)
class Step:
    """One layer of a series. size: what grows."""

    size: int
    shape: MoEProblem
    tokens: int


@dataclass(frozen=True)
class Series:
    kind: str
    name: str
    steps: tuple[Step, ...]


@dataclass(frozen=True)
class Point:
    """Microseconds at one size: with the fastest pair and with the default's, and what explains them."""

    size: int
    best_us: float
    default_us: float
    explained_us: float
    pair: TacticPair


@dataclass(frozen=True)
class Cliff:
    """Between neighbours, in order of size. grew, explained: ratios of times. which: "best" or "default" tactics."""

    series: str
    which: str
    sizes: tuple[int, int]
    grew: float
    explained: float

    @property
    def excess(self) -> float:
        return self.grew / self.explained


def all_series(kinds: Sequence[str]) -> list[Series]:
    found = []
    for case in TOKEN_CASES:
        shape = problem(*case.split(":"))
        found.append(Series("tokens", case, tuple(Step(tokens, shape, tokens) for tokens in sizes(1, 16384))))
    alone, config = Parallel.parse("tp1"), MoEConfig.preset(EXPERTS_OF)
    layers = [(count, MoEProblem(config.scaled(num_experts=count), alone)) for count in sizes(8, 512)]
    for tokens in FIXED_TOKENS:
        name = f"{EXPERTS_OF}, {tokens} tokens"
        found.append(Series("experts", name, tuple(Step(count, shape, tokens) for count, shape in layers)))
        for regime in ("dep", "ep"):
            split = [(ranks, problem(RANKS_OF, f"{regime}{ranks}")) for ranks in (1, 2, 4, 8, 16, 32, 64)]
            steps = tuple(Step(ranks, shape, tokens) for ranks, shape in split)
            found.append(Series("ranks", f"{RANKS_OF}, {regime}, {tokens} tokens", steps))
    return sorted((series for series in found if series.kind in kinds), key=lambda series: KINDS.index(series.kind))


def explained_us(executor: Executor, shape: MoEProblem, workload: Workload) -> float:
    read_tbps = ROOFS[executor.device_name].read_tbps
    stage_us = {stage: size / read_tbps / 1e6 for stage, size in stage_bytes(shape, workload).items()}
    total = LAYER_US + stage_us[Stage.GATHER]  # gemm2 combines, in as many bytes as it would store
    for gemm in GEMMS:
        predicted = predict(executor, shape, gemm, [workload])
        total += min(
            predicted[name][0]
            + (stage_us[Stage.ACTIVATION] if gemm == "gemm1" and not executor.variants[name].swiglu else 0)
            for name in able_tactics(executor, shape, gemm)
        )
    return total


def measure(executor: Executor, step: Step, weights: FP8BlockWeights) -> Point:
    shape = step.shape
    workload = make_workload(shape.config, shape.parallel, step.tokens, "balanced")
    surveys = [survey(executor, shape, weights, workload, gemm) for gemm in GEMMS]
    default = default_pair(executor, shape, kernel_rows(step.tokens, shape.parallel))
    times = survey_layer(executor, shape, weights, workload, surveys, default)
    best = next(iter(times))
    return Point(step.size, times[best], times[default], explained_us(executor, shape, workload), best)


def run(executor: Executor, series: Sequence[Series]) -> Iterator[tuple[Series, list[Point]]]:
    """The layers of a series differ in the number of local experts only, so they share the weights of the largest."""
    for one in series:
        widest = max((step.shape for step in one.steps), key=lambda shape: shape.num_local_experts)
        weights = random_weights(widest, device=executor.name)
        yield (
            one,
            [measure(executor, step, first_experts(weights, step.shape.num_local_experts)) for step in one.steps],
        )


def first_experts(weights: FP8BlockWeights, count: int) -> FP8BlockWeights:
    return FP8BlockWeights(
        weights.gate_up[:count],
        weights.gate_up_scale[:count],
        weights.down[:count],
        weights.down_scale[:count],
        weights.gate_first,
    )


def cliffs(series: str, points: Sequence[Point], factor: float = FACTOR) -> list[Cliff]:
    found = []
    for one, other in pairwise(points):
        explained = other.explained_us / one.explained_us
        grown = {"best": other.best_us / one.best_us, "default": other.default_us / one.default_us}
        for which, grew in grown.items():
            cliff = Cliff(series, which, (one.size, other.size), grew, explained)
            if not 1 / factor <= cliff.excess <= factor:
                found.append(cliff)
    return found


def points_table(series: Series, points: Sequence[Point]) -> Table:
    title = f"{series.name}: layer by {series.kind}"
    table = Table(series.kind, "best us", "default us", "explained us", "best / explained", title=title)
    for point in points:
        times = (f"{us:.1f}" for us in (point.best_us, point.default_us, point.explained_us))
        table.add_row(str(point.size), *times, f"{point.best_us / point.explained_us:.2f}")
    return table


def cliffs_table(found: Sequence[Cliff]) -> Table:
    table = Table("series", "tactics", "from", "to", "time", "explained", "beyond", title=f"Cliffs beyond {FACTOR}")
    for cliff in found:
        ratios = (f"{ratio:.2f}" for ratio in (cliff.grew, cliff.explained, cliff.excess))
        table.add_row(cliff.series, cliff.which, *map(str, cliff.sizes), *ratios)
    return table


def draw(kind: str, series: Sequence[tuple[str, Sequence[Point]]], found: Sequence[Cliff], folder: Path) -> Path:
    """One picture of all series of a kind, by name; rings are the ends of cliffs."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    from moe_runtime.report.style import INK, MARKERS, RC, SERIES

    with pyplot.rc_context(RC):
        figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
        for index, (name, points) in enumerate(series):
            colour, at = SERIES[index % len(SERIES)].light, [point.size for point in points]
            best = {point.size: point.best_us for point in points}
            axes.plot(at, list(best.values()), color=colour, marker=MARKERS[index % len(MARKERS)], ms=4, label=name)
            axes.plot(at, [point.default_us for point in points], color=colour, ls="--", lw=0.8)
            axes.plot(at, [point.explained_us for point in points], color=colour, ls=":", lw=0.8)
            ends = {size for cliff in found if (cliff.series, cliff.which) == (name, "best") for size in cliff.sizes}
            if ends:
                rings = [best[size] for size in sorted(ends)]
                axes.plot(sorted(ends), rings, marker="o", ms=12, mfc="none", ls="", color=INK.light)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.yaxis.set_minor_formatter(NullFormatter())
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
        axes.set_xlabel(kind)
        axes.set_ylabel("us")
        axes.set_title("Layer: fastest pair (line), default (dashes), explained (dots)")
        axes.legend()
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"growth-{kind}.png"
        figure.savefig(path, dpi=150)
        pyplot.close(figure)
    return path


def draw_all(series: Sequence[tuple[str, str, Sequence[Point]]], found: Sequence[Cliff], folder: Path) -> list[Path]:
    """A picture for each kind. series: kind, name and points of each."""
    by_kind: dict[str, list[tuple[str, Sequence[Point]]]] = {}
    for kind, name, points in series:
        by_kind.setdefault(kind, []).append((name, points))
    return [draw(kind, named, found, folder) for kind, named in by_kind.items()]


def draw_file(source: Path, folder: Path) -> list[Path]:
    """The pictures of a file that `main` wrote."""
    payload = json_module.loads(source.read_text())
    found = [Cliff(**{name: value for name, value in cliff.items() if name != "excess"}) for cliff in payload["cliffs"]]
    series = [(one["kind"], one["name"], [Point(**point) for point in one["points"]]) for one in payload["series"]]
    return draw_all(series, found, folder)


def main(
    json: Annotated[Path | None, typer.Option()] = None,
    png: Annotated[Path | None, typer.Option(help="The folder to draw pictures into.")] = None,
    series: Annotated[str, typer.Option(help=f"Of {', '.join(KINDS)}.")] = ",".join(KINDS),
    read: Annotated[Path | None, typer.Option(help="A file of earlier times to draw; nothing is measured.")] = None,
) -> None:
    if read is not None:
        if png is None:
            raise typer.BadParameter("--read draws a file's pictures: name a folder by --png")
        print(*draw_file(read, png), sep="\n")
        return
    executor, console = cuda_executor(), Console(width=140)
    if executor.device_name not in ROOFS:
        raise typer.BadParameter(f"no roofs are known of {executor.device_name}, so nothing explains its times")
    kinds = series.split(",")
    if unknown := set(kinds) - set(KINDS):
        raise typer.BadParameter(f"{', '.join(unknown)}: no such series; there are {', '.join(KINDS)}")
    measured: list[tuple[Series, list[Point]]] = []
    found: list[Cliff] = []
    environment, begin = provenance(executor), time.perf_counter()
    for one, points in run(executor, all_series(kinds)):
        measured.append((one, points))
        found += cliffs(one.name, points)
        seconds = time.perf_counter() - begin
        console.print(f"{seconds:6.1f} s: {one.kind} of {one.name} done")
        payload = {
            "benchmark": "growth",
            "environment": environment,
            "factor": FACTOR,
            "layer_us": LAYER_US,
            "cliffs": [dataclasses.asdict(cliff) | {"excess": cliff.excess} for cliff in found],
            "series": [
                {"kind": one.kind, "name": one.name, "points": [dataclasses.asdict(point) for point in points]}
                for one, points in measured
            ],
            "seconds": seconds,
        }
        write_json(json, payload)
    for one, points in measured:
        console.print(points_table(one, points))
    console.print(cliffs_table(found) if found else f"No cliff beyond {FACTOR}.")
    if png is not None:
        for path in draw_all([(one.kind, one.name, points) for one, points in measured], found, png):
            console.print(str(path))


if __name__ == "__main__":
    typer.run(main)
