"""Writes a small checkpoint as DeepSeek's are written, and loads one rank's experts from it.

    python examples/load_checkpoint.py

The second of two ranks reads its half of the experts and nothing of the others. With a real checkpoint, only the folder
and `MoEConfig.preset("deepseek-r1")` differ.
"""

import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file

from moe_runtime import FP8BlockWeights, FusedMoE, MoEConfig, Parallel, load_experts

CONFIG = MoEConfig("example", hidden_size=256, intermediate_size=128, num_experts=8, top_k=2)
LAYER = 3


def write_checkpoint(folder: Path, weights: FP8BlockWeights) -> None:
    """gate, up and down of every expert by DeepSeek's names; weights holds gate and up as one."""
    tensors = {}
    for expert in range(CONFIG.num_experts):
        name = f"model.layers.{LAYER}.mlp.experts.{expert}"
        values, scales = weights.gate_up[expert].chunk(2), weights.gate_up_scale[expert].chunk(2)
        for projection, value, scale in (
            ("gate_proj", values[0], scales[0]),
            ("up_proj", values[1], scales[1]),
            ("down_proj", weights.down[expert], weights.down_scale[expert]),
        ):
            tensors[f"{name}.{projection}.weight"] = value.contiguous()
            tensors[f"{name}.{projection}.weight_scale_inv"] = scale.contiguous()
    save_file(tensors, folder / "model.safetensors")


def main() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    written = FP8BlockWeights.random(CONFIG, CONFIG.num_experts)
    parallel = Parallel.parse("ep2", rank=1)
    with tempfile.TemporaryDirectory() as folder:
        write_checkpoint(Path(folder), written)
        weights = load_experts(folder, LAYER, CONFIG, parallel, device)
    experts = parallel.shard(CONFIG.num_experts)
    print(f"rank 1 holds experts {experts.start} to {experts.stop - 1}")

    layer = FusedMoE(CONFIG, parallel, weights, deterministic=True)
    x = torch.randn(4, CONFIG.hidden_size, device=device).bfloat16()
    ids = torch.tensor([[4, 5], [6, 7], [0, 4], [1, 2]], dtype=torch.int32, device=device)
    topk_weights = torch.full((4, 2), 0.5, device=device)
    y = layer(x, topk_ids=ids, topk_weights=topk_weights)
    print(f"rows with a local expert: {y.any(1).tolist()}")
    assert y.any(1).tolist() == [True, True, True, False], "experts 1 and 2 are rank 0's"

    same = FusedMoE(CONFIG, parallel, share(written, experts).to(device), deterministic=True)
    assert torch.equal(y, same(x, topk_ids=ids, topk_weights=topk_weights)), "what was read is what was written"


def share(weights: FP8BlockWeights, experts: range) -> FP8BlockWeights:
    part = slice(experts.start, experts.stop)
    return FP8BlockWeights(
        weights.gate_up[part], weights.gate_up_scale[part], weights.down[part], weights.down_scale[part]
    )


if __name__ == "__main__":
    main()
