"""How the experts of a layer are spread over ranks, and what that makes of the tokens."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal, cast

from ..errors import InvalidArgument

Regime = Literal["dep", "ep", "tp"]
REGIMES: tuple[Regime, ...] = ("dep", "ep", "tp")
_ACCEPTED = "dep<N>, ep<N>, tp<M>, dep<N>tp<M> or ep<N>tp<M> with N, M >= 1, such as dep8, ep2, tp4 or dep4tp2"


@dataclass(frozen=True)
class Parallel:
    """A layer's experts over `size` * `tp_size` ranks, seen from rank `rank` = ep_rank * tp_size + tp_rank.

    size: shards of the experts. tp_size: slices of each expert's intermediate size; the outputs of a shard's slices
    are partial sums, which the caller adds up.
    dep: attention is data-parallel over `size` groups, each with tokens of its own, and an all-to-all (or another
    dispatch) brings a rank the rows of its experts. The tp_size ranks of a group hold the same tokens.
    ep: attention is replicated, the rank sees every row with ids over all experts.
    tp: like ep, but experts are not split (size 1), only each expert's intermediate size.
    """

    regime: Regime
    size: int
    rank: int = 0
    tp_size: int = 1

    def __post_init__(self) -> None:
        if self.regime not in REGIMES:
            raise InvalidArgument("regime", repr(self.regime), ", ".join(REGIMES))
        if self.size < 1:
            raise InvalidArgument("size", self.size, "1 or more ranks")
        if self.tp_size < 1:
            raise InvalidArgument("tp_size", self.tp_size, "1 or more ranks")
        if self.regime == "tp" and self.size != 1:
            raise InvalidArgument("size", self.size, "1 under tp, which does not split the experts", "Give tp_size.")
        if not 0 <= self.rank < self.world_size:
            raise InvalidArgument("rank", self.rank, f"0 to {self.world_size - 1} for {self}")

    @classmethod
    def parse(cls, text: str, rank: int = 0) -> Parallel:
        """`dep8`, `ep2`, `tp4`, `dep4tp2` or `ep4tp2`. Raises InvalidArgument for anything else, dep0 included."""
        number = "([1-9][0-9]*)"
        if match := re.fullmatch(f"tp{number}", text):
            return cls("tp", 1, rank, int(match[1]))
        if match := re.fullmatch(f"(dep|ep){number}(?:tp{number})?", text):
            return cls(cast(Regime, match[1]), int(match[2]), rank, int(match[3] or 1))
        raise InvalidArgument("parallel", repr(text), _ACCEPTED)

    def __str__(self) -> str:
        if self.regime == "tp":
            return f"tp{self.tp_size}"
        return f"{self.regime}{self.size}" + (f"tp{self.tp_size}" if self.tp_size > 1 else "")

    @property
    def world_size(self) -> int:
        return self.size * self.tp_size

    @property
    def ep_rank(self) -> int:
        """Which shard of the experts the rank holds, 0 to size - 1."""
        return self.rank // self.tp_size

    @property
    def tp_rank(self) -> int:
        """Which slice of each expert the rank holds, 0 to tp_size - 1."""
        return self.rank % self.tp_size

    @property
    def use_dp(self) -> bool:
        return self.regime == "dep"

    def shard(self, num_experts: int) -> range:
        """Global ids of the rank's experts. Where they do not divide, the first shards hold one more.

        Raises InvalidArgument where a shard would be empty.
        """
        if num_experts < self.size:
            raise InvalidArgument("parallel", self, f"at most num_experts = {num_experts} shards")
        each, longer = divmod(num_experts, self.size)
        first = self.ep_rank * each + min(self.ep_rank, longer)
        return range(first, first + each + (self.ep_rank < longer))

    def validate_experts(self, num_experts: int) -> None:
        """Raises InvalidArgument unless every rank gets the same number of experts."""
        if num_experts % self.size:
            raise InvalidArgument("parallel", self, f"a number of ranks that divides num_experts = {num_experts}")

    def num_local_experts(self, num_experts: int) -> int:
        return len(self.shard(num_experts))

    def local_expert_offset(self, num_experts: int) -> int:
        """Global id of the rank's first expert."""
        return self.shard(num_experts).start

    def local_intermediate_size(self, intermediate_size: int, multiple: int) -> int:
        """What a rank has of each expert's intermediate size.

        multiple: the format's. Raises InvalidArgument unless that divides it: blocks of weight scales are not cut.
        """
        if intermediate_size % (self.tp_size * multiple):
            accepted = f"a tp size that cuts intermediate_size = {intermediate_size} into multiples of {multiple}"
            raise InvalidArgument("parallel", self, accepted)
        return intermediate_size // self.tp_size
