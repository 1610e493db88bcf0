"""The benchmarks over several ranks in their small form: two processes with gloo."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from benchmarks.ranked import share, small_config
from moe_runtime import FP8BlockWeights, FusedMoE, Parallel
from moe_runtime.executors.base import MoEProblem
from moe_runtime.reference import relative_error
from moe_runtime.tuning import PlanKey

from .plans import CPU, DEFAULT, OTHER, choice, entry, make_plan
from .test_parallel_layers import Ranks

MODEL = "qwen3-235b"


@pytest.fixture(scope="module")
def two() -> Iterator[Ranks]:
    started = Ranks(2)
    yield started
    started.stop()


def measured(path: Path, parallel: str, rank: int) -> None:
    from benchmarks.ranks import main

    main(parallel=parallel, tokens="1,6", json=path, plan=None, dispatch=None, repeats=2, small=True)


@pytest.mark.parametrize("parallel", ["dep2", "tp2"])
def test_ranks(two: Ranks, parallel: str, tmp_path: Path) -> None:
    path = tmp_path / "ranks.json"
    assert [error for _, error in two(functools.partial(measured, path, parallel))] == [None, None]
    written = json.loads(path.read_text())
    assert written["environment"]["ranks"] == 2 and written["environment"]["backend"] == "gloo"
    assert list(written["results"]) == ["1", "6"]
    for point in written["results"].values():
        assert set(point["errors"]) == {"equal", "unequal", "fixed", "own"} and max(point["errors"].values()) <= 1e-2
        assert list(point["us"]) == ["dispatch", "experts", "combine"] and min(point["us"].values()) > 0
        assert point["fixed_us"] > 0
        for cuts in point["chunks"].values():
            assert cuts["gained"] == pytest.approx(1 - cuts["overlapped"] / cuts["serial"])
        if parallel == "tp2":
            assert point["exchange"] is None
            continue
        exchange = point["exchange"]
        assert exchange["of_nccl"] == pytest.approx(exchange["us"]["nccl"] / exchange["us"]["exchange"])
    if parallel == "dep2":
        # With top_k 8 of 32 experts a token has a slot on the other of two ranks but for 1 of 800.
        row = 336  # 256 values, 2 scales, 8 ids and weights: 328, to a multiple of 16
        assert exchange["bytes"] == {"exchange": 6 * row, "back": 6 * 2 * 256}
        for name, speed in exchange["GBps"].items():
            size = exchange["bytes"]["back" if name.startswith("back") else "exchange"]
            assert speed == pytest.approx(size / exchange["us"][name] / 1e3)


def stacked(folder: Path, rank: int) -> None:
    from benchmarks.headline import main

    main(
        right=folder / "right.json", wrong=folder / "wrong.json", tokens="2,5", layers=2, json=folder / "headline.json",
        repeats=2, small=True,
    )  # fmt: skip


def test_headline(two: Ranks, tmp_path: Path) -> None:
    """Each arm runs its own plan's tactics, by tokens per rank."""
    for name, layout, tactics in (("right", "dep2", (DEFAULT, OTHER)), ("wrong", "ep2", (OTHER, DEFAULT))):
        problem = MoEProblem(small_config(MODEL), Parallel.parse(layout))
        key = PlanKey.of(problem, "balanced", 64, CPU.device_name, CPU.library_hash)
        entries = (entry(bucket, *map(choice, tactics[:: 1 if bucket == 1 else -1])) for bucket in (1, 4))
        make_plan(*entries, key=key).save(tmp_path / f"{name}.json")
    assert [error for _, error in two(functools.partial(stacked, tmp_path))] == [None, None]
    written = json.loads((tmp_path / "headline.json").read_text())
    assert written["tuned_for"] == {"right": "dep2", "wrong": "ep2"} and written["layers"] == 2
    two_tokens, five = written["results"]["2"], written["results"]["5"]
    assert two_tokens["tactics"] == {"right": [DEFAULT, OTHER], "wrong": [OTHER, DEFAULT]}
    assert five["tactics"] == {"right": [OTHER, DEFAULT], "wrong": [DEFAULT, OTHER]}
    for count, point in ((2, two_tokens), (5, five)):
        us, speeds = point["us"], point["tokens_per_second_per_gpu"]
        assert speeds == {arm: pytest.approx(1e6 * count / us[arm]) for arm in ("wrong", "right")}
        assert point["gain"] == pytest.approx(us["wrong"] / us["right"] - 1)
        assert point["difference"] < 2e-2  # tactics that differ in rounding


@pytest.mark.parametrize("text", ["ep2", "tp2", "ep2tp2"])
def test_shares_make_up_the_whole(text: str) -> None:
    config = small_config(MODEL)
    whole, single = FP8BlockWeights.random(config, config.num_experts), Parallel.parse("ep1")
    x, logits = torch.randn(5, 256).bfloat16(), torch.randn(5, 32)
    total = torch.zeros(5, 256, dtype=torch.float64)
    for rank in range(Parallel.parse(text).world_size):
        layout = Parallel.parse(text, rank)
        total += FusedMoE(config, layout, share(whole, MoEProblem(config, layout)))(x, logits).double()
    assert relative_error(total, FusedMoE(config, single, whole)(x, logits)) <= 5e-3
