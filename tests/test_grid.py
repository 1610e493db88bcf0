"""The layer grid on the CPU executor, and its table of what is missed on times that are known."""

import json
from pathlib import Path

import pytest
import typer

from benchmarks import common, grid
from moe_runtime import MoEConfig, Parallel
from moe_runtime.executors import get_executor
from moe_runtime.executors.base import MoEProblem
from moe_runtime.executors.cpu import TACTICS
from moe_runtime.kernels import KernelVariant
from moe_runtime.weights import random_weights
from moe_runtime.workload import Workload, make_workload

from .test_tuner import FakeExecutor


def small(model: str, parallel: str) -> MoEProblem:
    config = MoEConfig.preset(model).scaled(hidden_size=256, intermediate_size=512, num_experts=16)
    return MoEProblem(config, Parallel.parse(parallel))


def place(gemm: str = "gemm1", **us: float) -> grid.Place:
    return grid.Place(f"{gemm} {us}", gemm, us)  # type: ignore[arg-type]


def test_worth_by_hand() -> None:
    found = [
        place("gemm1", a=100, b=110, c=300),
        place("gemm1", a=101, b=100, c=130),
        place("gemm2", a=150, b=200, c=100),
        place("gemm2", a=50),
    ]
    a, b, c, unused = (grid.worth(name, found) for name in ("a", "b", "c", "unused"))
    assert (a.best, a.close) == ({"gemm1": 1, "gemm2": 1}, {"gemm1": 2, "gemm2": 1})
    assert (b.best, b.close) == ({"gemm1": 1, "gemm2": 0}, {"gemm1": 1, "gemm2": 0})
    # Without a the first place takes 110, and of the last there is nothing to say.
    assert a.worst == pytest.approx(0.1) and a.mean == pytest.approx(0.1 / 3) and a.alone == 1
    assert a.worst_at == found[0].name
    assert b.worst == pytest.approx(0.01) and b.mean == pytest.approx(0.01 / 4) and b.worst_at == found[1].name
    assert c.worst == pytest.approx(0.5) and c.mean == pytest.approx(0.5 / 4) and c.alone == 0
    assert (unused.worst, unused.worst_at, unused.mean) == (0, "", 0) and unused.best == {"gemm1": 0, "gemm2": 0}


def test_of_twins_neither_is_missed() -> None:
    found = [place(a=100, b=100, c=500)]
    assert grid.worth("a", found).worst == grid.worth("b", found).worst == 0


def test_the_most_missed_come_first() -> None:
    surveys = {"gemm1": common.Survey({"a": 10, "b": 11}, {"c": 40}), "gemm2": common.Survey({"b": 10}, {"a": 16})}
    point = grid.Point("m:dep2", "balanced", 4, 8, 2, surveys, ("a", "b"), 30.0, 0.3)  # type: ignore[arg-type]
    judged = grid.judge(["c", "a", "b"], [point])
    assert list(judged) == ["b", "a", "c"]
    # The rough time of a hopeless tactic is what is left without the fastest.
    assert judged["b"].worst == pytest.approx(0.6) and judged["b"].worst_at == "m:dep2 balanced 4 gemm2"
    assert judged["c"].close == {"gemm1": 0, "gemm2": 0}


def test_cases_by_name() -> None:
    assert grid.chosen_cases("") == list(grid.CASES)
    assert grid.chosen_cases("qwen3-30b,deepseek-r1:ep8") == ["deepseek-r1:ep8", "qwen3-30b:tp1"]
    assert len(grid.chosen_cases("qwen3-235b")) == 3
    with pytest.raises(typer.BadParameter, match="qwen3-235b:dep64"):
        grid.chosen_cases("qwen3-235b:dep64")
    for case in grid.CASES:
        grid.problem(*case.split(":"))


