"""The experts as vLLM's own classes select and call them; skipped where vLLM 0.33 is not installed.

docs/integrations/vllm.md says how to run this on a CPU. Nothing of vLLM is replaced here, but for what quantises rows
before a dispatch, which in vLLM is a CUDA or Triton kernel.
"""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

if torch.cuda.is_available():
    pytest.skip("vLLM has one platform in a process: tests/gpu/test_vllm.py", allow_module_level=True)
os.environ.setdefault("VLLM_TARGET_DEVICE", "cpu")
pytest.importorskip("vllm", exc_type=ImportError)

import vllm.model_executor.layers.fused_moe.modular_kernel as mk
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.fused_moe.config import FusedMoEParallelConfig
from vllm.model_executor.layers.fused_moe.expert_map_manager import determine_expert_map
from vllm.model_executor.layers.fused_moe.oracle import fp8
from vllm.model_executor.layers.fused_moe.prepare_finalize.no_dp_ep import (
    MoEPrepareAndFinalizeNoDPEPModular,
)
from vllm.model_executor.layers.quantization.utils.quant_utils import (
    kFp8DynamicTokenSym,
    kFp8Static128BlockSym,
    kFp8StaticTensorSym,
)

from moe_runtime import FP8BlockWeights, InvalidArgument, MoEConfig, Parallel, Unsupported
from moe_runtime.executors.base import MoEProblem
from moe_runtime.integrations import vllm as plugin
from moe_runtime.integrations.vllm.experts import MoeRuntimeExperts
from tests import reference
from tests.test_layer import CLAMPED, DEEPSEEK, RENORMALISE, SAME_POINTS, WEIGHTS, tokens
from tests.test_ops import make_plan, spy_on_tactics
from tests.vllm_support import LAYOUT, SCHEME, ep, kernel, moe_config, offered, run  # noqa: F401


def local(config: MoEConfig, ids: list[int]) -> FP8BlockWeights:
    whole = WEIGHTS[config.name]
    return FP8BlockWeights(whole.gate_up[ids], whole.gate_up_scale[ids], whole.down[ids], whole.down_scale[ids])


