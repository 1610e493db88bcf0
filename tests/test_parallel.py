from __future__ import annotations

import pytest

from moe_runtime.config import MoEConfig
from moe_runtime.errors import InvalidArgument
from moe_runtime.executors.base import MoEProblem
from moe_runtime.parallel import Parallel


@pytest.mark.parametrize(
    ("text", "size", "use_dp"), [("dep8", 8, True), ("ep2", 2, False), ("dep1", 1, True), ("ep64", 64, False)]
)
def test_parse(text: str, size: int, use_dp: bool) -> None:
    parallel = Parallel.parse(text, rank=size - 1)
    assert (parallel.size, parallel.rank, parallel.use_dp, str(parallel)) == (size, size - 1, use_dp, text)


@pytest.mark.parametrize("text", ["dep0", "ep", "tp8", "dep-1", "dep08", "DEP8", "dep8 ", "ep2.0", ""])
def test_unknown_regime(text: str) -> None:
    with pytest.raises(InvalidArgument, match="parallel: got"):
        Parallel.parse(text)


@pytest.mark.parametrize("rank", [-1, 2, 100])
def test_rank_outside(rank: int) -> None:
    with pytest.raises(InvalidArgument, match="rank: got"):
        Parallel.parse("ep2", rank)


def test_experts_must_divide() -> None:
    with pytest.raises(InvalidArgument, match=r"parallel: got ep3; .*num_experts = 128"):
        Parallel.parse("ep3").validate_experts(128)
    with pytest.raises(InvalidArgument, match="parallel: got ep3"):
        MoEProblem(MoEConfig.preset("qwen3-235b"), Parallel.parse("ep3"))


def test_shards_cover_every_expert_once() -> None:
    shards = [Parallel("ep", 8, rank) for rank in range(8)]
    experts = [
        shard.local_expert_offset(128) + local for shard in shards for local in range(shard.num_local_experts(128))
    ]
    assert experts == list(range(128))
