"""How good is the tuner itself?

    python -m benchmarks.tuner --json FILE [--case MODEL:LAYOUT ...] [--budget SECONDS] [--small]

For each case a plan is tuned, and then judged on workloads of other seeds than any tuning saw, at each number of tokens
on the mean of several draws, for a plan names one tactic for all of them:

- regret: the plan's time over that of the fastest tactics at each point, on tokens that are powers of two. The fastest
  are picked on half of the draws and timed on the other half, and the other way round; see `benchmarks.oracle`. That
  may miss the fastest, so regret is understated a little, and can be negative.
- bound: the same, picked and timed on all draws: with hindsight, so it is overstated, and never negative.
- default: the gain over the default tactics at the same points; the worst is the loss, if there is one.
- flips: two independent tunes' winners, and the share of time lost where they differ.
- transfer: regret at tokens that are no buckets.
- skew: a plan tuned on balanced routing run on skewed, beside one tuned on that.
- tune_seconds: wall time of one tune, with the worker process that checks candidates, as on the command line.

And for each model, once its cases are done:

- cross: a layout run with the plan of another layout, beside its own; under `dep` also an all-to-all dispatch with the
  plan tuned on `compact`, beside one tuned on `alltoall`. A plan of another key is refused, so its tactics are named:
  those of the bucket that so many tokens per rank map to.

Regret, flips and transfer add up the two GEMMs' times. Skew and cross time the whole layer, before and after in turns;
delta is the gain in tokens per second, which count on each GPU: under `ep` all ranks share theirs.

What keeps the device time short: one set of weights serves a model's layouts, and no plan is tuned twice; plans for
skew and all-to-all have a few buckets, which are also where they are compared; every tactic is scouted at every point
of regret and transfer, but on a few of the draws, and only those near the fastest and those that a plan or the default
runs are timed on all, which share the rounds; two tunes' tactics are timed where they differ. `seconds` in the results
says where the time went. Once `--budget` has passed, skew and all-to-all are left out, and named under `skipped`.
`--small` does all this on the CPU executor with a layer that it can time in seconds.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import random
import statistics
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import permutations
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

from benchmarks.common import cuda_executor, default_pair, medians, problem, provenance, write_json
from benchmarks.oracle import Draws, means, race, summary, survey, with_hindsight, without_hindsight
from benchmarks.tuner_tables import comparison, tables, timing
from moe_runtime import FP8BlockWeights, MoEConfig, Plan
from moe_runtime.executors import get_executor
from moe_runtime.executors.base import GEMMS, Executor, Gemm, GemmTrial, MoEProblem, TacticPair, able_tactics
from moe_runtime.executors.cuda import CudaExecutor
from moe_runtime.parallel import Parallel
from moe_runtime.tuning import tune
from moe_runtime.tuning.draws import draws
from moe_runtime.tuning.plan_tools import choices, serving_entry
from moe_runtime.tuning.quarantine import vetting
from moe_runtime.weights import random_weights
from moe_runtime.workload import DISPATCH, Workload, kernel_rows, make_workload

CASES = ("qwen3-235b:dep2", "qwen3-235b:ep2", "deepseek-r1:dep8", "deepseek-r1:ep8")
SKEWED = ("zipf:1.0", "dirichlet:0.3")
TUNED_ON = "random"
AGAIN_SEED, OTHER_SEED = 500, 1000
"""Of the second tune, and of the draws that judge: tunes draw from their seed and those after it."""
LEAST_DRAWS = 2
"""As many as it takes to pick on one half and time on the other."""

Point = dict[str, Any]


@dataclass(frozen=True)
class Size:
    """tokens: points of regret and of the layer, ascending. between: points of transfer. rounds: of each time.

    few: points of skew and of all-to-all, ascending: where experts have anything from few to many rows.
    """

    tokens: tuple[int, ...]
    few: tuple[int, ...]
    between: int
    rounds: int


FULL = Size(tuple(1 << i for i in range(15)), few=(16, 64, 256, 1024, 4096), between=40, rounds=11)
SMALL = Size((1, 4, 16), few=(1, 16), between=3, rounds=5)


@dataclass(frozen=True)
class Watch:
    """Seconds of the whole run so far, and after how many of them parts that can be left out are."""

    budget: float = math.inf
    begin: float = field(default_factory=time.perf_counter)

    def elapsed(self) -> float:
        return time.perf_counter() - self.begin


@functools.lru_cache(maxsize=256)
def _drawn(problem: MoEProblem, tokens: int, distribution: str) -> list[Workload]:
    """Kept, for the largest take a second to draw, and both GEMMs meet them."""
    found: list[Workload] = []
    while len(found) < LEAST_DRAWS:
        found += draws(problem, (tokens,), distribution, OTHER_SEED + len(found))
    return found


@dataclass
class Bench:
    """One layer on one executor, and what was found so far: plans by name, times by distribution and tokens.

    name: of the case. seconds: wall time by part of the work. skipped: parts that were left out for lack of time.
    """

    executor: Executor
    problem: MoEProblem
    weights: FP8BlockWeights
    size: Size
    plans: dict[str, Plan] = field(default_factory=dict)
    times: dict[tuple[str, int], dict[Gemm, dict[str, Draws]]] = field(default_factory=dict)
    name: str = ""
    watch: Watch = field(default_factory=Watch)
    seconds: dict[str, float] = field(default_factory=dict)
    skipped: list[str] = field(default_factory=list)

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        begin = time.perf_counter()
        yield
        took = time.perf_counter() - begin
        self.seconds[name] = self.seconds.get(name, 0.0) + took
        print(f"{self.watch.elapsed():5.0f} s: {self.name}: {name} took {took:.1f} s", flush=True)

    def has_time(self, name: str) -> bool:
        """Whether a part that can be left out is done."""
        if self.watch.elapsed() < self.watch.budget:
            return True
        self.skipped.append(name)
        return False

    def tune(self, name: str, distribution: str, seed: int = 0, **settings: Any) -> Plan:
        """A plan of all sizes, kept under the name. settings: further keywords of `tune`."""
        most = self.size.tokens[-1]
        plan = tune(self.problem, self.weights, self.executor, most, distribution, seed, **settings)
        self.plans[name] = plan
        return plan

    def tune_few(self, distribution: str, **settings: Any) -> Plan:
        """A plan of buckets at a few sizes, each of which serves that size alone, as it is run."""
        buckets = sorted({bucket for size in self.size.few for bucket in (size, size + 1)})[:-1]
        return tune(self.problem, self.weights, self.executor, buckets[-1], distribution, buckets=buckets, **settings)

    def workload(self, tokens: int, distribution: str, dispatch: str = DISPATCH) -> Workload:
        """One that no tuning saw."""
        return make_workload(self.problem.config, self.problem.parallel, tokens, distribution, OTHER_SEED, dispatch)

    def trials(self, tokens: int, distribution: str, gemm: Gemm) -> list[GemmTrial]:
        """Of the draws that bring rows to the rank."""
        return [
            self.executor.gemm_trial(self.problem, self.weights, workload, gemm, OTHER_SEED)
            for workload in _drawn(self.problem, tokens, distribution)
            if workload.local_slots
        ]

    def survey(self, distribution: str, tokens: int) -> dict[Gemm, dict[str, Draws]]:
        """Times of each GEMM by tactic: of those near the fastest, the default's and the plans' so far.

        Empty where the GEMMs have no rows.
        """
        if (distribution, tokens) not in self.times:
            pairs = [self.default(tokens), *(self.chosen(plan, tokens) for plan in self.plans.values())]
            self.times[distribution, tokens] = {
                gemm: survey(
                    self.trials(tokens, distribution, gemm),
                    able_tactics(self.executor, self.problem, gemm),
                    {pair[index] for pair in pairs},
                    self.size.rounds,
                )
                for index, gemm in enumerate(GEMMS)
            }
        return self.times[distribution, tokens]

    def default(self, tokens: int) -> TacticPair:
        return default_pair(self.executor, self.problem, kernel_rows(tokens, self.problem.parallel))

    def chosen(self, plan: Plan, tokens: int) -> TacticPair:
        """What serves so many tokens per rank by the plan, which may be of another layout."""
        entry = serving_entry(plan, tokens)
        return self.default(tokens) if entry is None else entry.pair

    def us(self, distribution: str, tokens: int, tactics: TacticPair) -> float:
        surveyed = self.survey(distribution, tokens)
        return sum(statistics.fmean(surveyed[gemm][tactic]) for gemm, tactic in zip(GEMMS, tactics, strict=True))

    def points(self, plan: Plan, tokens: Iterable[int]) -> list[Point]:
        """The plan, the default and the fastest at each number of tokens that brings rows to the rank."""
        found, distribution = [], plan.key.distribution
        for count in tokens:
            surveyed = self.survey(distribution, count)
            if not all(surveyed.values()):
                continue
            us = self.us(distribution, count, self.chosen(plan, count))
            default = self.us(distribution, count, self.default(count))
            best, least = (sum(map(how, surveyed.values())) for how in (without_hindsight, with_hindsight))
            found.append(
                {
                    "tokens": count,
                    "tactics": self.chosen(plan, count),
                    "us": us,
                    "default_us": default,
                    "best_us": best,
                    "least_us": least,
                    "regret": us / best - 1,
                    "bound": us / least - 1,
                    "gain": default / us - 1,
                    "surveyed": surveyed,
                }
            )
        return found

    def between(self, plan: Plan) -> list[int]:
        """Numbers of tokens that are no buckets, spread evenly by logarithm; the same for the same plan's range."""
        generator, top = random.Random(0), self.size.tokens[-1]
        inside = [count for count in range(2, top) if count not in plan.buckets]
        found: set[int] = set()
        while len(found) < min(self.size.between, len(inside)):
            target = top ** generator.random()
            found.add(min((count for count in inside if count not in found), key=lambda count: abs(count - target)))
        return sorted(found)

    def flips(self, first: Plan, second: Plan) -> dict[str, Any]:
        """Where two tunes chose differently, and what the worse choice costs.

        lost: share of the time there. lost_on_average: mean of the shares over all places, 0 where both chose alike.
        """
        flipped: list[Point] = []
        for one, other in zip(first.entries, second.entries, strict=True):
            for (gemm, mine), (_, its) in zip(choices(one), choices(other), strict=True):
                if mine.tactic == its.tactic:
                    continue
                tactics, trials = [mine.tactic, its.tactic], self.trials(one.bucket, first.key.distribution, gemm)
                if trials:
                    us = list(means(race(trials, tactics, self.size.rounds)).values())
                    flipped.append({"tokens": one.bucket, "gemm": gemm, "tactics": tactics, "us": us})
        places, least = len(GEMMS) * len(first.entries), sum(min(flip["us"]) for flip in flipped)
        lost = sum(max(flip["us"]) for flip in flipped) / least - 1 if flipped else 0.0
        average = sum(max(flip["us"]) / min(flip["us"]) - 1 for flip in flipped) / places
        return {"places": places, "flipped": flipped, "lost": lost, "lost_on_average": average}

    def compare(
        self, before: Plan, after: Plan, tokens: Iterable[int], distribution: str, dispatch: str = DISPATCH
    ) -> list[Point]:
        """The layer with the tactics of two plans at each number of tokens that brings rows to the rank."""
        found = []
        for count in tokens:
            workload = self.workload(count, distribution, dispatch)
            if not workload.local_slots:
                continue
            pairs = [self.chosen(plan, count) for plan in (before, after)]
            trial = self.executor.layer_trial(self.problem, self.weights, workload, OTHER_SEED)
            times = medians(trial.time(list(dict.fromkeys(pairs)), self.size.rounds))
            us, parallel = [times[pair] for pair in pairs], self.problem.parallel
            tokens_of_a_gpu = count if parallel.use_dp else count / parallel.world_size
            found.append(
                {
                    "tokens": count,
                    "us": us,
                    "delta": us[0] / us[1] - 1,
                    "tactics": pairs,
                    "tokens_per_second_per_gpu": [1e6 * tokens_of_a_gpu / each for each in us],
                }
            )
        return found


