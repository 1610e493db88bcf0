"""Ids drawn from each law against the law's own figures."""

import itertools
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moe_runtime import distributions
from moe_runtime.config import MoEConfig, RoutingMethod
from moe_runtime.distributions import draw, parse, recording_digest
from moe_runtime.errors import InvalidArgument


def layer(num_experts: int, top_k: int) -> MoEConfig:
    return MoEConfig("test", 128, 128, num_experts, top_k)


def grouped(num_experts: int, top_k: int, n_group: int, topk_group: int) -> MoEConfig:
    return MoEConfig("test", 128, 128, num_experts, top_k, RoutingMethod.DeepSeekV3, n_group, topk_group)


def counts(ids: torch.Tensor, num_experts: int) -> torch.Tensor:
    return ids.flatten().bincount(minlength=num_experts)


@pytest.mark.parametrize(
    ("text", "spelt"),
    [
        ("balanced", "balanced"),
        ("random", "random"),
        ("zipf:1", "zipf:1.0"),
        ("zipf:0", "zipf:0.0"),
        ("dirichlet:.3", "dirichlet:0.3"),
        ("recorded:a/b:c.pt", "recorded:a/b:c.pt"),
    ],
)
def test_one_spelling(text: str, spelt: str) -> None:
    assert distributions.check(text) == spelt == str(parse(spelt))


_UNKNOWN = ["", "even", "Balanced", "balanced:1", "random:", "recorded", "recorded:", "zipf", "zipf:", "zipf:-1"]


@pytest.mark.parametrize(
    "text", [*_UNKNOWN, "zipf:nan", "zipf:inf", "zipf:a", "dirichlet", "dirichlet:0", "dirichlet:-1"]
)
def test_unknown_distribution(text: str) -> None:
    with pytest.raises(InvalidArgument, match=r"^--distribution: got .*accepted: balanced, random, zipf:S, "):
        parse(text, "--distribution")


@st.composite
def configs(draw: st.DrawFn) -> MoEConfig:
    experts = draw(st.integers(1, 24))
    if draw(st.booleans()):
        n_group, size = draw(st.integers(1, 4)), draw(st.integers(2, 6))
        kept = draw(st.integers(1, n_group))
        return grouped(n_group * size, draw(st.integers(1, kept * size)), n_group, kept)
    return layer(experts, draw(st.integers(1, experts)))


