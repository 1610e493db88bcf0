"""The benchmark of the tuner, on the CPU executor and on tactics whose times are known."""

import json
import math
from contextlib import nullcontext
from pathlib import Path

import pytest

from benchmarks import tuner as benchmark
from moe_runtime import FP8BlockWeights, MoEConfig, Parallel
from moe_runtime.executors.base import MoEProblem
from moe_runtime.tuning import profiler
from moe_runtime.tuning.draws import DRAWS_OF_FEW_ROWS

from .test_tuner import FakeExecutor

TINY = benchmark.Size(tokens=(1, 4), few=(4,), between=1, rounds=3)
PARTS = ["tune", "tune again", "regret", "transfer", "flips", "skew", "cross"]


def test_small_form_on_the_cpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(benchmark, "SMALL", TINY)
    monkeypatch.setattr(benchmark, "vetting", lambda *_: nullcontext())
    monkeypatch.setattr(profiler, "RACE_SECONDS", 0.02)
    path = tmp_path / "tuner.json"
    benchmark.main(json=path, case=None, small=True)
    written = json.loads(path.read_text())
    assert written["environment"]["device"] == "cpu" and written["size"]["tokens"] == [1, 4]
    assert list(written["cases"]) == ["qwen3-235b:dep2", "qwen3-235b:ep2"]
    for name, result in written["cases"].items():
        parts = [*PARTS, "all-to-all"] if name.endswith("dep2") else PARTS
        assert result["complete"] and result["buckets"] == [1, 2, 4]
        assert list(result["seconds"]) == parts and result["seconds"]["tune"] == result["tune_seconds"] > 0
        assert result["skipped"] == []
        assert [point["tokens"] for point in result["points"]] == [1, 4]
        assert [point["tokens"] for point in result["transfer"]["points"]] == [3]
        for summary in (result["regret"], result["transfer"]):
            assert math.isfinite(summary["worst"]) and summary["mean"] <= summary["worst"]
            assert 0 <= summary["mean_bound"] <= summary["worst_bound"]
        for point in result["points"] + result["transfer"]["points"]:
            assert 0 < point["least_us"] <= min(point["us"], point["default_us"], point["best_us"])
            assert point["bound"] >= max(0, point["regret"]) and set(point["surveyed"]) == {"gemm1", "gemm2"}
            assert point["gain"] == pytest.approx(point["default_us"] / point["us"] - 1)
        assert result["flips"]["places"] == 6 and 0 <= result["flips"]["lost"] < math.inf
        assert set(result["skew"]) == {"zipf:1.0", "dirichlet:0.3"}
        assert all([point["tokens"] for point in points] == [4] for points in result["skew"].values())
    compared = written["cross"]["qwen3-235b"]
    assert list(compared) == [
        "dep2, with the plan of ep2 and its own",
        "ep2, with the plan of dep2 and its own",
        "dep2 after an all-to-all, tuned on compact and on alltoall",
    ]
    for title, points in compared.items():
        assert [point["tokens"] for point in points] == ([4] if "all-to-all" in title else [1, 4])
        for point in points:
            assert min(point["us"]) > 0 and point["delta"] == pytest.approx(point["us"][0] / point["us"][1] - 1)
    printed = capsys.readouterr().out
    assert "winners flipped" in printed and "dep2, with the plan of ep2 and its own" in printed
    assert "s: qwen3-235b:dep2: tune again took" in printed


def test_an_interrupted_run_keeps_what_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The second case is stopped; the budget is spent from the start."""
    judge = benchmark.judge

    def stopped(bench: benchmark.Bench) -> dict[str, object]:
        if bench.name.endswith(":ep2"):
            raise KeyboardInterrupt
        return judge(bench)

    monkeypatch.setattr(benchmark, "SMALL", TINY)
    monkeypatch.setattr(benchmark, "judge", stopped)
    monkeypatch.setattr(benchmark, "vetting", lambda *_: nullcontext())
    monkeypatch.setattr(profiler, "RACE_SECONDS", 0.02)
    with pytest.raises(KeyboardInterrupt):
        benchmark.main(json=tmp_path / "tuner.json", case=None, budget=0, small=True)
    (result,) = json.loads((tmp_path / "tuner.json").read_text())["cases"].values()
    assert result["skipped"] == ["skew"] and result["skew"] == {} and "skew" not in result["seconds"]
    assert "skew skipped for lack of time" in capsys.readouterr().out


def make_bench(layout: str = "dep2") -> benchmark.Bench:
    problem = MoEProblem(MoEConfig("test", 256, 128, 8, 2), Parallel.parse(layout))
    weights = FP8BlockWeights.random(problem.config, problem.num_local_experts)
    return benchmark.Bench(FakeExecutor({"plain": 100, "quick": 50, "fair": 80}), problem, weights, TINY)


@pytest.fixture
def bench() -> benchmark.Bench:
    return make_bench()


def test_regret_by_hand(bench: benchmark.Bench) -> None:
    plan = bench.tune("own", "balanced")
    (point,) = bench.points(plan, [4])
    assert (point["us"], point["default_us"], point["best_us"]) == (100, 200, 100)
    assert (point["regret"], point["bound"], point["gain"]) == (0, 0, 1)

    bench.times.clear()
    bench.executor.us |= {"fair": 40}  # type: ignore[attr-defined]
    (point,) = bench.points(plan, [4])
    assert (point["best_us"], point["regret"], point["bound"]) == (80, 0.25, 0.25)


def test_a_survey_scouts_all_and_times_those_that_matter(
    bench: benchmark.Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Near the fastest, or run by the default or a plan, whatever it takes by now."""
    bench.tune("own", "balanced")
    executor = bench.executor
    assert isinstance(executor, FakeExecutor)
    executor.us |= {"quick": 300, "close": 90, "far": 99, "fair": 80}
    trials = []
    make = executor.gemm_trial
    monkeypatch.setattr(executor, "gemm_trial", lambda *given: trials.append(make(*given)) or trials[-1])
    found = bench.survey("balanced", 4)
    assert found == bench.survey("balanced", 4) and len(trials) == 2 * benchmark.LEAST_DRAWS
    near = ("plain", "quick", "fair", "close")
    for trial, other in zip(trials[::2], trials[1::2], strict=True):
        assert trial.timed == [(*near, "far"), near] and other.timed == [near]
    assert found["gemm2"] == {"plain": [100, 100], "quick": [300, 300], "fair": [80, 80], "close": [90, 90]}


