"""Buckets of captured calls, as far as they show without a GPU: a replay on the CPU is a call on padded inputs."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from moe_runtime import GraphedMoE, InvalidArgument
from moe_runtime.executors.cpu import CpuExecutor
from tests.test_layer import DEEPSEEK, RENORMALISE, make_layer, tokens
from tests.test_ops import make_plan, spy_on_tactics

LAYER = make_layer(RENORMALISE, "ep2", 1)
GRAPHED = GraphedMoE(LAYER, (8, 1, 4, 4))


def routing(count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(-1, 8, (count, 2), dtype=torch.int32, generator=generator)
    return ids, torch.rand(count, 2, generator=generator)


@given(st.lists(st.integers(0, 8), min_size=1, max_size=6))
def test_any_sequence_of_calls(counts: list[int]) -> None:
    """Each call overwrites what longer ones left in the shared inputs."""
    for seed, count in enumerate(counts):
        x, (ids, weights) = tokens(RENORMALISE, count, seed), routing(count, seed)
        output = GRAPHED(x, ids, weights)
        assert torch.equal(output, LAYER(x, topk_ids=ids, topk_weights=weights))


@pytest.mark.parametrize(("count", "bucket"), [(1, 1), (2, 4), (4, 4), (5, 8), (8, 8)])
def test_bucket(count: int, bucket: int, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Tensor] = []
    run = CpuExecutor.run

    def spy(self: CpuExecutor, problem: object, weights: object, inputs: object, *rest: object) -> object:
        seen.append(inputs.topk_ids.clone())
        return run(self, problem, weights, inputs, *rest)

    monkeypatch.setattr(CpuExecutor, "run", spy)
    assert GRAPHED.bucket(count) == bucket
    ids, weights = routing(count)
    GRAPHED(tokens(RENORMALISE, count), ids, weights)
    assert len(seen) == 1 and seen[0].shape == (bucket, 2)
    assert torch.equal(seen[0][:count], ids) and (seen[0][count:] == -1).all()


def test_output_is_overwritten_by_the_next_call() -> None:
    ids, weights = routing(3)
    first = GRAPHED(tokens(RENORMALISE, 3), ids, weights)
    second = GRAPHED(tokens(RENORMALISE, 3, seed=1), ids, weights)
    assert first.data_ptr() == second.data_ptr() and torch.equal(first, second)


def test_the_plan_is_the_captured_layer_s(monkeypatch: pytest.MonkeyPatch) -> None:
    planned = make_layer(RENORMALISE, plan=make_plan(make_layer(RENORMALISE).problem))
    graphed = GraphedMoE(planned, (4,))
    ids, weights = routing(3)
    seen = spy_on_tactics(monkeypatch)
    make_layer(RENORMALISE)(tokens(RENORMALISE, 3), topk_ids=ids, topk_weights=weights)
    graphed(tokens(RENORMALISE, 3), ids, weights)
    assert seen == [("per_expert_loop", "per_expert_loop"), ("padded_batch", "grouped_mm")]


@pytest.mark.parametrize("sizes", [(), (0, 4), (-1,)], ids=str)
def test_bad_sizes(sizes: tuple[int, ...]) -> None:
    with pytest.raises(InvalidArgument) as error:
        GraphedMoE(LAYER, sizes)
    assert error.value.argument == "sizes"


@pytest.mark.parametrize(
    ("argument", "changes"),
    [
        ("x", {"x": tokens(RENORMALISE, 9)}),
        ("x", {"x": tokens(DEEPSEEK, 3)}),
        ("x", {"x": tokens(RENORMALISE, 3).float()}),
        ("topk_ids", {"topk_ids": torch.zeros(2, 2, dtype=torch.int32)}),
        ("topk_ids", {"topk_ids": torch.zeros(3, 2, dtype=torch.int64)}),
        ("topk_weights", {"topk_weights": torch.zeros(3, 3)}),
    ],
)
def test_bad_argument_is_named(argument: str, changes: dict[str, Tensor]) -> None:
    ids, weights = routing(3)
    with pytest.raises(InvalidArgument) as error:
        GRAPHED(**{"x": tokens(RENORMALISE, 3), "topk_ids": ids, "topk_weights": weights, **changes})
    assert error.value.argument == argument
