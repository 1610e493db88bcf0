"""The tuner on an executor whose tactics have known times and known faults."""

import io
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import Tensor

from moe_runtime.config import MoEConfig
from moe_runtime.errors import InvalidArgument, PlanRefused, Unsupported
from moe_runtime.executors import get_executor
from moe_runtime.executors.base import Executor, Gemm, MoEProblem
from moe_runtime.parallel import Parallel
from moe_runtime.tuning import Plan, plan_lock, tune
from moe_runtime.tuning.profiler import MARGIN, profile, winner
from moe_runtime.tuning.session import tune_into
from moe_runtime.weights import FP8BlockWeights
from moe_runtime.workload import Workload, kernel_rows

CONFIG = MoEConfig("test", 256, 128, 8, 2)
ROWS, N = 6, 4


class FakeTrial:
    """Tactic -> microseconds; a tactic may also raise or give a wrong result. Records what was timed."""

    def __init__(self, us: dict[str, float], faults: dict[str, str] | None = None) -> None:
        self.us, self.faults = us, faults or {}
        self.values = torch.randn(ROWS, N, generator=torch.Generator().manual_seed(0))
        self.timed: list[tuple[str, ...]] = []

    def run(self, tactic: str) -> Tensor:
        fault = self.faults.get(tactic)
        if fault == "raises":
            raise RuntimeError("illegal instruction")
        result = self.values.clone()
        if fault == "nan":
            result[3, 1] = torch.nan  # a row that the reference does not hold
        if fault == "wrong":
            result[-1] = 0
        return result

    def reference(self) -> tuple[Tensor, Tensor]:
        index = torch.tensor([0, 2, ROWS - 1])
        return index, self.values[index]

    def time(self, tactics: Sequence[str], repeats: int) -> dict[str, list[float]]:
        self.timed.append(tuple(tactics))
        return {tactic: [self.us[tactic] + repeat % 2 for repeat in range(repeats)] for tactic in tactics}


class FakeExecutor:
    name, device_name, library_hash = "cpu", "cpu", "fake"

    def __init__(self, us: dict[str, float], faults: dict[str, str] | None = None) -> None:
        self.us, self.faults = us, faults or {}
        self.asked: list[int] = []
        self.stop_at: int | None = None

    def tactics(self, problem: MoEProblem, gemm: Gemm) -> tuple[str, ...]:
        return (*self.us, "unfit")

    def default_tactic(self, problem: MoEProblem, gemm: Gemm, num_rows: int) -> str:
        self.asked.append(num_rows)
        return "plain"

    def can_implement(self, problem: MoEProblem, gemm: Gemm, tactic: str) -> str | None:
        return "needs another shape" if tactic == "unfit" else None

    def gemm_trial(
        self, problem: MoEProblem, weights: FP8BlockWeights, workload: Workload, gemm: Gemm, seed: int
    ) -> FakeTrial:
        if workload.num_tokens == self.stop_at:
            raise KeyboardInterrupt
        return FakeTrial(self.us, self.faults)

    def workspace_bytes(self, problem: MoEProblem, num_tokens: int) -> int:
        raise AssertionError("the tuner times GEMMs, not layers")

    run = workspace_bytes  # type: ignore[assignment]


def problem(text: str = "dep2") -> MoEProblem:
    return MoEProblem(CONFIG, Parallel.parse(text))


@pytest.fixture(scope="module")
def weights() -> FP8BlockWeights:
    return FP8BlockWeights.random(CONFIG, problem().num_local_experts)


