"""What one rank's kernels see: the routed ids of a profiling workload, and the bucket of a call.

n = tokens per rank, k = top_k, E experts, R = parallel.size, L experts on this rank: E / R, or one more or less where
R does not divide E. Under ``dep`` T = R*n tokens exist, n on each rank; under ``ep`` and ``tp`` every rank sees the
same T = n. Slicing experts (tp_size) narrows the GEMMs and changes nothing here.

What of the T tokens reaches the kernels is the dispatch:

- ``compact``, the default: rows stand for routed slots, whatever brought them. Under DEP n rows whose k ids all lie in
  this rank's shard, so m = n*k/L rows per local expert; what gives shards unequal work, a distribution or shared
  experts, makes it as many rows as hold this rank's slots. Under EP the n rows with ids over all experts, so m = n*k/E;
  ids outside the shard stay, and the kernels skip them, as in a real call.
- ``alltoall``: each of the T tokens that has a slot here, once, with its 1 to k local ids and -1 for the others.
- ``allgather``: all T tokens with ids over all experts.
- ``masked``: the slots of ``alltoall``, in buffers [L, T, H] of which each expert fills its first rows.

In all of them m is the same on average; rows, which gather, quantise and combine pay for, are not.

Under a placement tokens choose among the E logical experts, and a slot's row goes to the physical one that
`Placement.to_physical` names: E and L above then count those, and shards get unequal work.
"""

from __future__ import annotations

import functools
import math
import os
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from .config import MoEConfig
from .distributions import DISTRIBUTIONS, Distribution, draw, parse, routed_part
from .distributions import check as check_distribution
from .errors import InvalidArgument
from .parallel import Parallel
from .placement import Placement, physical_config

__all__ = [
    "DISPATCH",
    "DISPATCHES",
    "DISTRIBUTIONS",
    "DISTRIBUTION_VARIABLE",
    "Workload",
    "bucket",
    "bucket_index",
    "buckets",
    "check_dispatch",
    "check_distribution",
    "default_distribution",
    "expected_rows",
    "hit_probability",
    "kernel_rows",
    "make_workload",
    "tokens_per_rank",
]

DISTRIBUTION_VARIABLE = "MOE_RUNTIME_AUTOTUNE_DISTRIBUTION"
DISPATCHES = ("compact", "alltoall", "allgather", "masked")
DISPATCH = "compact"

LARGEST_POWER_BUCKET = 8192
_SAMPLED_TOKENS = 1 << 15


@dataclass(frozen=True)
class Workload:
    """The routed ids of ``num_tokens`` tokens per rank as they arrive at one rank's kernels.

    topk_ids: int32 [num_rows, top_k] on the CPU, global expert ids, distinct within a row; -1 is no slot.
    """

    config: MoEConfig
    parallel: Parallel
    num_tokens: int
    distribution: str
    seed: int
    topk_ids: Tensor
    dispatch: str = DISPATCH

    @property
    def num_rows(self) -> int:
        """Rows of hidden states that arrive: what gather reads and combine writes."""
        return len(self.topk_ids)

    @cached_property
    def rows_per_expert(self) -> Tensor:
        """int32 [L]: GEMM rows of each local expert."""
        shard = self.parallel.shard(self.config.num_experts)
        local = self.topk_ids[_is_local(self.topk_ids, shard)].long() - shard.start
        return torch.bincount(local, minlength=len(shard)).to(torch.int32)

    @property
    def local_slots(self) -> int:
        """GEMM rows of this rank: slots of ``topk_ids`` that name a local expert."""
        return int(self.rows_per_expert.sum())

    @property
    def busy_experts(self) -> int:
        """Local experts with rows."""
        return int((self.rows_per_expert > 0).sum())

    @property
    def max_rows_per_expert(self) -> int | None:
        """max_m of the buffers [L, max_m, H] under ``masked``: any token may choose any expert. None elsewhere."""
        return kernel_rows(self.num_tokens, self.parallel) if self.dispatch == "masked" else None


def default_distribution() -> str:
    """The distribution named by ``MOE_RUNTIME_AUTOTUNE_DISTRIBUTION``, else ``balanced``."""
    return check_distribution(os.environ.get(DISTRIBUTION_VARIABLE, "balanced"), DISTRIBUTION_VARIABLE)


def check_dispatch(dispatch: str) -> str:
    if dispatch not in DISPATCHES:
        raise InvalidArgument("dispatch", repr(dispatch), f"{', '.join(DISPATCHES[:-1])} or {DISPATCHES[-1]}")
    return dispatch


