"""What does one eager layer call cost the host, and which part of it?

    python -m benchmarks.host_overhead --json FILE

Batches of calls short enough not to fill the launch queue, on a layer small enough for the GPU to keep up. A model's
layers follow each other, and a kernel's launch keeps the tensor maps of its last arguments only: hence layers in turn.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table

from benchmarks.common import cuda_executor, default_pair, provenance, write_json
from benchmarks.layer import LAYER
from moe_runtime import FP8BlockWeights, FusedMoE, MoEConfig, Parallel
from moe_runtime.executors.base import LayerInputs, MoEProblem
from moe_runtime.kernels import Stage
from moe_runtime.ops import allocate

CALLS_A_BATCH = 20
BATCHES = 200
LAYERS_IN_TURN = 4


def host_us(call: Callable[[], object]) -> float:
    samples = []
    for _ in range(BATCHES):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        for _ in range(CALLS_A_BATCH):
            call()
        samples.append((time.perf_counter() - begin) / CALLS_A_BATCH * 1e6)
    return statistics.median(samples)


def main(json: Annotated[Path | None, typer.Option()] = None) -> None:
    executor = cuda_executor()
    config, parallel = MoEConfig("small", 512, 512, 32, 4), Parallel.parse("ep1")
    problem = MoEProblem(config, parallel)
    weights = FP8BlockWeights.random(config, 32, device="cuda")
    layer = FusedMoE(config, parallel, weights)
    others = [
        FusedMoE(config, parallel, FP8BlockWeights.random(config, 32, device="cuda")) for _ in range(LAYERS_IN_TURN - 1)
    ]
    in_turn = itertools.cycle([layer, *others])
    x = torch.randn(8, 512, device="cuda", dtype=torch.bfloat16)
    logits = torch.randn(8, 32, device="cuda")
    inputs = LayerInputs(x, routing_logits=logits)
    output = torch.empty_like(x)
    workspace = torch.empty(executor.workspace_bytes(problem, 8), dtype=torch.uint8, device="cuda")
    tactics = default_pair(executor, problem, 8)
    args = executor.arguments(problem, weights, inputs, tactics, output, workspace)

    def allocate_both() -> None:
        allocate((8, 512), (512, 1), torch.bfloat16, x.device)
        allocate((workspace.nbytes,), (1,), torch.uint8, x.device)

    def stages(which: Stage) -> float:
        return host_us(lambda: executor.launch(args, which))

    given = (output, workspace)
    ids, topk_weights = torch.zeros(8, 4, dtype=torch.int32, device="cuda"), torch.ones(8, 4, device="cuda")
    empty_call = stages(Stage(0))
    parts = {
        "layer(x, logits): the whole call": host_us(lambda: layer(x, logits)),
        "layer(x, logits), layers in turn": host_us(lambda: next(in_turn)(x, logits)),
        "layer(x, topk_ids=..., topk_weights=...)": host_us(lambda: layer(x, topk_ids=ids, topk_weights=topk_weights)),
        "checks of x and logits": host_us(lambda: inputs.check(problem, x.device)),
        "allocation of output and workspace": host_us(allocate_both),
        "executor.run, output and workspace given": host_us(
            lambda: executor.run(problem, weights, inputs, tactics, *given)
        ),
        "arguments of the native call": host_us(lambda: executor.arguments(problem, weights, inputs, tactics, *given)),
        "native call that launches nothing": empty_call,
        "all kernel launches": stages(LAYER | Stage.ROUTE) - empty_call,
        "of them GEMM1": stages(Stage.GEMM1) - empty_call,
        "of them GEMM2, which combines": stages(Stage.GEMM2 | Stage.COMBINE) - empty_call,
        "of them route, permute and gather": stages(Stage.ROUTE | Stage.PERMUTE | Stage.GATHER) - empty_call,
    }
    table = Table("part of an eager call", "us")
    for part, us in parts.items():
        table.add_row(part, f"{us:.1f}")
    Console().print(table)
    write_json(json, {"benchmark": "host_overhead", "environment": provenance(executor), "us": parts})


if __name__ == "__main__":
    typer.run(main)
