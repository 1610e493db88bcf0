"""What the CUDA executor makes of formats other than fp8_block, shown by a library that notes its calls down."""

from __future__ import annotations

import dataclasses
import gc
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from moe_runtime import FusedMoE, PackedWeights, Unsupported, flashinfer
from moe_runtime.executors.base import GEMMS, LayerInputs
from moe_runtime.executors.cuda import CudaExecutor
from moe_runtime.formats import FORMATS, Tokens, WeightLayout, Weights
from moe_runtime.formats.tokens import quantise_tokens
from moe_runtime.kernels import DTYPE_BF16, DTYPE_E2M1, DTYPE_E4M3, KernelVariant, LayerArguments
from moe_runtime.ops import shared_calls
from moe_runtime.weights import BoundWeights, packed
from tests.test_cuda_arguments import NotingLibrary, executor_of, fields
from tests.test_flashinfer import FUNCTIONS, call_arguments, with_scalars
from tests.test_format_layers import PACKED, make_inputs, make_problem, make_weights

FACTORS = ("gemm1_bias", "alpha", "beta", "clamp", "activation_multiplier", "gemm2_bias")


def variants() -> dict[str, KernelVariant]:
    """For each layout of weights a kernel, and of packed ones another that activates; fp8_block's takes 128 rows at a
    time."""
    kinds = [(layout, swiglu) for swiglu in (False, True) for layout in WeightLayout]
    return {
        kernel(layout, swiglu): KernelVariant(
            index, kernel(layout, swiglu), (128, 16, 128), (1, 1), True, 4, 0, swiglu=swiglu, weights=layout
        )
        for index, (layout, swiglu) in enumerate(kinds)
        if not (swiglu and layout == WeightLayout.FP8_BLOCK)
    }


def kernel(layout: WeightLayout, swiglu: bool) -> str:
    return f"kernel_{layout.name}" + swiglu * "_swiglu"


