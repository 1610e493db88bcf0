"""How good is the tuner itself?

    python -m benchmarks.tuner --json FILE [--case MODEL:LAYOUT ...] [--small]

For each case a plan is tuned, and then judged by what every tactic takes on workloads of other seeds:

- regret: the plan's time over that of the fastest tactics at each point, on tokens that are powers of two. Both are
  measured anew and the fastest is picked from the same noisy times, so the figure is an upper bound, never negative.
- default: the gain over the default tactics at the same points; the worst is the loss, if there is one.
- flips: two independent tunes' winners, and the time lost where they differ.
- transfer: regret at tokens that are no buckets.
- skew: a plan tuned on balanced routing run on skewed, beside one tuned on that.
- tune_seconds: wall time of one tune.

Times are of both GEMMs together. `--small` does all this on the CPU executor with a layer it can time in seconds.
"""

from __future__ import annotations

import dataclasses
import random
import statistics
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from benchmarks.common import cuda_executor, problem, provenance, write_json
from moe_runtime import FP8BlockWeights, MoEConfig, Plan
from moe_runtime.executors import get_executor
from moe_runtime.executors.base import GEMMS, Executor, Gemm, MoEProblem
from moe_runtime.executors.cuda import CudaExecutor
from moe_runtime.parallel import Parallel
from moe_runtime.tuning import tune
from moe_runtime.weights import random_weights
from moe_runtime.workload import kernel_rows, make_workload

CASES = ("qwen3-235b:dep2", "qwen3-235b:ep2", "deepseek-r1:dep8", "deepseek-r1:ep8")
SKEWED = ("zipf:1.0", "dirichlet:0.3")
TUNED_ON = "random"
OTHER_SEED = 1000
"""Far from the seeds that tuning draws its samples from."""


@dataclass(frozen=True)
class Size:
    """What is measured. tokens: points of regret. between: how many points of transfer. rounds: of each time."""

    tokens: tuple[int, ...]
    between: int
    rounds: int
    samples: int


FULL = Size(tuple(1 << i for i in range(15)), between=40, rounds=15, samples=2)
SMALL = Size((1, 4, 16), between=3, rounds=5, samples=2)


