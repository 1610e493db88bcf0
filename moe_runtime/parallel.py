"""How the experts of a layer are spread over ranks, and what that makes of the tokens."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal, cast

from .errors import InvalidArgument

Regime = Literal["dep", "ep"]
REGIMES: tuple[Regime, ...] = ("dep", "ep")
_ACCEPTED = "dep<N> or ep<N> with N >= 1, such as dep8 or ep2"


@dataclass(frozen=True)
class Parallel:
    """Expert parallelism over `size` ranks, seen from rank `rank`.

    dep: attention is data-parallel, an all-to-all brings the rank only rows with local experts.
    ep: attention is replicated, the rank sees every row with ids over all experts.
    """

    regime: Regime
    size: int
    rank: int = 0

    def __post_init__(self) -> None:
        if self.regime not in REGIMES:
            raise InvalidArgument("regime", repr(self.regime), ", ".join(REGIMES))
        if self.size < 1:
            raise InvalidArgument("size", self.size, "1 or more ranks")
        if not 0 <= self.rank < self.size:
            raise InvalidArgument("rank", self.rank, f"0 to {self.size - 1} for {self}")

    @classmethod
    def parse(cls, text: str, rank: int = 0) -> Parallel:
        """`dep8` or `ep2`. Raises InvalidArgument for anything else, dep0 included."""
        match = re.fullmatch(r"(dep|ep)([1-9][0-9]*)", text)
        if match is None:
            raise InvalidArgument("parallel", repr(text), _ACCEPTED)
        return cls(cast(Regime, match[1]), int(match[2]), rank)

    def __str__(self) -> str:
        return f"{self.regime}{self.size}"

    @property
    def use_dp(self) -> bool:
        return self.regime == "dep"

    def validate_experts(self, num_experts: int) -> None:
        """Raises InvalidArgument unless every rank gets the same number of experts."""
        if num_experts % self.size:
            raise InvalidArgument("parallel", self, f"a number of ranks that divides num_experts = {num_experts}")

    def num_local_experts(self, num_experts: int) -> int:
        self.validate_experts(num_experts)
        return num_experts // self.size

    def local_expert_offset(self, num_experts: int) -> int:
        """Global id of the rank's first expert."""
        return self.rank * self.num_local_experts(num_experts)