@pytest.fixture
def tiles(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Every tensor that was packed, in turn; its tiles are the bytes of the values here."""
    made: list[Tensor] = []

    def pack(layout: WeightLayout, values: Tensor, scale: Tensor | None) -> tuple[Tensor, float]:
        made.append(values)
        return values.view(torch.uint8).flatten().clone(), 1.0

    monkeypatch.setattr(packed, "_tiles", pack)
    return made


@pytest.fixture
def executor(monkeypatch: pytest.MonkeyPatch, tiles: list[Tensor]) -> Iterator[CudaExecutor]:
    library = NotingLibrary()
    library.variants = variants()
    executor = executor_of(library, monkeypatch)
    for module in ("layer", "flashinfer", "ops"):
        monkeypatch.setattr(f"moe_runtime.{module}.get_executor", lambda _: executor)
    shared_calls.cache_clear()  # which keeps the executors of devices
    yield executor
    shared_calls.cache_clear()


def last_call(executor: CudaExecutor) -> dict[str, Any]:
    assert isinstance(executor.library, NotingLibrary)
    return executor.library.calls[-1]


@pytest.mark.parametrize("activation", ["swiglu", "relu2"])
@pytest.mark.parametrize("format", PACKED)
def test_arguments(executor: CudaExecutor, format: str, activation: str) -> None:
    problem = make_problem(format, activation=activation)
    weights, (x, logits) = make_weights(problem), make_inputs(problem.config)
    FusedMoE(problem.config, problem.parallel, weights)(x, logits)
    call, operands, found = last_call(executor), weights.tiled_operands, FORMATS[format]
    assert (call["weights"], call["tokens"]) == (found.weight_layout, found.tokens)
    assert call["activation"] == (activation == "relu2")
    assert (call["hidden_size"], call["intermediate_size"]) == (96, 160)
    assert call["gemm1_variant"] == executor.variants[kernel(found.weight_layout, activation == "swiglu")].index
    assert call["gemm2_variant"] == executor.variants[kernel(found.weight_layout, False)].index
    assert call["gemm1_weights"] == operands.gate_up.data_ptr() != weights.operands.gate_up.data_ptr()
    assert call["gemm2_weights"] == operands.down.data_ptr()
    assert call["gemm1_weights_scale"] == call["gemm2_weights_scale"] == 0
    assert call["input_scale_inverse"] == pytest.approx(1 / operands.input_scale)
    for name in (*FACTORS, "gemm1_scale", "gemm2_scale"):
        factor = getattr(operands, name)
        assert call[name] == (0 if factor is None else factor.data_ptr()), name
    present = {name for name in FACTORS if call[name]}
    takes_bias = format != "fp8_nvfp4"
    wanted = {"gemm1_bias", "gemm2_bias"} if takes_bias else set()
    if takes_bias and activation == "swiglu":
        wanted |= {"alpha", "beta", "clamp"}
    if found.tokens.has_tensor_scale:
        wanted |= {"activation_multiplier"}
        assert call["gemm1_scale"] and call["gemm2_scale"]
    assert present == wanted


@pytest.mark.parametrize("format", PACKED)
def test_factors_that_are_neutral_are_null(executor: CudaExecutor, format: str) -> None:
    problem = make_problem(format)
    weights, (x, logits) = make_weights(problem, extras=False), make_inputs(problem.config)
    FusedMoE(problem.config, problem.parallel, weights)(x, logits)
    call = last_call(executor)
    assert not any(call[name] for name in FACTORS)
    assert call["input_scale_inverse"] == 1
    has_global = FORMATS[format].weights == Weights.NVFP4
    assert bool(call["gemm1_scale"]) == bool(call["gemm2_scale"]) == has_global


@pytest.mark.parametrize("format", PACKED)
def test_quantised_tokens(executor: CudaExecutor, format: str) -> None:
    problem, tokens = make_problem(format), FORMATS[format].tokens
    layer, (x, logits) = FusedMoE(problem.config, problem.parallel, make_weights(problem)), make_inputs(problem.config)
    values, scale = quantise_tokens(tokens, x)
    layer(values, logits, hidden_states_scale=scale)
    call = last_call(executor)
    dtypes = {Tokens.BF16: DTYPE_BF16, Tokens.NVFP4: DTYPE_E2M1}
    assert call["hidden_states_dtype"] == dtypes.get(tokens, DTYPE_E4M3)
    assert call["hidden_states"] == values.data_ptr()
    assert call["hidden_states_scale"] == (0 if scale is None else scale.data_ptr())
    layer(x, logits)
    call = last_call(executor)
    assert (call["hidden_states_dtype"], call["hidden_states_scale"]) == (DTYPE_BF16, 0)


def test_weights_are_packed_once(executor: CudaExecutor, tiles: list[Tensor]) -> None:
    problem = make_problem("nvfp4")
    weights, (x, logits) = make_weights(problem), make_inputs(problem.config)
    assert isinstance(weights, PackedWeights)
    first, second = (FusedMoE(problem.config, problem.parallel, weights) for _ in range(2))
    gate_up, down = tiles
    assert gate_up.shape == weights.gate_up.shape and down is weights.down
    first(x, logits)
    pointer = last_call(executor)["gemm1_weights"]
    second(x, logits)
    torch.compile(first.__call__, backend="eager", fullgraph=True)(x, logits)
    assert len(tiles) == 2 and last_call(executor)["gemm1_weights"] == pointer
    assert last_call(executor)["gemm1_bias"] == weights.operands.gemm1_bias.data_ptr()  # type: ignore[union-attr]


def test_plain_weights_go_with_the_caller_s(executor: CudaExecutor, tiles: list[Tensor]) -> None:
    problem = make_problem("nvfp4")
    weights, (x, logits) = make_weights(problem), make_inputs(problem.config)
    layer, gone = FusedMoE(problem.config, problem.parallel, weights), weakref.ref(weights.operands.gate_up)
    pointer = weights.tiled_operands.gate_up.data_ptr()
    tiles.clear()
    del weights
    gc.collect()
    assert gone() is None
    layer(x, logits)
    assert last_call(executor)["gemm1_weights"] == pointer


@pytest.mark.parametrize("format", [name for name in FUNCTIONS if name != "fp8_block"])
def test_functions_find_packed_weights_again(executor: CudaExecutor, format: str, tiles: list[Tensor]) -> None:
    problem = make_problem(format)
    arguments = call_arguments(format, problem, *with_scalars(format, problem))
    function = FUNCTIONS[format]
    for _ in range(3):
        function(**arguments)
    assert len(tiles) == 2
    call = last_call(executor)
    for name, scalar in (("gemm1_scale", "output1_scale_gate_scalar"), ("gemm2_scale", "output2_scale_scalar")):
        given = arguments[scalar]
        assert call[name] == (0 if given is None else given.data_ptr())
    assert bool(call["activation_multiplier"]) == (arguments["output1_scale_scalar"] is not None)
    arguments["gemm2_weights"][0] += 1
    function(**arguments)
    assert len(tiles) == 4
    function(**{**arguments, "gemm2_weights": arguments["gemm2_weights"].clone()})
    assert len(tiles) == 6


@pytest.mark.parametrize("format", ["fp8_mxfp4", "mxfp8_mxfp4"])
def test_functions_keep_what_packing_took_out_of_the_factors(
    executor: CudaExecutor, format: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Packing divides factors above 2, and output scalars come on top."""
    divided = iter((4.0, 8.0))
    monkeypatch.setattr(packed, "_tiles", lambda _encoding, values, _scale: (values.clone(), next(divided)))
    problem = make_problem(format)
    arguments = call_arguments(format, problem, *with_scalars(format, problem))
    FUNCTIONS[format](**arguments)
    operands = flashinfer._bound[arguments["gemm1_weights"]][1].operands
    ones = torch.ones(problem.num_local_experts)
    for scale, scalar, factor in (
        (operands.gemm1_scale, arguments["output1_scale_gate_scalar"], 4),
        (operands.gemm2_scale, arguments["output2_scale_scalar"], 8),
    ):
        assert torch.equal(scale, factor * (ones if scalar is None else scalar))


def test_packed_weights_go_with_the_caller_s(executor: CudaExecutor, tiles: list[Tensor]) -> None:
    problem = make_problem("bf16_mxfp4")
    arguments = call_arguments("bf16_mxfp4", problem, *with_scalars("bf16_mxfp4", problem))
    FUNCTIONS["bf16_mxfp4"](**arguments)
    bound = flashinfer._bound[arguments["gemm1_weights"]][1]
    assert isinstance(bound, BoundWeights)
    gone = weakref.ref(bound.operands.gate_up)
    del bound, arguments
    tiles.clear()
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize("gemm", GEMMS)
@pytest.mark.parametrize("format", FORMATS)
def test_tactics_are_those_that_read_the_weights(executor: CudaExecutor, format: str, gemm: Any) -> None:
    problem, layout = make_problem(format), FORMATS[format].weight_layout
    own = [name for name, variant in executor.variants.items() if variant.weights == layout]
    assert executor.tactics(problem, gemm) == tuple(own)
    name = kernel(layout, gemm == "gemm1" and format != "fp8_block")
    assert executor.can_implement(problem, gemm, name) is None
    assert executor.default_tactic(problem, gemm, 7) == name
    for other in executor.variants.keys() - own:
        reason = executor.can_implement(problem, gemm, other)
        assert reason == f"it reads {executor.variants[other].weights.name.lower()} weights"
    executor._variants = {other: variant for other, variant in executor.variants.items() if other != name}
    with pytest.raises(Unsupported, match=rf"has no kernel for {gemm} of .*format='{format}'"):
        executor.default_tactic(problem, gemm, 9)


def test_a_fused_swiglu_is_no_relu2(executor: CudaExecutor) -> None:
    fused = dataclasses.replace(executor.variants["kernel_BF16"], name="fused", swiglu=True)
    executor._variants = {"fused": fused}
    assert executor.can_implement(make_problem("bf16"), "gemm1", "fused") is None
    reason = executor.can_implement(make_problem("bf16", activation="relu2"), "gemm1", "fused")
    assert reason == "it applies SwiGLU, not relu2"


def test_a_call_leaves_nothing_for_the_next(executor: CudaExecutor) -> None:
    problem = make_problem("nvfp4")
    rich, bare = make_weights(problem), make_weights(problem, extras=False)
    (x, logits), workspace = make_inputs(problem.config), torch.empty(1 << 16, dtype=torch.uint8)
    pair = (executor.default_tactic(problem, "gemm1", 5), executor.default_tactic(problem, "gemm2", 5))

    def arguments(weights: Any) -> LayerArguments:
        return executor.arguments(problem, weights, LayerInputs(x, None, logits), pair, x, workspace)

    plain = fields(arguments(bare))
    assert fields(arguments(rich)) != plain
    assert fields(arguments(bare)) == plain
