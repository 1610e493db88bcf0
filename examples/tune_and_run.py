"""Tunes one rank's share of a layer, keeps the plan in a file, and runs the layer with it.

    python examples/tune_and_run.py

On the GPU where there is one with built kernels, else on the CPU, in seconds: the layer is small and the buckets are
few. `moe-runtime tune` does the same for real models, and checks each kernel in a worker process first.
"""

import tempfile
from pathlib import Path

import torch

from moe_runtime import FusedMoE, MoEConfig, Parallel, Plan, PlanRefused
from moe_runtime.executors import get_executor
from moe_runtime.executors.base import MoEProblem
from moe_runtime.tuning import tune
from moe_runtime.weights import random_weights

CONFIG = MoEConfig("example", hidden_size=256, intermediate_size=128, num_experts=16, top_k=4)
LAYOUT = Parallel.parse("dep2")
MAX_TOKENS = 8  # per rank


def main() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    problem = MoEProblem(CONFIG, LAYOUT)
    weights = random_weights(problem, device=device)
    plan = tune(problem, weights, get_executor(device), MAX_TOKENS, "random")
    for entry in plan.entries:
        print(f"{entry.bucket} tokens per rank, {entry.rows} GEMM rows: {entry.gemm1.tactic} and {entry.gemm2.tactic}")

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "plan.json"
        plan.save(path)
        loaded = Plan.load(path)
    layer = FusedMoE(CONFIG, LAYOUT, weights, plan=loaded)
    rows = 5 * LAYOUT.size  # under dep2 a call of 10 rows stands for 5 tokens per rank
    x = torch.randn(rows, CONFIG.hidden_size, device=device).bfloat16()
    y = layer(x, torch.randn(rows, CONFIG.num_experts, device=device))
    print(f"{rows} rows ran {' and '.join(loaded.lookup(rows) or ())}: {list(y.shape)}")

    try:
        FusedMoE(CONFIG, Parallel.parse("ep2"), weights, plan=loaded)
    except PlanRefused as refusal:
        print(f"ep2: {refusal}")
    else:
        raise AssertionError("a plan of dep2 must not serve ep2")


if __name__ == "__main__":
    main()
