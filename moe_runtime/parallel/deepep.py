"""The exchange of tokens by DeepEP (package ``deep_ep``, https://github.com/deepseek-ai/DeepEP), where it is installed.

On `deep_ep.Buffer` as versions 1.1 to 1.2 have it, and 2.x beside their ElasticBuffer, which is not used. Its kernels
move each distinct row once to every rank that has one of its experts, over NVLink within a node and RDMA between nodes.
fp8_block rows go as (e4m3, f32 scales), all others in bf16; partial sums come back in bf16 and are added up in f32, but
between nodes the sum of each node is rounded to bf16 on its way.

What a plan's buckets mean: as for ``alltoall``, rows are padded to as many as all ranks' tokens. Within a node DeepEP
does that itself: told with num_worst_tokens how many rows to make, it waits for no count and marks the rest absent. So
the host waits once a call, for the ranks' numbers of tokens, which DeepEP does not tell; between nodes it waits once
more, inside DeepEP, and the rows that came are copied into the padded ones.

The fixed size is the same call with num_worst_tokens of R * capacity: no count at all, and only rows that are wanted
travel. DeepEP has that within a node only. Its low-latency mode, which can be captured between nodes too, is not used:
it hands out [local experts, R * capacity, H], a row for each slot and most of them absent, so many times the rows of
``alltoall`` that a plan would be looked up wrongly, and weighs on the way back, too late where a layer weighs inputs.
"""

from __future__ import annotations

import atexit
import functools
import importlib
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ..errors import InvalidArgument, Unsupported
from ..executors.base import LayerInputs, MoEProblem
from .dispatch import Arrived, _reduced, _required, _tokens, _told
from .groups import RankGroup, RankGroups
from .packing import Packing

NVLINK_RANKS = 8
"""Ranks that DeepEP takes for one node; a group of more is so many on each node."""
DEVICE = "cuda"
"""Where its kernels run. They would read memory of the host without a check."""


class _Sent(NamedTuple):
    """handle: DeepEP's. came: rows that it made, before padding."""

    handle: Any
    came: int


class DeepEP:
    """A `Dispatcher`, see the module. Chosen by name, never by default.

    The first call makes the Buffer, all ranks together, so a graph can be captured from the second on.

    Raises Unsupported where deep_ep cannot be imported, InvalidArgument for a number of ranks that it does not serve.
    """

    needs_ids = True

    def __init__(self, problem: MoEProblem, groups: RankGroups, packing: Packing) -> None:
        self._problem, self._packing, self._slices = problem, packing, groups.slices
        self.ranks = _required(groups.shards)
        self._deep_ep = _imported()
        # bf16 rows come back whatever went there.
        self._sizes = _buffer_sizes(self._deep_ep, self.ranks.size, 2 * problem.config.hidden_size)

    def dispatch(self, inputs: LayerInputs, later: int, capacity: int | None) -> Arrived:
        """As `Dispatcher.dispatch`. Raises InvalidArgument for tokens on the CPU, and a capacity between nodes.

        RankError where a rank does not come. One that goes away later on is an error of DeepEP, after its time-out.
        """
        size, within_node = self.ranks.size, self.ranks.size <= NVLINK_RANKS
        device = inputs.hidden_states.device
        if device.type != DEVICE:
            raise InvalidArgument("dispatch", f"'deepep' for tokens on {device}", "tokens on a GPU", "Use 'alltoall'.")
        if capacity is not None and not within_node:
            accepted = f"None for 'deepep' over {size} ranks, more than the {NVLINK_RANKS} of a node"
            hint = "It waits for counts between nodes. dispatch='alltoall' or 'allgather' take a capacity."
            raise InvalidArgument("capacity", capacity, accepted, hint)
        x, ids, weights = self._encoded(inputs)
        if capacity is None:
            each, to_come = _told(self.ranks, len(ids), later, device)
            tokens, later = sum(each), max(to_come)
        else:
            tokens = size * capacity
        to_ranks, to_nodes, to_experts, is_sent, _ = self._buffer.get_dispatch_layout(
            ids, self._problem.config.num_experts
        )
        came, ids, weights, _, handle, _ = self._buffer.dispatch(
            x,
            num_tokens_per_rank=to_ranks,
            num_tokens_per_rdma_rank=to_nodes,
            is_token_in_rank=is_sent,
            num_tokens_per_expert=to_experts,
            topk_idx=ids,
            topk_weights=weights,
            num_worst_tokens=tokens if within_node else 0,
        )
        values, scales = came if isinstance(came, tuple) else (came, None)
        arrived = LayerInputs(
            _padded(values, tokens),
            None if scales is None else _padded(scales, tokens),
            topk_ids=_padded(self._global(ids), tokens, -1),
            topk_weights=_padded(weights, tokens),
        )
        return Arrived(arrived, later, _Sent(handle, len(ids)))

    def combine(self, partial: Tensor, handle: _Sent) -> Tensor:
        rows, _, _ = self._buffer.combine(partial[: handle.came], handle.handle)
        return _reduced(self._slices, rows)

    @functools.cached_property
    def _buffer(self) -> Any:
        """Of this layer for good: a captured graph names its memory."""
        return _shared_buffer(self._deep_ep, self.ranks, *self._sizes)

    def _encoded(self, inputs: LayerInputs) -> tuple[Tensor | tuple[Tensor, Tensor], Tensor, Tensor]:
        """Contiguous rows, with scales where they have some, ids as DeepEP was built for them, and weights."""
        x, ids, weights = _tokens(inputs)
        layout = self._packing.layout
        values, scales = x, None
        if layout.is_fp8_block:
            # Three kernels on a GPU, where the encoding alone is some twenty in torch.
            messages = self._packing.encode(x, ids, weights, len(x))
            values, scales = layout.values(messages), layout.scales(messages)
        rows = values.contiguous() if scales is None else (values.contiguous(), scales.contiguous())
        return rows, ids.to(getattr(self._deep_ep, "topk_idx_t", torch.int64)).contiguous(), weights.contiguous()

    def _global(self, local_ids: Tensor) -> Tensor:
        ids = torch.where(local_ids < 0, -1, local_ids + self._problem.local_expert_offset)
        return ids.to(torch.int32)