def routing(config: MoEConfig, count: int, dtype: torch.dtype = torch.int32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(count)
    ids = torch.rand(count, config.num_experts, generator=generator).argsort(-1)[:, : config.top_k].to(dtype)
    return ids, torch.rand(count, config.top_k, generator=generator)


def expected(
    config: MoEConfig, weights: FP8BlockWeights, x: Tensor, ids: Tensor, topk: Tensor, offset: int = 0
) -> Tensor:
    return reference.layer(config, weights, offset, x, ids, topk, quantised=True)


@pytest.mark.parametrize("config", [RENORMALISE, DEEPSEEK, CLAMPED], ids=lambda config: config.name)
@pytest.mark.parametrize("ids_dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.usefixtures("offered")
def test_kernel(config: MoEConfig, ids_dtype: torch.dtype) -> None:
    weights = WEIGHTS[config.name]
    built = kernel(config, weights)
    assert type(built.prepare_finalize) is MoEPrepareAndFinalizeNoDPEPModular
    for count in (1, 7, 30):
        x, (ids, topk) = tokens(config, count), routing(config, count, ids_dtype)
        output = run(built, config, weights, x, ids, topk)
        assert output.dtype == torch.bfloat16
        assert reference.relative_error(output, expected(config, weights, x, ids, topk)) <= SAME_POINTS


@pytest.mark.usefixtures("offered")
def test_no_tokens() -> None:
    weights = WEIGHTS[RENORMALISE.name]
    output = run(kernel(RENORMALISE, weights), RENORMALISE, weights, tokens(RENORMALISE, 0), *routing(RENORMALISE, 0))
    assert output.shape == (0, 256)


@pytest.mark.parametrize("placement", ["linear", "round_robin"])
@pytest.mark.parametrize("rank", range(4))
@pytest.mark.usefixtures("offered")
def test_expert_map(rank: int, placement: Any) -> None:
    _, expert_map, _ = determine_expert_map(4, rank, 16, placement)
    held = [e for e in range(16) if expert_map[e] >= 0]
    weights = local(DEEPSEEK, held)
    built = kernel(DEEPSEEK, weights, ep(4, rank))
    x, (ids, topk) = tokens(DEEPSEEK, 25), routing(DEEPSEEK, 25)
    ids[3], ids[5, 1] = -1, -1
    local_ids = torch.where(ids >= 0, expert_map[ids], -1)
    for _ in range(2):  # the second call finds the map read
        output = run(built, DEEPSEEK, weights, x, ids, topk, expert_map=expert_map)
        want = reference.layer(
            dataclasses.replace(DEEPSEEK, num_experts=16), weights, 0, x, local_ids, topk, quantised=True
        )
        assert reference.relative_error(output, want) <= SAME_POINTS
        assert not output[3].any()


@pytest.mark.usefixtures("offered")
def test_ranks_add_up() -> None:
    x, (ids, topk) = tokens(DEEPSEEK, 12), routing(DEEPSEEK, 12)
    total = torch.zeros(12, 128, dtype=torch.float64)
    for rank in range(4):
        _, expert_map, _ = determine_expert_map(4, rank, 16, "round_robin")
        weights = local(DEEPSEEK, list(range(rank, 16, 4)))
        total += run(
            kernel(DEEPSEEK, weights, ep(4, rank)), DEEPSEEK, weights, x, ids, topk, expert_map=expert_map
        ).double()
    whole = WEIGHTS[DEEPSEEK.name]
    assert reference.relative_error(total, expected(DEEPSEEK, whole, x, ids, topk)) <= SAME_POINTS


@pytest.mark.usefixtures("offered")
def test_a_changed_map_is_read_again() -> None:
    _, expert_map, _ = determine_expert_map(2, 0, 8)
    weights = local(RENORMALISE, [0, 1, 2, 3])
    built = kernel(RENORMALISE, weights, ep(2, 0))
    x, (ids, topk) = tokens(RENORMALISE, 9), routing(RENORMALISE, 9)
    first = run(built, RENORMALISE, weights, x, ids, topk, expert_map=expert_map)
    swapped = expert_map.roll(4)
    moved = run(built, RENORMALISE, weights, x, (ids + 4) % 8, topk, expert_map=swapped)
    assert torch.equal(first, moved)
    expert_map.copy_(swapped)
    assert torch.equal(run(built, RENORMALISE, weights, x, (ids + 4) % 8, topk, expert_map=expert_map), first)


@pytest.mark.usefixtures("offered")
def test_quantised_rows_of_a_dispatch() -> None:
    layout = ep(2, 1, dp_size=2, dp_rank=1)
    weights = local(RENORMALISE, [4, 5, 6, 7])
    _, expert_map, _ = determine_expert_map(2, 1, 8)
    built = kernel(RENORMALISE, weights, layout)
    assert not built.fused_experts.expects_unquantized_inputs
    x, (ids, topk) = tokens(RENORMALISE, 17), routing(RENORMALISE, 17)
    output = run(built, RENORMALISE, weights, x, ids, topk, expert_map=expert_map)
    assert reference.relative_error(output, expected(RENORMALISE, weights, x, ids, topk, 4)) <= SAME_POINTS


@pytest.mark.usefixtures("offered")
def test_router_weight_on_input() -> None:
    config = dataclasses.replace(RENORMALISE, top_k=1)
    weights = WEIGHTS[RENORMALISE.name]
    x, (ids, topk) = tokens(config, 11), routing(config, 11)
    output = run(kernel(config, weights), config, weights, x, ids, topk, apply_router_weight_on_input=True)
    want = expected(config, weights, x * topk.bfloat16(), ids, torch.ones_like(topk))
    assert reference.relative_error(output, want) <= SAME_POINTS


@pytest.mark.usefixtures("offered")
def test_tensor_parallel_slices() -> None:
    whole, x, (ids, topk) = WEIGHTS[DEEPSEEK.name], tokens(DEEPSEEK, 8), routing(DEEPSEEK, 8)
    gate_up = whole.gate_up.view(torch.uint8).view(16, 2, 2, 128, 128)
    gate_up_scale, down = whole.gate_up_scale.view(16, 2, 2, 1), whole.down.view(torch.uint8).view(16, 128, 2, 128)
    total = torch.zeros(8, 128, dtype=torch.float64)
    for rank in range(2):
        weights = FP8BlockWeights(
            gate_up[:, :, rank].reshape(16, 256, 128).view(torch.float8_e4m3fn),
            gate_up_scale[:, :, rank].reshape(16, 2, 1).contiguous(),
            down[:, :, rank].contiguous().view(torch.float8_e4m3fn),
            whole.down_scale[:, :, rank : rank + 1].contiguous(),
        )
        layout = dataclasses.replace(LAYOUT, tp_size=2, tp_rank=rank)
        total += run(kernel(DEEPSEEK, weights, layout), DEEPSEEK, weights, x, ids, topk).double()
    assert reference.relative_error(total, expected(DEEPSEEK, whole, x, ids, topk)) <= SAME_POINTS


@pytest.mark.usefixtures("offered")
def test_output_is_written_in_place() -> None:
    """What vLLM allocates for the experts is what it returns."""
    weights = WEIGHTS[RENORMALISE.name]
    experts = kernel(RENORMALISE, weights).fused_experts
    x, (ids, topk) = tokens(RENORMALISE, 6), routing(RENORMALISE, 6)
    shapes = experts.workspace_shapes(6, 256, 256, 2, 8, 8, None, MoEActivation.SILU)
    assert shapes[2] == (6, 256)
    workspaces = [torch.empty(shape, dtype=torch.bfloat16) for shape in shapes[:2]]
    output = torch.full((6, 256), torch.nan, dtype=torch.bfloat16)
    arguments = (weights.gate_up, weights.down, topk, ids, MoEActivation.SILU, 8, None, None, None, *workspaces, None)
    assert experts.apply(output, x, *arguments, False) is None
    assert reference.relative_error(output, expected(RENORMALISE, weights, x, ids, topk)) <= SAME_POINTS
    with pytest.raises(InvalidArgument, match="global_num_experts"):
        experts.apply(output, x, *arguments[:5], 9, *arguments[6:], False)
    with pytest.raises(InvalidArgument, match="w1"):
        experts.apply(output, x, weights.gate_up[:4], *arguments[1:], False)
    experts.post_gemm2_hook = lambda *_: None
    with pytest.raises(Unsupported, match="post_gemm2_hook"):
        experts.apply(output, x, *arguments, False)


@pytest.mark.parametrize(
    ("changes", "scheme"),
    [
        ({"moe_backend": "triton"}, SCHEME),
        ({"in_dtype": torch.float16}, SCHEME),
        ({"has_bias": True}, SCHEME),
        ({"swiglu_alpha": 1.702}, SCHEME),
        ({"intermediate_size": 192}, SCHEME),
        ({"hidden_dim": 192}, SCHEME),
        ({"activation": MoEActivation.GELU}, SCHEME),
        ({"activation": MoEActivation.SWIGLUOAI}, SCHEME),
        ({"is_lora_enabled": True}, SCHEME),
        ({"num_experts": 9, "moe_parallel_config": ep(2, 0)}, SCHEME),
        ({"moe_parallel_config": ep(2, 0, dp_size=2, all2all_backend="deepep_low_latency")}, SCHEME),
        ({"moe_parallel_config": ep(2, 0, dp_size=2, all2all_backend="flashinfer_nvlink_one_sided")}, SCHEME),
        ({}, (kFp8StaticTensorSym, kFp8DynamicTokenSym)),
        ({}, (kFp8Static128BlockSym, None)),
    ],
)
@pytest.mark.usefixtures("offered")
def test_other_layers_are_left_to_vllm(changes: dict[str, Any], scheme: Any) -> None:
    config = moe_config(RENORMALISE, **changes)
    supported, reason = MoeRuntimeExperts.is_supported_config(
        MoeRuntimeExperts, config, *scheme, mk.FusedMoEActivationFormat.Standard
    )
    assert not supported and reason
    order = fp8._get_priority_backends(config, *scheme)
    assert order == fp8._get_priority_backends.__wrapped__(config, *scheme)


@pytest.mark.parametrize("backend", ["allgather_reducescatter", "deepep_high_throughput"])
@pytest.mark.usefixtures("offered")
def test_selected_before_all_others(backend: str) -> None:
    config = moe_config(RENORMALISE, ep(2, 1, dp_size=2, all2all_backend=backend))
    assert fp8.select_fp8_moe_backend(config, *SCHEME)[1] is MoeRuntimeExperts
    order = fp8._get_priority_backends(config, *SCHEME)
    others = [b for b in fp8._get_priority_backends.__wrapped__(config, *SCHEME) if b != fp8.Fp8MoeBackend.TRITON]
    assert order == [fp8.Fp8MoeBackend.TRITON, *others]


@pytest.mark.usefixtures("offered")
def test_a_failing_question_leaves_the_layer_to_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> Any:
        raise RuntimeError("no driver")

    monkeypatch.setattr("moe_runtime.integrations.vllm.experts.get_executor", fail)
    assert fp8.select_fp8_moe_backend(moe_config(RENORMALISE), *SCHEME)[1] is not MoeRuntimeExperts


@pytest.mark.parametrize(
    ("layout", "plan_layout"),
    [(LAYOUT, "tp1"), (ep(4, 1), "ep4"), (ep(4, 1, dp_size=4), "dep4"), (ep(4, 1), "dep4"), (LAYOUT, None)],
)
@pytest.mark.usefixtures("offered")
def test_plan(
    layout: FusedMoEParallelConfig, plan_layout: str | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A plan serves its own layout, whatever its routing; any other leaves the default tactics."""
    path = tmp_path / "plan.json"
    if plan_layout:
        make_plan(MoEProblem(DEEPSEEK, Parallel.parse(plan_layout, 0))).save(path)
    monkeypatch.setenv(plugin.PLAN_VARIABLE, str(path))
    first = layout.ep_rank * (16 // layout.ep_size)
    weights = local(DEEPSEEK, list(range(first, first + 16 // layout.ep_size)))
    built = kernel(DEEPSEEK, weights, layout)
    seen = spy_on_tactics(monkeypatch)
    _, expert_map, _ = determine_expert_map(layout.ep_size, layout.ep_rank, 16)
    run(built, DEEPSEEK, weights, tokens(DEEPSEEK, 6), *routing(DEEPSEEK, 6), expert_map=expert_map)
    served = {("tp1", 1): True, ("ep4", 4): True, ("dep4", 4): layout.dp_size == 4}
    fits = served.get((plan_layout or "", layout.ep_size), False)
    assert seen == [("padded_batch", "grouped_mm") if fits else ("per_expert_loop", "per_expert_loop")]
