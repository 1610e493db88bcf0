"""Tactics of both GEMMs chosen together: which pairs race on the layer, what wins, and what the plan keeps of it."""

import time
from pathlib import Path

import pytest

from moe_runtime.executors.base import TacticPair
from moe_runtime.tuning import GemmChoice, PairTiming, Plan, PlanEntry, Timing, tune
from moe_runtime.tuning.explain import explain
from moe_runtime.tuning.pairs import doubtful_pairs
from moe_runtime.tuning.tuner import assemble
from moe_runtime.weights import FP8BlockWeights

from .plans import make_plan
from .test_tuner import CONFIG, Clock, FakeExecutor, problem, slow_executor

PAIRS = (("plain", "plain"), ("quick", "quick"), ("quick", "fused"), ("fused", "quick"), ("fused", "fused"))


def choice(tactic: str, **us: float) -> GemmChoice:
    """`tactic` chosen among tactics that took so many microseconds, give or take 1 %; "plain" is the default."""
    return GemmChoice(tactic, "plain", {name: Timing(at, 0.99 * at, 1.01 * at) for name, at in us.items()})


def entry(gemm1: GemmChoice, gemm2: GemmChoice, **changes: tuple[PairTiming, ...]) -> PlanEntry:
    return PlanEntry(8, 64, gemm1, gemm2, **changes)


def timed(*pairs: tuple[str, str, float]) -> tuple[PairTiming, ...]:
    return tuple(PairTiming(gemm1, gemm2, Timing(us, 0.99 * us, 1.01 * us)) for gemm1, gemm2, us in pairs)


@pytest.fixture(scope="module")
def weights() -> FP8BlockWeights:
    return FP8BlockWeights.random(CONFIG, problem().num_local_experts)


@pytest.mark.parametrize(
    "gemm1,gemm2,expected",
    [
        (choice("a", plain=90, a=50), choice("b", plain=90, b=50), []),
        (choice("plain", plain=50, a=90), choice("plain", plain=50, a=90), []),
        (choice("a", plain=90, a=50, b=51), choice("b", plain=90, b=50), ["plain plain", "a b", "b b"]),
        (choice("a", plain=51, a=50), choice("plain", plain=50, b=90), ["plain plain", "a plain"]),
        (
            choice("a", plain=90, a=50, b=51, c=52),
            choice("plain", plain=50, b=52),
            ["plain plain", "a plain", "a b", "b plain", "b b"],
        ),
        (GemmChoice("plain", "plain"), choice("a", plain=90, a=50, b=51), []),
        (choice("a", a=50, b=51), choice("a", plain=90, a=50), ["a a", "b a"]),
    ],
    ids=["clear", "clear defaults", "one in doubt", "the default in doubt", "two of each", "untimed", "default is out"],
)
def test_doubtful_pairs(gemm1: GemmChoice, gemm2: GemmChoice, expected: list[str]) -> None:
    assert [" ".join(pair) for pair in doubtful_pairs(entry(gemm1, gemm2), set())] == expected


def test_a_faulty_tactic_does_not_race() -> None:
    doubtful = entry(choice("a", plain=90, a=50, b=51), choice("c", plain=90, c=50))
    assert doubtful_pairs(doubtful, {"b"}) == [("plain", "plain"), ("a", "c")]
    assert doubtful_pairs(doubtful, {"b", "plain"}) == []


def tuned(weights: FP8BlockWeights, layer_us: dict[TacticPair, float], margin: float = 0.01) -> PlanEntry:
    executor = FakeExecutor({"plain": 100, "quick": 50, "fused": 51})
    executor.layer_us = layer_us
    plan = tune(problem(), weights, executor, 1, "balanced", margin=margin)
    assert [set(trial.timed) for trial in executor.layers] == [{PAIRS}]
    return plan.entries[0]


def test_the_layer_decides_and_not_the_sum_of_the_gemms(weights: FP8BlockWeights) -> None:
    """A GEMM1 that does the activation as well is the slower GEMM1, and the faster layer."""
    found = tuned(weights, {("fused", "quick"): 80, ("fused", "fused"): 82})
    assert found.pair == ("fused", "quick") and found.gemm1.us == 51
    assert {(pair.gemm1, pair.gemm2): pair.timing.us for pair in found.layer} == {
        ("plain", "plain"): 200, ("quick", "quick"): 100, ("quick", "fused"): 101,
        ("fused", "quick"): 80, ("fused", "fused"): 82,
    }  # fmt: skip
    assert tuned(weights, {}).pair == ("quick", "quick")


