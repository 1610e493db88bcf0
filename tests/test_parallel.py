from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_runtime.config import MoEConfig
from moe_runtime.errors import InvalidArgument
from moe_runtime.executors.base import MoEProblem
from moe_runtime.parallel import Parallel, Regime


@pytest.mark.parametrize(
    ("text", "size", "use_dp"), [("dep8", 8, True), ("ep2", 2, False), ("dep1", 1, True), ("ep64", 64, False)]
)
def test_parse(text: str, size: int, use_dp: bool) -> None:
    parallel = Parallel.parse(text, rank=size - 1)
    assert (parallel.size, parallel.rank, parallel.use_dp, str(parallel)) == (size, size - 1, use_dp, text)


@pytest.mark.parametrize(
    ("text", "rank", "expected"),
    [
        ("dep8", 5, ("dep", 8, 1, 5, 0)),
        ("tp4", 3, ("tp", 1, 4, 0, 3)),
        ("tp1", 0, ("tp", 1, 1, 0, 0)),
        ("dep4tp2", 5, ("dep", 4, 2, 2, 1)),
        ("ep3tp2", 4, ("ep", 3, 2, 2, 0)),
    ],
)
def test_ranks_of_mixes(text: str, rank: int, expected: tuple[str, int, int, int, int]) -> None:
    """(regime, size, tp_size, ep_rank, tp_rank); the slices of one shard are neighbours."""
    parallel = Parallel.parse(text, rank)
    assert (parallel.regime, parallel.size, parallel.tp_size, parallel.ep_rank, parallel.tp_rank) == expected
    assert parallel.world_size == parallel.size * parallel.tp_size and str(parallel) == text


def test_a_slice_of_one_is_no_slice() -> None:
    assert Parallel.parse("ep4tp1") == Parallel.parse("ep4")


@pytest.mark.parametrize(
    "text", ["dep0", "ep", "tp", "tp0", "tp2ep2", "dep2tp0", "dep2-tp2", "dep-1", "dep08", "DEP8", "dep8 ", "ep2.0", ""]
)
def test_unknown_regime(text: str) -> None:
    with pytest.raises(InvalidArgument, match="parallel: got"):
        Parallel.parse(text)


@pytest.mark.parametrize(("text", "rank"), [("ep2", -1), ("ep2", 2), ("ep2", 100), ("tp2", 2), ("dep4tp2", 8)])
def test_rank_outside(text: str, rank: int) -> None:
    with pytest.raises(InvalidArgument, match="rank: got"):
        Parallel.parse(text, rank)


def test_tp_alone_does_not_split_experts() -> None:
    with pytest.raises(InvalidArgument, match="size: got 2"):
        Parallel("tp", 2)
    with pytest.raises(InvalidArgument, match="tp_size: got 0"):
        Parallel("ep", 2, tp_size=0)


def test_the_layer_needs_equal_shards() -> None:
    with pytest.raises(InvalidArgument, match=r"parallel: got ep3; .*num_experts = 128"):
        Parallel.parse("ep3").validate_experts(128)
    with pytest.raises(InvalidArgument, match="parallel: got ep3"):
        MoEProblem(MoEConfig.preset("qwen3-235b"), Parallel.parse("ep3"))


@given(st.sampled_from(["dep", "ep"]), st.integers(1, 20), st.integers(1, 4), st.integers(0, 300))
def test_shards_cover_every_expert_once(regime: Regime, size: int, tp_size: int, more: int) -> None:
    experts = size + more
    shards = [Parallel(regime, size, rank, tp_size).shard(experts) for rank in range(0, size * tp_size, tp_size)]
    assert [expert for shard in shards for expert in shard] == list(range(experts))
    lengths = [len(shard) for shard in shards]
    assert lengths == sorted(lengths, reverse=True) and lengths[0] - lengths[-1] <= 1
    for rank in range(size * tp_size):
        parallel = Parallel(regime, size, rank, tp_size)
        assert parallel.shard(experts) == shards[rank // tp_size]
        assert parallel.num_local_experts(experts) == len(parallel.shard(experts))
        assert parallel.local_expert_offset(experts) == parallel.shard(experts).start


def test_no_empty_shards() -> None:
    with pytest.raises(InvalidArgument, match="parallel: got ep9; accepted: at most num_experts = 8 shards"):
        Parallel.parse("ep9").shard(8)


def test_gemm_shapes_are_of_the_slice() -> None:
    config = MoEConfig.preset("deepseek-r1")
    problem = MoEProblem(config, Parallel.parse("dep4tp2", 5))
    assert (problem.num_local_experts, problem.local_expert_offset) == (64, 128)
    assert problem.local_intermediate_size == 1024
    assert problem.gemm_shape("gemm1") == (2048, 7168) and problem.gemm_shape("gemm2") == (7168, 1024)
    assert MoEProblem(config, Parallel.parse("dep8")).gemm_shape("gemm1") == (4096, 7168)


@pytest.mark.parametrize("text", ["tp3", "ep2tp32"])
def test_a_slice_is_a_multiple_of_a_block(text: str) -> None:
    with pytest.raises(
        InvalidArgument, match=rf"parallel: got {text}; .*intermediate_size = 2048 into multiples of 128"
    ):
        MoEProblem(MoEConfig.preset("deepseek-r1"), Parallel.parse(text))
