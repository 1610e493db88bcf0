"""What each dispatch brings to a rank: by its definition, and against the closed forms."""

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_runtime.config import MoEConfig, RoutingMethod
from moe_runtime.errors import InvalidArgument
from moe_runtime.parallel import Parallel
from moe_runtime.workload import DISPATCHES, Workload, expected_rows, hit_probability, make_workload

R1 = MoEConfig.preset("deepseek-r1")
R1_FREE = MoEConfig("deepseek-r1 without groups", 7168, 2048, 256, 8)
LAWS = ["balanced", "random", "zipf:1.2", "dirichlet:0.3"]


def layer(num_experts: int, top_k: int) -> MoEConfig:
    return MoEConfig("test", 128, 128, num_experts, top_k)


@st.composite
def layouts(draw: st.DrawFn) -> tuple[MoEConfig, list[Parallel], int]:
    """A layer, its layout seen from every rank, and tokens per rank; shards uneven or with L < k among them."""
    regime = draw(st.sampled_from(["dep", "ep", "tp"]))
    size, tp_size = 1 if regime == "tp" else draw(st.integers(1, 6)), draw(st.integers(1, 2))
    experts = size + draw(st.integers(0, 20))
    config = layer(experts, draw(st.integers(1, min(experts, 6))))
    ranks = [Parallel(regime, size, rank, tp_size) for rank in range(size * tp_size)]
    return config, ranks, draw(st.integers(0, 20))


def everywhere(
    case: tuple[MoEConfig, list[Parallel], int], dispatch: str, law: str, seed: int = 0
) -> tuple[list[Workload], int]:
    """The workload at one rank of each shard, and T, the tokens of all."""
    config, ranks, n = case
    first = ranks[0]
    shards = [make_workload(config, rank, n, law, seed, dispatch) for rank in ranks[:: first.tp_size]]
    return shards, n * first.size if first.regime == "dep" else n


@given(layouts(), st.sampled_from(DISPATCHES), st.sampled_from(LAWS), st.integers(0, 3))
def test_rows_are_distinct_and_counted(
    case: tuple[MoEConfig, list[Parallel], int], dispatch: str, law: str, seed: int
) -> None:
    config, ranks, n = case
    for parallel in ranks:
        workload = make_workload(config, parallel, n, law, seed, dispatch)
        ids, shard = workload.topk_ids, parallel.shard(config.num_experts)
        assert ids.dtype == torch.int32 and ids.is_contiguous() and ids.shape == (workload.num_rows, config.top_k)
        for row in ids.tolist():
            named = [expert for expert in row if expert != -1]
            assert len(set(named)) == len(named) and all(0 <= expert < config.num_experts for expert in named)
        flat = ids.flatten().tolist()
        assert workload.rows_per_expert.tolist() == [flat.count(expert) for expert in shard]
        assert (workload.num_tokens, workload.dispatch, workload.distribution) == (n, dispatch, law)


@given(layouts(), st.sampled_from(["alltoall", "allgather", "masked"]), st.sampled_from(LAWS))
def test_every_slot_is_at_one_rank(case: tuple[MoEConfig, list[Parallel], int], dispatch: str, law: str) -> None:
    shards, tokens = everywhere(case, dispatch, law)
    assert sum(workload.local_slots for workload in shards) == tokens * case[0].top_k


@given(layouts(), st.sampled_from(LAWS))
def test_slices_of_a_shard_see_the_same(case: tuple[MoEConfig, list[Parallel], int], law: str) -> None:
    config, ranks, n = case
    for parallel in ranks:
        neighbour = Parallel(parallel.regime, parallel.size, parallel.ep_rank * parallel.tp_size, parallel.tp_size)
        one, other = (make_workload(config, seen, n, law, 1, "alltoall") for seen in (parallel, neighbour))
        assert torch.equal(one.topk_ids, other.topk_ids)


