"""The tuner on an executor whose tactics have known times and known faults."""

import io
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor

from moe_runtime.config import MoEConfig
from moe_runtime.errors import InvalidArgument, PlanRefused, Unsupported
from moe_runtime.executors import get_executor
from moe_runtime.executors.base import Executor, Gemm, MoEProblem, TacticPair
from moe_runtime.kernels import KernelVariant
from moe_runtime.parallel import Parallel
from moe_runtime.reference import relative_error
from moe_runtime.tuning import Plan, plan_lock, tune
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
        if fault == "memory":
            raise torch.OutOfMemoryError("too much")
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

    def error(self, tactic: str, rows: Tensor, expected: Tensor) -> float:
        return relative_error(rows, expected)

    def time(self, tactics: Sequence[str], repeats: int) -> dict[str, list[float]]:
        self.timed.append(tuple(tactics))
        return {tactic: [self.us[tactic] + repeat % 2 for repeat in range(repeats)] for tactic in tactics}


class FakeLayerTrial:
    """A layer takes what `us` says of its pair, else as long as both GEMMs."""

    def __init__(self, gemm_us: dict[str, float], us: dict[TacticPair, float]) -> None:
        self.gemm_us, self.us = gemm_us, us
        self.timed: list[tuple[TacticPair, ...]] = []

    def time(self, pairs: Sequence[TacticPair], repeats: int) -> dict[TacticPair, list[float]]:
        self.timed.append(tuple(pairs))
        us = {pair: self.us.get(pair, sum(self.gemm_us[tactic] for tactic in pair)) for pair in pairs}
        return {pair: [us[pair] + repeat % 2 for repeat in range(repeats)] for pair in pairs}


class FakeExecutor:
    name, device_name, library_hash, sm_count = "cpu", "cpu", "fake", 0
    variants: Mapping[str, KernelVariant] = {}

    def __init__(self, us: dict[str, float], faults: dict[str, str] | None = None) -> None:
        self.us, self.faults = us, faults or {}
        self.layer_us: dict[TacticPair, float] = {}
        self.layers: list[FakeLayerTrial] = []
        self.asked: list[int] = []
        self.stop_at: int | None = None
        self.free: int | None = None

    def free_bytes(self) -> int | None:
        return self.free

    def tactics(self, problem: MoEProblem, gemm: Gemm) -> tuple[str, ...]:
        return (*self.us, "unfit")

    def default_tactic(self, problem: MoEProblem, gemm: Gemm, num_rows: int) -> str:
        self.asked.append(num_rows)
        return "plain"

    def leaving_rows(self, tactic: str) -> str:
        return tactic

    def can_implement(self, problem: MoEProblem, gemm: Gemm, tactic: str) -> str | None:
        return "needs another shape" if tactic == "unfit" else None

    def gemm_trial(
        self, problem: MoEProblem, weights: FP8BlockWeights, workload: Workload, gemm: Gemm, seed: int
    ) -> FakeTrial:
        if workload.num_tokens == self.stop_at:
            raise KeyboardInterrupt
        return FakeTrial(self.us, self.faults)

    def layer_trial(
        self, problem: MoEProblem, weights: FP8BlockWeights, workload: Workload, seed: int
    ) -> FakeLayerTrial:
        self.layers.append(FakeLayerTrial(self.us, self.layer_us))
        return self.layers[-1]

    def workspace_bytes(self, problem: MoEProblem, num_tokens: int) -> int:
        raise AssertionError("the tuner runs trials, not layers")

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
    assert sorted(executor.asked) == [kernel_rows(n, Parallel.parse(text)) for n in (1, 1, 2, 2, 4, 4)]


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
    assert [step for _, step in steps][:3] == ["1 tokens, gemm1", "1 tokens, gemm2", "4 tokens, gemm1"]


def test_named_buckets(weights: FP8BlockWeights) -> None:
    plan = tune(problem(), weights, FakeExecutor({"plain": 1}), 8, "balanced", buckets=[2, 3, 8])
    assert plan.buckets == (2, 3, 8) == tuple(entry.bucket for entry in plan.entries) and plan.complete
    with pytest.raises(InvalidArgument, match=r"^buckets: got \[9\]"):
        tune(problem(), weights, FakeExecutor({"plain": 1}), 8, "balanced", buckets=[9])


