"""Ids become slots on the GPU as on the CPU, without a look at them, and layers of slots add up to the model's."""

from __future__ import annotations

import torch

from moe_runtime import FP8BlockWeights, FusedMoE, MoEConfig, Parallel, physical_config
from moe_runtime.balancing import place_layer
from moe_runtime.reference import relative_error
from moe_runtime.routing import route

CONFIG = MoEConfig("small", 512, 384, 32, 4)
PLACEMENT = place_layer([float(1 + expert % 7) ** 2 for expert in range(32)], 4, 8)


def drawn(tokens: int, seed: int = 0) -> torch.Tensor:
    scores = torch.rand(tokens, 32, generator=torch.Generator().manual_seed(seed))
    return scores.topk(4, 1).indices.to(torch.int32)


def test_no_stall_and_no_slot_for_ids_that_are_none() -> None:
    ids, wild = drawn(100), torch.tensor([[-1, 32, 2**31 - 1, 0]], dtype=torch.int32)
    on_gpu, nothing = ids.cuda(), wild.cuda()
    PLACEMENT.to_physical(on_gpu)  # copies the tables
    torch.cuda.set_sync_debug_mode("error")
    try:
        found, none = PLACEMENT.to_physical(on_gpu, 7), PLACEMENT.to_physical(nothing)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(found.cpu(), PLACEMENT.to_physical(ids, 7))
    assert none.tolist() == [[-1, -1, -1, PLACEMENT.logical_to_physical[0][0]]]


def test_in_a_cuda_graph() -> None:
    ids = drawn(64).cuda()
    PLACEMENT.to_physical(ids)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        physical = PLACEMENT.to_physical(ids)
    other = drawn(64, seed=1)
    ids.copy_(other)
    graph.replay()
    assert torch.equal(physical.cpu(), PLACEMENT.to_physical(other))


def test_slots_of_all_ranks_add_up_to_the_layer() -> None:
    whole = FP8BlockWeights.random(CONFIG, 32, seed=1, device="cuda")
    x = torch.randn(200, 512, device="cuda", dtype=torch.bfloat16)
    logits = torch.randn(200, 32, device="cuda")
    ids, weights = route(CONFIG, logits)
    physical, total = PLACEMENT.to_physical(ids), torch.zeros(200, 512, dtype=torch.float64, device="cuda")
    for rank in range(4):
        mine = list(PLACEMENT.local_experts(rank))
        parts = (whole.gate_up, whole.gate_up_scale, whole.down, whole.down_scale)
        local = FP8BlockWeights(*(part.view(torch.uint8)[mine].view(part.dtype) for part in parts))
        layer = FusedMoE(physical_config(CONFIG, PLACEMENT), Parallel("ep", 4, rank), local)
        total += layer(x, topk_ids=physical, topk_weights=weights).double()
    expected = FusedMoE(CONFIG, Parallel.parse("ep1"), whole)(x, logits)
    assert relative_error(total, expected.double()) <= 1e-2
