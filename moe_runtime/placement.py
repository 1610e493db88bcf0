"""Which physical slots the experts of a layer lie in, where busy ones have replicas on several ranks.

A rank of R has P / R of the P = E + num_redundant_experts slots, each with the weights of one logical expert. To the
kernels slots are experts: the layer is `physical_config`, and its ids are slots. The router knows logical experts only,
so routing is done outside the layer, and its ids become slots on the way:

>>> placements = Placements.load("placement.json")
>>> placement = placements.layers["model.layers.10.mlp.gate"]
>>> weights = load_experts(path, 10, config, parallel, "cuda", experts=placement.local_experts(parallel.ep_rank))
>>> layer = FusedMoE(physical_config(config, placement), parallel, weights, plan)
>>> topk_ids, topk_weights = route(config, router_logits, bias)
>>> y = layer(x, topk_ids=placement.to_physical(topk_ids), topk_weights=topk_weights)

So any routing works, group-limited as well, whose groups are of logical experts. Shared experts are placed like others.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple, Protocol

import msgspec
import torch
from torch import Tensor

from .config import MoEConfig
from .errors import InvalidArgument
from .files import write_whole
from .parallel import Parallel

SCHEMA_VERSION = 1


class Balance(NamedTuple):
    """How even a placement makes the ranks' loads. before, after: `imbalance` without it and with it."""

    before: float
    after: float
    replicated_experts: int
    most_replicas: int


