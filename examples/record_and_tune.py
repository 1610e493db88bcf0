"""Records what a model's routers choose, and tunes a layer on that.

    python examples/record_and_tune.py

The model is a stand-in of two blocks whose router is biased, so that a few experts get most rows. Of a real one,
`moe-runtime record` does the same from the command line. On the GPU where there is one with built kernels, else on the
CPU.
"""

import tempfile
from pathlib import Path

import torch
from torch import Tensor, nn

from moe_runtime import MoEConfig, Parallel
from moe_runtime.executors import get_executor
from moe_runtime.executors.base import MoEProblem
from moe_runtime.recording import record
from moe_runtime.tuning import tune
from moe_runtime.weights import random_weights
from moe_runtime.workload import make_workload

CONFIG = MoEConfig("example", hidden_size=256, intermediate_size=128, num_experts=16, top_k=4)
LAYOUT = Parallel.parse("dep2")
MAX_TOKENS = 8  # per rank


class Block(nn.Module):
    """Its router is called `gate`, as in most models, and returns logits [T, E]: `record` finds it by that name."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(CONFIG.hidden_size, CONFIG.num_experts)
        with torch.no_grad():
            self.gate.bias.copy_(torch.linspace(1.5, -1.5, CONFIG.num_experts))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.gate(x).softmax(-1).mean(-1, keepdim=True)


def main() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Block(), Block())
    with torch.inference_mode(), record(model, CONFIG) as recording:
        for _ in range(4):
            model(torch.randn(256, CONFIG.hidden_size))

    device = "cuda" if torch.cuda.is_available() else "cpu"
    problem = MoEProblem(CONFIG, LAYOUT)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "routing.safetensors"
        recording.save(path)
        print(f"recorded {', '.join(recording.layers)}")
        for distribution in ("balanced", f"recorded:{path}"):
            rows = make_workload(CONFIG, LAYOUT, MAX_TOKENS, distribution).rows_per_expert
            print(f"{distribution.partition(':')[0]}: {int(rows.sum())} rows at rank 0, by expert {rows.tolist()}")
        plan = tune(problem, random_weights(problem, device=device), get_executor(device), MAX_TOKENS, distribution)
    assert plan.complete and plan.key.recording, "the plan names the recording by its digest"
    for entry in plan.entries:
        print(f"{entry.bucket} tokens per rank: {entry.gemm1.tactic} and {entry.gemm2.tactic}")


if __name__ == "__main__":
    main()
