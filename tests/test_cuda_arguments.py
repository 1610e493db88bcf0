"""What the CUDA executor hands to the native call, shown by a library that notes it down instead of running it."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from moe_runtime import FP8BlockWeights, FusedMoE, InvalidArgument, MoEConfig, Parallel
from moe_runtime.config import RoutingMethod
from moe_runtime.executors import cuda
from moe_runtime.executors.base import LayerInputs, MoEProblem
from moe_runtime.executors.cuda import CudaExecutor
from moe_runtime.formats.fp8_block import quantise_rows
from moe_runtime.kernels import (
    DTYPE_BF16,
    DTYPE_E4M3,
    DTYPE_F32,
    KernelVariant,
    LayerArguments,
    MoeMessages,
    Stage,
    WorkspaceLayout,
)

CONFIG = MoEConfig("deepseek", 256, 128, 8, 2, RoutingMethod.DeepSeekV3, 2, 1, 2.5)
PROBLEM = MoEProblem(CONFIG, Parallel("ep", 1))
WEIGHTS = FP8BlockWeights.random(CONFIG, 8)
STREAM = 77
NAMES = ("cooperative_128x16", "cooperative_128x32")


class NotingLibrary:
    """Stands in for KernelLibrary."""

    hash = "noted"
    path = Path("noted.so")

    def __init__(self) -> None:
        self.calls: list[dict[str, int]] = []
        self.variants = {
            name: KernelVariant(index, name, (128, 16 << index, 128), (1, 1), True, 4, 0, swiglu=False)
            for index, name in enumerate(NAMES)
        }

    def layer(self, args: LayerArguments) -> int:
        # Read twice, with a chance for other threads between: what changed meanwhile is not this call's own.
        first, _, second = fields(args), threading.Event().wait(0.001), fields(args)
        self.calls.append(first)
        return int(first != second)

    def workspace_layout(self, args: LayerArguments) -> WorkspaceLayout:
        return WorkspaceLayout(total_bytes=1024 * args.num_tokens)

    def error_string(self, code: int) -> str:
        return "the arguments changed during the call"


def fields(args: LayerArguments) -> dict[str, int]:
    """Those of the messages under names of their own."""
    layer = {name: getattr(args, name) or 0 for name, *_ in LayerArguments._fields_ if name != "messages"}
    messages = {f"messages.{name}": getattr(args.messages, name) or 0 for name, *_ in MoeMessages._fields_}
    return layer | messages


def executor_of(library: NotingLibrary, monkeypatch: pytest.MonkeyPatch) -> CudaExecutor:
    """On a GPU that is not there."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "noted")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(multi_processor_count=132))
    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: 0, raising=False)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda _: STREAM, raising=False)
    monkeypatch.setattr(cuda, "load_library", lambda _: library)
    return CudaExecutor(torch.device("cuda", 0))


@pytest.fixture
def executor(monkeypatch: pytest.MonkeyPatch) -> CudaExecutor:
    executor = executor_of(NotingLibrary(), monkeypatch)
    monkeypatch.setattr("moe_runtime.layer.get_executor", lambda _: executor)
    return executor


def x(num_tokens: int) -> Tensor:
    return torch.randn(num_tokens, 256).bfloat16()


def test_arguments_of_calls_in_any_order(executor: CudaExecutor) -> None:
    """Calls have a template in common; none may find in it what another call set."""
    rows, workspace = x(3), torch.empty(4096, dtype=torch.uint8)
    values, scale = quantise_rows(rows)
    logits, bias = torch.randn(3, 8), torch.randn(8).bfloat16()
    ids, topk_weights = torch.zeros(3, 2, dtype=torch.int32), torch.ones(3, 2)
    common = {
        "num_tokens": 3, "hidden_size": 256, "hidden_states_stride": 256, "intermediate_size": 128, "num_experts": 8,
        "top_k": 2, "num_local_experts": 8, "routing_method": 2, "n_group": 2, "topk_group": 1,
        "routed_scaling_factor": 2.5,
        "gate_first": 1, "input_scale_inverse": 1.0, "sm_count": 132, "gemm1_variant": 1, "workspace_bytes": 4096,
        "gemm1_weights": WEIGHTS.gate_up.data_ptr(), "gemm1_weights_scale": WEIGHTS.gate_up_scale.data_ptr(),
        "gemm2_weights": WEIGHTS.down.data_ptr(), "gemm2_weights_scale": WEIGHTS.down_scale.data_ptr(),
        "output": rows.data_ptr(), "workspace": workspace.data_ptr(),
    }  # fmt: skip
    routed = {"routing_logits": logits.data_ptr(), "routing_logits_dtype": DTYPE_F32}
    biased = {"routing_bias": bias.data_ptr(), "routing_bias_dtype": DTYPE_BF16}
    ready = {"topk_ids": ids.data_ptr(), "topk_weights": topk_weights.data_ptr()}
    bf16 = {"hidden_states": rows.data_ptr(), "hidden_states_dtype": DTYPE_BF16}
    quantised = {
        "hidden_states": values.data_ptr(), "hidden_states_dtype": DTYPE_E4M3, "hidden_states_scale": scale.data_ptr(),
        "scale_token_stride": scale.stride(0), "scale_block_stride": scale.stride(1),
    }  # fmt: skip
    apart, codes_apart = torch.randn(3, 264).bfloat16()[:, :256], torch.zeros(3, 272).to(torch.float8_e4m3fn)[:, :256]
    far, codes_far = (
        {"hidden_states": each.data_ptr(), "hidden_states_stride": each.stride(0)} for each in (apart, codes_apart)
    )
    calls = [
        (LayerInputs(apart, None, logits, bias), bf16 | routed | biased | far),
        (LayerInputs(codes_apart, scale, logits), quantised | routed | codes_far),
        (LayerInputs(rows, None, logits, bias), bf16 | routed | biased),
        (LayerInputs(values, scale, logits), quantised | routed),
        (LayerInputs(rows, None, None, None, ids, topk_weights), bf16 | ready),
        (LayerInputs(values, scale, None, None, ids, topk_weights), quantised | ready),
        (LayerInputs(rows, None, logits), bf16 | routed),
    ]
    blank = fields(LayerArguments())
    for inputs, own in [*calls, *reversed(calls)]:
        args = executor.arguments(PROBLEM, WEIGHTS, inputs, (NAMES[1], NAMES[0]), rows, workspace)
        assert fields(args) == blank | common | own