@dataclass(frozen=True)
class Placement:
    """One layer's. load: of each of the E logical experts, in any unit; what the placement was made for.

    physical_to_logical: the expert in each of P slots; slot p is on ep_rank p // (P / ep_size).
    Raises InvalidArgument where ranks do not get equal slots, an expert has none, or a load is no load.
    """

    ep_size: int
    physical_to_logical: tuple[int, ...]
    load: tuple[float, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "physical_to_logical", tuple(map(int, self.physical_to_logical)))
        object.__setattr__(self, "load", tuple(map(float, self.load)))
        slots, experts = self.physical_to_logical, range(self.num_experts)
        if self.ep_size < 1:
            raise InvalidArgument("ep_size", self.ep_size, "1 or more ranks")
        if len(slots) % self.ep_size:
            raise InvalidArgument("physical_to_logical", f"{len(slots)} slots", f"a multiple of {self.ep_size} ranks")
        if set(slots) != set(experts):
            odd = sorted(set(slots) ^ set(experts))
            accepted = f"ids below num_experts = {self.num_experts}, and each once or more"
            raise InvalidArgument("physical_to_logical", f"{odd} missing or unknown", accepted)
        check_load(self.load)

    def check_ranks(self, parallel: Parallel) -> None:
        """Raises InvalidArgument for a layout of another number of ranks."""
        if parallel.size != self.ep_size:
            raise InvalidArgument("placement", f"one over {self.ep_size} ranks", f"one over those of {parallel}")

    @property
    def num_experts(self) -> int:
        """Logical ones."""
        return len(self.load)

    @property
    def num_physical_experts(self) -> int:
        return len(self.physical_to_logical)

    @cached_property
    def logical_to_physical(self) -> tuple[tuple[int, ...], ...]:
        """The slots of each logical expert, ascending."""
        slots: list[list[int]] = [[] for _ in self.load]
        for slot, expert in enumerate(self.physical_to_logical):
            slots[expert].append(slot)
        return tuple(map(tuple, slots))

    @property
    def replica_counts(self) -> tuple[int, ...]:
        """How many slots each logical expert has."""
        return tuple(map(len, self.logical_to_physical))

    def local_experts(self, ep_rank: int) -> tuple[int, ...]:
        """The logical experts in a rank's slots, in their order: what it loads."""
        each = self.num_physical_experts // self.ep_size
        return self.physical_to_logical[ep_rank * each : (ep_rank + 1) * each]

    @cached_property
    def rank_loads(self) -> tuple[float, ...]:
        """Each rank's, where an expert's load is shared out evenly among its replicas."""
        counts = self.replica_counts
        shares = [load / count for load, count in zip(self.load, counts, strict=True)]
        return tuple(math.fsum(shares[expert] for expert in self.local_experts(rank)) for rank in range(self.ep_size))

    @cached_property
    def unplaced_rank_loads(self) -> tuple[float, ...]:
        """The same without a placement: each expert once, in order, as `Parallel.shard` has them."""
        shards = [Parallel("ep", self.ep_size, rank).shard(self.num_experts) for rank in range(self.ep_size)]
        return tuple(math.fsum(self.load[expert] for expert in shard) for shard in shards)

    @property
    def balance(self) -> Balance:
        counts = self.replica_counts
        replicated = sum(count > 1 for count in counts)
        return Balance(imbalance(self.unplaced_rank_loads), imbalance(self.rank_loads), replicated, max(counts))

    def to_physical(self, topk_ids: Tensor, start: int = 0) -> Tensor:
        """Logical ids [T, k], int32 or int64 -> int32 [T, k]: the slot that does the work of each.

        Token t takes the (start + t) modulo n-th of an expert's n replicas, so replicas get as many of T tokens that
        choose alike, give or take one. start: of this call's first token among those of all ranks, where each routes
        its own; else ranks with one token each would all take the first replica.
        Negative ids become -1. Ids of num_experts and above are an InvalidArgument in eager calls on the CPU; on CUDA,
        where looking would stall the stream, and under torch.compile they become -1. The first call on a device copies
        the tables there, so it must be made before a CUDA graph is captured.
        """
        if topk_ids.ndim != 2 or topk_ids.dtype not in (torch.int32, torch.int64):
            given = f"{topk_ids.dtype} of shape {list(topk_ids.shape)}"
            raise InvalidArgument("topk_ids", given, "int32 or int64 ids [num_tokens, top_k]")
        can_look = topk_ids.device.type == "cpu" and not torch.compiler.is_compiling()
        if can_look and topk_ids.numel() and (largest := int(topk_ids.max())) >= self.num_experts:
            raise InvalidArgument("topk_ids", largest, f"ids below num_experts = {self.num_experts}")
        counts, slots = self._tables(topk_ids.device)
        # The tables' last row is of no expert; -1 and num_experts both reach it, where a mask would take more launches.
        ids = topk_ids.clamp(-1, self.num_experts)
        token = torch.arange(start, start + len(ids), device=ids.device, dtype=torch.int32)
        return slots[ids, token[:, None] % counts[ids]]

    def _tables(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """int32 on the device: replica counts [E + 1], and slots [E + 1, most] with -1 where there are no more."""
        if device not in self._tables_by_device:
            slots = [*self.logical_to_physical, (-1,)]
            most = max(map(len, slots))
            filled = [(*found, *[-1] * (most - len(found))) for found in slots]
            tables = [list(map(len, slots)), filled]
            counts, table = (torch.tensor(each, dtype=torch.int32, device=device) for each in tables)
            self._tables_by_device[device] = counts, table
        return self._tables_by_device[device]

    @cached_property
    def _tables_by_device(self) -> dict[torch.device, tuple[Tensor, Tensor]]:
        return {}


def check_load(load: Sequence[float]) -> None:
    if not all(math.isfinite(each) and each >= 0 for each in load) or not sum(load) > 0:
        raise InvalidArgument("load", "other numbers", "finite ones of 0 and more, with one above 0 or more")


def imbalance(rank_loads: Sequence[float]) -> float:
    """The largest over the mean: how much longer than needed the ranks wait for the busiest; 1 is even."""
    return max(rank_loads) * len(rank_loads) / math.fsum(rank_loads)


class _Sizes(Protocol):
    @property
    def num_experts(self) -> int: ...
    @property
    def num_physical_experts(self) -> int: ...


def physical_config(config: MoEConfig, placement: _Sizes) -> MoEConfig:
    """The layer of a model as its ranks run it, with an expert for each slot. placement: a Placement or Placements.

    It takes topk_ids, never router logits: `route` and `Placement.to_physical` come before it. What only routing reads,
    groups, the scaling factor and which experts are shared, is left out.

    Raises InvalidArgument for a config of another number of experts.
    """
    if config.num_experts != placement.num_experts:
        accepted = f"num_experts = {config.num_experts}, as {config.name} has"
        raise InvalidArgument("placement", f"one of {placement.num_experts} experts", accepted)
    return dataclasses.replace(
        config,
        num_experts=placement.num_physical_experts,
        n_group=1,
        topk_group=1,
        routed_scaling_factor=1.0,
        num_fused_shared_experts=0,
        experts_are_slots=True,
    )


class Placements(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, dict=True):
    """A model's placements by layer, as `balancing.place` makes them: what a file holds.

    layers: by the name that the recorded load has for each, such as its router's. All have as many experts, slots and
    ranks. n_group, topk_group, num_fused_shared_experts: the model's, which a `physical_config` no longer tells.
    """

    schema_version: int = SCHEMA_VERSION
    n_group: int
    topk_group: int
    num_fused_shared_experts: int
    layers: dict[str, Placement]

    def __post_init__(self) -> None:
        sizes = {(each.ep_size, each.num_experts, each.num_physical_experts) for each in self.layers.values()}
        if len(sizes) != 1:
            accepted = "one layer or more, all of as many ranks, experts and slots"
            raise InvalidArgument("layers", f"{len(self.layers)} layers of {len(sizes)} kinds", accepted)

    def layer(self, index: int) -> Placement:
        """The (index modulo layers)-th."""
        return self._in_order[index % len(self._in_order)]

    @cached_property
    def _in_order(self) -> tuple[Placement, ...]:
        return tuple(self.layers.values())

    @property
    def ep_size(self) -> int:
        return self.layer(0).ep_size

    @property
    def num_experts(self) -> int:
        return self.layer(0).num_experts

    @property
    def num_physical_experts(self) -> int:
        return self.layer(0).num_physical_experts

    def check_problem(self, config: MoEConfig, parallel: Parallel) -> None:
        """Raises InvalidArgument unless the config is a `physical_config`, over the placements' number of ranks."""
        self.logical_config(config)
        self.layer(0).check_ranks(parallel)

    def logical_config(self, physical: MoEConfig) -> MoEConfig:
        """The layer that the router sees, of which `physical` is the `physical_config`: enough to draw ids for.

        Raises InvalidArgument for a layer of another number of experts.
        """
        if physical.num_experts != self.num_physical_experts:
            given, hint = f"num_experts = {physical.num_experts}", "Take the placement's physical_config."
            raise InvalidArgument("config", given, f"{self.num_physical_experts}, the slots of the placement", hint)
        return dataclasses.replace(
            physical,
            num_experts=self.num_experts,
            n_group=self.n_group,
            topk_group=self.topk_group,
            num_fused_shared_experts=self.num_fused_shared_experts,
            experts_are_slots=False,
        )

    def digest(self) -> str:
        """16 hex digits of sha256 over all of it."""
        return hashlib.sha256(msgspec.json.encode(self)).hexdigest()[:16]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the file whole or not at all. Raises InvalidArgument where the folder cannot be written."""
        # A line: indented, every slot would have one, and DeepSeek-R1 has 30,000 numbers.
        write_whole(path, msgspec.json.encode(self) + b"\n")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Placements:
        """Raises InvalidArgument with the reason for a file that is missing, damaged, or not such a file."""
        try:
            data = Path(path).read_bytes()
        except OSError as error:
            raise _refused(path, f"cannot be read: {error.strerror}") from error
        try:
            version = msgspec.json.decode(data, type=_Header).schema_version
            if version != SCHEMA_VERSION:
                raise _refused(path, f"schema version {version}, this moe_runtime reads {SCHEMA_VERSION}")
            return msgspec.json.decode(data, type=cls)
        except msgspec.ValidationError as error:
            raise _refused(path, f"damaged, or no placement: {error}") from None
        except msgspec.DecodeError as error:
            raise _refused(path, f"damaged, not JSON: {error}") from None


class _Header(msgspec.Struct):
    schema_version: int


def _refused(path: str | os.PathLike[str], reason: str) -> InvalidArgument:
    return InvalidArgument("placement", f"{path} ({reason})", "a file that `moe-runtime place` wrote")


def read_digest(path: str) -> str:
    """`Placements.digest` of the file at `path`, "" where that is "". Raises InvalidArgument as `Placements.load`."""
    return Placements.load(path).digest() if path else ""