@given(layouts(), st.sampled_from(LAWS), st.integers(0, 2))
def test_alltoall_is_allgather_without_what_is_not_local(
    case: tuple[MoEConfig, list[Parallel], int], law: str, seed: int
) -> None:
    gathered, tokens = everywhere(case, "allgather", law, seed)
    sent, _ = everywhere(case, "alltoall", law, seed)
    masked, _ = everywhere(case, "masked", law, seed)
    for whole, part, buffers in zip(gathered, sent, masked, strict=True):
        assert whole.num_rows == tokens and torch.equal(whole.topk_ids, gathered[0].topk_ids)
        shard = whole.parallel.shard(whole.config.num_experts)
        kept = [[expert if expert in shard else -1 for expert in row] for row in whole.topk_ids.tolist()]
        assert part.topk_ids.tolist() == [row for row in kept if max(row) >= 0]
        assert torch.equal(buffers.rows_per_expert, part.rows_per_expert)
        assert (part.max_rows_per_expert, buffers.max_rows_per_expert) == (None, tokens)
        assert int(buffers.rows_per_expert.max()) <= tokens


@given(layouts(), st.integers(0, 2), st.sampled_from(["alltoall", "allgather", "masked"]))
def test_balanced_experts_have_the_same_rows(
    case: tuple[MoEConfig, list[Parallel], int], seed: int, dispatch: str
) -> None:
    shards, _ = everywhere(case, dispatch, "balanced", seed)
    rows = torch.cat([workload.rows_per_expert for workload in shards])
    assert int(rows.max() - rows.min()) <= 1


@given(layouts(), st.sampled_from(["zipf:1.2", "dirichlet:0.3"]), st.integers(0, 2))
def test_compact_holds_the_slots_in_few_rows(case: tuple[MoEConfig, list[Parallel], int], law: str, seed: int) -> None:
    """Skewed laws: under DEP the slots of the all-to-all, packed; otherwise every token."""
    compact, tokens = everywhere(case, "compact", law, seed)
    sent, _ = everywhere(case, "alltoall", law, seed)
    for packed, spread in zip(compact, sent, strict=True):
        assert torch.equal(packed.rows_per_expert, spread.rows_per_expert)
        if packed.parallel.use_dp:
            fewest = max(math.ceil(spread.local_slots / case[0].top_k), int(spread.rows_per_expert.max()))
            assert packed.num_rows == fewest <= spread.num_rows
        else:
            assert packed.num_rows == tokens


@given(layouts(), st.sampled_from(["balanced", "random"]))
def test_compact_rows_follow_the_shards(case: tuple[MoEConfig, list[Parallel], int], law: str) -> None:
    """Rows of all ranks add up to the tokens; a shard has its experts' part of them, each of min(k, L) local slots."""
    config, ranks, n = case
    shards, tokens = everywhere(case, "compact", law)
    if ranks[0].regime != "dep":
        assert all(workload.num_rows == n for workload in shards)
        assert sum(workload.local_slots for workload in shards) == n * config.top_k
        return
    assert sum(workload.num_rows for workload in shards) == tokens
    for workload in shards:
        local = len(workload.parallel.shard(config.num_experts))
        assert abs(workload.num_rows - Fraction(tokens * local, config.num_experts)) < 1
        assert workload.local_slots == workload.num_rows * min(config.top_k, local)


@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 4), st.integers(1, 4), st.integers(0, 60))
def test_balanced_compact_is_even_where_top_k_divides(size: int, rank: int, k: int, more: int, n: int) -> None:
    parallel = Parallel("dep", size, min(rank, size - 1))
    rows = make_workload(layer(size * k * more, k), parallel, n, "balanced").rows_per_expert
    assert int(rows.max() - rows.min()) <= 1


def test_masked_and_unknown_dispatch() -> None:
    with pytest.raises(
        InvalidArgument, match=r"dispatch: got 'mask'; accepted: compact, alltoall, allgather or masked"
    ):
        make_workload(layer(8, 2), Parallel.parse("dep2"), 1, "balanced", dispatch="mask")
    with pytest.raises(InvalidArgument, match="dispatch: got 'mask'"):
        expected_rows(layer(8, 2), Parallel.parse("dep2"), 1, "mask")


