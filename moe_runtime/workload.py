"""What one rank's kernels see: the routed ids of a profiling workload, and the bucket of a call.

n = tokens per rank, k = top_k, E experts, R = parallel.size, L = E / R experts on this rank.

- ``dep``: R*n tokens exist and a perfect all-to-all leaves this rank n*k routed slots, all local, so
  m = n*k/L rows per local expert. The workload is n rows whose ids lie in [offset, offset + L).
- ``ep``: the rank sees its own n rows with ids over all E experts, of which about 1/R are local, so
  m = n*k/E. Ids outside the shard stay in the workload; the kernels skip them, as they do in a real call.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cached_property

import torch

from .config import MoEConfig
from .errors import InvalidArgument
from .parallel import Parallel
from .routing import route

DISTRIBUTIONS = ("balanced", "random")
DISTRIBUTION_VARIABLE = "MOE_RUNTIME_AUTOTUNE_DISTRIBUTION"
DISPATCH = "compact"
"""How rows stand for routed slots: n rows with k slots each, whatever dispatch delivered them."""

LARGEST_POWER_BUCKET = 8192


@dataclass(frozen=True)
class Workload:
    """The routed ids of ``num_tokens`` kernel rows at one rank.

    topk_ids: int32 [num_tokens, top_k] on the CPU, global expert ids, distinct within a row.
    """

    config: MoEConfig
    parallel: Parallel
    num_tokens: int
    distribution: str
    seed: int
    topk_ids: torch.Tensor

    @cached_property
    def rows_per_expert(self) -> torch.Tensor:
        """int32 [L]: GEMM rows of each local expert."""
        num_local = self.parallel.num_local_experts(self.config.num_experts)
        local = self.topk_ids.flatten().long() - self.parallel.local_expert_offset(self.config.num_experts)
        local = local[(local >= 0) & (local < num_local)]
        return torch.bincount(local, minlength=num_local).to(torch.int32)

    @property
    def local_slots(self) -> int:
        """GEMM rows of this rank: slots of ``topk_ids`` that name a local expert."""
        return int(self.rows_per_expert.sum())


def default_distribution() -> str:
    """The distribution named by ``MOE_RUNTIME_AUTOTUNE_DISTRIBUTION``, else ``balanced``."""
    return check_distribution(os.environ.get(DISTRIBUTION_VARIABLE, "balanced"), DISTRIBUTION_VARIABLE)


def check_distribution(distribution: str, argument: str = "distribution") -> str:
    if distribution not in DISTRIBUTIONS:
        raise InvalidArgument(argument, repr(distribution), " or ".join(DISTRIBUTIONS))
    return distribution


def make_workload(
    config: MoEConfig, parallel: Parallel, num_tokens: int, distribution: str | None = None, seed: int = 0
) -> Workload:
    """The workload of ``num_tokens`` kernel rows at rank ``parallel.rank``.

    distribution: ``balanced`` (closed formula) or ``random`` (uniform logits' top-k); None takes the environment's.
    seed: of ``random``; every rank draws the same logits, so ranks of equal shards get equal work.

    Raises InvalidArgument for a negative num_tokens, an unknown distribution, or experts that do not divide.
    """
    if num_tokens < 0:
        raise InvalidArgument("num_tokens", num_tokens, "0 or more")
    distribution = default_distribution() if distribution is None else check_distribution(distribution)
    parallel.validate_experts(config.num_experts)
    if distribution == "balanced":
        ids = _balanced(config, parallel, num_tokens)
    else:
        ids = _random(config, parallel, num_tokens, seed)
    return Workload(config, parallel, num_tokens, distribution, seed, ids.to(torch.int32).contiguous())


def _balanced(config: MoEConfig, parallel: Parallel, num_tokens: int) -> torch.Tensor:
    """id[t, j] = (t + j * stride) mod N, plus the shard's offset under DEP.

    Ids of a row are distinct as long as (k - 1) * stride < N. Since stride <= max(1, N // k) that fails only for
    N < k, which means DEP with L < k (the configuration holds k <= E): there the formula fills the L local
    columns and `_pad_remote` the rest.
    """
    num_local = parallel.num_local_experts(config.num_experts)
    domain = num_local if parallel.use_dp else config.num_experts
    stride = max(1, min(num_local, domain // config.top_k))
    token = torch.arange(num_tokens)[:, None]
    column = torch.arange(min(config.top_k, domain))
    ids = (token + column * stride) % domain
    return _pad_remote(ids, config, parallel) if parallel.use_dp else ids


def _random(config: MoEConfig, parallel: Parallel, num_tokens: int, seed: int) -> torch.Tensor:
    num_local = parallel.num_local_experts(config.num_experts)
    domain = num_local if parallel.use_dp else config.num_experts
    generator = torch.Generator("cpu").manual_seed(seed)
    # float64 first: the vectorised float32 generator differs between CPUs in the last bit, and so could a near tie.
    logits = torch.randn(num_tokens, domain, generator=generator, dtype=torch.float64).float()
    if parallel.use_dp:
        return _pad_remote(logits.topk(min(config.top_k, domain), dim=1).indices, config, parallel)
    return route(config, logits)[0]


def _pad_remote(local: torch.Tensor, config: MoEConfig, parallel: Parallel) -> torch.Tensor:
    """Shard-relative ids [n, min(k, L)] -> global ids [n, k]; the columns beyond L name distinct remote experts."""
    offset = parallel.local_expert_offset(config.num_experts)
    missing = torch.arange(config.top_k - local.shape[1])
    remote = (offset + parallel.num_local_experts(config.num_experts) + missing) % config.num_experts
    return torch.cat([local + offset, remote.expand(local.shape[0], -1)], dim=1)


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
