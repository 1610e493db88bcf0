"""How token rows get to the ranks of their experts, and what those compute of them back.

- ``alltoall``: each distinct row goes once to every rank that holds one of its experts, however many of them; partial
  sums come back in bf16 and are added up in f32, by rank. Under ``dep``, whose default it is.
- ``allgather``: every rank gets all rows; the partial sums are reduced and scattered by the collective, in bf16.
- ``allreduce``: all ranks have the same rows, as under ``ep`` and ``tp``, and their partial sums are reduced in bf16.
- ``deepep``: rows as in ``alltoall``, by the kernels of the package deep_ep, see `deepep`.

Where experts are sliced as well (``dep4tp2``) the ranks of equal slices exchange rows, and the
slices' sums are reduced.

``alltoall`` and ``allgather`` have a form of fixed size, which needs no count on the host and can stand in a CUDA
graph: every rank brings `capacity` rows, of which those beyond its own have ids -1. Any token may choose any expert, so
all of them go to all ranks, by an all-gather; the way back differs as above.

What a plan's buckets mean: a call of x kernel rows is looked up as x // R tokens per rank (`workload.tokens_per_rank`).
Each dispatcher hands the experts as many rows as make that right. ``alltoall`` pads the rows that came, about
R * n * `workload.hit_probability`, with absent ones to as many as all ranks' tokens, which makes x // R the mean of the
ranks' tokens, which decides how many rows an expert gets. ``allgather`` has R * n_max rows, n_max the most of any rank,
and the fixed size R * capacity, so x // R is n_max or the capacity: what the call may hold. ``allreduce`` has the rows
of the call. Absent rows cost a look at their ids and zeros in the output, no GEMM row.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ..errors import InvalidArgument
from ..executors.base import LayerInputs, MoEProblem
from .groups import RankGroup, RankGroups
from .packing import Packed, Packing

_log = logging.getLogger("moe_runtime.parallel")


class Arrived(NamedTuple):
    """What a dispatch hands to this rank's experts.

    inputs: rows with ids and weights; ids of -1 and of other ranks' experts mean no work here. later: tokens that are
    still to come, the most of any rank. handle: for `combine`.
    """

    inputs: LayerInputs
    later: int
    handle: Any


class Dispatcher(Protocol):
    """All ranks call the same methods in the same order, whether they have tokens or not.

    needs_ids: `dispatch` takes inputs with topk_ids, not with router logits.
    """

    needs_ids: bool

    def dispatch(self, inputs: LayerInputs, later: int, capacity: int | None) -> Arrived:
        """inputs: this rank's n tokens, bf16. later: how many more of them come in calls after this one.

        capacity: None, or at least n and the same on all ranks, for buffers of fixed size and no wait on the host.
        Raises RankError.
        """
        ...

    def combine(self, partial: Tensor, handle: Any) -> Tensor:
        """partial: bf16, what this rank's experts give for each row of `Arrived.inputs`; may be overwritten.

        Returns bf16 [n, H], the sums over all ranks for this rank's tokens. Raises RankError.
        """
        ...


class _Sent(NamedTuple):
    """Of one all-to-all. packed: None where it was of fixed size, of num_tokens rows that count."""

    packed: Packed | None
    num_tokens: int
    sent: list[int]
    received: list[int]


class AllToAll:
    """See the module. One wait of the host a call, for how many rows come from which rank."""

    needs_ids = True

    def __init__(self, problem: MoEProblem, groups: RankGroups, packing: Packing) -> None:
        self._packing, self._slices = packing, groups.slices
        self.ranks = _required(groups.shards)

    def dispatch(self, inputs: LayerInputs, later: int, capacity: int | None) -> Arrived:
        x, ids, weights = _tokens(inputs)
        if capacity is not None:
            return Arrived(_gathered(self.ranks, self._packing, inputs, capacity), later, _Sent(None, len(x), [], []))
        packed = self._packing.pack(x, ids, weights, later)
        sent, received, tokens, later = self._meet(packed.notices)
        handle = _Sent(packed, len(x), sent, received)
        came = self._packing.layout.empty(tokens, x.device)
        self.exchange(came, handle)
        return Arrived(self._packing.unpack(came, sum(received)), later, handle)

    def exchange(self, came: Tensor, handle: _Sent) -> None:
        """The messages themselves, to the first of `came`."""
        assert handle.packed is not None
        messages = handle.packed.messages(sum(handle.sent))
        self.ranks.all_to_all(came[: sum(handle.received)], messages, handle.received, handle.sent)

    def combine(self, partial: Tensor, handle: _Sent) -> Tensor:
        if handle.packed is None:
            returned = torch.empty_like(partial)
            self.ranks.all_to_all(returned, partial)
            by_rank = returned.view(self.ranks.size, -1, returned.shape[1])[:, : handle.num_tokens]
            return _reduced(self._slices, by_rank.sum(0, dtype=torch.float32).to(torch.bfloat16))
        returned = handle.packed.returned(sum(handle.sent))
        self.ranks.all_to_all(returned, partial[: sum(handle.received)], handle.sent, handle.received)
        return _reduced(self._slices, handle.packed.add_up())

    def _meet(self, notices: Tensor) -> tuple[list[int], list[int], int, int]:
        """(rows to each rank, rows from each, tokens of all ranks in this call, the most that are to come)."""
        self.ranks.all_to_all(notices[1], notices[0])
        mine, theirs = notices.tolist()  # the wait
        received, tokens, later = zip(*theirs, strict=True)
        return [rows for rows, _, _ in mine], list(received), sum(tokens), max(later)


class AllGather:
    """See the module. One wait of the host a call, for the most tokens of any rank."""

    needs_ids = True

    def __init__(self, problem: MoEProblem, groups: RankGroups, packing: Packing) -> None:
        self._packing, self._slices, self.ranks = packing, groups.slices, _required(groups.shards)

    def dispatch(self, inputs: LayerInputs, later: int, capacity: int | None) -> Arrived:
        x = inputs.hidden_states
        if capacity is None:
            capacity, later = map(max, _told(self.ranks, len(x), later, x.device))
        return Arrived(_gathered(self.ranks, self._packing, inputs, capacity), later, len(x))

    def combine(self, partial: Tensor, handle: int) -> Tensor:
        mine = partial.new_empty((len(partial) // self.ranks.size, partial.shape[1]))
        if len(partial):
            self.ranks.reduce_scatter(mine, partial)
        return _reduced(self._slices, mine[:handle])


class AllReduce:
    """See the module. The rows stay where they are; no wait of the host."""

    needs_ids = False

    def __init__(self, problem: MoEProblem, groups: RankGroups, packing: Packing) -> None:
        self.ranks = groups.all

    def dispatch(self, inputs: LayerInputs, later: int, capacity: int | None) -> Arrived:
        return Arrived(inputs, later, None)

    def combine(self, partial: Tensor, handle: None) -> Tensor:
        return _reduced(self.ranks, partial)


DispatcherFactory = Callable[[MoEProblem, RankGroups, Packing], Dispatcher]
"""Makes a rank's dispatcher; `groups` has the process groups, `packing` what is done on the rank's own tokens."""


def _deepep(problem: MoEProblem, groups: RankGroups, packing: Packing) -> Dispatcher:
    from .deepep import DeepEP  # which stands on this module

    return DeepEP(problem, groups, packing)


DISPATCHERS: dict[str, DispatcherFactory] = {
    "alltoall": AllToAll,
    "allgather": AllGather,
    "allreduce": AllReduce,
    "deepep": _deepep,
}


def make_dispatcher(
    problem: MoEProblem, groups: RankGroups, packing: Packing, name: str | DispatcherFactory | None = None
) -> Dispatcher:
    """The dispatcher of that name, or by default the layout's; the log of ``moe_runtime.parallel`` says why.

    name: or what makes one, for exchanges that are not here.

    Raises InvalidArgument for a name that there is not, or that does not do under the layout, and as the dispatcher
    does itself.
    """
    parallel = problem.parallel
    if callable(name):
        dispatcher = name(problem, groups, packing)
        _log.info("%s: dispatch by the given %s", parallel, type(dispatcher).__name__)
        return dispatcher
    able = ("alltoall", "allgather", "deepep") if parallel.use_dp and parallel.size > 1 else ("allreduce",)
    if name is not None and name not in able:
        raise InvalidArgument("dispatch", repr(name), f"{' or '.join(able)} under {parallel}, or None for its default")
    if name is not None:
        reason = "as asked for"
    elif "allreduce" in able:
        reason = "because all ranks have the same tokens"
    else:
        reason = "because each rank has tokens of its own, and sends each to the ranks of its experts only"
    chosen = name or able[0]
    _log.info("%s: dispatch by %s, %s", parallel, chosen, reason)
    return DISPATCHERS[chosen](problem, groups, packing)


def _required(ranks: RankGroup | None) -> RankGroup:
    assert ranks is not None
    return ranks


def _tokens(inputs: LayerInputs) -> tuple[Tensor, Tensor, Tensor]:
    assert inputs.topk_ids is not None and inputs.topk_weights is not None
    return inputs.hidden_states, inputs.topk_ids, inputs.topk_weights


def _told(ranks: RankGroup, num_tokens: int, later: int, device: torch.device) -> tuple[list[int], list[int]]:
    """Each rank's tokens in this call, and those that it has still to come."""
    mine = torch.tensor([[num_tokens, later]], dtype=torch.int64, device=device)
    everyone = mine.new_empty((ranks.size, 2))
    ranks.all_gather(everyone, mine)
    tokens, to_come = everyone.T.tolist()  # the wait
    return tokens, to_come


def _reduced(ranks: RankGroup | None, rows: Tensor) -> Tensor:
    if ranks is not None and len(rows):
        ranks.all_reduce(rows)
    return rows


def _gathered(ranks: RankGroup, packing: Packing, inputs: LayerInputs, capacity: int) -> LayerInputs:
    """[R * capacity] rows, those of each rank first among its own, then absent ones."""
    messages = packing.encode(*_tokens(inputs), capacity)
    everyone = messages.new_empty((ranks.size * capacity, messages.shape[1]))
    if capacity:
        ranks.all_gather(everyone, messages)
    return packing.unpack(everyone, len(everyone))
