"""Stands in for the package deep_ep on CPUs: the part of its Buffer that the adapter uses, by gloo's all-to-all.

It takes what the real one takes and refuses what that refuses, also where that would read wrong memory without a word.
What the real one leaves unwritten is NaN here.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from moe_runtime.parallel import deepep

topk_idx_t = torch.int64
NVLINK_RANKS = 8


def install(nvlink_ranks: int = 8) -> None:
    """As the package of this process. nvlink_ranks: how many ranks are taken for a node."""
    global NVLINK_RANKS
    NVLINK_RANKS = deepep.NVLINK_RANKS = nvlink_ranks
    deepep.DEVICE = "cpu"
    package: Any = ModuleType("deep_ep")
    package.Buffer, package.Config, package.topk_idx_t = Buffer, Config, topk_idx_t
    sys.modules["deep_ep"] = package


@dataclass(frozen=True)
class Config:
    num_sms: int
    num_max_nvl_chunked_recv_tokens: int
    num_max_rdma_chunked_recv_tokens: int

    def get_nvl_buffer_size_hint(self, hidden_bytes: int, num_ranks: int) -> int:
        assert num_ranks <= NVLINK_RANKS or num_ranks % NVLINK_RANKS == 0
        tokens = self.num_sms // 2 * min(num_ranks, NVLINK_RANKS) * self.num_max_nvl_chunked_recv_tokens
        return _aligned(tokens * (hidden_bytes + 128 * 16))

    def get_rdma_buffer_size_hint(self, hidden_bytes: int, num_ranks: int) -> int:
        assert num_ranks > NVLINK_RANKS and num_ranks % NVLINK_RANKS == 0, "built without NVSHMEM"
        tokens = self.num_sms // 2 * (num_ranks // NVLINK_RANKS) * self.num_max_rdma_chunked_recv_tokens
        return _aligned(2 * tokens * (hidden_bytes + 128 * 16))


def _aligned(size: int) -> int:
    return -(-size // 128) * 128


@dataclass(frozen=True)
class Handle:
    sent: list[int]
    received: list[int]
    tokens: Tensor
    num_tokens: int
    num_made: int


class Buffer:
    num_sms = 20
    made: list[Buffer] = []  # noqa: RUF012 - of the process, as num_sms

    def __init__(self, group: dist.ProcessGroup, num_nvl_bytes: int = 0, num_rdma_bytes: int = 0) -> None:
        self.group, self.rank, self.group_size = group, group.rank(), group.size()
        self.num_nvl_bytes, self.num_rdma_bytes = num_nvl_bytes, num_rdma_bytes
        assert num_nvl_bytes % 128 == 0 and num_rdma_bytes % 128 == 0
        assert num_rdma_bytes == 0 or self.group_size > NVLINK_RANKS
        everyone: list[Any] = [None] * self.group_size
        dist.all_gather_object(everyone, (num_nvl_bytes, num_rdma_bytes), group)
        assert everyone == [(num_nvl_bytes, num_rdma_bytes)] * self.group_size
        self.made.append(self)

    @staticmethod
    def get_dispatch_config(num_ranks: int) -> Config:
        assert num_ranks in (2, 4, 8, 16, 24, 32, 64), f"Unsupported number of EP ranks: {num_ranks}"
        return Config(Buffer.num_sms, 256, 128)

    @staticmethod
    def get_combine_config(num_ranks: int) -> Config:
        assert num_ranks in (2, 4, 8, 16, 24, 32, 64), f"Unsupported number of EP ranks: {num_ranks}"
        return Config(Buffer.num_sms, 288, 128)

    def get_dispatch_layout(
        self, topk_idx: Tensor, num_experts: int, previous_event: None = None, async_finish: bool = False
    ) -> tuple[Tensor, Tensor | None, Tensor, Tensor, None]:
        assert topk_idx.dim() == 2 and topk_idx.is_contiguous() and topk_idx.dtype == topk_idx_t
        assert num_experts % self.group_size == 0 and previous_event is None and not async_finish
        owner = topk_idx.div(num_experts // self.group_size, rounding_mode="floor")
        sent = (owner.unsqueeze(-1) == torch.arange(self.group_size)).any(1)
        per_expert = topk_idx[topk_idx >= 0].bincount(minlength=num_experts).int()
        return sent.sum(0).int(), self._per_node(sent), per_expert, sent, None

    def dispatch(
        self,
        x: Tensor | tuple[Tensor, Tensor],
        handle: None = None,
        num_tokens_per_rank: Tensor | None = None,
        num_tokens_per_rdma_rank: Tensor | None = None,
        is_token_in_rank: Tensor | None = None,
        num_tokens_per_expert: Tensor | None = None,
        topk_idx: Tensor | None = None,
        topk_weights: Tensor | None = None,
        expert_alignment: int = 1,
        num_worst_tokens: int = 0,
    ) -> tuple[Tensor | tuple[Tensor, Tensor], Tensor, Tensor, list[int], Handle, None]:
        assert handle is None and topk_idx is not None and topk_weights is not None and is_token_in_rank is not None
        assert num_tokens_per_rank is not None and num_tokens_per_expert is not None
        values, scales = x if isinstance(x, tuple) else (x, None)
        self._check_rows(values, scales, topk_idx, topk_weights)
        assert num_tokens_per_rank.dtype == num_tokens_per_expert.dtype == torch.int32
        assert is_token_in_rank.dtype == torch.bool and is_token_in_rank.shape == (len(values), self.group_size)
        if self.group_size > NVLINK_RANKS:
            assert num_worst_tokens == 0 and num_tokens_per_rdma_rank is not None and self.num_rdma_bytes > 0
            assert torch.equal(num_tokens_per_rdma_rank, self._per_node(is_token_in_rank))
        assert torch.equal(num_tokens_per_rank, is_token_in_rank.sum(0).int())

        counts = torch.empty_like(num_tokens_per_rank)
        dist.all_to_all_single(counts, num_tokens_per_rank, group=self.group)
        ranks, tokens = is_token_in_rank.T.nonzero(as_tuple=True)
        rows = num_worst_tokens or int(counts.sum())
        assert rows >= counts.sum(), "more rows than the worst number"
        made = Handle(num_tokens_per_rank.tolist(), counts.tolist(), tokens, len(values), rows)

        local = len(num_tokens_per_expert) // self.group_size
        ids = topk_idx[tokens] - ranks.unsqueeze(1) * local
        elsewhere = (topk_idx[tokens] < 0) | (ids < 0) | (ids >= local)
        ids[elsewhere] = -1
        came = self._travelled(values, made, 255), self._travelled(ids, made, 255, is_sent=True)
        weights = self._travelled(topk_weights[tokens].masked_fill(elsewhere, 0), made, 255, is_sent=True)
        found = came[1][came[1] >= 0].bincount(minlength=local).tolist() if num_worst_tokens == 0 else []
        if scales is None:
            return came[0], came[1], weights, found, made, None
        return (came[0], self._travelled(scales, made, 255)), came[1], weights, found, made, None

    def combine(
        self, x: Tensor, handle: Handle, topk_weights: None = None, bias: None = None
    ) -> tuple[Tensor, None, None]:
        assert x.dim() == 2 and x.is_contiguous() and x.dtype == torch.bfloat16 and x.shape[1] * 2 % 16 == 0
        assert len(x) == handle.num_made and topk_weights is None and bias is None
        self._check_size(x)
        back = x.new_empty((sum(handle.sent), x.shape[1]))
        dist.all_to_all_single(
            back, x[: sum(handle.received)].contiguous(), handle.sent, handle.received, group=self.group
        )
        total = torch.zeros((handle.num_tokens, x.shape[1]))
        return total.index_add_(0, handle.tokens, back.float()).bfloat16(), None, None

    def _travelled(self, tensor: Tensor, handle: Handle, unwritten: int, is_sent: bool = False) -> Tensor:
        """As many rows as were made, those behind what came of bytes `unwritten`: NaN, or as an id -1."""
        rows = tensor if is_sent else tensor[handle.tokens]
        sent = rows.contiguous().view(torch.uint8)
        made = sent.new_full((handle.num_made, sent.shape[1]), unwritten)
        came = sent.new_empty((sum(handle.received), sent.shape[1]))
        dist.all_to_all_single(came, sent, handle.received, handle.sent, group=self.group)
        made[: len(came)] = came
        return made.view(tensor.dtype)

    def _check_rows(self, values: Tensor, scales: Tensor | None, ids: Tensor, weights: Tensor) -> None:
        assert values.dim() == 2 and values.is_contiguous() and values.shape[1] * values.element_size() % 16 == 0
        self._check_size(values)
        if scales is None:
            assert values.dtype == torch.bfloat16
        else:
            assert values.dtype == torch.float8_e4m3fn and scales.dtype == torch.float32
            assert scales.shape == (len(values), values.shape[1] // 128)
        assert ids.dtype == topk_idx_t and ids.dim() == 2 and ids.is_contiguous()
        assert weights.dtype == torch.float32 and weights.is_contiguous() and weights.shape == ids.shape
        assert len(ids) == len(values)

    def _check_size(self, rows: Tensor) -> None:
        tokens = Buffer.num_sms // 2 * min(self.group_size, NVLINK_RANKS) * 256
        assert self.num_nvl_bytes >= tokens * rows.shape[1] * rows.element_size()

    def _per_node(self, sent: Tensor) -> Tensor | None:
        if self.group_size <= NVLINK_RANKS:
            return None
        return sent.view(len(sent), self.group_size // NVLINK_RANKS, NVLINK_RANKS).any(2).sum(0).int()