@given(layouts())
@settings(max_examples=40)
def test_hit_probability_by_counting_subsets(case: tuple[MoEConfig, list[Parallel], int]) -> None:
    config, ranks, _ = case
    if math.comb(config.num_experts, config.top_k) > 5000:
        return
    subsets = list(itertools.combinations(range(config.num_experts), config.top_k))
    for parallel in ranks:
        shard = parallel.shard(config.num_experts)
        hits = sum(any(expert in shard for expert in subset) for subset in subsets)
        assert hit_probability(config, parallel) == pytest.approx(hits / len(subsets), rel=1e-12)


def grouped_hit_probability(groups: int, kept: int, size: int, k: int) -> float:
    """P that a token has a slot in one given group under group-limited routing of sigmoids of normal logits; exact.

    The group has no slot when it is not kept, P = 1 - kept / groups, or kept while the other kept ones hold k scores
    above its best, a. With the best-2 sums s of groups, their law H, and t = the largest s of a group not kept,

        P(kept, no slot) = C(groups - 1, kept - 1) * integral over t of d[H(t)^(groups - kept)]
                           * integral over a of P(best in da, s > t) * P(c_1 + ... + c_(kept-1) >= k)

    where the c_j, independent, are numbers of scores above a in groups with s > t: q(c) = P(s > t, c above a). For
    c >= 2, s > 2a > t, so q is binomial; for c = 0 and 1 it is an integral over the group's best score.
    """
    steps = 400
    middles = (torch.arange(steps, dtype=torch.float64) + 0.5) / steps
    quantile = middles ** (1 / size)  # F of a group's best score, at evenly spread probabilities
    best = torch.special.ndtri(quantile).sigmoid()

    def law(x: torch.Tensor) -> torch.Tensor:
        """F: P(score <= x)."""
        return torch.special.ndtr(x.clamp(1e-300, 1 - 1e-16).logit()).where(x > 0, 0.0).where(x < 1, 1.0)

    def others_below(x: torch.Tensor) -> torch.Tensor:
        """P(the size - 1 others <= min(x, best) | best is the top), for x [..., steps] against best [steps]."""
        return (law(x).minimum(quantile) / quantile) ** (size - 1)

    t = torch.linspace(0, 2, steps + 1, dtype=torch.float64)
    sums = others_below(t[:, None] - best).mean(1)  # H(t)
    unkept = sums ** (groups - kept)
    missed = 0.0
    for low, high, weight in zip(t[:-1], t[1:], unkept.diff(), strict=True):
        if weight < 1e-12:
            continue
        middle = (low + high) / 2
        below = others_below(middle - best)
        tail = 1 - below  # P(s > t | best), times 1 / steps is P(best in its step, s > t)
        q = torch.zeros(steps, k, dtype=torch.float64)  # [a, c < k]
        q[:, 0] = (tail.cumsum(0) - tail / 2) / steps
        # One above a: it is the best, x > a, and the second lies above t - x but not above a.
        second = ((quantile[:, None] / quantile) ** (size - 1) - below).clamp(min=0)
        if k > 1:
            q[:, 1] = second.triu(1).mean(1) + second.diagonal() / 2 / steps
        for c in range(2, k):
            q[:, c] = math.comb(size, c) * (1 - quantile) ** c * quantile ** (size - c)
        few = torch.zeros(steps, k, dtype=torch.float64)
        few[:, 0] = 1
        for _ in range(kept - 1):
            few = torch.stack([(few[:, : c + 1] * q[:, : c + 1].flip(1)).sum(1) for c in range(k)], 1)
        many = (tail.mean() ** (kept - 1) - few.sum(1)).clamp(min=0)
        missed += float(weight * (tail * many).mean())
    return kept / groups - math.comb(groups - 1, kept - 1) * missed


