"""The greedy that places experts: what holds for any load, and small layers worked by hand."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moe_runtime.balancing import place, place_layer
from moe_runtime.config import MoEConfig, RoutingMethod
from moe_runtime.errors import InvalidArgument
from moe_runtime.placement import Placement, imbalance


@st.composite
def layers(draw: st.DrawFn) -> tuple[list[float], int, int]:
    """(load, ep_size, num_redundant_experts) that can be placed."""
    experts = draw(st.integers(1, 24))
    ranks = draw(st.integers(1, experts))
    counts = st.lists(st.integers(0, 1000), min_size=experts, max_size=experts).filter(any)
    even = -experts % ranks
    redundant = draw(st.sampled_from(range(even, experts * (ranks - 1) + 1, ranks)))
    return [float(count) for count in draw(counts)], ranks, redundant


def by_rank(placement: Placement) -> list[list[int]]:
    return [list(placement.local_experts(rank)) for rank in range(placement.ep_size)]


def loads(load: list[float], ranks: list[list[int]]) -> list[Fraction]:
    """Of each rank, exactly, when an expert's replicas share its load."""
    slots = [expert for rank in ranks for expert in rank]
    return [sum((Fraction(load[e]) / slots.count(e) for e in rank), Fraction()) for rank in ranks]


def in_order(load: list[float], ranks: int) -> list[list[int]]:
    """The first E modulo R ranks get one more than E // R experts."""
    each, longer = divmod(len(load), ranks)
    ends = [rank * each + min(rank, longer) for rank in range(ranks + 1)]
    return [list(range(ends[rank], ends[rank + 1])) for rank in range(ranks)]


