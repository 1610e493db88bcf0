"""The workloads that stand for all draws of a distribution: one, or where experts get few rows several."""

from __future__ import annotations

from collections.abc import Sequence

from ..executors.base import MoEProblem
from ..placement import Placements
from ..workload import DISPATCH, Workload, kernel_rows, make_workload

FEW_ROWS = 4.0
"""With fewer rows an expert on average, more than 2 % of a draw's experts have none, and how many differs from draw to
draw: busy ones by a standard deviation of 2 % at 4 rows, of 6 (dep2) and 11 % (ep2) at half a row."""
DRAWS_OF_FEW_ROWS = 8
"""How many experts are busy decides how full the last wave of tiles is, and so between wide and narrow ones. On an H200
256 columns of Qwen3's gate_up lost 4.6 % (dep2) and 4.5 % (ep2) of both GEMMs to 128 in draws of 27 busy experts, 2.5
waves against 3, and 5.6 % in one of 16, 1.5 against 2; in one of 22, 2 against 2, they won 3 %. So a plan of one draw
guesses. Few rows are cheap to time."""
POOL = 16
"""Each is the middle one, by busy experts, of so many of `POOL * DRAWS_OF_FEW_ROWS` draws, which take 10 to 200 ms to
make: as they come, eight of 4 tokens may hold two that fill their waves, or six."""


def draws(
    problem: MoEProblem,
    ends: Sequence[int],
    distribution: str,
    seed: int,
    sample: int = 0,
    dispatch: str = DISPATCH,
    placements: Placements | None = None,
) -> list[Workload]:
    """As many for each number of tokens per rank in `ends`, of which the first says whether rows are few.

    Those of one end come together, ascending by busy experts. sample: each has draws of its own, with seeds seed,
    seed + 1, ... over all samples. placements, problem: see `draw`.
    """
    count = number_of_draws(problem, ends[0], distribution, placements is not None)
    pool = POOL * count if count > 1 else 1
    seeds, found = range(seed + sample * pool, seed + (sample + 1) * pool), []
    for tokens in ends:
        drawn = [draw(problem, tokens, distribution, one, dispatch, placements) for one in seeds]
        found += sorted(drawn, key=lambda workload: workload.busy_experts)[POOL // 2 :: POOL] if count > 1 else drawn
    return found


def draw(
    problem: MoEProblem,
    tokens: int,
    distribution: str,
    seed: int,
    dispatch: str = DISPATCH,
    placements: Placements | None = None,
) -> Workload:
    """`make_workload` of a problem, which under placements is that of their slots.

    The seed chooses the layer of a recording and that of the placements alike. Raises InvalidArgument for placements of
    another number of slots or ranks.
    """
    if placements is None:
        return make_workload(problem.config, problem.parallel, tokens, distribution, seed, dispatch)
    logical, placement = placements.logical_config(problem.config), placements.layer(seed)
    return make_workload(logical, problem.parallel, tokens, distribution, seed, dispatch, placement)


def number_of_draws(problem: MoEProblem, tokens: int, distribution: str, placed: bool = False) -> int:
    """How many workloads it takes to tell tactics apart at so many tokens per rank."""
    return DRAWS_OF_FEW_ROWS if smears(distribution, placed) and mean_rows(problem, tokens) < FEW_ROWS else 1


def smears(distribution: str, placed: bool) -> bool:
    """Whether experts get unequal rows. placed: replicas share what one expert gets, wherever others have one alone."""
    return placed or distribution != "balanced"


def mean_rows(problem: MoEProblem, tokens: int) -> float:
    """Rows of an expert with so many tokens per rank, on average."""
    return problem.mean_rows(kernel_rows(tokens, problem.parallel))
