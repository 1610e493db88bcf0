"""What a bucket is timed on: both ends of the tokens that it serves, and where rows are few several draws.

With few rows the draw decides how many experts are busy, and that which tactic is the fastest.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence
from itertools import pairwise
from statistics import fmean, pstdev

import numpy as np
import pytest

from moe_runtime.config import MoEConfig
from moe_runtime.executors.base import Gemm, MoEProblem
from moe_runtime.parallel import Parallel
from moe_runtime.tuning import draws as module
from moe_runtime.tuning import tune
from moe_runtime.tuning.buckets import served_range
from moe_runtime.tuning.draws import DRAWS_OF_FEW_ROWS, draws, number_of_draws
from moe_runtime.tuning.plan_tools import timed_workloads
from moe_runtime.weights import FP8BlockWeights
from moe_runtime.workload import Workload, make_workload

from .test_tuner import CONFIG, FakeExecutor, FakeTrial

LAYER = MoEProblem(MoEConfig.preset("qwen3-235b"), Parallel.parse("dep2"))
WEIGHTS = FP8BlockWeights.random(CONFIG, 4)  # the stand-ins read none
SEEDS = (0, 200, 400, 600, 800, 1000)
TOKENS = 4
BUCKETS = (1, 4, 9, 32)


@pytest.mark.parametrize(("bucket", "served"), [(1, (1, 3)), (4, (4, 8)), (9, (9, 31)), (32, (32,))])
def test_a_bucket_serves_up_to_the_next(bucket: int, served: tuple[int, ...]) -> None:
    assert served_range(bucket, BUCKETS, "random") == served
    assert served_range(bucket, BUCKETS, "balanced") == (bucket,)


def test_neighbouring_buckets_leave_nothing_between() -> None:
    assert served_range(1, (1, 2), "zipf:1.0") == (1,)


def busy(workloads: Sequence[Workload]) -> list[int]:
    return [int((workload.rows_per_expert > 0).sum()) for workload in workloads]


def as_they_come(tokens: int, seed: int, count: int) -> list[Workload]:
    return [make_workload(LAYER.config, LAYER.parallel, tokens, "random", seed + i) for i in range(count)]


def test_few_rows_take_several_draws() -> None:
    """dep2 has four rows an expert from 32 tokens on, ep2 from 64; even routing draws the same whatever the seed."""
    for text, enough in (("dep2", 32), ("ep2", 64)):
        layer = MoEProblem(LAYER.config, Parallel.parse(text))
        few = [number_of_draws(layer, enough - 1, "random"), number_of_draws(layer, 1, "zipf:1.0")]
        assert few == [DRAWS_OF_FEW_ROWS] * 2 and DRAWS_OF_FEW_ROWS > 1
        assert number_of_draws(layer, enough, "random") == number_of_draws(layer, 1, "balanced") == 1


def test_few_rows_differ_most_from_draw_to_draw() -> None:
    """What the threshold rests on: the share by which busy experts vary."""

    def variation(tokens: int) -> float:
        found = busy(as_they_come(tokens, 0, 60))
        return pstdev(found) / fmean(found)

    assert variation(4) > 0.05 and variation(32) < 0.02


def test_draws_of_two_tunes_are_alike() -> None:
    """By busy experts, each is the middle one of an eighth of the pool."""
    found = [busy(draws(LAYER, (TOKENS,), "random", seed)) for seed in SEEDS]
    assert all(one == sorted(one) and len(one) == DRAWS_OF_FEW_ROWS for one in found)
    for first, second in pairwise(found):
        assert all(abs(a - b) <= 1 for a, b in zip(first, second, strict=True))
    unsorted = [fmean(busy(as_they_come(TOKENS, seed, DRAWS_OF_FEW_ROWS))) for seed in SEEDS]
    assert pstdev(map(fmean, found)) < 0.5 * pstdev(unsorted)


def test_samples_are_other_draws() -> None:
    first, second = ({one.seed for one in draws(LAYER, (TOKENS,), "random", 7, sample)} for sample in (0, 1))
    assert first.isdisjoint(second) and min(first) >= 7
    assert [one.seed for sample in (0, 1) for one in draws(LAYER, (64,), "random", 7, sample)] == [7, 8]


def waves_us(tactic: str, workload: Workload) -> float:
    """Qwen3's gate_up on 132 multiprocessors: 12 tiles of 256 an expert ("plain"), or 24 of 128 and the activation."""
    (count,) = busy([workload])
    return 32.0 * math.ceil(12 * count / 132) if tactic == "plain" else 16.0 * math.ceil(24 * count / 132) + 2.5


class Waves(FakeTrial):
    """Times with a noise of 0.5 %, the same in every run of the test."""

    def __init__(self, workload: Workload, tactics: Sequence[str]) -> None:
        super().__init__({tactic: waves_us(tactic, workload) for tactic in tactics})
        self.random = np.random.default_rng(zlib.crc32(workload.topk_ids.numpy().tobytes()))

    def time(self, tactics: Sequence[str], repeats: int) -> dict[str, list[float]]:
        noise = 1 + 0.005 * self.random.standard_normal((len(tactics), repeats))
        return {tactic: (self.us[tactic] * row).tolist() for tactic, row in zip(tactics, noise, strict=True)}


class WavesExecutor(FakeExecutor):
    def gemm_trial(
        self, problem: MoEProblem, weights: FP8BlockWeights, workload: Workload, gemm: Gemm, seed: int
    ) -> FakeTrial:
        return Waves(workload, tuple(self.us))


def chosen(seed: int) -> str:
    """gemm1's tactic of a tune that starts from the seed; a layer takes the same time with either."""
    executor = WavesExecutor({"plain": 100, "narrow": 100})
    plan = tune(LAYER, WEIGHTS, executor, TOKENS + 1, "random", seed, buckets=(TOKENS, TOKENS + 1))
    return plan.entries[0].gemm1.tactic


def test_tunes_of_several_draws_agree_on_what_is_fastest_on_average(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = as_they_come(TOKENS, 5000, 200)
    mean = {tactic: fmean(waves_us(tactic, draw) for draw in drawn) for tactic in ("plain", "narrow")}
    assert mean["narrow"] < 0.95 * mean["plain"]
    assert {chosen(seed) for seed in SEEDS} == {"narrow"}
    monkeypatch.setattr(module, "DRAWS_OF_FEW_ROWS", 1)
    assert {chosen(seed) for seed in range(12)} == {"narrow", "plain"}


def test_the_tuner_times_all_draws_at_both_ends() -> None:
    seen: dict[int, set[int]] = {}

    class Watched(FakeExecutor):
        def gemm_trial(
            self, problem: MoEProblem, weights: FP8BlockWeights, workload: Workload, gemm: Gemm, seed: int
        ) -> FakeTrial:
            seen.setdefault(workload.num_tokens, set()).add(workload.seed)
            return super().gemm_trial(problem, weights, workload, gemm, seed)

    few = DRAWS_OF_FEW_ROWS
    for distribution, samples, expected in (
        ("random", 1, {4: few, 63: few, 64: 1}),
        ("random", 3, {4: 3 * few, 63: 3 * few, 64: 3}),
        ("balanced", 1, {4: 1, 64: 1}),
    ):
        seen.clear()
        plan = tune(LAYER, WEIGHTS, Watched({"plain": 1}), 64, distribution, samples=samples, buckets=(4, 64))
        assert {tokens: len(seeds) for tokens, seeds in seen.items()} == expected
        timed = [workload.num_tokens for workload in timed_workloads(plan, 4)]
        assert timed == ([4] * few + [63] * few if distribution == "random" else [4])
