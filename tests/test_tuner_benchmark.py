"""The benchmark of the tuner, on the CPU executor and on tactics whose times are known."""

import json
import math
from pathlib import Path

import pytest

from benchmarks import tuner as benchmark
from moe_runtime import FP8BlockWeights, MoEConfig, Parallel
from moe_runtime.executors.base import MoEProblem
from moe_runtime.tuning import profiler

from .test_tuner import FakeExecutor

TINY = benchmark.Size(tokens=(1, 4), between=1, rounds=3, samples=1)


def test_small_form_on_the_cpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(benchmark, "SMALL", TINY)
    monkeypatch.setattr(profiler, "RACE_SECONDS", 0.02)
    path = tmp_path / "tuner.json"
    benchmark.main(json=path, case=None, small=True)
    written = json.loads(path.read_text())
    assert written["environment"]["device"] == "cpu" and written["size"]["tokens"] == [1, 4]
    (result,) = written["cases"].values()
    assert result["complete"] and result["buckets"] == [1, 2, 4] and result["tune_seconds"] > 0
    assert [point["tokens"] for point in result["points"]] == [1, 4]
    assert [point["tokens"] for point in result["transfer"]["points"]] == [3]
    for summary in (result["regret"], result["transfer"]):
        assert math.isfinite(summary["worst"]) and 0 <= summary["mean"] <= summary["worst"]
    for point in result["points"] + result["transfer"]["points"]:
        assert 0 < point["best_us"] <= min(point["us"], point["default_us"]) and point["regret"] >= 0
        assert point["gain"] == pytest.approx(point["default_us"] / point["us"] - 1)
    assert result["flips"]["places"] == 6 and 0 <= result["flips"]["lost"] < math.inf
    assert set(result["skew"]) == {"zipf:1.0", "dirichlet:0.3"}
    for points in result["skew"].values():
        assert [point["tokens"] for point in points] == [1, 4]
        assert all(point["tuned_on_balanced_us"] > 0 and point["tuned_on_it_us"] > 0 for point in points)
    assert "winners flipped" in capsys.readouterr().out


@pytest.fixture
def bench() -> benchmark.Bench:
    problem = MoEProblem(MoEConfig("test", 256, 128, 8, 2), Parallel.parse("dep2"))
    weights = FP8BlockWeights.random(problem.config, problem.num_local_experts)
    return benchmark.Bench(FakeExecutor({"plain": 100, "quick": 50, "fair": 80}), problem, weights, TINY)


def test_regret_by_hand(bench: benchmark.Bench) -> None:
    plan, _ = bench.tune("balanced")
    (point,) = bench.points(plan, "balanced", [4])
    assert (point["us"], point["default_us"], point["best_us"]) == (100, 200, 100)
    assert (point["regret"], point["gain"]) == (0, 1)

    bench.times.clear()
    bench.executor.us |= {"fair": 40}  # type: ignore[attr-defined]
    (point,) = bench.points(plan, "balanced", [4])
    assert (point["best_us"], point["regret"]) == (80, 0.25)


def test_flips_by_hand(bench: benchmark.Bench) -> None:
    first, _ = bench.tune("balanced")
    assert bench.flips(first, first) == {"places": 6, "flipped": [], "lost": 0}
    bench.times.clear()
    bench.executor.us |= {"fair": 20}  # type: ignore[attr-defined]
    second, _ = bench.tune("balanced", seed=1)
    found = bench.flips(first, second)
    assert len(found["flipped"]) == 6 and found["flipped"][0]["tactics"] == ["quick", "fair"]
    assert found["lost"] == pytest.approx((50 - 20) / 20)


def test_points_between_buckets(bench: benchmark.Bench) -> None:
    bench.size = benchmark.Size(tokens=(1, 64), between=40, rounds=3, samples=1)
    plan, _ = bench.tune("balanced")
    found = bench.between(plan)
    assert len(found) == 40 and not set(found) & set(plan.buckets) and found == sorted(set(found))
    assert found == bench.between(plan) and found[0] > 1 and found[-1] < 64
