"""What is made of repeated times, on times whose truth is known."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from moe_runtime.errors import InvalidArgument
from moe_runtime.tuning.measure import Rule, beats, judge, objective_us, winner


def noisy(us: float, seed: int, samples: int = 1, rounds: int = 25, noise: float = 0.02) -> NDArray[np.float64]:
    return us * (1 + noise * np.random.default_rng(seed).standard_normal((samples, rounds)))


def test_objectives() -> None:
    times = np.array([[1.0, 2.0, 9.0], [4.0, 4.0, 4.0]])  # medians 2 and 4
    assert objective_us(times, "mean") == 3
    assert objective_us(times, "p95") == pytest.approx(3.9)


def test_constant_times_have_no_spread() -> None:
    timing = judge({"a": np.full((2, 5), 7.0)}, Rule())["a"]
    assert (timing.low, timing.us, timing.high) == (7, 7, 7)


def test_the_interval_holds_the_truth_as_often_as_it_says() -> None:
    rule = Rule(confidence=0.8)
    held = 0
    for seed in range(200):
        timing = judge({"a": noisy(100, seed, rounds=31)}, rule)["a"]
        assert timing.low <= timing.us <= timing.high
        held += timing.low <= 100 <= timing.high
    assert 0.7 * 200 <= held <= 0.92 * 200


def test_the_interval_narrows_with_rounds_and_widens_with_confidence() -> None:
    def width(rounds: int, confidence: float) -> float:
        timing = judge({"a": noisy(100, 1, rounds=rounds)}, Rule(confidence=confidence))["a"]
        return timing.high - timing.low

    assert width(400, 0.95) < width(20, 0.95)
    assert width(40, 0.5) < width(40, 0.99)


def test_the_same_times_give_the_same_verdict() -> None:
    times = {"a": noisy(100, 1), "b": noisy(99, 2)}
    assert judge(times, Rule(seed=3)) == judge(times, Rule(seed=3)) != judge(times, Rule(seed=4))


@pytest.mark.parametrize(
    "us,margin,expected",
    [(90.0, 0.02, "quick"), (99.5, 0.01, "plain"), (99.0, 0.02, "plain"), (101.0, 0.0, "plain"), (97.0, 0.0, "quick")],
)
def test_the_default_stays_unless_it_is_beaten_by_the_margin(us: float, margin: float, expected: str) -> None:
    times = {"plain": noisy(100, 1), "quick": noisy(us, 2)}
    assert winner(times, "plain", Rule(margin=margin)) == expected


def test_a_gain_within_the_noise_is_not_believed() -> None:
    """3 % faster, by two medians that are each off by more; ten times as many rounds show it."""
    few = {"plain": noisy(100, 1, rounds=5, noise=0.2), "quick": noisy(97, 2, rounds=5, noise=0.2)}
    many = {"plain": noisy(100, 1, rounds=2000, noise=0.2), "quick": noisy(95, 2, rounds=2000, noise=0.2)}
    assert winner(few, "plain", Rule()) == "plain" and winner(many, "plain", Rule()) == "quick"


def test_equal_tactics_seldom_replace_the_default() -> None:
    """At 95 % a coin toss passes in 2.5 % of cases without a margin, and hardly ever with one."""
    replaced = [
        sum(
            winner({"plain": noisy(100, seed), "twin": noisy(100, 10_000 + seed)}, "plain", Rule(margin=m)) == "twin"
            for seed in range(200)
        )
        for m in (0.0, 0.02)
    ]
    assert replaced[0] <= 16 and replaced[1] == 0


def test_what_disturbs_a_round_disturbs_both() -> None:
    """The clock drifts by half, which hides 5 % from each interval, but not from that of the ratio."""
    drift = np.linspace(1.0, 1.5, 25)[None, :]
    default, candidate = 100 * drift, 95 * drift
    intervals = judge({"default": default, "candidate": candidate}, Rule())
    assert intervals["candidate"].high > intervals["default"].low
    assert beats(candidate, default, Rule(margin=0.04)) and not beats(candidate, default, Rule(margin=0.06))


def test_samples_that_disagree_leave_doubt() -> None:
    """Faster on average over four workloads, slower on one: the next four may well turn it round."""
    default = np.full((4, 9), 100.0)
    candidate = np.array([[90.0], [90.0], [90.0], [125.0]]) * np.ones(9)
    assert objective_us(candidate, "mean") < 99 and not beats(candidate, default, Rule(margin=0))


def test_without_the_default_the_fastest_wins() -> None:
    assert winner({"a": noisy(100, 1), "b": noisy(95, 1)}, "plain", Rule()) == "b"


def test_of_equals_the_first_wins_whatever_the_noise() -> None:
    """Which of two equals is the fastest is a coin toss, so two tunes would disagree at half of the buckets."""
    races = [
        {"plain": noisy(100, 3 * seed), "a": noisy(50, 3 * seed + 1), "b": noisy(50, 3 * seed + 2)}
        for seed in range(40)
    ]
    fastest = [min(race, key=lambda name: objective_us(race[name], "mean")) for race in races]
    assert min(fastest.count("a"), fastest.count("b")) > 10
    assert {winner(race, "plain", Rule()) for race in races} == {"a"}
    assert {winner({"plain": race["plain"], "b": race["b"], "a": race["a"]}, "plain", Rule()) for race in races} == {
        "b"
    }


def test_being_first_does_not_outweigh_a_gain() -> None:
    assert winner({"plain": noisy(100, 1), "a": noisy(50, 2), "b": noisy(48, 3)}, "plain", Rule()) == "b"


def test_who_equals_the_fastest_must_itself_beat_the_default() -> None:
    exact = {name: np.full((1, 5), us) for name, us in (("plain", 100.0), ("a", 99.2), ("b", 98.5))}
    assert winner(exact, "plain", Rule(margin=0.01)) == "b"
    assert winner(exact | {"a": np.full((1, 5), 98.9)}, "plain", Rule(margin=0.01)) == "a"


@given(st.lists(st.floats(1, 1e6), min_size=1, max_size=12), st.sampled_from(["mean", "p95"]))
def test_an_interval_lies_within_the_times(times: list[float], objective: str) -> None:
    timing = judge({"a": np.array([times])}, Rule(objective=objective))["a"]  # type: ignore[arg-type]
    slack = 1 + 1e-9
    assert min(times) / slack <= timing.low <= timing.us <= timing.high <= max(times) * slack


@pytest.mark.parametrize(
    "arguments,name",
    [({"objective": "max"}, "objective"), ({"margin": -0.1}, "margin"), ({"margin": 1.0}, "margin")]
    + [({"confidence": value}, "confidence") for value in (0.0, 1.0, 95.0, float("nan"))],
)
def test_bad_rules(arguments: dict[str, float], name: str) -> None:
    with pytest.raises(InvalidArgument, match=f"^{name}: got"):
        Rule(**arguments)  # type: ignore[arg-type]
