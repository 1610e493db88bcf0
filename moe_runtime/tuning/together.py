"""Trials of one draw at several numbers of tokens, timed as one: a tactic's time is their mean.

Not samples of their own: a bucket serves both ends of its range, so confidence must not depend on which was drawn.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from torch import Tensor

from ..executors.base import GemmTrial
from .profiler import Trial

T = TypeVar("T", bound=Hashable)


@dataclass(frozen=True)
class Together(Generic[T]):
    trials: Sequence[Trial[T]]

    def time(self, names: Sequence[T], repeats: int) -> dict[T, list[float]]:
        """Microseconds of each repeat by name, mean over the trials."""
        each = [trial.time(names, repeats) for trial in self.trials]
        return {name: [sum(us) / len(us) for us in zip(*(t[name] for t in each), strict=True)] for name in names}


@dataclass(frozen=True)
class GemmTogether(Together[str]):
    """As a `GemmTrial`, whose results are those of the first."""

    trials: Sequence[GemmTrial]

    def run(self, tactic: str) -> Tensor:
        return self.trials[0].run(tactic)

    def reference(self) -> tuple[Tensor, Tensor]:
        return self.trials[0].reference()

    def error(self, tactic: str, rows: Tensor, expected: Tensor) -> float:
        return self.trials[0].error(tactic, rows, expected)