@pytest.mark.parametrize(
    "arguments,message",
    [
        ({"samples": 0}, "samples: got 0"),
        ({"budget_seconds": 0}, "budget: got 0 s"),
        ({"objective": "max"}, "objective: got 'max'"),
        ({"dispatch": "mail"}, "dispatch: got 'mail'"),
        ({"distribution": "even"}, "distribution: got 'even'"),
        ({"tune_max_num_tokens": 0}, "tune_max_num_tokens: got 0"),
    ],
)
def test_bad_arguments(weights: FP8BlockWeights, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidArgument, match=f"^{message}"):
        tune(problem(), weights, FakeExecutor({"plain": 1}), **({"tune_max_num_tokens": 1} | arguments))


def test_a_gain_below_the_margin_keeps_the_default(weights: FP8BlockWeights) -> None:
    executor = FakeExecutor({"plain": 100, "quick": 95})
    assert tune(problem(), weights, executor, 1, "balanced", margin=0.04).entries[0].gemm1.tactic == "quick"
    assert tune(problem(), weights, executor, 1, "balanced", margin=0.06).entries[0].gemm1.tactic == "plain"


def test_a_faulting_tactic_is_quarantined_and_tried_no_more(weights: FP8BlockWeights) -> None:
    asked: list[tuple[int, Gemm, tuple[str, ...]]] = []

    def vet(workload: Workload, gemm: Gemm, tactics: Sequence[str]) -> dict[str, str]:
        asked.append((workload.num_tokens, gemm, tuple(tactics)))
        return {"quick": "hung"} if (workload.num_tokens, gemm) == (4, "gemm2") else {}

    executor = FakeExecutor({"plain": 100, "quick": 50, "fair": 70, "broken": 1}, {"broken": "wrong"})
    plan = tune(problem(), weights, executor, 4, "balanced", vet=vet)
    assert set(plan.quarantined) == {"quick", "broken"} and plan.quarantined["quick"] == "hung"
    assert asked == [
        (1, "gemm1", ("plain", "quick", "fair", "broken")),
        (1, "gemm2", ("plain", "quick", "fair")),
        (4, "gemm1", ("plain", "quick", "fair")),
        (4, "gemm2", ("plain", "quick", "fair")),
        (2, "gemm1", ("plain", "fair")),
        (2, "gemm2", ("plain", "fair")),
    ]
    # Chosen before it faulted elsewhere: the default takes its place.
    assert [entry.gemm1.tactic for entry in plan.entries] == ["plain", "fair", "plain"]
    assert plan.complete and plan.entries[0].gemm1.rejected["quick"] == "hung"


def test_running_out_of_memory_is_not_a_fault(weights: FP8BlockWeights) -> None:
    executor = FakeExecutor({"plain": 100, "quick": 50}, {"quick": "memory"})
    plan = tune(problem(), weights, executor, 1, "balanced")
    assert plan.quarantined == {} and plan.entries[0].gemm1.rejected["quick"].startswith("no memory")


def test_a_trial_that_does_not_fit_keeps_the_default(weights: FP8BlockWeights) -> None:
    executor = FakeExecutor({"plain": 100, "quick": 50})
    executor.free = 3 << 30
    executor.workspace_bytes = lambda problem, num_rows: num_rows << 30  # type: ignore[method-assign]
    plan = tune(problem("ep2"), weights, executor, 4, "balanced")
    assert plan.complete and [entry.gemm1.tactic for entry in plan.entries] == ["quick", "quick", "plain"]
    reason = plan.entries[2].gemm2.rejected["quick"]
    assert reason == "no memory: timing it needs 4.0 GiB, 3.0 GiB are free" and not plan.entries[2].gemm1.timings