@pytest.mark.parametrize(
    "default,own,other,margin,expected",
    [
        (1000, 1000, 985, 0.01, ("quick", "fused")),
        (1000, 1000, 985, 0.03, ("quick", "quick")),
        (1000, 980, 975, 0.01, ("quick", "quick")),  # beats the default, but hardly what stands
        (995, 1003, 990, 0.01, ("plain", "plain")),  # what stands is slower than the default, which none beats
        (1003, 995, 984, 0.01, ("quick", "fused")),
        (950, 1000, 1000, 0.01, ("plain", "plain")),  # on the layer both winners lose
        (1000, 1020, 995, 0.01, ("plain", "plain")),
    ],
)
def test_a_pair_must_beat_the_default_and_what_stands(
    weights: FP8BlockWeights, default: float, own: float, other: float, margin: float, expected: TacticPair
) -> None:
    """The two races of "quick" against "fused" and "plain" say quick, quick."""
    layer_us = {pair: 2000.0 for pair in PAIRS}
    layer_us |= {("plain", "plain"): default, ("quick", "quick"): own, ("quick", "fused"): other}
    found = tuned(weights, layer_us, margin)
    assert found.pair == expected and len(found.layer) == len(PAIRS)


def test_clear_choices_need_no_layer(weights: FP8BlockWeights) -> None:
    executor = FakeExecutor({"plain": 100, "quick": 50})
    assert tune(problem(), weights, executor, 4, "balanced").entries[0].layer == () and not executor.layers


def test_no_race_after_the_deadline(weights: FP8BlockWeights, monkeypatch: pytest.MonkeyPatch) -> None:
    """What each GEMM's own times chose stands: it was paid for."""
    clock = Clock(monkeypatch)
    executor = slow_executor(clock, 1.0)
    executor.us |= {"fused": 51}
    make = executor.layer_trial

    def late(*arguments: object) -> object:
        clock.now += 100 * (clock.now > 2)
        return make(*arguments)  # type: ignore[arg-type]

    executor.layer_trial = late  # type: ignore[method-assign, assignment]
    plan = tune(problem(), weights, executor, 2, "balanced", budget_seconds=10)
    assert [len(one.layer) for one in plan.entries] == [5, 0] and plan.complete
    assert plan.entries[1].pair == ("quick", "quick") and time.monotonic() > 100


def test_the_pairs_are_in_the_file(tmp_path: Path, weights: FP8BlockWeights) -> None:
    plan = tune(problem(), weights, FakeExecutor({"plain": 100, "quick": 50, "fused": 51}), 2, "balanced")
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan and plan.entries[1].layer


def amended(*faulty: str) -> PlanEntry | None:
    raced = timed(("plain", "plain", 100), ("a", "b", 60), ("c", "b", 62), ("c", "d", 61))
    whole = entry(choice("a", plain=50, a=30, c=31), choice("b", plain=50, b=30, d=31), layer=raced)
    plan = assemble(make_plan(buckets=(8,)), {8: whole}, {tactic: "hung" for tactic in faulty})
    return plan.entries[0] if plan.entries else None


def test_a_fault_afterwards_leaves_a_pair_that_raced() -> None:
    found = amended("a")
    assert found is not None and found.pair == ("plain", "plain") and len(found.layer) == 4
    found = amended("a", "plain")
    assert found is not None and found.pair == ("c", "d") and found.gemm1.rejected == {"a": "hung", "plain": "hung"}
    found = amended("d")
    assert found is not None and found.pair == ("a", "b") and not found.gemm1.rejected
    found = amended("a", "plain", "c")
    assert found is None
    found = amended("b", "plain", "d")
    assert found is None
    found = amended("a", "c")
    assert found is not None and found.pair == ("plain", "plain")


@pytest.mark.parametrize(
    "pair,layer,sentence",
    [
        (
            ("a", "b"),
            timed(("plain", "plain", 100), ("a", "b", 60)),
            "fastest of 2 pairs, 40.0% below the default pair",
        ),
        (("plain", "plain"), timed(("plain", "plain", 100), ("a", "b", 99)), "the fastest of 2 pairs took 1.0% less"),
        (("plain", "plain"), timed(("plain", "plain", 100), ("a", "b", 101)), "the fastest of 2 pairs"),
        (("a", "b"), timed(("a", "d", 61), ("a", "b", 60)), "the fastest of 2 pairs"),
        (
            ("a", "b"),
            timed(("a", "d", 61), ("a", "b", 61.5)),
            "0.8% less time, but replaces the default, what each GEMM's own times",
        ),
    ],
)
def test_explain_names_the_rule_of_the_layer(pair: TacticPair, layer: tuple[PairTiming, ...], sentence: str) -> None:
    gemm1, gemm2 = choice(pair[0], plain=50, a=30), choice(pair[1], plain=50, b=30)
    found = explain(make_plan(entry(gemm1, gemm2, layer=layer)), 8)
    assert found.layer is not None and sentence in found.layer.decision
    assert [one.timing.us for one in found.layer.pairs] == sorted(one.timing.us for one in layer)
    assert {gemm.decision for gemm in found.gemms} == {"its own times left a doubt: the layer's decide"}
    lost = {one.tactic: one.note for one in found.gemms[0].candidates}
    assert lost["a"] == ("chosen" if pair[0] == "a" else "lost on the layer")


def test_explain_tells_of_a_fault_after_the_race() -> None:
    found = amended("a")
    assert found is not None
    layer = explain(make_plan(found, quarantined={"a": "hung"}), 8).layer
    assert layer is not None and layer.decision == "a faulted after the race: the default pair runs instead"