def test_draws_that_judge_are_those_of_no_tune() -> None:
    bench = make_bench()
    seen: list[int] = []
    make = bench.executor.gemm_trial

    def gemm_trial(problem, weights, workload, gemm, seed):  # type: ignore[no-untyped-def]
        seen.append(workload.seed)
        return make(problem, weights, workload, gemm, seed)

    bench.executor.gemm_trial = gemm_trial  # type: ignore[method-assign]
    drawn = []
    for seed in (0, benchmark.AGAIN_SEED):
        bench.tune(f"from {seed}", "random", seed)
        drawn.append(set(seen))
        seen.clear()
    bench.survey("random", 4)
    assert len(seen) == 2 * DRAWS_OF_FEW_ROWS
    assert drawn[0].isdisjoint(drawn[1]) and drawn[0].isdisjoint(seen) and drawn[1].isdisjoint(seen)


def test_flips_by_hand(bench: benchmark.Bench) -> None:
    first = bench.tune("own", "balanced")
    assert bench.flips(first, first) == {"places": 6, "flipped": [], "lost": 0, "lost_on_average": 0}
    bench.executor.us |= {"fair": 20}  # type: ignore[attr-defined]
    second = bench.tune("again", "balanced", seed=1)
    found = bench.flips(first, second)
    assert len(found["flipped"]) == 6 and found["flipped"][0]["tactics"] == ["quick", "fair"]
    assert found["lost"] == pytest.approx((50 - 20) / 20)
    assert found["lost_on_average"] == pytest.approx((50 - 20) / 20)  # all six places flipped


def test_points_between_buckets(bench: benchmark.Bench) -> None:
    bench.size = benchmark.Size(tokens=(1, 64), few=(4,), between=40, rounds=3)
    plan = bench.tune("own", "balanced")
    found = bench.between(plan)
    assert len(found) == 40 and not set(found) & set(plan.buckets) and found == sorted(set(found))
    assert found == bench.between(plan) and found[0] > 1 and found[-1] < 64


def test_the_cost_of_another_layouts_plan_by_hand() -> None:
    """Under ep2 "quick" is fast and under dep2 "fair"; the layer takes 30 more than what its GEMMs do."""
    benches = {layout: make_bench(layout) for layout in ("dep2", "ep2")}
    for bench, best in zip(benches.values(), ("fair", "quick"), strict=True):
        executor = bench.executor
        assert isinstance(executor, FakeExecutor)
        executor.us = {"plain": 100, "quick": 50, "fair": 80} | {best: 20}
        executor.layer_us = {(name, name): 2 * us + 30 for name, us in executor.us.items()}
        assert {entry.pair for entry in bench.tune("own", benchmark.TUNED_ON).entries} == {(best, best)}
    found = benchmark.cross(benches)
    (dep_with_ep, ep_with_dep, alltoall) = found.values()
    assert [point["tokens"] for point in dep_with_ep] == [1, 4]
    one, four = dep_with_ep
    assert one["tactics"] == [("quick", "quick"), ("fair", "fair")] and one["us"] == [130, 70]
    assert one["delta"] == pytest.approx(130 / 70 - 1)
    assert four["tokens_per_second_per_gpu"] == pytest.approx([4e6 / 130, 4e6 / 70])
    assert ep_with_dep[1]["us"] == [190, 70]
    # Both ranks hold the same four tokens.
    assert ep_with_dep[1]["tokens_per_second_per_gpu"] == pytest.approx([2e6 / 190, 2e6 / 70])
    assert [(point["tokens"], point["us"], point["delta"]) for point in alltoall] == [(4, [70, 70], 0)]
    assert all(bench.seconds["cross"] > 0 for bench in benches.values())
    assert benches["dep2"].seconds["all-to-all"] > 0 and "all-to-all" not in benches["ep2"].seconds


def test_plans_of_a_few_sizes(bench: benchmark.Bench) -> None:
    plan = bench.tune_few("random", dispatch="alltoall")
    assert plan.buckets == TINY.few and plan.key.dispatch == "alltoall" and not bench.plans


def test_without_time_the_all_to_all_is_left_out() -> None:
    bench = make_bench("dep2")
    bench.tune("own", benchmark.TUNED_ON)
    bench.watch = benchmark.Watch(budget=0)
    assert benchmark.cross({"dep2": bench}) == {} and bench.skipped == ["all-to-all"]


def test_layouts_of_a_model_share_weights() -> None:
    cases = ["qwen3-235b:dep2", "deepseek-r1:dep8", "qwen3-235b:ep2", "qwen3-235b:dep4"]
    found = {model: of_layouts for model, of_layouts in benchmark.benches(cases, small=True)}
    assert {model: list(of_layouts) for model, of_layouts in found.items()} == {
        "qwen3-235b": ["dep2", "ep2", "dep4"], "deepseek-r1": ["dep8"],
    }  # fmt: skip
    dep2, ep2, dep4 = found["qwen3-235b"].values()
    assert dep2.weights is ep2.weights is not dep4.weights