_buffers: dict[dist.ProcessGroup, Any] = {}
# As the groups that they hold: before the interpreter ends.
atexit.register(_buffers.clear)


def _shared_buffer(deep_ep: Any, ranks: RankGroup, nvlink_bytes: int, rdma_bytes: int) -> Any:
    """The group's Buffer, or a larger one in its place, which layers that begin later share. All ranks call it."""
    buffer = _buffers.get(ranks.group)
    if buffer is None or buffer.num_nvl_bytes < nvlink_bytes or buffer.num_rdma_bytes < rdma_bytes:
        buffer = _buffers[ranks.group] = deep_ep.Buffer(ranks.group, nvlink_bytes, rdma_bytes)
    return buffer


def _buffer_sizes(deep_ep: Any, num_ranks: int, hidden_bytes: int) -> tuple[int, int]:
    """Bytes of the NVLink and of the RDMA buffer. Raises InvalidArgument as `DeepEP`."""
    try:
        configs = [deep_ep.Buffer.get_dispatch_config(num_ranks), deep_ep.Buffer.get_combine_config(num_ranks)]
    except AssertionError as error:
        accepted = "a number of ranks that deep_ep has settings for, such as 2, 4, 8, 16, 32 or 64"
        raise InvalidArgument("dispatch", f"'deepep' over {num_ranks} ranks", accepted) from error
    nvlink = max(config.get_nvl_buffer_size_hint(hidden_bytes, num_ranks) for config in configs)
    if num_ranks <= NVLINK_RANKS:
        return nvlink, 0  # built without NVSHMEM, deep_ep answers no question about RDMA
    return nvlink, max(config.get_rdma_buffer_size_hint(hidden_bytes, num_ranks) for config in configs)


def _imported() -> Any:
    try:
        deep_ep = importlib.import_module("deep_ep")
    except Exception as error:  # it looks for libraries of its own as well, and raises what it likes
        raise Unsupported(
            f"dispatch 'deepep' needs the package deep_ep, which cannot be imported ({error}); build and install it "
            "from https://github.com/deepseek-ai/DeepEP, with NVSHMEM for ranks on several nodes, or use "
            "dispatch='alltoall'"
        ) from error
    if not hasattr(deep_ep, "Buffer"):
        raise Unsupported("dispatch 'deepep' needs deep_ep.Buffer; install deep_ep 1.1 to 2.1, which have it")
    return deep_ep


def _padded(rows: Tensor, count: int, rest: int | None = None) -> Tensor:
    """[count, ...]: the rows, and behind them `rest` or whatever is there."""
    if len(rows) == count:
        return rows
    padded = rows.new_empty((count, *rows.shape[1:]))
    padded[: len(rows)] = rows
    if rest is not None:
        padded[len(rows) :] = rest
    return padded