def test_fastest_sound_tactic_wins(weights: FP8BlockWeights) -> None:
    executor: Executor = FakeExecutor(
        {"plain": 100, "quick": 50, "broken": 1, "poisoned": 2, "crash": 3},
        {"broken": "wrong", "poisoned": "nan", "crash": "raises"},
    )
    plan = tune(problem(), weights, executor, 4, "balanced")
    assert plan.complete and [entry.bucket for entry in plan.entries] == [1, 2, 4]
    for entry in plan.entries:
        for choice in (entry.gemm1, entry.gemm2):
            assert (choice.tactic, choice.us) == ("quick", 50)
            assert (choice.default_tactic, choice.default_us) == ("plain", 100)
            assert set(choice.rejected) == {"broken", "poisoned", "crash", "unfit"}
            assert choice.rejected["broken"].startswith("wrong result: relative error ")
            assert choice.rejected["poisoned"].startswith("wrong result: not finite")
            assert choice.rejected["crash"] == "raised RuntimeError: illegal instruction"
            assert choice.rejected["unfit"] == "needs another shape"


@pytest.mark.parametrize(
    "us,expected",
    [
        ({"plain": 100.0, "quick": 100 * (1 - MARGIN) - 0.1}, "quick"),
        ({"plain": 100.0, "quick": 100 * (1 - MARGIN) + 0.1}, "plain"),
        ({"plain": 100.0, "slow": 101.0}, "plain"),
        ({"quick": 90.0, "slow": 101.0}, "quick"),
    ],
)
def test_winner_beats_the_default_by_a_margin(us: dict[str, float], expected: str) -> None:
    assert winner(us, "plain") == expected


def test_hopeless_tactics_leave_the_race_but_the_default_stays() -> None:
    trial = FakeTrial({"plain": 1000, "quick": 10, "close": 15, "slow": 30})
    profiled = profile(trial, list(trial.us), "plain", 1e-3)
    assert trial.timed == [("plain", "quick", "close", "slow"), ("plain", "quick", "close")]
    assert profiled.us == {"plain": 1000, "quick": 10, "close": 15}


def test_a_wrong_default_is_replaced(weights: FP8BlockWeights) -> None:
    plan = tune(problem(), weights, FakeExecutor({"plain": 1, "quick": 50}, {"plain": "wrong"}), 1, "balanced")
    choice = plan.entries[0].gemm1
    assert (choice.tactic, choice.default_us) == ("quick", None) and "plain" in choice.rejected


def test_no_sound_tactic(weights: FP8BlockWeights) -> None:
    with pytest.raises(Unsupported, match=r"no tactic of gemm1 works at 1 tokens: unfit: .*plain: raised RuntimeError"):
        tune(problem(), weights, FakeExecutor({"plain": 1}, {"plain": "raises"}), 1, "balanced")


@pytest.mark.parametrize("text", ["dep2", "ep2"])
def test_the_default_is_asked_for_the_rows_of_a_call(weights: FP8BlockWeights, text: str) -> None:
    executor = FakeExecutor({"plain": 1})
    tune(problem(text), weights, executor, 4, "balanced")
    assert executor.asked == [kernel_rows(n, Parallel.parse(text)) for n in (1, 1, 2, 2, 4, 4)]


def test_a_bucket_without_rows_keeps_the_default() -> None:
    """The balanced EP workload of one token names experts 0 and 2 of 8; rank 3 of 4 holds 6 and 7."""
    alone = MoEProblem(CONFIG, Parallel("ep", 4, 3))
    weights = FP8BlockWeights.random(CONFIG, 2)
    entry = tune(alone, weights, FakeExecutor({"plain": 5, "quick": 1}), 1, "balanced").entries[0]
    assert entry.rows == 0
    assert (entry.gemm1.tactic, entry.gemm1.us, entry.gemm1.default_us) == ("plain", None, None)


def test_steps_tell_the_share_done(weights: FP8BlockWeights) -> None:
    steps: list[tuple[float, str]] = []
    tune(problem(), weights, FakeExecutor({"plain": 1}), 4, "balanced", on_step=lambda *step: steps.append(step))
    shares = [done for done, _ in steps]
    assert shares[0] == 0 and shares == sorted(shares) and shares[-1] < 1
    assert [step for _, step in steps][:3] == ["1 tokens, gemm1", "1 tokens, gemm2", "2 tokens, gemm1"]


