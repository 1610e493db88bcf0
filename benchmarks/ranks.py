"""What does a layer over several ranks cost, where does the time go, and is its exchange as fast as NCCL's own?

    torchrun --nproc-per-node=2 -m benchmarks.ranks --model qwen3-235b --parallel dep2 --tokens 1,8,64,512 --json FILE

Each point is a number of tokens per rank. First the results: with as many tokens on every rank, with unequal ones, and
in the form of fixed size, each against one rank that has all experts and runs the same kernels; the worst rank's
relative error counts. own is that of the first with the kernels that each would choose, of which some round to bf16
between gate_up and down, so that activations fall to the other side of an e4m3 step. Then the times, of the slowest
rank:

- dispatch, experts, combine: an eager layer on ready ids, part by part, the wait for counts included.
- fixed: the layer on ready ids with a capacity, which waits for nothing, from a CUDA graph.
- chunks: the same cut into so many, whose exchange overlaps with the experts, beside the same chunks one after
  another. gained is the share of time that the overlap saves.
- exchange: the messages of the dispatch alone, against one all_to_all_single of as many bytes to the same ranks; back
  is the way back alone. Bus bandwidth counts the bytes that leave the rank.

A layout without dispatch (`ep2`, `tp2`) has no exchange; its combine is NCCL's all-reduce. `--small` does all this on
the CPU with gloo and a layer that it can time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.distributed as dist
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.common import default_pair, parse_counts, pinned, write_json
from benchmarks.ranked import join, of_slowest, provenance, share, small_config, time_captured, time_parts
from moe_runtime import FP8BlockWeights, FusedMoE, MoEConfig, Parallel, ParallelMoE, Plan
from moe_runtime.executors.base import LayerInputs, MoEProblem
from moe_runtime.parallel.dispatch import AllToAll
from moe_runtime.reference import relative_error
from moe_runtime.routing import route
from moe_runtime.workload import kernel_rows

BOUND = 1e-2
PARTS = ("dispatch", "experts", "combine")
CHUNKS = (2, 4)
LEAST_CHUNK = 128
"""Tokens below which cutting a call has nothing to gain: the kernels read all weights for every chunk."""
LAUNCHES = 10


@dataclass(frozen=True)
class Bench:
    """One layer on one rank. whole: the weights of all ranks."""

    config: MoEConfig
    parallel: Parallel
    device: torch.device
    weights: FP8BlockWeights
    whole: FP8BlockWeights
    plan: Plan | None
    dispatch: str | None
    repeats: int

    @classmethod
    def make(
        cls, config: MoEConfig, parallel: Parallel, device: torch.device, plan: Plan | None, dispatch: str | None,
        repeats: int,
    ) -> Bench:  # fmt: skip
        whole = FP8BlockWeights.random(config, config.num_experts, seed=0, device=device)
        weights = share(whole, MoEProblem(config, parallel))
        return cls(config, parallel, device, weights, whole, plan, dispatch, repeats)

    def layer(self, max_num_tokens: int, plan: Plan | None = None) -> ParallelMoE:
        return ParallelMoE(
            self.config,
            self.parallel,
            self.weights,
            plan or self.plan,
            dispatch=self.dispatch,
            max_num_tokens=max(1, max_num_tokens),
        )

    def tokens(self, count: int) -> LayerInputs:
        """With ready ids, of this rank's own tokens under dep, else the same on all."""
        seed = self.parallel.ep_rank if self.parallel.use_dp else 0
        generator = torch.Generator(self.device).manual_seed(seed)
        x = torch.randn(count, self.config.hidden_size, generator=generator, device=self.device).bfloat16()
        logits = torch.randn(count, self.config.num_routed_experts, generator=generator, device=self.device)
        ids, weights = route(self.config, logits)
        return LayerInputs(x, topk_ids=ids, topk_weights=weights)

    def errors(self, count: int) -> dict[str, float]:
        """The worst rank's relative error by form."""
        unequal = count * (self.parallel.ep_rank + 1) // self.parallel.size if self.parallel.use_dp else count
        calls = {"equal": (count, None), "unequal": (unequal, None), "fixed": (unequal, count)}
        own, single, found = self.layer(count), Parallel("ep", 1), {}
        problem, executor = own.problem, own.experts.executor
        pair = default_pair(executor, problem, kernel_rows(count, self.parallel))
        same = self.layer(count, pinned(problem, executor, pair))
        plan = pinned(MoEProblem(self.config, single), executor, pair)
        alone = FusedMoE(self.config, single, self.whole, plan)
        for name, (tokens, capacity) in calls.items():
            given = self.tokens(tokens)
            found[name] = relative_error(call(same, given, capacity=capacity), call(alone, given))
        given = self.tokens(count)
        found["own"] = relative_error(call(own, given), call(FusedMoE(self.config, single, self.whole), given))
        return of_slowest(self.device, found)

    def parts(self, given: LayerInputs) -> dict[str, float]:
        layer = self.layer(len(given.hidden_states))

        def run(done: Callable[[], None]) -> None:
            arrived = layer.dispatcher.dispatch(given, 0, None)
            done()
            partial = call(layer.experts, arrived.inputs)
            done()
            layer.dispatcher.combine(partial, arrived.handle)
            done()

        return time_parts(self.device, run, PARTS, self.repeats)

    def fixed(self, given: LayerInputs) -> float:
        count = len(given.hidden_states)
        layer = self.layer(count)
        return time_captured(
            self.device, {"fixed": lambda: call(layer, given, capacity=count)}, LAUNCHES, self.repeats
        )["fixed"]

    def chunks(self, given: LayerInputs) -> dict[str, dict[str, float]]:
        """By number of chunks: overlapped, one after another, and the share of time that the overlap saves."""
        count, found = len(given.hidden_states), {}
        for number in CHUNKS:
            size = -(-count // number)
            if size < LEAST_CHUNK and self.device.type == "cuda":
                continue
            layer = self.layer(size)
            cuts = [cut(given, slice(first, first + size)) for first in range(0, count, size)]

            def overlapped(layer: ParallelMoE = layer) -> None:
                call(layer, given, capacity=count)

            def serial(layer: ParallelMoE = layer, cuts: list[LayerInputs] = cuts) -> None:
                for part in cuts:
                    call(layer, part, capacity=len(part.hidden_states))

            us = time_captured(self.device, {"overlapped": overlapped, "serial": serial}, 1, self.repeats)
            found[str(number)] = us | {"gained": 1 - us["overlapped"] / us["serial"]}
        return found

    def exchange(self, given: LayerInputs) -> dict[str, Any] | None:
        """The rows of a dispatch and of a combine alone; None for a layout without an all-to-all."""
        count = len(given.hidden_states)
        layer = self.layer(count)
        dispatcher = layer.dispatcher
        if not isinstance(dispatcher, AllToAll):
            return None
        ranks = dispatcher.ranks
        arrived = dispatcher.dispatch(given, 0, None)
        handle, tokens = arrived.handle, len(arrived.inputs.hidden_states)
        packed, row_bytes = handle.packed, layer.packing.layout.pitch
        came = layer.packing.layout.empty(tokens, self.device)
        # What NCCL itself takes for as many bytes to the same ranks, as they lie.
        sizes = {"": row_bytes, "back ": 2 * self.config.hidden_size}
        raw: dict[str, tuple[Tensor, Tensor, list[int], list[int]]] = {}
        for way, size in sizes.items():
            to, of = (handle.sent, handle.received) if way == "" else (handle.received, handle.sent)
            out, back = ([rows * size for rows in each] for each in (to, of))
            send = torch.zeros(sum(out), dtype=torch.uint8, device=self.device)
            raw[way] = torch.empty(sum(back), dtype=torch.uint8, device=self.device), send, back, out
        partial = torch.zeros((tokens, self.config.hidden_size), dtype=torch.bfloat16, device=self.device)
        returned = packed.returned(sum(handle.sent))
        calls: dict[str, Callable[[], object]] = {
            "exchange": lambda: dispatcher.exchange(came, handle),
            "nccl": lambda: ranks.all_to_all(*raw[""]),
            "back": lambda: ranks.all_to_all(returned, partial[: sum(handle.received)], handle.sent, handle.received),
            "back nccl": lambda: ranks.all_to_all(*raw["back "]),
        }
        us = time_captured(self.device, calls, LAUNCHES, self.repeats)
        own = dist.get_rank(ranks.group)
        leaving = (sum(handle.sent) - handle.sent[own]) * row_bytes
        coming = (sum(handle.received) - handle.received[own]) * 2 * self.config.hidden_size
        bytes_of = {name: coming if name.startswith("back") else leaving for name in us}
        return {
            "us": us,
            "bytes": {"exchange": leaving, "back": coming},
            "GBps": {name: bytes_of[name] / each / 1e3 for name, each in us.items()},
            "of_nccl": us["nccl"] / us["exchange"],
            "back_of_nccl": us["back nccl"] / us["back"],
        }

    def point(self, count: int) -> dict[str, Any]:
        errors = self.errors(count)
        given = self.tokens(count)
        return {
            "errors": errors,
            "us": self.parts(given),
            "fixed_us": self.fixed(given),
            "chunks": self.chunks(given),
            "exchange": self.exchange(given),
        }


def call(layer: FusedMoE | ParallelMoE, given: LayerInputs, **more: Any) -> Tensor:
    x, scale, _, _, ids, weights = given
    if scale is not None:
        more["hidden_states_scale"] = scale
    return layer(x, topk_ids=ids, topk_weights=weights, **more)


def cut(given: LayerInputs, rows: slice) -> LayerInputs:
    assert given.topk_ids is not None and given.topk_weights is not None
    return LayerInputs(given.hidden_states[rows], topk_ids=given.topk_ids[rows], topk_weights=given.topk_weights[rows])


def worst_error(point: Mapping[str, Any]) -> float:
    """Of those with the same kernels on both sides."""
    return max(error for name, error in point["errors"].items() if name != "own")


def row(count: int, point: dict[str, Any]) -> list[str]:
    us, exchange = point["us"], point["exchange"]
    chunks = " ".join(
        f"{number}: {each['overlapped']:.0f} ({each['gained']:.0%})" for number, each in point["chunks"].items()
    )
    ours, nccl = (f"{exchange['GBps'][name]:.1f}" if exchange else "-" for name in ("exchange", "nccl"))
    return [
        str(count),
        f"{worst_error(point):.1e}",
        *(f"{us[name]:.1f}" for name in PARTS),
        f"{sum(us.values()):.1f}",
        f"{point['fixed_us']:.1f}",
        chunks or "-",
        ours,
        nccl,
        f"{exchange['of_nccl']:.2f}" if exchange else "-",
        f"{exchange['back_of_nccl']:.2f}" if exchange else "-",
    ]


COLUMNS = ("tokens", "error", *PARTS, "sum us", "fixed us", "chunks us", "GB/s", "NCCL GB/s", "of NCCL", "back of NCCL")


def main(
    model: str = "qwen3-235b",
    parallel: str = "dep2",
    tokens: str = "1,8,64,512,2048,8192",
    json: Annotated[Path | None, typer.Option()] = None,
    plan: Annotated[Path | None, typer.Option(help="Of this layout; by default the kernels' default tactics.")] = None,
    dispatch: Annotated[str | None, typer.Option(help="By name; by default the layout's.")] = None,
    repeats: int = 20,
    small: Annotated[bool, typer.Option("--small")] = False,
) -> None:
    device = join(small)
    layout = Parallel.parse(parallel, dist.get_rank())
    config = small_config(model) if small else MoEConfig.preset(model)
    loaded = None if plan is None else Plan.load(plan)
    bench = Bench.make(config, layout, device, loaded, dispatch, repeats)
    payload: dict[str, Any] = {"benchmark": "ranks", "small": small, "model": model, "parallel": parallel}
    payload |= {"dispatch": dispatch, "environment": provenance(device), "results": {}}
    table = Table(*COLUMNS, title=f"{model} {parallel}: microseconds of the slowest of {layout.world_size} ranks")
    for count in parse_counts(tokens):
        point = bench.point(count)
        payload["results"][str(count)] = point
        table.add_row(*row(count, point))
        if layout.rank == 0:
            write_json(json, payload)  # after each point: the next may fail
        worst = worst_error(point)
        assert worst <= BOUND, f"{count} tokens: a relative error of {worst:.3g}"
    if layout.rank == 0:
        Console(width=170).print(table)


if __name__ == "__main__":
    typer.run(main)
