"""Buckets tuned at both ends of what they serve, timed as one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch

from moe_runtime import MoEConfig, Parallel
from moe_runtime.executors import get_executor
from moe_runtime.executors.base import MoEProblem
from moe_runtime.tuning import tune
from moe_runtime.tuning.buckets import served_range
from moe_runtime.tuning.plan_tools import timed_workloads
from moe_runtime.tuning.together import GemmTogether, Together
from moe_runtime.weights import random_weights

BUCKETS = (1, 4, 9, 32)


@dataclass(frozen=True)
class Fixed:
    """A trial that takes us of each name, growing by one a repeat, and gives its number as result."""

    us: float

    def time(self, names: Sequence[str], repeats: int) -> dict[str, list[float]]:
        return {name: [self.us + repeat for repeat in range(repeats)] for name in names}

    def run(self, tactic: str) -> torch.Tensor:
        return torch.full((1,), self.us)

    def reference(self) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.tensor([0]), torch.full((1,), self.us)

    def error(self, tactic: str, rows: torch.Tensor, expected: torch.Tensor) -> float:
        return self.us


@pytest.mark.parametrize(("bucket", "served"), [(1, (1, 3)), (4, (4, 8)), (9, (9, 31)), (32, (32,))])
def test_a_bucket_serves_up_to_the_next(bucket: int, served: tuple[int, ...]) -> None:
    assert served_range(bucket, BUCKETS, "random") == served
    assert served_range(bucket, BUCKETS, "balanced") == (bucket,)


def test_neighbouring_buckets_leave_nothing_between() -> None:
    assert served_range(1, (1, 2), "zipf:1.0") == (1,)


def test_times_are_means_repeat_by_repeat() -> None:
    assert Together([Fixed(10), Fixed(30)]).time(["a", "b"], 2) == {"a": [20, 21], "b": [20, 21]}


def test_results_are_the_first_trials() -> None:
    trial = GemmTogether([Fixed(1), Fixed(2)])
    assert trial.run("a") == 1 and trial.reference()[1] == 1 and trial.error("a", torch.ones(1), torch.ones(1)) == 1


def test_the_tuner_times_both_ends() -> None:
    config = MoEConfig("small", 256, 128, 16, 2)
    problem, executor = MoEProblem(config, Parallel.parse("ep1")), get_executor("cpu")
    sizes: list[int] = []
    made = executor.gemm_trial

    def gemm_trial(problem, weights, workload, gemm, seed):  # type: ignore[no-untyped-def]
        sizes.append(workload.num_tokens)
        return made(problem, weights, workload, gemm, seed)

    executor.gemm_trial = gemm_trial  # type: ignore[method-assign]
    try:
        plan = tune(problem, random_weights(problem, device="cpu"), executor, 8, "random", buckets=(1, 4, 8))
    finally:
        del executor.gemm_trial
    assert sorted(sizes) == sorted([1, 3, 4, 7, 8] * 2)
    assert [workload.num_tokens for workload in timed_workloads(plan, 4)] == [4, 7]
    assert plan.complete
