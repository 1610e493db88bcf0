"""What does a plan of the wrong regime cost a model, end to end?

    torchrun --nproc-per-node=2 -m benchmarks.headline --right dep2.json --wrong ep2.json --json FILE

A stack of MoE layers under `--parallel`, each with weights of its own, as many as fit or `--layers`. Every layer is the
projections of the model's attention in bf16, which stand in for all of it, then router, dispatch, experts and combine,
with a residual and a norm around either. Two arms run the same weights on the same tokens; they differ in the plan of
the experts alone: one tuned for this layout, and one for another layout of the same model, GPU and library. A plan of
another key is refused, so the wrong one gets this layout's key: its tactics then serve the tokens per rank that they
were tuned for.

Each number of tokens per rank is one CUDA graph of each arm, of fixed size, without a wait of the host; the graphs take
turns. Tokens per second count on each GPU: under `dep` each has tokens of its own. `--small` runs on the CPU with gloo.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import msgspec
import torch
import torch.distributed as dist
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn.functional import rms_norm

from benchmarks.common import parse_counts, write_json
from benchmarks.ranked import join, of_slowest, provenance, small_config, time_captured
from moe_runtime import FP8BlockWeights, MoEConfig, Parallel, ParallelMoE, Plan
from moe_runtime.executors.base import MoEProblem
from moe_runtime.reference import relative_error
from moe_runtime.weights import random_weights
from moe_runtime.workload import kernel_rows

ARMS = ("wrong", "right")
LAYERS = {"qwen3-235b": 94}
"""Of the whole model."""
PROJECTIONS = {"qwen3-235b": (64 * 128, 2 * 4 * 128)}
"""Columns of the attention's queries, and of its keys and values: heads times their size."""
RESERVED_BYTES = 24 << 30
"""Left for workspaces, graphs and exchange buffers where the layers are as many as fit."""


@dataclass(frozen=True)
class Layer:
    """qkv: bf16 [H, queries + keys and values]. out: bf16 [queries, H]. router: bf16 [H, E]. moe: by arm."""

    qkv: Tensor
    out: Tensor
    router: Tensor
    moe: dict[str, ParallelMoE]

    def __call__(self, x: Tensor, arm: str) -> Tensor:
        """x: [n, H] bf16, as many on every rank."""
        hidden = [x.shape[1]]
        x = x + (rms_norm(x, hidden) @ self.qkv)[:, : len(self.out)] @ self.out
        normed = rms_norm(x, hidden)
        return x + self.moe[arm](normed, normed @ self.router, capacity=len(x))


def rekeyed(plan: Plan, parallel: Parallel) -> Plan:
    """The plan's tactics for as many tokens per rank under another layout."""
    key = msgspec.structs.replace(plan.key, regime=parallel.regime, size=parallel.size, tp_size=parallel.tp_size)
    return msgspec.structs.replace(plan, key=key)