def judge(bench: Bench) -> dict[str, Any]:
    """All measurements of one case. The plans that a survey times come first, what can be left out comes last."""
    with bench.part("tune"), vetting(bench.problem, str(bench.weights.device)) as vet:
        plan = bench.tune("own", TUNED_ON, vet=vet)
    with bench.part("tune again"):
        again = bench.tune("again", TUNED_ON, seed=AGAIN_SEED)
    with bench.part("regret"):
        at_powers = bench.points(plan, bench.size.tokens)
    with bench.part("transfer"):
        between = bench.points(plan, bench.between(plan))
    with bench.part("flips"):
        flips = bench.flips(plan, again)
    skew = {}
    if bench.has_time("skew"):
        with bench.part("skew"):
            balanced = bench.tune_few("balanced")
            for name in SKEWED:
                skew[name] = bench.compare(balanced, bench.tune_few(name), bench.size.few, name)
    gains = [point["gain"] for point in at_powers]
    return {
        "distribution": TUNED_ON,
        "tune_seconds": bench.seconds["tune"],
        "buckets": list(plan.buckets),
        "complete": plan.complete,
        "regret": summary(at_powers),
        "default": {"worst": min(gains), "mean": statistics.fmean(gains)},
        "points": at_powers,
        "flips": flips,
        "transfer": summary(between) | {"points": between},
        "skew": skew,
        "seconds": bench.seconds,
        "skipped": bench.skipped,
    }


