"""Places the experts of a layer for a recorded load, as DeepSeek's expert-parallel load balancer (EPLB) does.

Two greedy steps, source https://github.com/deepseek-ai/EPLB. First replicas: as long as a slot is left, the expert with
the highest load per replica gets one more. Then ranks: replicas, the heaviest first, go to the least loaded rank that
has room. Two replicas on one rank would share nothing, so an expert has no more of them than there are ranks, and a
rank that holds it gets no second.

With several nodes, where routing is limited to groups of experts, groups are packed onto nodes by the same rule first,
and both steps then run within each node: a token's experts lie on no more nodes than it has groups.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor

from .config import MoEConfig
from .distributions import routed_part
from .errors import InvalidArgument
from .parallel import Parallel
from .placement import Placement, Placements, check_load

_ROUNDING = 1e-9


def place(
    config: MoEConfig, loads: Mapping[str, Tensor], ep_size: int, num_redundant_experts: int, num_nodes: int = 1
) -> Placements:
    """The placement of each layer. loads: by layer a histogram [E], or ids [tokens, k], as `recording.read_layers` has
    them: of routed experts. Shared ones have the load of all tokens.

    num_nodes: over which ep_size ranks lie in equal parts; more than 1 only where it divides n_group, and without
    shared experts, which belong to no group. Raises InvalidArgument as `place_layer`.
    """
    if num_nodes > 1 and config.num_fused_shared_experts:
        raise InvalidArgument("num_nodes", num_nodes, "1 for a layer with shared experts, which belong to no group")
    n_group = config.n_group if num_nodes > 1 else 1
    layers = {
        name: place_layer(_load(config, recorded), ep_size, num_redundant_experts, num_nodes, n_group)
        for name, recorded in loads.items()
    }
    return Placements(
        n_group=config.n_group,
        topk_group=config.topk_group,
        num_fused_shared_experts=config.num_fused_shared_experts,
        layers=layers,
    )


def _load(config: MoEConfig, recorded: Tensor) -> list[float]:
    routed = routed_part(config)
    counts = recorded if recorded.ndim == 1 else recorded.flatten().bincount(minlength=routed.num_experts)
    if len(counts) != routed.num_experts:
        raise InvalidArgument(
            "load", f"{len(counts)} experts", f"the {routed.num_experts} that {config.name} routes to"
        )
    tokens = float(counts.sum()) / routed.top_k
    return [*counts.tolist(), *[tokens] * config.num_fused_shared_experts]


def place_layer(
    load: Sequence[float], ep_size: int, num_redundant_experts: int, num_nodes: int = 1, n_group: int = 1
) -> Placement:
    """The placement of a layer with the load of each of its E experts. n_group: read where there are several nodes.

    Its busiest rank has never more load than without a placement. Where the greedy steps do not reach that, which
    takes a load that is nearly even over ranks as it is, experts stay in order, and redundant slots repeat the rank's.

    Raises InvalidArgument for a load that is none, slots that ranks cannot share equally or that outnumber what
    different experts fill, more ranks than experts, and nodes that do not divide ranks and groups.
    """
    check_load(load)
    _check(len(load), ep_size, num_redundant_experts, num_nodes, n_group)
    slots = len(load) + num_redundant_experts
    size = len(load) // n_group
    members = [range(group * size, (group + 1) * size) for group in range(n_group)]
    group_loads = {group: sum(load[expert] for expert in experts) for group, experts in enumerate(members)}
    placed: list[int] = []
    for groups in _pack(group_loads, range(n_group), num_nodes):
        experts = [expert for group in groups for expert in members[group]]
        counts = _replicate({expert: load[expert] for expert in experts}, slots // num_nodes, ep_size // num_nodes)
        shares = {expert: load[expert] / count for expert, count in counts.items()}
        replicas = [expert for expert, count in counts.items() for _ in range(count)]
        placed += itertools.chain(*_pack(shares, replicas, ep_size // num_nodes))
    greedy = Placement(ep_size, tuple(placed), tuple(load))
    if max(greedy.rank_loads) <= max(greedy.unplaced_rank_loads) * (1 + _ROUNDING):
        return greedy
    return Placement(ep_size, _in_order(len(load), ep_size, slots), greedy.load)


def _check(experts: int, ep_size: int, redundant: int, num_nodes: int, n_group: int) -> None:
    if not 1 <= ep_size <= experts:
        raise InvalidArgument("ep_size", ep_size, f"1 to num_experts = {experts} ranks")
    if num_nodes < 1 or ep_size % num_nodes or n_group % num_nodes or (num_nodes > 1 and experts % ep_size):
        accepted = f"a divisor of {ep_size} ranks and of n_group = {n_group}, and 1 unless ranks divide experts"
        raise InvalidArgument("num_nodes", num_nodes, accepted)
    if redundant < 0 or (experts + redundant) % ep_size:
        accepted = f"0 or more, which with num_experts = {experts} make a multiple of {ep_size} ranks"
        hint = f"{-experts % ep_size} is the least; then steps of {ep_size}."
        raise InvalidArgument("num_redundant_experts", redundant, accepted, hint)
    most = experts * (ep_size // num_nodes - 1)
    if redundant > most:
        accepted = f"at most {most}: each expert once on every rank" + (" of its node" if num_nodes > 1 else "")
        raise InvalidArgument("num_redundant_experts", redundant, accepted)


def _replicate(load: Mapping[int, float], slots: int, most: int) -> dict[int, int]:
    """Replicas of each expert, `slots` in all and at most `most` of one."""
    counts = dict.fromkeys(load, 1)
    waiting = [(-each, expert) for expert, each in load.items()]
    heapq.heapify(waiting)
    for _ in range(slots - len(load)):
        _, expert = heapq.heappop(waiting)
        counts[expert] += 1
        if counts[expert] < most:
            heapq.heappush(waiting, (-load[expert] / counts[expert], expert))
    return counts


def _pack(weights: Mapping[int, float], items: Iterable[int], num_bins: int) -> list[list[int]]:
    """Bins of equally many items, ascending, none twice in one. weights: by item, of which num_bins come at most."""
    heaviest_first = sorted(items, key=lambda item: (-weights[item], item))
    capacity = len(heaviest_first) // num_bins
    bins: list[list[int]] = [[] for _ in range(num_bins)]
    loads = [0.0] * num_bins

    def put(item: int, to: int) -> None:
        bins[to].append(item)
        loads[to] += weights[item]

    for item in heaviest_first:
        open_bins = [at for at in range(num_bins) if len(bins[at]) < capacity]
        free = [at for at in open_bins if item not in bins[at]]
        if not free:
            # The bins that lack it are full, and each holds an item that an open bin lacks: that one moves there.
            to = min(open_bins, key=loads.__getitem__)
            moves = [(at, x) for at in range(num_bins) if item not in bins[at] for x in bins[at] if x not in bins[to]]
            at, moved = min(
                moves,
                key=lambda move: max(loads[to] + weights[move[1]], loads[move[0]] - weights[move[1]] + weights[item]),
            )
            bins[at].remove(moved)
            loads[at] -= weights[moved]
            put(moved, to)
            free = [at]
        put(item, min(free, key=loads.__getitem__))
    return [sorted(found) for found in bins]


def _in_order(experts: int, ep_size: int, slots: int) -> tuple[int, ...]:
    shards = [Parallel("ep", ep_size, rank).shard(experts) for rank in range(ep_size)]
    ranks = [sorted(itertools.islice(itertools.cycle(shard), slots // ep_size)) for shard in shards]
    return tuple(itertools.chain(*ranks))