def layers_that_fit(model: str, device: torch.device, each: int) -> int:
    """each: bytes of a layer."""
    free, _ = torch.cuda.mem_get_info(device)
    return max(1, min(LAYERS[model], (free - RESERVED_BYTES) // each))


def layer_bytes(problem: MoEProblem, queries: int, keys_and_values: int) -> int:
    hidden, experts = problem.config.hidden_size, problem.num_local_experts
    weights = (
        experts * 3 * hidden * problem.local_intermediate_size * problem.config.number_format.weights.bytes_per_value
    )
    return int(weights) + 2 * hidden * (2 * queries + keys_and_values + problem.config.num_experts)


def make_layer(
    problem: MoEProblem,
    projections: tuple[int, int],
    plans: dict[str, Plan],
    device: torch.device,
    index: int,
    most: int,
) -> Layer:
    """Random. What all ranks have is the same on all."""
    config, (queries, keys_and_values) = problem.config, projections
    generator = torch.Generator(device).manual_seed(index)

    def draw(rows: int, columns: int) -> Tensor:
        drawn = torch.randn(rows, columns, generator=generator, device=device, dtype=torch.bfloat16)
        return drawn / rows**0.5

    seed = index * problem.parallel.world_size + problem.parallel.rank
    weights = random_weights(problem, seed, device)
    assert isinstance(weights, FP8BlockWeights)
    moe = {arm: ParallelMoE(config, problem.parallel, weights, plans[arm], max_num_tokens=most) for arm in ARMS}
    hidden = config.hidden_size
    return Layer(draw(hidden, queries + keys_and_values), draw(queries, hidden), draw(hidden, config.num_experts), moe)


def measure(stack: Sequence[Layer], device: torch.device, count: int, repeats: int) -> dict[str, Any]:
    """Both arms at one number of tokens per rank."""
    parallel, config = stack[0].moe["right"].problem.parallel, stack[0].moe["right"].problem.config
    generator = torch.Generator(device).manual_seed(1000 + (parallel.ep_rank if parallel.use_dp else 0))
    x = torch.randn(count, config.hidden_size, generator=generator, device=device, dtype=torch.bfloat16)

    def step(arm: str) -> Tensor:
        rows = x
        for layer in stack:
            rows = layer(rows, arm)
        return rows

    def call(arm: str) -> Callable[[], object]:
        return lambda: step(arm)

    difference = of_slowest(device, {"difference": relative_error(step("wrong"), step("right"))})["difference"]
    us = time_captured(device, {arm: call(arm) for arm in ARMS}, 1, repeats)
    of_a_gpu = count if parallel.use_dp else count / parallel.world_size
    return {
        "us": us,
        "tokens_per_second_per_gpu": {arm: 1e6 * of_a_gpu / each for arm, each in us.items()},
        "gain": us["wrong"] / us["right"] - 1,
        "difference": difference,
    }


def main(
    right: Annotated[Path, typer.Option(help="Plan tuned for --parallel.")],
    wrong: Annotated[Path, typer.Option(help="Plan tuned for another layout.")],
    model: str = "qwen3-235b",
    parallel: str = "dep2",
    tokens: str = "8,16,32,64,128,256,512,1024,2048",
    layers: Annotated[int | None, typer.Option(help="By default as many as fit.")] = None,
    json: Annotated[Path | None, typer.Option()] = None,
    repeats: int = 30,
    small: Annotated[bool, typer.Option("--small")] = False,
) -> None:
    device, counts = join(small), parse_counts(tokens)
    layout = Parallel.parse(parallel, dist.get_rank())
    config = small_config(model) if small else MoEConfig.preset(model)
    problem, projections = MoEProblem(config, layout), (256, 128) if small else PROJECTIONS[model]
    plans = {"right": Plan.load(right), "wrong": rekeyed(given := Plan.load(wrong), layout)}
    if layers is None:
        layers = 2 if small else layers_that_fit(model, device, layer_bytes(problem, *projections))
        layers = -int(of_slowest(device, {"fewer": -float(layers)})["fewer"])  # the same on all ranks
    stack = [make_layer(problem, projections, plans, device, index, max(counts)) for index in range(layers)]
    payload: dict[str, Any] = {"benchmark": "headline", "small": small, "model": model, "parallel": parallel}
    payload |= {"layers": layers, "layers_of_the_model": LAYERS[model], "tuned_for": {"right": parallel}}
    payload["tuned_for"]["wrong"] = str(given.key.parallel)
    payload |= {"environment": provenance(device), "results": {}}
    table = Table("tokens per rank", *(f"{arm} {what}" for what in ("ms", "tokens/s") for arm in ARMS), "gain")
    table.title = (
        f"{model} {parallel}, {layers} layers: tokens/s per GPU by plans of {given.key.parallel} and {parallel}"
    )
    for count in counts:
        rows = kernel_rows(count, layout)
        point = measure(stack, device, count, repeats) | {"tactics": {arm: plans[arm].lookup(rows) for arm in ARMS}}
        payload["results"][str(count)] = point
        speeds = point["tokens_per_second_per_gpu"]
        table.add_row(
            str(count),
            *(f"{point['us'][arm] / 1e3:.2f}" for arm in ARMS),
            *(f"{speeds[arm]:.0f}" for arm in ARMS),
            f"{point['gain']:+.1%}",
        )
        if layout.rank == 0:
            write_json(json, payload)  # after each point: the next may fail
    if layout.rank == 0:
        Console(width=140).print(table)


if __name__ == "__main__":
    typer.run(main)