@dataclass
class Bench:
    """One layer on one executor, and the times of all tactics that were measured so far."""

    executor: Executor
    problem: MoEProblem
    weights: FP8BlockWeights
    size: Size
    times: dict[tuple[str, int], dict[Gemm, dict[str, float]]] = field(default_factory=dict)

    def tune(self, distribution: str, seed: int = 0) -> tuple[Plan, float]:
        """A plan and the seconds it took."""
        begin = time.perf_counter()
        plan = tune(
            self.problem, self.weights, self.executor, self.size.tokens[-1], distribution, seed,
            samples=self.size.samples,
        )  # fmt: skip
        return plan, time.perf_counter() - begin

    def survey(self, distribution: str, tokens: int) -> dict[Gemm, dict[str, float]]:
        """Median microseconds by tactic of each GEMM, on a workload that no tuning saw; none where it has no rows."""
        if (distribution, tokens) not in self.times:
            config, parallel = self.problem.config, self.problem.parallel
            workload = make_workload(config, parallel, tokens, distribution, OTHER_SEED)
            self.times[distribution, tokens] = {
                gemm: self._survey_gemm(workload, gemm) if workload.local_slots else {} for gemm in GEMMS
            }
        return self.times[distribution, tokens]

    def _survey_gemm(self, workload: Any, gemm: Gemm) -> dict[str, float]:
        tactics = [
            tactic
            for tactic in self.executor.tactics(self.problem, gemm)
            if self.executor.can_implement(self.problem, gemm, tactic) is None
        ]
        trial = self.executor.gemm_trial(self.problem, self.weights, workload, gemm, OTHER_SEED)
        return {tactic: statistics.median(us) for tactic, us in trial.time(tactics, self.size.rounds).items()}

    def default(self, tokens: int) -> tuple[str, ...]:
        rows = kernel_rows(tokens, self.problem.parallel)
        return tuple(self.executor.default_tactic(self.problem, gemm, rows) for gemm in GEMMS)

    def chosen(self, plan: Plan, tokens: int) -> tuple[str, ...]:
        return plan.lookup(kernel_rows(tokens, self.problem.parallel)) or self.default(tokens)

    def us(self, distribution: str, tokens: int, tactics: Sequence[str]) -> float:
        surveyed = self.survey(distribution, tokens)
        return sum(surveyed[gemm].get(tactic, 0.0) for gemm, tactic in zip(GEMMS, tactics, strict=True))

    def best_us(self, distribution: str, tokens: int) -> float:
        return sum(min(times.values(), default=0.0) for times in self.survey(distribution, tokens).values())

    def points(self, plan: Plan, distribution: str, tokens: Iterable[int]) -> list[dict[str, float]]:
        """The plan, the default and the fastest at each number of tokens that brings rows to the rank."""
        found = []
        for count in tokens:
            best = self.best_us(distribution, count)
            if best == 0:
                continue
            us = self.us(distribution, count, self.chosen(plan, count))
            default = self.us(distribution, count, self.default(count))
            found.append(
                {
                    "tokens": count,
                    "us": us,
                    "default_us": default,
                    "best_us": best,
                    "regret": us / best - 1,
                    "gain": default / us - 1,
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
        """Where two tunes chose differently, and the share of time that the worse of both choices costs."""
        flipped, lost, total = [], 0.0, 0.0
        for one, other in zip(first.entries, second.entries, strict=True):
            for gemm in GEMMS:
                times = self.survey(first.key.distribution, one.bucket)[gemm]
                tactics = [getattr(entry, gemm).tactic for entry in (one, other)]
                us = [times.get(tactic, 0.0) for tactic in tactics]
                lost, total = lost + max(us) - min(us), total + min(us)
                if tactics[0] != tactics[1]:
                    flipped.append({"tokens": one.bucket, "gemm": gemm, "tactics": tactics, "us": us})
        return {"places": 2 * len(first.entries), "flipped": flipped, "lost": lost / total if total else 0.0}


def judge(bench: Bench) -> dict[str, Any]:
    """All measurements of one case."""
    tokens = bench.size.tokens
    plan, seconds = bench.tune(TUNED_ON)
    again, _ = bench.tune(TUNED_ON, seed=1)
    at_powers, between = (bench.points(plan, TUNED_ON, counts) for counts in (tokens, bench.between(plan)))
    balanced, _ = bench.tune("balanced")
    skew = {}
    for distribution in SKEWED:
        own, _ = bench.tune(distribution)
        of_balanced, of_own = (bench.points(each, distribution, tokens) for each in (balanced, own))
        skew[distribution] = [
            {"tokens": a["tokens"], "tuned_on_balanced_us": a["us"], "tuned_on_it_us": b["us"]}
            for a, b in zip(of_balanced, of_own, strict=True)
        ]
    return {
        "distribution": TUNED_ON,
        "tune_seconds": seconds,
        "buckets": list(plan.buckets),
        "complete": plan.complete,
        "regret": _summary(at_powers),
        "default": {"worst": min(point["gain"] for point in at_powers), "mean": _mean(at_powers, "gain")},
        "points": at_powers,
        "flips": bench.flips(plan, again),
        "transfer": _summary(between) | {"points": between},
        "skew": skew,
    }


def _mean(points: Sequence[dict[str, float]], name: str) -> float:
    return statistics.fmean(point[name] for point in points)


def _summary(points: Sequence[dict[str, float]]) -> dict[str, Any]:
    return {"mean": _mean(points, "regret"), "worst": max(point["regret"] for point in points)}


def tables(name: str, result: dict[str, Any]) -> Iterable[Table | str]:
    yield (
        f"{name}: tuned {len(result['buckets'])} buckets in {result['tune_seconds']:.0f} s; "
        f"regret mean {result['regret']['mean']:.2%}, worst {result['regret']['worst']:.2%}; "
        f"between buckets mean {result['transfer']['mean']:.2%}, worst {result['transfer']['worst']:.2%}; "
        f"{len(result['flips']['flipped'])} of {result['flips']['places']} winners flipped, "
        f"which loses {result['flips']['lost']:.2%}"
    )
    table = Table("tokens", "default us", "plan us", "gain", "best us", "regret", title=f"{name}: against the default")
    for point in result["points"]:
        times = [f"{point[key]:.1f}" for key in ("default_us", "us", "best_us")]
        gain, regret = f"{point['gain']:+.2%}", f"{point['regret']:.2%}"
        table.add_row(str(point["tokens"]), times[0], times[1], gain, times[2], regret)
    yield table
    for distribution, points in result["skew"].items():
        table = Table(
            "tokens", "before us", "after us", "delta", title=f"{name}: {distribution}, tuned on balanced, on it"
        )
        for point in points:
            before, after = point["tuned_on_balanced_us"], point["tuned_on_it_us"]
            table.add_row(str(point["tokens"]), f"{before:.1f}", f"{after:.1f}", f"{before / after - 1:+.2%}")
        yield table


def benches(cases: Sequence[str], small: bool) -> Iterable[tuple[str, Bench]]:
    for case in cases:
        model, layout = case.split(":")
        if small:
            executor: Executor = get_executor("cpu")
            config = MoEConfig.preset(model).scaled(hidden_size=256, intermediate_size=128, num_experts=32)
            shape = MoEProblem(config, Parallel.parse(layout))
        else:
            executor, shape = cuda_executor(), problem(model, layout)
        weights = random_weights(shape, device=executor.name)
        yield case, Bench(executor, shape, weights, SMALL if small else FULL)


def environment(executor: Executor) -> dict[str, Any]:
    if isinstance(executor, CudaExecutor):
        return provenance(executor)
    return {"device": executor.device_name, "torch": torch.__version__, "threads": torch.get_num_threads()}


def main(
    json: Annotated[Path | None, typer.Option()] = None,
    case: Annotated[list[str] | None, typer.Option(help=f"MODEL:LAYOUT, of {', '.join(CASES)}.")] = None,
    small: Annotated[bool, typer.Option("--small")] = False,
) -> None:
    console = Console(width=160)
    payload: dict[str, Any] = {"benchmark": "tuner", "small": small, "cases": {}}
    for name, bench in benches(case or (CASES[:1] if small else CASES), small):
        result = judge(bench)
        payload |= {"environment": environment(bench.executor), "size": dataclasses.asdict(bench.size)}
        payload["cases"][name] = result
        for part in tables(name, result):
            console.print(part)
        write_json(json, payload)  # after each case: the next may fail


if __name__ == "__main__":
    typer.run(main)