@given(
    configs(),
    st.sampled_from(["balanced", "random", "zipf:1.5", "dirichlet:0.1"]),
    st.integers(0, 50),
    st.integers(0, 2**40),
)
def test_ids_are_of_the_model(config: MoEConfig, text: str, tokens: int, seed: int) -> None:
    ids = draw(parse(text), config, tokens, seed)
    assert ids.shape == (tokens, config.top_k)
    size = config.num_experts // config.n_group
    for row in ids.tolist():
        assert len(set(row)) == config.top_k and all(0 <= expert < config.num_experts for expert in row)
        assert len({expert // size for expert in row}) <= config.topk_group
    assert torch.equal(ids, draw(parse(text), config, tokens, seed))


@given(configs(), st.integers(0, 60), st.integers(0, 5))
def test_balanced_is_even(config: MoEConfig, tokens: int, seed: int) -> None:
    """Within one without group limits; under them within two where the groups share a token's slots evenly."""
    rows = counts(draw(parse("balanced"), config, tokens, seed), config.num_experts)
    spread = int(rows.max() - rows.min())
    if config.n_group == config.topk_group:
        assert spread <= 1
    elif config.top_k % config.topk_group == 0:
        assert spread <= 2


def test_balanced_chooses_any_set_of_experts() -> None:
    """Also where hands lie across two decks: of 5 experts dealt 3 at a time, each of the 10 sets is as frequent."""
    ids = draw(parse("balanced"), layer(5, 3), 20_000, 0).sort(1).values
    sets = {tuple(row): 0 for row in itertools.combinations(range(5), 3)}
    for row in ids.tolist():
        sets[tuple(row)] += 1
    assert all(count == pytest.approx(2000, rel=0.1) for count in sets.values())


def test_random_is_the_models_routing() -> None:
    ids = draw(parse("random"), grouped(32, 4, 4, 1), 500, 0)
    assert (ids // 8 == ids[:, :1] // 8).all()
    assert (counts(ids, 32).double() / 2000 * 32 - 1).abs().max() < 0.6


def test_long_draws_are_routed_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributions, "_ROWS_AT_ONCE", 64)
    ids = draw(parse("zipf:1.0"), layer(16, 2), 200, 0)
    assert len(ids) == 200 and not torch.equal(ids[:64], ids[64:128])


@pytest.mark.parametrize("power", [0.0, 1.0, 2.0])
def test_zipf_frequencies(power: float) -> None:
    """With one slot a token, sorted frequencies are i^-S over the sum."""
    tokens = 40_000
    found = counts(draw(parse(f"zipf:{power}"), layer(12, 1), tokens, 3), 12).sort(descending=True).values
    law = torch.tensor([i**-power for i in range(1, 13)], dtype=torch.float64)
    expected = tokens * law / law.sum()
    assert ((found - expected).abs() <= 4.5 * expected.sqrt()).all()


_ORDERS = list(itertools.permutations(range(3), 2))


def test_zipf_draws_without_putting_back() -> None:
    """Two slots of three experts with odds 1 : 1/2 : 1/3: P(not in the token), written out by both orders."""
    odds = [1.0, 1 / 2, 1 / 3]
    total = sum(odds)
    orders = {order: odds[order[0]] / total * odds[order[1]] / (total - odds[order[0]]) for order in _ORDERS}
    out = [sum(chance for order, chance in orders.items() if expert not in order) for expert in range(3)]
    tokens = 40_000
    found = counts(draw(parse("zipf:1.0"), layer(3, 2), tokens, 0), 3).sort(descending=True).values / tokens
    assert found.tolist() == pytest.approx([1 - p for p in out], abs=0.01)


@pytest.mark.parametrize("alpha", [0.3, 2.0])
def test_dirichlet_spread(alpha: float) -> None:
    """The shares' variance over seeds is that of a Beta(A, A * (E - 1)) margin, as far as one slot a token shows it."""
    experts, tokens, seeds = 8, 2000, 150
    shares = (
        torch.stack(
            [
                counts(draw(parse(f"dirichlet:{alpha}"), layer(experts, 1), tokens, seed), experts)
                for seed in range(seeds)
            ]
        ).double()
        / tokens
    )
    mean = 1 / experts
    variance = mean * (1 - mean) / (experts * alpha + 1)
    assert float((shares - mean).square().mean()) == pytest.approx(variance + mean * (1 - mean) / tokens, rel=0.2)


def test_seeds_choose_who_is_popular() -> None:
    first = [int(counts(draw(parse("zipf:2.0"), layer(64, 1), 500, seed), 64).argmax()) for seed in range(6)]
    assert len(set(first)) > 3


GOLDEN = {
    "balanced": [[2, 5, 0], [6, 3, 1], [4, 7, 3]],
    "random": [[5, 2, 3], [5, 3, 4], [2, 5, 3]],
    "zipf:1.0": [[2, 4, 5], [0, 7, 1], [3, 5, 1]],
    "dirichlet:0.3": [[3, 4, 7], [7, 1, 3], [3, 1, 4]],
}


@pytest.mark.parametrize("text", GOLDEN)
def test_the_same_on_any_machine(text: str) -> None:
    """Literal ids, so that a change of generator or machine shows."""
    assert draw(parse(text), layer(8, 3), 3, 7).tolist() == GOLDEN[text]


def test_extreme_parameters_still_give_distinct_ids() -> None:
    for text in ("zipf:1000", "dirichlet:1e-6", "dirichlet:1e6"):
        ids = draw(parse(text), layer(16, 4), 20, 0)
        assert all(len(set(row)) == 4 for row in ids.tolist())
        assert math.isfinite(float(ids.float().mean()))


def test_a_recording_is_known_by_its_content(tmp_path: Path) -> None:
    path = tmp_path / "routing.npy"
    assert recording_digest("zipf:1.0") == ""
    with pytest.raises(InvalidArgument, match=r"^distribution: got 'recorded:.*No such file"):
        recording_digest(f"recorded:{path}")
    path.write_bytes(b"one")
    first = recording_digest(f"recorded:{path}")
    path.write_bytes(b"two")
    assert first != recording_digest(f"recorded:{path}") and len(first) == 16