def cross(benches: Mapping[str, Bench]) -> dict[str, list[Point]]:
    """What another key's plan costs, for benches of one model by layout that were judged."""
    found = {}
    for (layout, bench), (other, its) in permutations(benches.items(), 2):
        with bench.part("cross"):
            plans = its.plans["own"], bench.plans["own"]
            found[f"{layout}, with the plan of {other} and its own"] = bench.compare(
                *plans, bench.size.tokens, TUNED_ON
            )
    for layout, bench in benches.items():
        if bench.problem.parallel.use_dp and bench.has_time("all-to-all"):
            with bench.part("all-to-all"):
                plans = bench.plans["own"], bench.tune_few(TUNED_ON, dispatch="alltoall")
                found[f"{layout} after an all-to-all, tuned on compact and on alltoall"] = bench.compare(
                    *plans, bench.size.few, TUNED_ON, "alltoall"
                )
    return found


def benches(cases: Sequence[str], small: bool, watch: Watch | None = None) -> Iterator[tuple[str, dict[str, Bench]]]:
    """Each model's benches by layout; where layouts have as many local experts, they share the weights."""
    layouts: dict[str, list[str]] = {}
    for case in cases:
        model, layout = case.split(":")
        layouts.setdefault(model, []).append(layout)
    for model, named in layouts.items():
        executor: Executor = get_executor("cpu") if small else cuda_executor()
        weights: dict[int, FP8BlockWeights] = {}
        found = {}
        for layout in named:
            shape = _small_problem(model, layout) if small else problem(model, layout)
            if shape.num_local_experts not in weights:
                weights[shape.num_local_experts] = random_weights(shape, device=executor.name)
            size, name = SMALL if small else FULL, f"{model}:{layout}"
            found[layout] = Bench(
                executor, shape, weights[shape.num_local_experts], size, name=name, watch=watch or Watch()
            )
        yield model, found


