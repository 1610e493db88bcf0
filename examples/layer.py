"""One layer from router logits on each of two ranks, and the sum of both beside plain torch.

    python examples/layer.py

On the GPU where there is one with built kernels, else on the CPU; both ranks in one process.
"""

import torch
from torch import Tensor

from moe_runtime import FP8BlockWeights, FusedMoE, MoEConfig, Parallel

CONFIG = MoEConfig("example", hidden_size=512, intermediate_size=256, num_experts=16, top_k=4)
TOKENS, RANKS = 32, 2


def plain_torch(x: Tensor, logits: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """The same layer on unquantised weights, an expert at a time."""
    chosen, ids = logits.topk(CONFIG.top_k)
    weights, y = chosen.softmax(-1), torch.zeros_like(x, dtype=torch.float32)
    for expert in range(CONFIG.num_experts):
        token, slot = (ids == expert).nonzero(as_tuple=True)
        gate, up = (x[token].float() @ gate_up[expert].float().T).chunk(2, -1)
        rows = (torch.nn.functional.silu(gate) * up) @ down[expert].float().T
        y.index_add_(0, token, weights[token, slot, None] * rows)
    return y


def main() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    hidden, inter, experts = CONFIG.hidden_size, CONFIG.intermediate_size, CONFIG.num_experts
    torch.manual_seed(0)
    gate_up = (torch.randn(experts, 2 * inter, hidden, device=device) / hidden**0.5).bfloat16()
    down = (torch.randn(experts, hidden, inter, device=device) / inter**0.5).bfloat16()
    x = torch.randn(TOKENS, hidden, device=device).bfloat16()
    logits = torch.randn(TOKENS, experts, device=device)

    y = torch.zeros(TOKENS, hidden, device=device)
    for rank in range(RANKS):
        parallel = Parallel("ep", RANKS, rank)
        local = list(parallel.shard(experts))
        weights = FP8BlockWeights.quantise_bf16(gate_up[local], down[local])
        layer = FusedMoE(CONFIG, parallel, weights)
        part = layer(x, logits)  # [32, 512] bf16: what this rank's experts add
        print(f"rank {rank}: experts {local[0]} to {local[-1]}, output {list(part.shape)} {part.dtype}")
        y += part

    expected = plain_torch(x, logits, gate_up, down)
    error = (y - expected).norm() / expected.norm()
    print(f"relative error against unquantised torch: {error:.3f}")
    assert error < 0.1, "more than rounding weights and rows to e4m3 explains"


if __name__ == "__main__":
    main()