def grouped(groups: int, kept: int, size: int, k: int) -> MoEConfig:
    return MoEConfig("test", 128, 128, groups * size, k, RoutingMethod.DeepSeekV3, groups, kept)


@pytest.mark.parametrize("shape", [(8, 4, 32, 8), (4, 2, 4, 3), (4, 3, 8, 2), (3, 2, 2, 1), (4, 1, 4, 2)])
def test_hit_probability_of_a_group(shape: tuple[int, int, int, int]) -> None:
    groups, kept, size, k = shape
    exact = grouped_hit_probability(groups, kept, size, k)
    found = hit_probability(grouped(groups, kept, size, k), Parallel("dep", groups))
    assert found == pytest.approx(exact, rel=4e-3)


def test_hit_probability_adds_up_over_group_sizes() -> None:
    """A rank with all groups is always hit; two halves of a group together are hit as often as the group."""
    assert hit_probability(R1, Parallel.parse("dep1")) == pytest.approx(1)
    whole, half = (hit_probability(R1, Parallel.parse(text)) for text in ("dep8", "dep16"))
    assert half < whole < 2 * half
    uneven = [hit_probability(R1, Parallel("dep", 3, rank)) for rank in range(3)]
    assert all(0.5 < probability < 1 for probability in uneven)


@pytest.mark.parametrize(
    ("config", "rows", "slots_per_row", "exact"),
    [
        (R1_FREE, 5.29, 1.51, 1 - math.comb(224, 8) / math.comb(256, 8)),
        (R1, 3.97, 2.01, grouped_hit_probability(8, 4, 32, 8)),
    ],
    ids=["free", "group-limited"],
)
def test_deepseek_r1_at_dep8(config: MoEConfig, rows: float, slots_per_row: float, exact: float) -> None:
    """R*n*P(hit) rows of k*L/E/P(hit) slots: stated, from the closed form, and as sampled."""
    assert 8 * exact == pytest.approx(rows, abs=0.01) and 1 / exact == pytest.approx(slots_per_row, abs=0.01)
    n, ranks = 256, [Parallel("dep", 8, rank) for rank in range(8)]
    assert expected_rows(config, ranks[0], n, "alltoall") == pytest.approx(8 * n * exact, rel=2e-3)
    workloads = [make_workload(config, parallel, n, "random", 0, "alltoall") for parallel in ranks]
    found = np.mean([workload.num_rows for workload in workloads])
    assert found == pytest.approx(8 * n * exact, rel=0.01)
    assert np.mean([workload.local_slots for workload in workloads]) / found == pytest.approx(1 / exact, rel=0.01)


@pytest.mark.parametrize(("config", "exact"), [(R1_FREE, 5.29), (R1, 4.0)], ids=["free", "group-limited"])
def test_balanced_rows_are_near_those_of_random(config: MoEConfig, exact: float) -> None:
    """Even experts, and yet the rows of an all-to-all, not one row a slot or k slots a row."""
    workloads = [make_workload(config, Parallel("dep", 8, rank), 512, "balanced", 0, "alltoall") for rank in range(8)]
    assert all(set(workload.rows_per_expert.tolist()) == {128} for workload in workloads)
    assert np.mean([workload.num_rows for workload in workloads]) / 512 == pytest.approx(exact, rel=0.01)


@pytest.mark.parametrize("dispatch", DISPATCHES)
@pytest.mark.parametrize("text", ["dep3", "ep3", "tp2", "dep3tp2"])
def test_expected_rows_are_the_mean(text: str, dispatch: str) -> None:
    config, parallel, n = layer(16, 3), Parallel.parse(text), 40
    rows = [make_workload(config, parallel, n, "random", seed, dispatch).num_rows for seed in range(40)]
    assert np.mean(rows) == pytest.approx(expected_rows(config, parallel, n, dispatch), rel=0.03)