def test_arguments_follow_tokens_tactics_and_weights(executor: CudaExecutor) -> None:
    turned = FP8BlockWeights(*(part.clone() for part in tensors(WEIGHTS)), gate_first=False)
    workspace = torch.empty(4096, dtype=torch.uint8)
    for num_tokens, weights, tactics in [
        (1, WEIGHTS, (0, 0)), (2, WEIGHTS, (0, 0)), (2, WEIGHTS, (0, 1)), (2, turned, (0, 1)), (1, WEIGHTS, (0, 0)),
    ]:  # fmt: skip
        inputs, names = LayerInputs(x(num_tokens), routing_logits=torch.randn(num_tokens, 8)), (NAMES[0], NAMES[1])
        pair = (names[tactics[0]], names[tactics[1]])
        args = executor.arguments(PROBLEM, weights, inputs, pair, inputs.hidden_states, workspace)
        assert (args.num_tokens, args.gemm1_variant, args.gemm2_variant) == (num_tokens, *tactics)
        assert (args.gate_first, args.gemm1_weights) == (weights.gate_first, weights.gate_up.data_ptr())


def test_weights_that_torch_moved_are_found(executor: CudaExecutor) -> None:
    weights = FP8BlockWeights(*(part.clone() for part in tensors(WEIGHTS)))
    layer, before = FusedMoE(CONFIG, PROBLEM.parallel, weights), weights.down.data_ptr()
    layer(x(2), torch.randn(2, 8))
    weights.down.data = weights.down.clone()
    layer(x(2), torch.randn(2, 8))
    assert [call["gemm2_weights"] for call in noted(executor)] == [before, weights.down.data_ptr()]
    assert before != weights.down.data_ptr()


def test_a_layer_s_call(executor: CudaExecutor) -> None:
    layer, rows, logits = FusedMoE(CONFIG, PROBLEM.parallel, WEIGHTS), x(4), torch.randn(4, 8)
    output = layer(rows, logits)
    layer(rows, topk_ids=torch.zeros(4, 2, dtype=torch.int32), topk_weights=torch.ones(4, 2), output=output)
    after_routing = int(Stage.PERMUTE | Stage.GATHER | Stage.GEMM1 | Stage.ACTIVATION | Stage.GEMM2 | Stage.COMBINE)
    assert [call["stages"] for call in noted(executor)] == [int(Stage.ROUTE) | after_routing, after_routing]
    for call in noted(executor):
        assert (call["stream"], call["output"], call["workspace_bytes"]) == (STREAM, output.data_ptr(), 4096)


def test_threads_do_not_share_arguments(executor: CudaExecutor) -> None:
    layer = FusedMoE(CONFIG, PROBLEM.parallel, WEIGHTS)
    calls = [(x(2), torch.randn(2, 8)) for _ in range(60)]
    with ThreadPoolExecutor(2) as pool:
        outputs = list(pool.map(lambda call: layer(*call), calls))
    seen = {(call["hidden_states"], call["routing_logits"], call["output"]) for call in noted(executor)}
    pairs = zip(calls, outputs, strict=True)
    assert seen == {(rows.data_ptr(), logits.data_ptr(), output.data_ptr()) for (rows, logits), output in pairs}


def test_unknown_tactic(executor: CudaExecutor) -> None:
    inputs, workspace = LayerInputs(x(1), routing_logits=torch.randn(1, 8)), torch.empty(4096, dtype=torch.uint8)
    for _ in range(2):
        with pytest.raises(InvalidArgument, match=r"tactics: got 'gone'; accepted: variants of noted\.so"):
            executor.arguments(PROBLEM, WEIGHTS, inputs, (NAMES[0], "gone"), None, workspace)


def tensors(weights: FP8BlockWeights) -> tuple[Tensor, ...]:
    return weights.gate_up, weights.gate_up_scale, weights.down, weights.down_scale


def noted(executor: CudaExecutor) -> list[dict[str, int]]:
    library = executor.library
    assert isinstance(library, NotingLibrary)
    return library.calls
