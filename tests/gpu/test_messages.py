"""What leaves a rank, written by the kernels and by torch: the same messages, and rows that serve where they arrive."""

from __future__ import annotations

from typing import cast

import pytest
import torch

from moe_runtime import FusedMoE, MoEConfig, Parallel
from moe_runtime.executors import get_executor
from moe_runtime.executors.base import MoEProblem
from moe_runtime.executors.cuda import CudaExecutor
from moe_runtime.parallel.native import NativePacking
from moe_runtime.parallel.packing import TorchPacking
from moe_runtime.weights import random_weights
from tests.test_parallel_packing import content

DEVICE = torch.device("cuda")
EXPERTS, TOP_K = 24, 6
COUNTS = (1, 7, 40, 700, 5000)
"""Those that one launch sorts and gathers, and those that take two; of the largest, all blocks of a cluster sort."""


def routed(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids, of which some are absent, and weights."""
    generator = torch.Generator(DEVICE).manual_seed(count)
    scores = torch.rand(count, EXPERTS, generator=generator, device=DEVICE)
    ids = scores.argsort(1)[:, :TOP_K].to(torch.int32)
    absent = torch.rand(count, TOP_K, generator=generator, device=DEVICE) < 0.3
    return ids.masked_fill(absent, -1).contiguous(), torch.rand(count, TOP_K, generator=generator, device=DEVICE)


@pytest.mark.parametrize("format", ["fp8_block", "bf16", "mxfp8_mxfp4"])
@pytest.mark.parametrize("hidden", [256, 7168])
@pytest.mark.parametrize("num_ranks", [2, 8])
@pytest.mark.parametrize("count", COUNTS)
def test_native_messages_are_those_of_torch(format: str, hidden: int, num_ranks: int, count: int) -> None:
    problem = MoEProblem(
        MoEConfig("test", hidden, 256, EXPERTS, TOP_K, format=format), Parallel.parse(f"dep{num_ranks}")
    )
    native = NativePacking(problem, cast(CudaExecutor, get_executor(DEVICE)), DEVICE)
    plain = TorchPacking(problem)
    x = torch.randn(count, hidden, device=DEVICE).bfloat16()
    ids, weights = routed(count)
    mine, theirs = native.pack(x, ids, weights, 11), plain.pack(x, ids, weights, 11)
    told = mine.notices[0].tolist()
    assert told == theirs.notices[0].tolist()
    total = sum(rows for rows, _, _ in told)
    layout = native.layout
    assert torch.equal(content(layout, mine.messages(total)), content(layout, theirs.messages(total)))
    results = torch.randn(total, hidden, device=DEVICE).bfloat16()
    for packed in (mine, theirs):
        packed.returned(total).copy_(results)
    assert torch.equal(mine.add_up(), theirs.add_up())
    capacity = count + 3
    encoded, expected = (packing.encode(x, ids, weights, capacity) for packing in (native, plain))
    assert torch.equal(content(layout, encoded), content(layout, expected))
    came, absent = native.unpack(encoded, count), layout.slots(encoded)[0].clone()
    absent[count:] = -1
    assert came.topk_ids is not None and torch.equal(came.topk_ids, absent)
    assert came.topk_weights is not None and torch.equal(came.topk_weights[:count], weights)


@pytest.mark.parametrize("format", ["fp8_block", "bf16_mxfp4"])
@pytest.mark.parametrize("count", COUNTS)
def test_rows_serve_where_they_arrive(format: str, count: int) -> None:
    problem = MoEProblem(MoEConfig("test", 512, 256, EXPERTS, TOP_K, format=format), Parallel("ep", 1))
    layer = FusedMoE(problem.config, problem.parallel, random_weights(problem, 0, DEVICE), deterministic=True)
    packing = TorchPacking(problem)
    x, (ids, weights) = torch.randn(count, 512, device=DEVICE).bfloat16(), routed(count)
    rows, scale, _, _, sent_ids, sent_weights = packing.layout.inputs(packing.encode(x, ids, weights, count))
    apart = layer(rows, topk_ids=sent_ids, topk_weights=sent_weights, hidden_states_scale=scale)
    assert count == 1 or not rows.is_contiguous()
    assert torch.equal(apart, layer(x, topk_ids=ids, topk_weights=weights))
