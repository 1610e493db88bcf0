"""Which rank gets which rows: the bookkeeping of an all-to-all. Pure functions, without a sync of device and host.

n tokens on this rank, R destination ranks, L experts on each: rank r has the experts r * L to (r + 1) * L - 1.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class SendOrder(NamedTuple):
    """Rows in the order in which they are sent: by destination, and of one destination by token.

    rows: int32 [n, R], which row a token is for a destination; -1 where it has no slot there.
    tokens: int64 [n * R], the token of each row; as many as there are rows count, the rest is arbitrary.
    counts: int64 [R], rows of each destination.
    """

    rows: Tensor
    tokens: Tensor
    counts: Tensor


def reached_ranks(topk_ids: Tensor, num_local_experts: int, num_ranks: int) -> Tensor:
    """topk_ids [n, k] -> bool [n, R]: whether a token has a slot on a rank. Ids of no expert do not count."""
    owner = topk_ids.div(num_local_experts, rounding_mode="floor")
    ranks = torch.arange(num_ranks, dtype=owner.dtype, device=owner.device)
    return (owner.unsqueeze(-1) == ranks).any(1)


def send_order(reached: Tensor) -> SendOrder:
    """reached: bool [n, R]."""
    num_tokens, num_ranks = reached.shape
    by_rank = reached.T.reshape(-1)
    row = by_rank.cumsum(0, dtype=torch.int32) - 1
    rows = torch.where(by_rank, row, -1).view(num_ranks, num_tokens).T
    # Rows that are sent come first, in order: a stable sort needs no count on the host, as nonzero would.
    tokens = by_rank.logical_not().to(torch.uint8).argsort(stable=True) % max(1, num_tokens)
    return SendOrder(rows, tokens, reached.sum(0))


def add_up(returned: Tensor, rows: Tensor) -> Tensor:
    """What the ranks computed of this rank's tokens, added up by rank in f32, always in the same order.

    returned: bf16 [S + 1, H], rows in the order in which they were sent, and one of zeros for tokens that were not.
    rows: as `SendOrder` has them. Returns bf16 [n, H].
    """
    total = torch.zeros((len(rows), returned.shape[1]), dtype=torch.float32, device=returned.device)
    for rank in range(rows.shape[1]):
        total += returned[rows[:, rank]]  # row -1 is the last one
    return total.to(torch.bfloat16)
