"""The process groups that a layout's ranks form, and their collectives, whose failures are RankErrors."""

from __future__ import annotations

import atexit
import functools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..errors import InvalidArgument, RankError
from .layout import Parallel

# torch 2.13 has new names for two collectives, and warns of those that 2.8 to 2.12 know.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


@dataclass(frozen=True)
class RankGroup:
    """Ranks that exchange rows. Every rank calls the same methods in the same order.

    Raises RankError where another rank is missing, dead or stuck: with gloo at the call, at the latest after the
    group's time-out. With NCCL the host does not wait for a collective: torch's watchdog ends the process once the
    time-out has passed, or with TORCH_NCCL_BLOCKING_WAIT=1 the call itself waits and raises. Either way the group is of
    no use afterwards.
    """

    group: dist.ProcessGroup
    size: int
    name: str

    def all_to_all(
        self,
        output: Tensor,
        rows: Tensor,
        received: Sequence[int] | None = None,
        sent: Sequence[int] | None = None,
    ) -> None:
        """rows [sum(sent), ...] to the ranks in turn, output [sum(received), ...] from them; equal parts by default."""
        with self._calling("all-to-all"):
            dist.all_to_all_single(
                output,
                rows,
                None if received is None else list(received),
                None if sent is None else list(sent),
                group=self.group,
            )

    def all_gather(self, output: Tensor, rows: Tensor) -> None:
        """rows [n, ...], as many on every rank, to output [size * n, ...]."""
        with self._calling("all-gather"):
            _all_gather(output, rows, group=self.group)

    def reduce_scatter(self, output: Tensor, rows: Tensor) -> None:
        """rows [size * n, ...] to output [n, ...]: the sum over ranks of this rank's part."""
        with self._calling("reduce-scatter"):
            _reduce_scatter(output, rows, group=self.group)

    def all_reduce(self, rows: Tensor) -> None:
        """The sum over ranks, in place."""
        with self._calling("all-reduce"):
            dist.all_reduce(rows, group=self.group)

    def require_alike(self, facts: Mapping[str, object]) -> None:
        """Raises RankError, on every rank, where they do not all come with the same facts."""
        everyone: list[Any] = [None] * self.size
        with self._calling("comparison of layers"):
            dist.all_gather_object(everyone, {name: str(fact) for name, fact in facts.items()}, group=self.group)
        differences = [
            f"rank {rank} has {name} {theirs.get(name)} (rank 0: {expected})"
            for rank, theirs in enumerate(everyone)
            for name, expected in everyone[0].items()
            if theirs.get(name) != expected
        ]
        if differences:
            raise RankError(f"{self.name}: the ranks' layers differ: {'; '.join(differences)}")

    def _calling(self, what: str) -> AbstractContextManager[None]:
        return _translated(f"{what} of {self.name} on its rank {dist.get_rank(self.group)} of {self.size}")


@dataclass(frozen=True)
class RankGroups:
    """The groups that one rank is in; None for a group of this rank alone.

    all: every rank of the layout. shards: those that hold the same slice of all experts. slices: those that hold the
    slices of the same experts.
    """

    all: RankGroup | None
    shards: RankGroup | None
    slices: RankGroup | None


def rank_groups(
    parallel: Parallel,
    device: torch.device,
    group: dist.ProcessGroup | None = None,
    timeout_seconds: float | None = None,
) -> RankGroups:
    """The groups of a layout whose ranks are those of `group`, by default all.

    timeout_seconds: of collectives; None takes the group's own. Layers with the same arguments share groups; the first
    makes them, on all ranks together.

    Raises InvalidArgument for a time-out that is not positive, without a group, and for a group that has not the
    layout's ranks in its order or does not serve the device.
    """
    if timeout_seconds is not None and not timeout_seconds > 0:
        raise InvalidArgument("timeout_seconds", timeout_seconds, "more than 0, or None for the group's own")
    if parallel.world_size == 1 and group is None:
        return RankGroups(None, None, None)
    if not dist.is_initialized():
        hint = "Start with torchrun and call torch.distributed.init_process_group first."
        raise InvalidArgument("group", "no process group", f"one of {parallel.world_size} ranks for {parallel}", hint)
    group = dist.group.WORLD if group is None else group
    assert group is not None
    size, rank = dist.get_world_size(group), dist.get_rank(group)
    if size != parallel.world_size:
        raise InvalidArgument("parallel", f"{parallel}, of {parallel.world_size} ranks", f"a layout of {size} ranks")
    if rank != parallel.rank:
        hint = "Parallel.parse(text, rank=torch.distributed.get_rank(group)) takes it from the group."
        raise InvalidArgument("parallel", f"{parallel} seen from rank {parallel.rank}", f"rank {rank}", hint)
    _check_backend(group, device)
    return _make_groups(parallel, group, timeout_seconds)


@contextmanager
def _translated(what: str) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # torch's for a lost connection as for a time-out
        reason = str(error).strip().partition("\n")[0]
        raise RankError(
            f"{what} failed: another rank is missing, dead or stuck; look at the ranks' output, and start all again "
            f"({reason})"
        ) from error


def _check_backend(group: dist.ProcessGroup, device: torch.device) -> None:
    backends = dict(part.split(":") for part in dist.get_backend_config(group).split(","))
    backend = backends.get(device.type)
    if backend is None or (device.type == "cuda" and backend == "gloo"):
        accepted = f"one with {'nccl' if device.type == 'cuda' else 'gloo'} for weights on {device}"
        raise InvalidArgument("group", f"a group with {dist.get_backend_config(group)}", accepted)


@functools.lru_cache(maxsize=64)
def _make_groups(parallel: Parallel, group: dist.ProcessGroup, timeout_seconds: float | None) -> RankGroups:
    members = dist.get_process_group_ranks(group)
    timeout = None if timeout_seconds is None else timedelta(seconds=timeout_seconds)

    def make(positions: range, kind: str) -> RankGroup | None:
        if len(positions) == 1:
            return None
        made = group
        if len(positions) < len(members) or timeout is not None:
            ranks = [members[position] for position in positions]
            # Only its members make it, for the group may be a part of all ranks.
            with _translated(f"meeting of {parallel}{kind}"):
                made = dist.new_group(ranks, timeout=timeout, use_local_synchronization=True)
        return RankGroup(made, len(positions), f"{parallel}{kind}")

    size, tp_size = parallel.size, parallel.tp_size
    whole = make(range(size * tp_size), "")
    if size == 1 or tp_size == 1:
        return RankGroups(whole, whole if size > 1 else None, whole if tp_size > 1 else None)
    first = parallel.ep_rank * tp_size
    return RankGroups(
        whole,
        make(range(parallel.tp_rank, size * tp_size, tp_size), "'s shards"),
        make(range(first, first + tp_size), "'s slices"),
    )


# A group of gloo that is let go only as the interpreter ends takes its threads' end for a crash, and aborts.
atexit.register(_make_groups.cache_clear)