def test_some_buckets(weights: FP8BlockWeights) -> None:
    plan = tune(problem(), weights, FakeExecutor({"plain": 1}), 8, "balanced", buckets=[8, 2])
    assert [entry.bucket for entry in plan.entries] == [2, 8] and not plan.complete
    with pytest.raises(InvalidArgument, match=r"^buckets: got"):
        tune(problem(), weights, FakeExecutor({"plain": 1}), 8, "balanced", buckets=[3])


def quiet() -> Console:
    return Console(file=io.StringIO(), width=100)


def test_interrupted_and_resumed(tmp_path: Path, weights: FP8BlockWeights) -> None:
    path, executor = tmp_path / "plan.json", FakeExecutor({"plain": 100, "quick": 50})
    executor.stop_at = 4
    with pytest.raises(KeyboardInterrupt):
        tune_into(path, problem(), weights, executor, 8, "balanced", 0, quiet())
    kept = Plan.load(path)
    assert [entry.bucket for entry in kept.entries] == [1, 2] and not kept.complete

    executor.stop_at, executor.us = None, {"plain": 100, "quick": 25}
    console = quiet()
    plan = tune_into(path, problem(), weights, executor, 8, "balanced", 0, console)
    assert [entry.gemm1.us for entry in plan.entries] == [50, 50, 25, 25] and plan.complete
    assert Plan.load(path) == plan
    assert "4 tokens, gemm1" in console.file.getvalue() and "2 tokens, gemm1" not in console.file.getvalue()  # type: ignore[attr-defined]


@pytest.mark.parametrize("changed", ["seed", "distribution", "regime", "complete"])
def test_other_plans_are_not_resumed_from(tmp_path: Path, weights: FP8BlockWeights, changed: str) -> None:
    path, executor = tmp_path / "plan.json", FakeExecutor({"plain": 100})
    if changed != "complete":
        executor.stop_at = 2
        with pytest.raises(KeyboardInterrupt):
            tune_into(path, problem(), weights, executor, 2, "balanced", 0, quiet())
    else:
        tune_into(path, problem(), weights, executor, 2, "balanced", 0, quiet())
    executor.stop_at, executor.us = None, {"plain": 70}
    layout = problem("ep2" if changed == "regime" else "dep2")
    distribution, seed = "random" if changed == "distribution" else "balanced", int(changed == "seed")
    plan = tune_into(path, layout, weights, executor, 2, distribution, seed, quiet())
    assert {entry.gemm1.us for entry in plan.entries} <= {70, None}


def test_a_foreign_file_is_left_alone(tmp_path: Path, weights: FP8BlockWeights) -> None:
    path = tmp_path / "notes.json"
    path.write_text('{"my": "notes"}')
    with pytest.raises(PlanRefused, match="remove the file or name another output"):
        tune_into(path, problem(), weights, FakeExecutor({"plain": 1}), 1, "balanced", 0, quiet())
    assert path.read_text() == '{"my": "notes"}'


def test_two_tuners_of_one_plan(tmp_path: Path, weights: FP8BlockWeights) -> None:
    path = tmp_path / "plan.json"
    with plan_lock(path), pytest.raises(InvalidArgument, match="no other process"):
        tune_into(path, problem(), weights, FakeExecutor({"plain": 1}), 1, "balanced", 0, quiet())


@pytest.mark.parametrize("text", ["dep2", "ep2"])
@pytest.mark.parametrize("distribution", ["balanced", "random"])
def test_cpu_executor_tunes_for_real(weights: FP8BlockWeights, text: str, distribution: str) -> None:
    executor = get_executor("cpu")
    plan = tune(problem(text), weights, executor, 8, distribution)
    assert plan.complete and plan.fits(problem(text), "cpu", executor.library_hash) is None
    for entry in plan.entries:
        for gemm, choice in (("gemm1", entry.gemm1), ("gemm2", entry.gemm2)):
            assert choice.tactic in executor.tactics(problem(text), gemm)
            assert not any(reason.startswith("wrong") for reason in choice.rejected.values())
            if entry.rows:
                assert choice.us is not None and choice.default_us is not None
                assert 0 < choice.us <= choice.default_us