def make_workload(
    config: MoEConfig,
    parallel: Parallel,
    num_tokens: int,
    distribution: str | None = None,
    seed: int = 0,
    dispatch: str = DISPATCH,
    placement: Placement | None = None,
) -> Workload:
    """The workload of ``num_tokens`` tokens per rank at rank ``parallel.rank``.

    config: the model's. With a placement the workload's own is its `physical_config`, and its ids are physical.
    distribution: one of `DISTRIBUTIONS`, of logical experts; None takes the environment's.
    seed: the same on every rank draws the same tokens for all of them, so ranks get shares of one whole. Balanced
        ``compact`` without a placement is a closed formula without it.

    Raises InvalidArgument for a negative num_tokens, an unknown distribution or dispatch, a recorded file that cannot
    be read or is of another model, a placement of other experts or ranks, or fewer experts than ranks.
    """
    if num_tokens < 0:
        raise InvalidArgument("num_tokens", num_tokens, "0 or more")
    check_dispatch(dispatch)
    chosen = parse(default_distribution() if distribution is None else distribution)
    seen = config if placement is None else physical_config(config, placement)
    shard = parallel.shard(seen.num_experts)
    if dispatch == "compact" and placement is None:
        ids = _compact(config, parallel, shard, num_tokens, chosen, seed)
    else:
        ids = draw(chosen, config, kernel_rows(num_tokens, parallel), seed)
        if placement is not None:
            placement.check_ranks(parallel)
            ids = placement.to_physical(ids)
        if dispatch == "compact" and parallel.use_dp:
            ids = _packed(ids, shard)
        elif dispatch in ("alltoall", "masked"):
            local = _is_local(ids, shard)
            ids = ids.masked_fill(~local, -1)[local.any(1)]
    return Workload(seen, parallel, num_tokens, str(chosen), seed, ids.to(torch.int32).contiguous(), dispatch)


def expected_rows(config: MoEConfig, parallel: Parallel, num_tokens: int, dispatch: str = DISPATCH) -> float:
    """The mean of `Workload.num_rows` when every expert is as popular: over seeds of ``random``."""
    tokens = kernel_rows(num_tokens, parallel)
    if check_dispatch(dispatch) in ("alltoall", "masked"):
        return tokens * hit_probability(config, parallel)
    if dispatch == "compact" and parallel.use_dp:
        if config.num_fused_shared_experts:
            shard = parallel.shard(config.num_experts)
            slots = config.routed_top_k * len(shard) / config.num_routed_experts
            return tokens if _has_shared(config, shard) else tokens * slots / config.top_k
        return _share(tokens, parallel.shard(config.num_experts), config.num_experts)
    return tokens


def hit_probability(config: MoEConfig, parallel: Parallel) -> float:
    """P that a token has a slot at this rank when every expert is as popular: 1 - C(E-L, k) / C(E, k).

    Group-limited routing has no such form: which groups win, and how many experts a group then gives, depends on how
    scores are distributed. That count is sampled from normal logits, with a fixed seed; given a group's count, its
    experts are any subset, so the rest is exact. The standard error is about 0.1 % of the result.
    """
    shard = parallel.shard(config.num_experts)
    if _has_shared(config, shard):
        return 1.0
    config = routed_part(config)
    experts, k = config.num_experts, config.top_k
    if config.topk_group == config.n_group:
        return 1 - math.comb(experts - len(shard), k) / math.comb(experts, k)
    size = experts // config.n_group
    given = _slots_by_group(config)
    misses = torch.empty(config.n_group, k + 1, dtype=torch.float64)
    for group in range(config.n_group):
        there = len(range(max(shard.start, group * size), min(shard.stop, (group + 1) * size)))
        chances = [math.comb(size - there, count) / max(1, math.comb(size, count)) for count in range(k + 1)]
        misses[group] = torch.tensor(chances)
    # No group is different from another, so each token also stands for those with the groups moved round.
    groups = torch.arange(config.n_group)
    moved = [misses[groups, given.roll(shift, 1)].prod(1).mean() for shift in range(config.n_group)]
    return 1 - float(torch.stack(moved).mean())


@functools.lru_cache(maxsize=8)
def _slots_by_group(config: MoEConfig) -> Tensor:
    """int64 [tokens, n_group]: slots that sampled tokens have in each group."""
    group = draw(Distribution("random"), config, _SAMPLED_TOKENS, 0) // (config.num_experts // config.n_group)
    return torch.nn.functional.one_hot(group, config.n_group).sum(1)


def _has_shared(config: MoEConfig, shard: range) -> bool:
    return shard.stop > config.num_routed_experts


def _is_local(ids: Tensor, shard: range) -> Tensor:
    return (ids >= shard.start) & (ids < shard.stop)


def _share(num_tokens: int, shard: range, num_experts: int) -> int:
    """How many of the T tokens a shard takes over when they are dealt out by experts: n where shards are equal."""
    return num_tokens * shard.stop // num_experts - num_tokens * shard.start // num_experts


