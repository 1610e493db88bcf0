"""Who races, for how long, and who is spared the race."""

import math
import time
from collections.abc import Sequence
from itertools import pairwise

import pytest

from moe_runtime.tuning import tune, tuner
from moe_runtime.tuning.measure import Rule
from moe_runtime.tuning.profiler import OutOfTime, profile, race
from moe_runtime.weights import FP8BlockWeights

from .test_tuner import CONFIG, FakeExecutor, FakeTrial, problem


def test_hopeless_tactics_leave_the_race_but_the_default_stays() -> None:
    trial = FakeTrial({"plain": 1000, "quick": 10, "close": 15, "slow": 30})
    profiled = profile([[trial]], list(trial.us), "plain", 1e-3, Rule())
    assert trial.timed == [("plain", "quick", "close", "slow"), ("plain", "quick", "close")]
    assert profiled.tactic == "quick"
    assert {tactic: timing.us for tactic, timing in profiled.timings.items()} == {
        "plain": 1000, "quick": 10, "close": 15, "slow": 30.5,
    }  # fmt: skip


def test_the_field_halves_until_the_final() -> None:
    us = {"plain": 50.0} | {f"t{i}": 100.0 + 10 * i for i in range(16)}
    trial = FakeTrial(us)
    profiled = profile([[trial]], list(us), "plain", 1e-3, Rule())
    assert [len(heat) for heat in trial.timed] == [17, 2]
    assert profiled.tactic == "plain"

    us = {"plain": 150.0} | {f"t{i}": 100.0 + 6 * i for i in range(16)}
    trial = FakeTrial(us)
    assert profile([[trial]], list(us), "plain", 1e-3, Rule()).tactic == "t0"
    sizes = [len(heat) for heat in trial.timed]
    assert sizes[0] == 17 and sizes[-1] <= 4
    assert all(later <= earlier // 2 + 2 for earlier, later in pairwise(sizes))
    assert all("plain" in heat for heat in trial.timed)


def test_near_ties_are_not_halved_away() -> None:
    us = {name: 100.0 + place for place, name in enumerate(["plain", "a", "b", "c", "d"])}
    trial = FakeTrial(us)
    profile([[trial]], list(us), "plain", 1e-3, Rule())
    assert [len(heat) for heat in trial.timed] == [5, 5]


def test_a_time_is_the_mean_over_the_workloads_of_a_sample() -> None:
    near, far = FakeTrial({"plain": 10, "quick": 8}), FakeTrial({"plain": 30, "quick": 40})
    times = race([[near, far], [near]], ["plain", "quick"], 2, math.inf)
    assert times["plain"].tolist() == [[20, 21], [10, 11]] and times["quick"].tolist() == [[24, 25], [8, 9]]
    found = profile([[near, far]], list(near.us), "plain", 1e-3, Rule())
    assert found.tactic == "plain" and found.timings["quick"].us == 24


def test_many_workloads_are_scouted_on_some_and_share_the_rounds_of_the_final() -> None:
    """Sixteen workloads are not eight times the work of two."""
    us = {"plain": 100.0, **{f"t{i}": 100.0 + i for i in range(4)}}

    class Counting(FakeTrial):
        rounds = 0

        def time(self, tactics: Sequence[str], repeats: int) -> dict[str, list[float]]:
            self.rounds += repeats
            return super().time(tactics, repeats)

    def rounds(workloads: int) -> list[int]:
        trials = [Counting(us) for _ in range(workloads)]
        profile([trials], list(us), "plain", 1e-3, Rule())
        return [trial.rounds for trial in trials]

    assert rounds(2) == [17, 17] and rounds(1) == [23]
    assert rounds(16) == [5, 3, 3, 3] * 4


def test_nothing_is_timed_after_the_deadline() -> None:
    trial = FakeTrial({"plain": 10, "quick": 5})
    with pytest.raises(OutOfTime):
        profile([[trial]], list(trial.us), "plain", 1e-3, Rule(), deadline=time.monotonic() - 1)
    assert trial.timed == []


def test_the_cost_model_spares_the_hopeless_but_never_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    predicted = {"plain": [900.0], "quick": [50.0], "fair": [65.0], "hopeless": [80.0]}
    monkeypatch.setattr(tuner, "predict", lambda *_: predicted)
    executor = FakeExecutor({"plain": 100, "quick": 50, "fair": 70, "hopeless": 1, "unknown": 60})
    weights = FP8BlockWeights.random(CONFIG, problem().num_local_experts)
    choice = tune(problem(), weights, executor, 1, "balanced").entries[0].gemm1
    assert choice.tactic == "quick"
    assert set(choice.timings) == {"plain", "quick", "fair", "unknown"}  # what the model does not know races too
    assert choice.predicted == {"plain": 900, "quick": 50, "fair": 65, "hopeless": 80}
