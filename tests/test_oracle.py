"""Who is the fastest of several draws, with hindsight and without."""

import statistics

import numpy as np
import pytest

from benchmarks.oracle import Draws, survey, with_hindsight, without_hindsight

from .test_tuner import FakeTrial


def test_by_hand() -> None:
    """On the draws in odd places "a" is the faster, on those between "b": neither is on average."""
    times = {"a": [1.0, 3.0, 1.0, 3.0], "b": [2.0, 2.0, 2.0, 2.0]}
    assert with_hindsight(times) == 2 and without_hindsight(times) == statistics.fmean([3, 3, 2, 2])


def test_a_clear_winner_costs_no_hindsight() -> None:
    times = {"a": [4.0, 5.0, 6.0], "b": [7.0, 8.0, 9.0]}
    assert without_hindsight(times) == pytest.approx(with_hindsight(times)) == 5


def test_a_single_draw_leaves_nothing_to_hold_back() -> None:
    assert without_hindsight({"a": [4.0], "b": [3.0]}) == 3


def test_equal_tactics_owe_nothing() -> None:
    """Twelve tactics of the same mean: hindsight finds one that is 2 % faster, and charges whoever runs another."""
    random = np.random.default_rng(0)

    def race() -> dict[str, Draws]:
        return {f"t{i}": (100 + 4 * random.standard_normal(8)).tolist() for i in range(12)}

    races = [race() for _ in range(200)]
    assert statistics.fmean(map(with_hindsight, races)) < 98.5
    assert statistics.fmean(map(without_hindsight, races)) == pytest.approx(100, abs=0.3)


def test_a_survey_scouts_a_few_draws_and_races_on_all() -> None:
    """Two of eight draws meet every tactic; the rounds are shared out, but each draw has three."""
    trials = [FakeTrial({"quick": 100, "near": 115, "far": 130, "wanted": 200}) for _ in range(8)]
    found = survey(trials, ["quick", "near", "far", "wanted"], {"wanted"}, 11)
    assert {name: len(us) for name, us in found.items()} == {"quick": 8, "near": 8, "wanted": 8}
    assert [len(trial.timed) for trial in trials] == [1, 1, 2, 1, 1, 1, 2, 1]
    assert survey(trials[:0], ["quick"], set(), 11) == {}
