"""How tokens choose experts: the laws that a workload can follow, and ids drawn from them.

Everything is drawn for all experts at once, so that the ranks of one layout see shares of the same tokens.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .config import MoEConfig
from .errors import InvalidArgument
from .recording import read_layer
from .routing import route

Law = Literal["balanced", "random", "zipf", "dirichlet", "recorded"]
DISTRIBUTIONS = ("balanced", "random", "zipf:S", "dirichlet:A", "recorded:FILE")
"""As a user writes them: S >= 0, A > 0, FILE as `recording.read_layer` takes it."""

_ROWS_AT_ONCE = 1 << 14
"""Tokens routed in one go: bounds the float64 logits to 32 MiB for 256 experts."""


@dataclass(frozen=True)
class Distribution:
    """One law of routing.

    balanced: every expert gets the same number of rows, give or take one (`_balanced` has the exceptions).
    random: the model's own routing of normal logits.
    zipf: the i-th most popular expert is chosen in proportion to i ** -parameter; the seed says which one that is.
    dirichlet: popularities drawn from Dirichlet(parameter, ..., parameter); smaller is more skewed.
    recorded: one layer of the file at `path`, the (seed modulo the number of layers)-th.
    """

    law: Law
    parameter: float = 0.0
    path: Path | None = None

    def __str__(self) -> str:
        if self.law in ("zipf", "dirichlet"):
            return f"{self.law}:{self.parameter}"
        return self.law if self.path is None else f"{self.law}:{self.path}"


def recording_digest(text: str) -> str:
    """16 hex digits of sha256 over the file of `recorded:FILE`, "" for a law without one: names may be used again.

    Raises InvalidArgument for a file that cannot be read.
    """
    path = parse(text).path
    if path is None:
        return ""
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()[:16]
    except OSError as error:
        raise InvalidArgument(
            "distribution", f"{text!r} ({error.strerror})", "a recorded file that can be read"
        ) from None


def parse(text: str, argument: str = "distribution") -> Distribution:
    """One of `DISTRIBUTIONS`. Raises InvalidArgument that names `argument`; does not look for a recorded file."""
    law, colon, rest = text.partition(":")
    if not colon and law in ("balanced", "random"):
        return Distribution(cast(Law, law))
    if law == "recorded" and rest:
        return Distribution("recorded", path=Path(rest))
    if law in ("zipf", "dirichlet"):
        try:
            parameter = float(rest)
        except ValueError:
            parameter = math.nan
        if math.isfinite(parameter) and (parameter > 0 or (law == "zipf" and parameter == 0)):
            return Distribution(cast(Law, law), parameter)
    accepted = f"{', '.join(DISTRIBUTIONS[:-1])} or {DISTRIBUTIONS[-1]} with numbers S >= 0 and A > 0"
    raise InvalidArgument(argument, repr(text), accepted)


def check(distribution: str, argument: str = "distribution") -> str:
    """The distribution in its one spelling: zipf:1 is zipf:1.0. Raises InvalidArgument that names `argument`."""
    return str(parse(distribution, argument))


def draw(distribution: Distribution, config: MoEConfig, num_tokens: int, seed: int) -> Tensor:
    """Global expert ids [num_tokens, top_k], int64, distinct within a row. The same for a seed on any machine.

    The law is that of routed experts, and so is what a file holds; shared ones follow in the last slots.

    Raises InvalidArgument for a recorded file that cannot be read or is of another model.
    """
    if shared := config.num_fused_shared_experts:
        ids = draw(distribution, routed_part(config), num_tokens, seed)
        return torch.cat([ids, torch.arange(config.num_routed_experts, config.num_experts).expand(len(ids), shared)], 1)
    if distribution.law == "balanced":
        return torch.from_numpy(_balanced(config, num_tokens, seed))
    generator = torch.Generator("cpu").manual_seed(seed)
    popularity = None
    if distribution.path is not None:
        layer = read_layer(distribution.path, config, seed)
        if layer.ndim == 2:
            return layer[torch.randint(len(layer), (num_tokens,), generator=generator)]
        popularity = layer.double() / layer.sum()
    elif distribution.law != "random":
        popularity = torch.from_numpy(_popularity(distribution, config.num_experts, seed))
    chunks = [
        route(config, _logits(distribution, popularity, config, min(_ROWS_AT_ONCE, num_tokens - first), generator))[0]
        for first in range(0, num_tokens, _ROWS_AT_ONCE)
    ]
    return torch.cat([torch.empty(0, config.top_k, dtype=torch.int64), *chunks])


def routed_part(config: MoEConfig) -> MoEConfig:
    """The layer without its shared experts."""
    experts, top_k = config.num_routed_experts, config.routed_top_k
    return dataclasses.replace(config, num_experts=experts, top_k=top_k, num_fused_shared_experts=0)


def _logits(
    distribution: Distribution, popularity: Tensor | None, config: MoEConfig, rows: int, generator: torch.Generator
) -> Tensor:
    """f32 [rows, E], whose top k follow the law. popularity: f64 [E], sums to 1; None for random.

    Top k of log p + Gumbel noise are k draws in proportion to p, without putting back. A recorded histogram is
    not p but what came of such draws, each expert's share of the slots: with the k * share = P(token has the expert),
    top k of logit(P) + logistic noise meet those (Rosen's Pareto sampling). Group limits, where the model has them,
    then bend both.
    """
    # float64 first: the vectorised float32 generator differs between CPUs in the last bit, and so could a near tie.
    shape, k = (rows, config.num_experts), config.top_k
    if popularity is None:
        return torch.randn(shape, generator=generator, dtype=torch.float64).float()
    uniform = torch.rand(shape, generator=generator, dtype=torch.float64)
    if distribution.law == "recorded":
        return ((k * popularity).logit(eps=1e-12) + uniform.logit()).float()
    # The factor k centres the k-th largest logit at 0, where a sigmoid still tells scores apart.
    return ((k * popularity).clamp(min=1e-30).log() - (-uniform.log()).log()).float()


def _popularity(distribution: Distribution, num_experts: int, seed: int) -> NDArray[np.float64]:
    """f64 [E], sums to 1; a numpy RandomState, because its streams are frozen for good."""
    state = np.random.RandomState(seed % 2**32)
    if distribution.law == "dirichlet":
        return state.dirichlet(np.full(num_experts, distribution.parameter))
    weights = (1.0 + state.permutation(num_experts)) ** -distribution.parameter
    return np.asarray(weights / weights.sum())


def _balanced(config: MoEConfig, num_tokens: int, seed: int) -> NDArray[np.int64]:
    """[num_tokens, k]: experts dealt like cards, from one shuffled deck of all of them after the other.

    So every expert has the same number of rows, give or take one, and yet a token's experts are a random choice,
    which ranks they lie on included. Under group-limited routing a token is dealt topk_group groups and from each as
    many experts, which is near what such routing does. Rows then are as even within a group, and over groups within
    two as long as topk_group divides top_k.
    """
    limited = config.topk_group < config.n_group
    n_group, topk_group = (config.n_group, config.topk_group) if limited else (1, 1)
    group_size = config.num_experts // n_group
    state = np.random.RandomState(seed % 2**32)
    groups = _deal(n_group, np.full(num_tokens, topk_group), state).reshape(num_tokens, topk_group)
    slots = [len(part) for part in np.array_split(np.arange(config.top_k), topk_group)]
    owner = groups.repeat(slots, axis=1)
    ids = np.empty_like(owner)
    for group in range(n_group):
        mine = owner == group
        hands = mine.sum(1)
        ids[mine] = group * group_size + _deal(group_size, hands[hands > 0], state)
    return ids


def _deal(deck: int, hands: NDArray[np.int64], state: np.random.RandomState) -> NDArray[np.int64]:
    """Cards 0 to deck - 1 for hands of the given sizes (each <= deck) in turn, distinct within a hand, [sum(hands)].

    A shuffled deck is dealt to its end before the next is begun. A hand that lies across two decks gets what it still
    lacks from cards that it does not have.
    """
    ends = np.cumsum(hands)
    total = int(ends[-1]) if len(ends) else 0
    cards = np.empty(-(-total // deck) * deck, dtype=np.int64)
    across = np.searchsorted(ends, np.arange(0, total, deck), side="right")
    for first, hand in zip(range(0, total, deck), across.tolist(), strict=True):
        shuffled = state.permutation(deck)
        held = cards[ends[hand] - hands[hand] : first]
        if held.size:
            fits = shuffled[~np.isin(shuffled, held)][: ends[hand] - first]
            shuffled = np.concatenate([fits, shuffled[~np.isin(shuffled, fits)]])
        cards[first : first + deck] = shuffled
    return cards[:total]