@given(layers())
def test_what_holds_for_any_load(layer: tuple[list[float], int, int]) -> None:
    load, ranks, redundant = layer
    placement = place_layer(load, ranks, redundant)
    placed = by_rank(placement)
    assert {len(rank) for rank in placed} == {(len(load) + redundant) // ranks}
    assert {expert for rank in placed for expert in rank} == set(range(len(load)))
    exact, before = loads(load, placed), loads(load, in_order(load, ranks))
    assert placement.rank_loads == pytest.approx(list(map(float, exact)))
    assert placement.unplaced_rank_loads == pytest.approx(list(map(float, before)))
    # One rank with two replicas of an expert is one with nothing gained: it holds what it held, or all is as it was.
    if any(len(set(rank)) < len(rank) for rank in placed):
        assert [set(rank) for rank in placed] == [set(rank) for rank in in_order(load, ranks)]
    assert float(max(exact)) <= float(max(before)) * (1 + 1e-9)
    assert place_layer(load, ranks, redundant) == placement


def test_by_hand() -> None:
    """Six slots of two ranks for loads 8, 4, 2, 2: the first two experts get the two replicas, 4 each and 2 each.

    4 and 4 go to different ranks, then 2 and 2 of expert 1, then experts 2 and 3: 8 on either rank.
    """
    placement = place_layer([8, 4, 2, 2], 2, 2)
    assert by_rank(placement) == [[0, 1, 2], [0, 1, 3]]
    assert placement.rank_loads == (8, 8) and placement.unplaced_rank_loads == (12, 4)
    assert placement.balance == (1.5, 1.0, 2, 2)
    assert placement.logical_to_physical == ((0, 3), (1, 4), (2,), (5,))


def test_without_redundancy_heavy_experts_are_spread() -> None:
    placement = place_layer([9, 8, 1, 2], 2, 0)
    assert by_rank(placement) == [[0, 2], [1, 3]] and placement.rank_loads == (10, 10)
    assert imbalance(placement.unplaced_rank_loads) == 1.7


def test_no_more_replicas_than_ranks() -> None:
    """Five replicas of one hot expert on two ranks would share nothing that two do not."""
    placement = place_layer([100, 1, 1, 1], 2, 4)
    assert placement.replica_counts == (2, 2, 2, 2) and placement.rank_loads == (51.5, 51.5)


def test_a_rank_that_has_it_gets_no_second() -> None:
    """Heaviest first alone would leave two replicas of an expert for the one rank that still has room."""
    placement = place_layer([1, 3, 1, 1, 2, 6, 2, 1, 2, 1], 3, 14)
    assert [len(set(rank)) for rank in by_rank(placement)] == [8, 8, 8]
    assert placement.balance.after < 1.1 < placement.balance.before


def test_what_is_even_stays_in_order() -> None:
    """0.9 + 0.1 and 0.8 + 0.2: whichever two experts get the replicas, one rank would have more than before."""
    placement = place_layer([0.9, 0.1, 0.8, 0.2], 2, 2)
    assert [set(rank) for rank in by_rank(placement)] == [{0, 1}, {2, 3}]
    assert placement.balance[:2] == pytest.approx((1, 1))


def test_experts_that_ranks_do_not_divide() -> None:
    placement = place_layer([1.0] * 60, 8, 4)
    assert placement.num_physical_experts == 64 and placement.balance.before == 8 / 7.5
    assert placement.balance.after < 1.05


def test_groups_stay_on_a_node() -> None:
    """Loads of groups 10, 2, 3, 9: nodes of groups 0 and 1, and 3 and 2; replicas only within each."""
    load = [9, 1, 1, 1, 2, 1, 8, 1]
    placement = place_layer(load, 4, 4, num_nodes=2, n_group=4)
    ranks = by_rank(placement)
    assert [sorted({expert // 2 for rank in node for expert in rank}) for node in (ranks[:2], ranks[2:])] == [
        [0, 1],
        [2, 3],
    ]
    assert placement.replica_counts == (2, 2, 1, 1, 2, 1, 2, 1)
    # Within nodes: 9/2 + 1/2 + 1 on either rank of the first, 8/2 + 2/2 + 1 on either of the second.
    assert placement.rank_loads == (6, 6, 6, 6)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (([1, 2, 3, 4], 0, 0), "ep_size: got 0; accepted: 1 to num_experts = 4"),
        (([1, 2, 3, 4], 5, 1), "ep_size: got 5"),
        (([1, 2, 3, 4], 2, 1), "num_redundant_experts: got 1; .*0 is the least; then steps of 2"),
        (([1, 2, 3], 2, -1), "num_redundant_experts: got -1"),
        (([1, 2, 3, 4], 2, 6), "num_redundant_experts: got 6; accepted: at most 4"),
        (([1, 2], 1, 1), "num_redundant_experts: got 1; accepted: at most 0"),
        (([0, 0], 1, 0), "load: got "),
        (([1, -1], 1, 0), "load: got "),
        (([1, float("nan")], 1, 0), "load: got "),
        (([], 1, 0), "load: got "),
        (([1, 2, 3, 4], 2, 0, 2, 1), "num_nodes: got 2"),
        (([1, 2, 3, 4], 2, 0, 0), "num_nodes: got 0"),
    ],
)
def test_what_cannot_be_placed(arguments: tuple[Any, ...], named: str) -> None:
    with pytest.raises(InvalidArgument, match=f"^{named}"):
        place_layer(*arguments)


def test_a_node_s_ranks_bound_the_replicas() -> None:
    with pytest.raises(InvalidArgument, match=r"got 8; accepted: at most 4: .* of its node"):
        place_layer([1, 2, 3, 4], 4, 8, num_nodes=2, n_group=2)


GROUPED = MoEConfig("grouped", 256, 128, 10, 5, RoutingMethod.DeepSeekV3, 4, 2, 2.5, num_fused_shared_experts=2)


def test_shared_experts_have_the_load_of_all_tokens() -> None:
    """100 slots of three routed experts each are 100 / 3 tokens, and ids say the same as what they count."""
    ids = torch.tensor([[0, 1, 2], [0, 1, 3], [0, 4, 5], [0, 6, 7]])
    histogram = ids.flatten().bincount(minlength=8)
    by_ids, by_counts = (place(GROUPED, {"a": recorded}, 2, 2).layers["a"] for recorded in (ids, histogram))
    assert by_ids == by_counts and by_ids.load == (4, 2, 1, 1, 1, 1, 1, 1, 4, 4)
    assert by_ids.num_experts == 10 and by_ids.num_physical_experts == 12


def test_placements_of_a_model() -> None:
    histograms = {name: torch.rand(8, generator=torch.Generator().manual_seed(at)) for at, name in enumerate("ab")}
    placements = place(GROUPED, histograms, 2, 2)
    assert list(placements.layers) == ["a", "b"] and placements.layers["a"] != placements.layers["b"]
    assert (placements.ep_size, placements.num_experts, placements.num_physical_experts) == (2, 10, 12)
    assert (placements.n_group, placements.topk_group, placements.num_fused_shared_experts) == (4, 2, 2)
    with pytest.raises(InvalidArgument, match="num_nodes: got 2; accepted: 1 for a layer with shared experts"):
        place(GROUPED, histograms, 2, 2, num_nodes=2)
    with pytest.raises(InvalidArgument, match="load: got 9 experts; accepted: the 8 that grouped routes to"):
        place(GROUPED, {"a": torch.ones(9)}, 2, 2)
    with pytest.raises(InvalidArgument, match="layers: got 0 layers"):
        place(GROUPED, {}, 2, 2)
