"""vLLM's own classes around our experts, for tests on either device."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import vllm.model_executor.layers.fused_moe.modular_kernel as mk
from torch import Tensor
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.fused_moe.config import FusedMoEConfig, FusedMoEParallelConfig, RoutingMethodType
from vllm.model_executor.layers.fused_moe.oracle import fp8
from vllm.model_executor.layers.fused_moe.prepare_finalize.no_dp_ep import MoEPrepareAndFinalizeNoDPEPModular
from vllm.model_executor.layers.quantization.utils.quant_utils import kFp8Dynamic128Sym, kFp8Static128BlockSym

from moe_runtime import FP8BlockWeights, MoEConfig
from moe_runtime.formats.fp8_block import quantise_rows
from moe_runtime.integrations import vllm as plugin
from moe_runtime.integrations.vllm.experts import MoeRuntimeExperts

SCHEME = (kFp8Static128BlockSym, kFp8Dynamic128Sym)
LAYOUT = FusedMoEParallelConfig.make_no_parallel()


def ep(size: int, rank: int, **changes: Any) -> FusedMoEParallelConfig:
    return dataclasses.replace(LAYOUT, ep_size=size, ep_rank=rank, use_ep=True, **changes)


def moe_config(config: MoEConfig, layout: FusedMoEParallelConfig = LAYOUT, **changes: Any) -> FusedMoEConfig:
    arguments = {
        "num_experts": config.num_experts,
        "experts_per_token": config.top_k,
        "hidden_dim": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_local_experts": config.num_experts // layout.ep_size,
        "num_logical_experts": config.num_experts,
        "activation": MoEActivation.SILU,
        "device": "cpu",
        "routing_method": RoutingMethodType.Renormalize,
        "moe_parallel_config": layout,
        "in_dtype": torch.bfloat16,
        "swiglu_limit": config.clamp_limit,
    }
    return FusedMoEConfig(**{**arguments, **changes})


@pytest.fixture
def offered(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """vLLM with the plug-in, as a server with MOE_RUNTIME_VLLM=1 has it."""
    for name in ("backend_to_kernel_cls", "_get_priority_backends"):
        monkeypatch.setattr(fp8, name, getattr(fp8, name))
    monkeypatch.setenv(plugin.ENABLE_VARIABLE, "1")
    assert plugin.register() is None
    assert plugin.register() is None  # vLLM may call it again
    with set_current_vllm_config(VllmConfig()):
        yield


def kernel(
    config: MoEConfig, weights: FP8BlockWeights, layout: FusedMoEParallelConfig = LAYOUT, prepare: Any = None
) -> mk.FusedMoEKernel:
    """As vLLM's quantisation method builds it, with the experts that its selection gives."""
    moe = moe_config(config, layout)
    backend, experts = fp8.select_fp8_moe_backend(moe, *SCHEME)
    quant = fp8.make_fp8_moe_quant_config(
        backend, weights.gate_up_scale, weights.down_scale, None, None, block_shape=[128, 128]
    )
    assert experts is MoeRuntimeExperts
    if prepare is None and not layout.use_all2all_kernels:
        return fp8.make_fp8_moe_kernel(quant, moe, experts, backend)
    return mk.FusedMoEKernel(prepare or PrepareQuantised(), experts(moe, quant))


class PrepareQuantised(MoEPrepareAndFinalizeNoDPEPModular):
    """Rows come to the experts in e4m3 with scales, as they do after a dispatch."""

    def prepare(self, a1: Tensor, *rest: Any, **others: Any) -> Any:
        assert not others["defer_input_quant"]
        return *quantise_rows(a1), None, None, None


def run(
    built: mk.FusedMoEKernel, config: MoEConfig, weights: FP8BlockWeights, x: Tensor, ids: Any, topk: Any, **others: Any
) -> Tensor:
    arguments = {
        "activation": MoEActivation.SILU,
        "global_num_experts": config.num_experts,
        "expert_map": None,
        "apply_router_weight_on_input": False,
        **others,
    }
    return built.apply(x, weights.gate_up, weights.down, topk, ids, **arguments)
