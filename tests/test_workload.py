"""The compact workload and the buckets against their closed formulas, written out again here in plain integers."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_runtime.config import MoEConfig, RoutingMethod
from moe_runtime.errors import InvalidArgument
from moe_runtime.parallel import Parallel
from moe_runtime.workload import (
    DISTRIBUTION_VARIABLE,
    bucket,
    buckets,
    default_distribution,
    kernel_rows,
    make_workload,
    tokens_per_rank,
)

DISTRIBUTIONS = ("balanced", "random")
"""Those whose compact workload is n rows."""


def layer(num_experts: int, top_k: int, grouped: bool = False) -> MoEConfig:
    if grouped:
        return MoEConfig("test", 128, 128, num_experts, top_k, RoutingMethod.DeepSeekV3, 2, 1, 2.5)
    return MoEConfig("test", 128, 128, num_experts, top_k)


@st.composite
def cases(draw: st.DrawFn, regime: str, enough_local: bool | None = None) -> tuple[MoEConfig, Parallel, int]:
    size = draw(st.integers(1, 8))
    local = draw(st.integers(1, 16))
    top_k = draw(st.integers(1, min(size * local, 8)))
    if enough_local is not None and (local >= top_k) != enough_local:
        size, local, top_k = (size, max(local, top_k), top_k) if enough_local else (max(size, 2), 1, 2)
    parallel = Parallel(regime, size, draw(st.integers(0, size - 1)))
    return layer(size * local, top_k), parallel, draw(st.integers(0, 40))


def shard(config: MoEConfig, parallel: Parallel) -> range:
    local = config.num_experts // parallel.size
    return range(parallel.rank * local, (parallel.rank + 1) * local)


@given(cases("dep", enough_local=True))
def test_balanced_dep_formula(case: tuple[MoEConfig, Parallel, int]) -> None:
    config, parallel, n = case
    experts, k = shard(config, parallel), config.top_k
    stride = max(1, min(len(experts), len(experts) // k))
    expected = [[(t + j * stride) % len(experts) + experts.start for j in range(k)] for t in range(n)]
    workload = make_workload(config, parallel, n, "balanced")
    assert workload.topk_ids.tolist() == expected
    assert workload.local_slots == n * k


@given(cases("ep"))
def test_balanced_ep_formula(case: tuple[MoEConfig, Parallel, int]) -> None:
    config, parallel, n = case
    local, k, num_experts = config.num_experts // parallel.size, config.top_k, config.num_experts
    stride = max(1, min(local, num_experts // k))
    expected = [[(t + j * stride) % num_experts for j in range(k)] for t in range(n)]
    assert make_workload(config, parallel, n, "balanced").topk_ids.tolist() == expected


@given(st.sampled_from(["dep", "ep"]).flatmap(cases), st.sampled_from(DISTRIBUTIONS), st.integers(0, 3))
def test_ids_are_valid_distinct_and_counted(
    case: tuple[MoEConfig, Parallel, int], distribution: str, seed: int
) -> None:
    config, parallel, n = case
    workload = make_workload(config, parallel, n, distribution, seed)
    ids = workload.topk_ids
    assert ids.shape == (n, config.top_k) and ids.dtype == torch.int32 and ids.is_contiguous()
    rows = ids.tolist()
    assert all(len(set(row)) == config.top_k for row in rows)
    assert all(0 <= expert < config.num_experts for row in rows for expert in row)
    flat = [expert for row in rows for expert in row]
    assert workload.rows_per_expert.tolist() == [flat.count(expert) for expert in shard(config, parallel)]
    assert workload.local_slots == int(workload.rows_per_expert.sum())


@given(cases("dep", enough_local=False), st.sampled_from(DISTRIBUTIONS))
def test_dep_with_fewer_local_experts_than_top_k(case: tuple[MoEConfig, Parallel, int], distribution: str) -> None:
    """Every row names all L local experts, and remote ones in the columns that are left."""
    config, parallel, n = case
    experts = shard(config, parallel)
    workload = make_workload(config, parallel, n, distribution)
    assert len(experts) < config.top_k
    assert all(set(experts) <= set(row) for row in workload.topk_ids.tolist())
    assert workload.rows_per_expert.tolist() == [n] * len(experts)


@given(cases("dep", enough_local=True), st.integers(0, 3))
def test_random_dep_is_local(case: tuple[MoEConfig, Parallel, int], seed: int) -> None:
    config, parallel, n = case
    workload = make_workload(config, parallel, n, "random", seed)
    assert workload.local_slots == n * config.top_k


@pytest.mark.parametrize("regime,expected", [("dep", 1.0), ("ep", 0.25)])
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_mean_rows_per_expert(regime: str, expected: float, distribution: str) -> None:
    """m = n*k/L under DEP and n*k/E under EP: R times apart."""
    config, parallel, n = layer(64, 4), Parallel(regime, 4, 1), 1024
    workload = make_workload(config, parallel, n, distribution)
    assert workload.local_slots / (n * config.top_k) == pytest.approx(expected, rel=0.05)


def test_balanced_full_cycle_is_even() -> None:
    workload = make_workload(layer(64, 4), Parallel("dep", 4, 2), 128, "balanced")
    assert workload.rows_per_expert.tolist() == [128 * 4 // 16] * 16


def test_random_ep_goes_through_the_model_routing() -> None:
    """Group-limited routing keeps all ids of a token within topk_group groups; free routing does not."""
    parallel = Parallel("ep", 2)
    grouped = make_workload(layer(32, 4, grouped=True), parallel, 200, "random").topk_ids // 16
    free = make_workload(layer(32, 4), parallel, 200, "random").topk_ids // 16
    assert (grouped == grouped[:, :1]).all()
    assert not (free == free[:, :1]).all()


def test_random_is_seeded() -> None:
    config, parallel = layer(32, 4), Parallel("ep", 4)
    first, again, other = (make_workload(config, parallel, 64, "random", seed).topk_ids for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)


GOLDEN = {
    "dep": [[13, 10], [12, 10], [13, 11], [12, 15]],
    "ep": [[12, 5], [5, 12], [1, 15], [0, 1]],
}


@pytest.mark.parametrize("regime", ["dep", "ep"])
def test_random_workload_is_the_same_on_any_machine(regime: str) -> None:
    """Literal ids, so that a change of generator or machine shows."""
    ids = make_workload(layer(16, 2), Parallel(regime, 2, 1), 4, "random", seed=7).topk_ids.tolist()
    assert ids == GOLDEN[regime]


def test_ranks_draw_the_same_tokens() -> None:
    config = layer(32, 4)
    ep = [make_workload(config, Parallel("ep", 4, rank), 64, "random") for rank in range(4)]
    assert all(torch.equal(ep[0].topk_ids, other.topk_ids) for other in ep)
    assert sum(workload.local_slots for workload in ep) == 64 * 4
    dep = [make_workload(config, Parallel("dep", 4, rank), 64, "random") for rank in range(4)]
    assert all(torch.equal(dep[0].rows_per_expert, other.rows_per_expert) for other in dep)


def closed_form_bucket(x: int, parallel: Parallel, tune_max: int) -> int:
    d = x // parallel.size if parallel.regime == "dep" else x
    if d > 8192 and tune_max > 8192:
        return tune_max
    floor = 2 ** int(math.log2(d)) if d >= 1 else 1
    return min(floor, 8192, 2 ** int(math.log2(tune_max)))


@given(st.sampled_from(["dep", "ep"]), st.integers(1, 64), st.integers(0, 1 << 20), st.integers(1, 40_000))
@settings(max_examples=300)
def test_bucket_formula(regime: str, size: int, x: int, tune_max: int) -> None:
    parallel = Parallel(regime, size)
    found = bucket(x, parallel, tune_max)
    assert found == closed_form_bucket(x, parallel, tune_max)
    assert found in buckets(tune_max)


@pytest.mark.parametrize(
    "x,text,tune_max,expected",
    [
        (0, "ep2", 8192, 1),
        (1, "dep8", 8192, 1),
        (8, "dep8", 8192, 1),
        (4096, "dep8", 8192, 512),
        (4096, "ep8", 8192, 4096),
        (4095, "ep8", 8192, 2048),
        (8192, "ep2", 16384, 8192),
        (8193, "ep2", 16384, 16384),
        (8193, "ep2", 8192, 8192),
        (100_000, "ep2", 10_000, 10_000),
        (1000, "ep2", 300, 256),
    ],
)
def test_bucket_examples(x: int, text: str, tune_max: int, expected: int) -> None:
    assert bucket(x, Parallel.parse(text), tune_max) == expected


@pytest.mark.parametrize("text", ["dep8", "ep8"])
def test_kernel_rows_map_back_to_their_tokens(text: str) -> None:
    parallel = Parallel.parse(text)
    for tokens in buckets(10_000):
        assert tokens_per_rank(kernel_rows(tokens, parallel), parallel) == tokens
        assert bucket(kernel_rows(tokens, parallel), parallel, 10_000) == tokens


@pytest.mark.parametrize(
    "tune_max,expected",
    [(1, [1]), (8, [1, 2, 4, 8]), (9, [1, 2, 4, 8]), (9000, [2**i for i in range(14)] + [9000])],
)
def test_buckets(tune_max: int, expected: list[int]) -> None:
    assert buckets(tune_max) == expected


def test_distribution_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(DISTRIBUTION_VARIABLE, raising=False)
    assert default_distribution() == "balanced"
    monkeypatch.setenv(DISTRIBUTION_VARIABLE, "random")
    assert make_workload(layer(8, 2), Parallel("ep", 2), 4).distribution == "random"
    monkeypatch.setenv(DISTRIBUTION_VARIABLE, "zipfian")
    with pytest.raises(
        InvalidArgument, match=f"{DISTRIBUTION_VARIABLE}: got 'zipfian'; accepted: balanced, random, zipf:S, "
    ):
        make_workload(layer(8, 2), Parallel("ep", 2), 4)


@pytest.mark.parametrize(
    "num_tokens,distribution,text,argument",
    [(-1, "balanced", "ep2", "num_tokens"), (1, "even", "ep2", "distribution"), (1, "balanced", "ep9", "parallel")],
)
def test_bad_input_names_the_argument(num_tokens: int, distribution: str, text: str, argument: str) -> None:
    with pytest.raises(InvalidArgument, match=rf"^{argument}: got"):
        make_workload(layer(8, 2), Parallel.parse(text), num_tokens, distribution)


def test_buckets_need_a_positive_maximum() -> None:
    with pytest.raises(InvalidArgument, match=r"^tune_max_num_tokens: got 0"):
        buckets(0)