def test_never_during_a_capture(weights: FP8BlockWeights, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(Unsupported, match="CUDA-graph capture"):
        tune(problem(), weights, FakeExecutor({"plain": 1}), 1, "balanced")


class Clock:
    """Time that passes only when a fake trial takes it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        monkeypatch.setattr(time, "monotonic", lambda: self.now)


def slow_executor(clock: Clock, seconds: float = 1.0) -> FakeExecutor:
    """Making a trial takes `seconds`, so a bucket takes twice that."""

    class Slow(FakeExecutor):
        def gemm_trial(self, *arguments: Any) -> FakeTrial:
            clock.now += seconds
            return super().gemm_trial(*arguments)

    return Slow({"plain": 100, "quick": 50})


def test_the_budget_caps_the_time(weights: FP8BlockWeights, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    plan = tune(problem(), weights, slow_executor(clock), 64, "balanced", budget_seconds=12.5)
    assert plan.buckets == (1, 2, 4, 8, 16, 32, 64) and not plan.complete
    tuned = [entry.bucket for entry in plan.entries]
    assert 1 in tuned and 16 in tuned and 3 <= len(tuned) < 7 and clock.now <= 12.5
    assert plan.lookup(2 * 16) == ("quick", "quick")
    left_out = min(set(plan.buckets) - set(tuned))
    assert plan.lookup(2 * left_out) is None


def test_a_bucket_that_outlasts_the_budget_is_left_out(
    weights: FP8BlockWeights, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock(monkeypatch)
    executor = slow_executor(clock, 1.0)
    make = executor.gemm_trial

    def stuck(problem: MoEProblem, weights: FP8BlockWeights, workload: Workload, gemm: Gemm, seed: int) -> FakeTrial:
        clock.now += 100 * (workload.num_tokens == 4)
        return make(problem, weights, workload, gemm, seed)

    executor.gemm_trial = stuck  # type: ignore[method-assign]
    plan = tune(problem(), weights, executor, 8, "balanced", budget_seconds=20)
    assert [entry.bucket for entry in plan.entries] == [1] and not plan.complete


def test_a_budget_that_holds_no_bucket(weights: FP8BlockWeights, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    with pytest.raises(InvalidArgument, match=r"^budget: got 1 s; accepted: 2.4 s or more, .*took 2.0 s"):
        tune(problem(), weights, slow_executor(clock), 8, "balanced", budget_seconds=1)
    assert tune(problem(), weights, slow_executor(clock), 8, "balanced", budget_seconds=2.4).entries


def test_samples_are_other_workloads(weights: FP8BlockWeights) -> None:
    seen: list[tuple[int, list[int]]] = []

    class Watched(FakeExecutor):
        def gemm_trial(
            self, problem: MoEProblem, weights: FP8BlockWeights, workload: Workload, gemm: Gemm, seed: int
        ) -> FakeTrial:
            seen.append((workload.seed, workload.rows_per_expert.tolist()))
            slower = 2.0 if workload.seed == 9 else 1.0
            return FakeTrial({name: us * slower for name, us in self.us.items()})

    executor = Watched({"plain": 100, "quick": 50})
    plan = tune(problem(), weights, executor, 16, "random", 7, samples=3, buckets=[16])
    assert [seed for seed, _ in seen] == [7, 8, 9] * 2 and len({tuple(rows) for _, rows in seen}) == 3
    assert plan.samples == 3 and plan.entries[0].gemm1.us == pytest.approx((50 + 50 + 100) / 3, abs=0.5)
    worst = tune(problem(), weights, executor, 16, "random", 7, samples=3, objective="p95", buckets=[16])
    assert worst.key.objective == "p95" and worst.entries[0].gemm1.us == pytest.approx(95, abs=0.5)


def quiet() -> Console:
    return Console(file=io.StringIO(), width=100)


def test_interrupted_and_resumed(tmp_path: Path, weights: FP8BlockWeights) -> None:
    path, executor = tmp_path / "plan.json", FakeExecutor({"plain": 100, "quick": 50})
    executor.stop_at = 4
    with pytest.raises(KeyboardInterrupt):
        tune_into(path, problem(), weights, executor, 8, "balanced", 0, quiet())
    kept = Plan.load(path)
    assert [entry.bucket for entry in kept.entries] == [1] and not kept.complete

    executor.stop_at, executor.us = None, {"plain": 100, "quick": 25}
    console = quiet()
    plan = tune_into(path, problem(), weights, executor, 8, "balanced", 0, console)
    assert [entry.gemm1.us for entry in plan.entries] == [50, 25, 25, 25] and plan.complete
    assert Plan.load(path) == plan
    assert "4 tokens, gemm1" in console.file.getvalue() and "1 tokens, gemm1" not in console.file.getvalue()  # type: ignore[attr-defined]


@pytest.mark.parametrize("changed", ["seed", "distribution", "regime", "complete", "samples", "margin", "dispatch"])
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
    settings: dict[str, Any] = {
        "samples": {"samples": 2},
        "margin": {"margin": 0.3},
        "dispatch": {"dispatch": "alltoall"},
    }
    plan = tune_into(path, layout, weights, executor, 2, distribution, seed, quiet(), **settings.get(changed, {}))
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
                assert choice.us is not None and choice.default_us is not None and choice.us > 0
                # A race on the layer may take what is slower alone.
                assert entry.layer or choice.us < choice.default_us or choice.tactic == choice.default_tactic
        raced = {(pair.gemm1, pair.gemm2): pair.timing for pair in entry.layer}
        assert not raced or raced[entry.pair].low <= raced[entry.default_pair].high