def test_grid_on_the_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(grid, "cuda_executor", lambda: get_executor("cpu"))
    monkeypatch.setattr(grid, "provenance", lambda _: {"gpu": "none"})
    monkeypatch.setattr(grid, "problem", small)
    monkeypatch.setattr(common, "TACTIC_US", 3000.0)
    path = tmp_path / "grid.json"
    grid.main(json=path, models="qwen3-30b", tokens="1,4", distributions="balanced,zipf:1.0")
    written = json.loads(path.read_text())
    assert [path] == list(tmp_path.iterdir())
    assert set(written["variants"]) == set(TACTICS)
    assert [(point["distribution"], point["tokens"]) for point in written["points"]] == [
        ("balanced", 1), ("balanced", 4), ("zipf:1.0", 1), ("zipf:1.0", 4),
    ]  # fmt: skip
    for point in written["points"]:
        assert point["rows"] == 8 * point["tokens"] and 1 <= point["busy"] <= 16
        for gemm, tactic in zip(("gemm1", "gemm2"), point["pair"], strict=True):
            survey = point["gemms"][gemm]
            assert set(survey["us"]) | set(survey["scouted"]) == set(TACTICS)
            assert not set(survey["us"]) & set(survey["scouted"]) and survey["us"][tactic] > 0
        assert point["outside"] < 1 and point["layer_us"] > 0
    assert sum(sum(worth["best"].values()) for worth in written["variants"].values()) == 8
    printed = capsys.readouterr().out
    assert "2 points so far" in printed and "lost without it" in printed


def test_what_is_done_survives_an_interruption(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grid, "cuda_executor", lambda: FakeExecutor({"plain": 10, "quick": 5}))
    monkeypatch.setattr(grid, "provenance", lambda _: {})
    monkeypatch.setattr(grid, "problem", small)
    make = grid.make_workload

    def stopped(config: MoEConfig, parallel: Parallel, tokens: int, distribution: str) -> Workload:
        if distribution == "random":
            raise KeyboardInterrupt
        return make(config, parallel, tokens, distribution)

    monkeypatch.setattr(grid, "make_workload", stopped)
    path = tmp_path / "grid.json"
    with pytest.raises(KeyboardInterrupt):
        grid.main(json=path, models="qwen3-30b", tokens="1", distributions="balanced,random")
    assert [point["distribution"] for point in json.loads(path.read_text())["points"]] == ["balanced"]


def test_a_survey_leaves_the_hopeless_early(monkeypatch: pytest.MonkeyPatch) -> None:
    executor = FakeExecutor({"plain": 100, "quick": 50, "near": 74, "slow": 90})
    trials = []
    make = executor.gemm_trial
    monkeypatch.setattr(executor, "gemm_trial", lambda *given, seed: trials.append(make(*given, seed)) or trials[-1])
    shape = small("qwen3-30b", "tp1")
    found = common.survey(
        executor, shape, random_weights(shape), make_workload(shape.config, shape.parallel, 4), "gemm1"
    )
    assert trials[0].timed == [("plain", "quick", "near", "slow"), ("quick", "near")]
    assert found.fastest == ["quick", "near"] and found.us["quick"] == 50 + 0.5  # ten rounds of 50 and 51 in turns
    assert set(found.scouted) == {"plain", "slow"}


def test_the_layer_races_pairs_of_the_nearest_and_the_default() -> None:
    executor = FakeExecutor({"plain": 100, "quick": 50, "near": 51})
    executor.layer_us = {("near", "quick"): 60.0}
    shape = small("qwen3-30b", "tp1")
    surveys = [common.Survey({"near": 51, "quick": 50}, {}), common.Survey({"quick": 50, "near": 52}, {})]
    workload = make_workload(shape.config, shape.parallel, 4)
    found = common.survey_layer(executor, shape, random_weights(shape), workload, surveys, ("plain", "plain"))
    assert list(found) == [("near", "quick"), ("quick", "quick"), ("plain", "plain")]


def test_the_cost_model_rules_out_what_cannot_win() -> None:
    """A tile of 8 tokens at 512 rows per expert computes at half the rate of one of 128, or less."""
    executor = FakeExecutor({"wide": 1, "narrow": 1})
    executor.variants = {
        "wide": KernelVariant(0, "wide", (128, 128, 128), (1, 1), False, 0, 0, False),
        "narrow": KernelVariant(1, "narrow", (128, 8, 128), (1, 1), True, 0, 0, False),
    }
    shape = MoEProblem(MoEConfig.preset("qwen3-235b"), Parallel.parse("dep2"))
    many, few = (make_workload(shape.config, shape.parallel, tokens, "balanced") for tokens in (4096, 64))
    assert common.likely_tactics(executor, shape, many, "gemm1") == ["wide", "narrow"]
    executor.device_name, executor.sm_count = "NVIDIA H200", 132
    assert common.likely_tactics(executor, shape, many, "gemm1") == ["wide"]
    assert common.likely_tactics(executor, shape, few, "gemm1") == ["wide", "narrow"]
