"""The CPU executor's tactics: grouped matmuls in plain torch, which differ in how they batch experts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import accumulate

import torch
from torch import Tensor

# Largest padded operand that a batched tactic allocates at once; a skewed routing would otherwise need L times more.
_PADDED_BYTES = 256 << 20
# A segment grows while padding stays below this share of its rows.
_PADDING = 1.25


def per_expert_loop(rows: Tensor, counts: list[int], weights: Tensor, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """One matmul an expert that has rows."""
    out = rows.new_empty(rows.shape[0], weights.shape[1], dtype=dtype)
    for expert, (start, stop) in enumerate(_spans(counts)):
        if start < stop:
            out[start:stop] = rows[start:stop] @ weights[expert].T
    return out


def padded_batch(rows: Tensor, counts: list[int], weights: Tensor, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """One batched matmul over all experts, each padded to the rows of the fullest."""
    out = rows.new_empty(rows.shape[0], weights.shape[1], dtype=dtype)
    height = max(counts)
    step = max(1, _PADDED_BYTES // max(1, height * sum(weights.shape[1:]) * rows.element_size()))
    spans = _spans(counts)
    for first in range(0, len(counts), step):
        last = min(first + step, len(counts))
        part = slice(spans[first][0], spans[last - 1][1])
        out[part] = _padded(rows[part], counts[first:last], weights[first:last], height)
    return out


def sorted_segments(rows: Tensor, counts: list[int], weights: Tensor, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """One batched matmul for each run of neighbouring experts with about as many rows; none for empty experts."""
    out = rows.new_empty(rows.shape[0], weights.shape[1], dtype=dtype)
    spans = _spans(counts)
    budget = _PADDED_BYTES // (sum(weights.shape[1:]) * rows.element_size())
    for first, last in _segments(counts, budget):
        part, segment = slice(spans[first][0], spans[last - 1][1]), counts[first:last]
        height = max(segment)
        if min(segment) == height:
            batch = rows[part].view(last - first, height, -1)
            out[part] = torch.bmm(batch, weights[first:last].mT).flatten(0, 1)
        else:
            out[part] = _padded(rows[part], segment, weights[first:last], height)
    return out


def grouped_mm(rows: Tensor, counts: list[int], weights: Tensor, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """torch's own grouped matmul over row offsets."""
    if not rows.shape[0]:
        return rows.new_empty(0, weights.shape[1], dtype=dtype)
    offsets = torch.tensor(list(accumulate(counts)), dtype=torch.int32)
    result: Tensor = torch._grouped_mm(rows, weights.mT, offs=offsets)
    return result.to(dtype)


Tactic = Callable[[Tensor, list[int], Tensor, torch.dtype], Tensor]
"""rows [M, K] f32 grouped by expert, rows of each expert, weights [L, N, K] f32, dtype -> [M, N] in dtype."""

TACTICS: dict[str, Tactic] = {
    tactic.__name__: tactic for tactic in (per_expert_loop, padded_batch, sorted_segments, grouped_mm)
}


def _spans(counts: list[int]) -> list[tuple[int, int]]:
    """First and last + 1 row of each expert."""
    ends = list(accumulate(counts))
    return [(end - count, end) for end, count in zip(ends, counts, strict=True)]


def _padded(rows: Tensor, counts: list[int], weights: Tensor, height: int) -> Tensor:
    """rows [sum(counts), K] x weights [n, N, K] -> [sum(counts), N] by one batched matmul of [n, height, K]."""
    taken = torch.arange(height) < torch.tensor(counts)[:, None]
    batch = rows.new_zeros(len(counts), height, rows.shape[1])
    batch[taken] = rows
    return torch.bmm(batch, weights.mT)[taken]


def _segments(counts: list[int], max_rows: int) -> Iterator[tuple[int, int]]:
    """Runs (first, last + 1) of experts that have rows, within the padding and memory limits."""
    first, height, rows = 0, 0, 0
    for expert, count in enumerate(counts):
        taller = max(height, count)
        padded = (expert + 1 - first) * taller
        if rows and (count == 0 or padded > _PADDING * (rows + count) or padded > max_rows):
            yield first, expert
            rows, taller = 0, count
        if rows == 0:
            first = expert
        height, rows = taller, rows + count
    if rows:
        yield first, len(counts)