def _small_problem(model: str, layout: str) -> MoEProblem:
    config = MoEConfig.preset(model).scaled(hidden_size=256, intermediate_size=128, num_experts=32)
    return MoEProblem(config, Parallel.parse(layout))


def environment(executor: Executor) -> dict[str, Any]:
    if isinstance(executor, CudaExecutor):
        return provenance(executor)
    return {"device": executor.device_name, "torch": torch.__version__, "threads": torch.get_num_threads()}


def main(
    json: Annotated[Path | None, typer.Option()] = None,
    case: Annotated[list[str] | None, typer.Option(help=f"MODEL:LAYOUT, of {', '.join(CASES)}.")] = None,
    budget: Annotated[float, typer.Option(help="Seconds after which skew and all-to-all are left out.")] = math.inf,
    small: Annotated[bool, typer.Option("--small")] = False,
) -> None:
    console, watch = Console(width=160), Watch(budget)
    payload: dict[str, Any] = {"benchmark": "tuner", "small": small, "cases": {}, "cross": {}}
    for model, of_layouts in benches(case or (CASES[:2] if small else CASES), small, watch):
        for bench in of_layouts.values():
            result = judge(bench)
            payload |= {"environment": environment(bench.executor), "size": dataclasses.asdict(bench.size)}
            payload["cases"][bench.name] = result
            for part in tables(bench.name, result):
                console.print(part)
            write_json(json, payload)  # after each case: the next may fail
        payload["cross"][model] = cross(of_layouts)
        for title, points in payload["cross"][model].items():
            console.print(comparison(f"{model}: {title}", points))
        for bench in of_layouts.values():
            console.print(timing(bench.name, bench.seconds, bench.skipped))
        write_json(json, payload)
    print(f"{watch.elapsed():5.0f} s: done")


if __name__ == "__main__":
    typer.run(main)