def _compact(
    config: MoEConfig, parallel: Parallel, shard: range, num_tokens: int, distribution: Distribution, seed: int
) -> Tensor:
    """Ids [rows, k] in which rows stand for this rank's slots."""
    if not parallel.use_dp:
        if distribution.law == "balanced" and not config.num_fused_shared_experts:
            stride = max(1, min(config.num_experts // parallel.size, config.num_experts // config.top_k))
            return _strided(num_tokens, config.top_k, stride, config.num_experts)
        return draw(distribution, config, num_tokens, seed)
    tokens = kernel_rows(num_tokens, parallel)
    if distribution.law not in ("balanced", "random") or config.num_fused_shared_experts:
        return _packed(draw(distribution, config, tokens, seed), shard)
    rows, columns = _share(tokens, shard, config.num_experts), min(config.top_k, len(shard))
    if distribution.law == "balanced":
        local = _strided(rows, columns, max(1, len(shard) // config.top_k), len(shard))
    else:
        generator = torch.Generator("cpu").manual_seed(seed)
        # float64 first: the vectorised float32 generator differs between CPUs in the last bit, and so could a near tie.
        logits = torch.randn(rows, len(shard), generator=generator, dtype=torch.float64).float()
        local = logits.topk(columns, dim=1).indices
    return _pad_remote(local, config, shard)


def _strided(rows: int, columns: int, stride: int, domain: int) -> Tensor:
    """id[t, j] = (t + j * stride) mod domain; distinct within a row while (columns - 1) * stride < domain."""
    return (torch.arange(rows)[:, None] + torch.arange(columns) * stride) % domain


def _pad_remote(local: Tensor, config: MoEConfig, shard: range) -> Tensor:
    """Shard-relative ids [rows, min(k, L)] -> global ids [rows, k]; columns beyond L name distinct remote experts."""
    missing = torch.arange(config.top_k - local.shape[1])
    remote = (shard.stop + missing) % config.num_experts
    return torch.cat([local + shard.start, remote.expand(local.shape[0], -1)], dim=1)


def _packed(ids: Tensor, shard: range) -> Tensor:
    """The shard's slots of ids [T, k] in as few rows [rows, k] as hold them with distinct ids; -1 fills the last."""
    k = ids.shape[1]
    slots = ids[_is_local(ids, shard)].sort().values
    if not len(slots):
        return ids.new_empty(0, k)
    rows = max(-(-len(slots) // k), int(slots.bincount().max()))
    # Down the columns: slots of one expert, no more than a column is long, meet every row once at most.
    packed = slots.new_full((k * rows,), -1)
    packed[: len(slots)] = slots
    return packed.view(k, rows).T


def tokens_per_rank(num_kernel_rows: int, parallel: Parallel) -> int:
    """Tokens per rank that a call with ``num_kernel_rows`` rows stands for: x // R under DEP, x under EP.

    Under DEP a one-sided all-to-all hands the kernels a buffer of R * n_max rows in which absent rows carry id -1.
    Those cost a look and no GEMM row, so the call does the work that was profiled with n = x // R rows.
    """
    return num_kernel_rows // parallel.size if parallel.use_dp else num_kernel_rows


def kernel_rows(num_tokens: int, parallel: Parallel) -> int:
    """Rows of the kernels' buffer at ``num_tokens`` tokens per rank: R * n under DEP, n under EP."""
    return num_tokens * parallel.size if parallel.use_dp else num_tokens


def bucket(num_kernel_rows: int, parallel: Parallel, tune_max_num_tokens: int) -> int:
    """The bucket, in tokens per rank, whose tactics serve a call with ``num_kernel_rows`` rows.

    With d = `tokens_per_rank`: the largest power of two <= d, clamped to [1, 8192] and to ``tune_max_num_tokens``;
    d > 8192 goes to the bucket ``tune_max_num_tokens`` where that is larger than 8192.
    """
    return buckets(tune_max_num_tokens)[bucket_index(num_kernel_rows, parallel, tune_max_num_tokens)]


def bucket_index(num_kernel_rows: int, parallel: Parallel, tune_max_num_tokens: int) -> int:
    """Position of a call's `bucket` in `buckets`; integer arithmetic only, cheap enough for every call."""
    tokens = tokens_per_rank(num_kernel_rows, parallel)
    if tokens > LARGEST_POWER_BUCKET and tune_max_num_tokens > LARGEST_POWER_BUCKET:
        return LARGEST_POWER_BUCKET.bit_length()
    return max(1, min(tokens, tune_max_num_tokens, LARGEST_POWER_BUCKET)).bit_length() - 1


def buckets(tune_max_num_tokens: int) -> list[int]:
    """{1, 2, 4 ... 8192} up to ``tune_max_num_tokens``, and ``tune_max_num_tokens`` itself when larger than 8192."""
    if tune_max_num_tokens < 1:
        raise InvalidArgument("tune_max_num_tokens", tune_max_num_tokens, "1 or more")
    powers = [1 << i for i in range(min(tune_max_num_tokens, LARGEST_POWER_BUCKET).bit_length())]
    return powers + [tune_max_num_tokens] * (tune_max_num_tokens > LARGEST_POWER_BUCKET)
