"""The functions named as the runners of 4-bit formats; `fp8_block_scale_moe` is in test_ops."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch import Tensor

from moe_runtime import InvalidArgument, PackedWeights, PlanRefused, flashinfer
from moe_runtime.config import RoutingMethod
from moe_runtime.executors.base import MoEProblem
from moe_runtime.formats import FORMATS, Extra, Weights
from moe_runtime.formats.tokens import quantise_tokens
from moe_runtime.parallel import Parallel
from moe_runtime.routing import route
from tests import reference
from tests import reference_formats as exact
from tests.test_format_layers import SAME_POINTS, TOKENS, make_config, make_inputs, make_problem
from tests.test_ops import make_plan, spy_on_tactics

FUNCTIONS = {name: getattr(flashinfer, found.operator) for name, found in FORMATS.items() if found.operator}
PACKED = [name for name in FUNCTIONS if name != "fp8_block"]


def with_scalars(format: str, problem: MoEProblem) -> tuple[PackedWeights, dict[str, Tensor | None]]:
    """Weights with rows [up; gate], and as output scalars what the weights' own scales come to."""
    weights = PackedWeights.random(problem.config, problem.num_local_experts, 3, extras=True)
    fields = {**vars(weights), "gate_first": False, "input_scale": 1.0}
    takes = Extra.OUTPUT_SCALES in FORMATS[format].extras
    for name in ("gate_up_global", "down_global", "intermediate_scale"):
        neutral = 1.0 if name == "intermediate_scale" else None
        fields[name] = torch.rand(problem.num_local_experts) + 0.5 if takes else neutral
    if FORMATS[format].weights == Weights.NVFP4:
        # Factors of about 1 where the random weights have a small global scale.
        fields["gate_up_global"] *= 0.03
        fields["down_global"] *= 0.03
    weights = PackedWeights(**{name: value for name, value in fields.items() if name in PackedWeights.__annotations__})
    if not takes:
        return weights, dict.fromkeys(SCALARS)
    assert weights.gate_up_global is not None and weights.down_global is not None
    scalars = (
        weights.gate_up_global / weights.intermediate_scale,
        weights.gate_up_global,
        weights.intermediate_scale * weights.down_global,
    )
    return weights, dict(zip(SCALARS, scalars, strict=True))


SCALARS = ("output1_scale_scalar", "output1_scale_gate_scalar", "output2_scale_scalar")


def call_arguments(
    format: str, problem: MoEProblem, weights: PackedWeights, scalars: dict[str, Tensor | None], quantised: bool = False
) -> dict[str, Any]:
    """What a caller has at hand, in the order of the arguments."""
    config = problem.config
    x, logits = make_inputs(config)
    values, scale = quantise_tokens(FORMATS[format].tokens, x) if quantised else (x, None)
    return {
        "routing_logits": logits,
        "routing_bias": None,
        "hidden_states": values,
        "hidden_states_scale": scale,
        "gemm1_weights": weights.gate_up,
        "gemm1_weights_scale": weights.gate_up_scale,
        "gemm1_bias": weights.gate_up_bias,
        "gemm1_alpha": weights.alpha,
        "gemm1_beta": weights.beta,
        "gemm1_clamp_limit": weights.clamp,
        "gemm2_weights": weights.down,
        "gemm2_weights_scale": weights.down_scale,
        "gemm2_bias": weights.down_bias,
        **scalars,
        "num_experts": config.num_experts,
        "top_k": config.top_k,
        "n_group": config.n_group,
        "topk_group": config.topk_group,
        "intermediate_size": config.intermediate_size,
        "local_expert_offset": problem.local_expert_offset,
        "local_num_experts": problem.num_local_experts,
        "routed_scaling_factor": config.routed_scaling_factor,
        "routing_method_type": int(config.routing_method),
    }


def expected(problem: MoEProblem, weights: PackedWeights) -> Tensor:
    x, logits = make_inputs(problem.config)
    return exact.layer(problem.config, weights, problem.local_expert_offset, x, *route(problem.config, logits))


def test_every_runner_has_its_function() -> None:
    assert {name: function.__name__ for name, function in FUNCTIONS.items()} == {
        "fp8_block": "fp8_block_scale_moe",
        "nvfp4": "fp4_block_scale_moe",
        "mxfp8_mxfp4": "mxe4m3_mxe2m1_block_scale_moe",
        "fp8_mxfp4": "e4m3_mxe2m1_block_scale_moe",
        "bf16_mxfp4": "bf16_mxe2m1_block_scale_moe",
        "fp8_nvfp4": "fp8_fp4_block_scale_moe",
    }
    for name in PACKED:
        assert name in str(FUNCTIONS[name].__doc__).splitlines()[0]


LLAMA4: dict[str, Any] = {"routing_method": RoutingMethod.Llama4, "top_k": 1}
CALLS = [
    pytest.param(format, changes, quantised, id=f"{format}-{name}-{'quantised' if quantised else 'bf16'}")
    for format in PACKED
    for name, changes in (("plain", {}), ("llama4", LLAMA4), ("relu2", {"activation": "relu2"}))
    for quantised in (False, True)
    # Under Llama4 quantised rows are weighed and rounded a second time; that is tested with the layer.
    if not (quantised and changes is LLAMA4)
]


@pytest.mark.parametrize("finalize", [True, False])
@pytest.mark.parametrize(("format", "changes", "quantised"), CALLS)
def test_function(format: str, changes: dict[str, Any], quantised: bool, finalize: bool) -> None:
    problem = make_problem(format, **changes)
    weights, scalars = with_scalars(format, problem)
    arguments = call_arguments(format, problem, weights, scalars, quantised)
    if problem.config.activation == "relu2":
        arguments["activation_type"] = 6
    result = FUNCTIONS[format](**arguments, do_finalize=finalize)
    if finalize:
        total = result.double()
    else:
        rows, topk_weights, row_of_slot = result
        total = torch.zeros(TOKENS, problem.config.hidden_size, dtype=torch.float64)
        for slot, row in enumerate(row_of_slot.tolist()):
            if row >= 0:
                total[slot // problem.config.top_k] += topk_weights.flatten()[slot].double() * rows[row].double()
    assert reference.relative_error(total, expected(problem, weights)) <= SAME_POINTS


@pytest.mark.parametrize("format", PACKED)
def test_positional_arguments_and_an_output(format: str) -> None:
    problem = make_problem(format)
    arguments = call_arguments(format, problem, *with_scalars(format, problem))
    function, want = FUNCTIONS[format], FUNCTIONS[format](**arguments)
    assert list(inspect.signature(function).parameters)[: len(arguments)] == list(arguments)
    output = torch.full_like(want, torch.nan)
    given = {"use_shuffled_weight": False, "weight_layout": 0, "enable_pdl": True}
    assert function(*arguments.values(), output=output, **given) is output
    assert torch.equal(output, want)
    compiled = torch.compile(lambda: function(**arguments) + 1, backend="eager")
    assert torch.equal(compiled(), want + 1)


@pytest.mark.parametrize("use_dp", [False, True])
@pytest.mark.parametrize("format", PACKED)
def test_plan_serves_its_own_regime_only(format: str, use_dp: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    layout = Parallel("dep" if use_dp else "ep", 2, 1)
    problem = MoEProblem(make_config(format), layout)
    arguments = call_arguments(format, problem, *with_scalars(format, problem))
    given = {**arguments, "plan": make_plan(problem), "tune_max_num_tokens": 64}
    seen = spy_on_tactics(monkeypatch)
    FUNCTIONS[format](**given, use_dp=use_dp)
    assert seen == [("padded_batch", "grouped_mm")]
    with pytest.raises(PlanRefused, match=f"regime {layout.regime}"):
        FUNCTIONS[format](**given, use_dp=not use_dp)
    with pytest.raises(PlanRefused, match="tune_max_num_tokens 64"):
        FUNCTIONS[format](**{**given, "tune_max_num_tokens": 8192}, use_dp=use_dp)


@pytest.mark.parametrize("argument", ["gemm1_bias", "gemm2_bias", "gemm1_alpha", "gemm1_beta", "gemm1_clamp_limit"])
def test_what_a_format_takes_not_is_refused(argument: str) -> None:
    problem = make_problem("fp8_nvfp4")
    arguments = call_arguments("fp8_nvfp4", problem, *with_scalars("fp8_nvfp4", problem))
    shape = {"gemm1_bias": (4, 320), "gemm2_bias": (4, 96)}.get(argument, (4,))
    with pytest.raises(InvalidArgument, match=f"{argument}: got a tensor; accepted: None: fp8_nvfp4 takes none"):
        FUNCTIONS["fp8_nvfp4"](**{**arguments, argument: torch.ones(shape)})


@pytest.mark.parametrize("format", PACKED)
@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("gemm1_weights", torch.zeros(4, 320, 96, dtype=torch.uint8)),
        ("gemm2_weights_scale", torch.zeros(4, 96, 3, dtype=torch.uint8)),
        ("gemm1_weights_scale", torch.zeros(4, 320, 6)),
        ("gemm1_bias", torch.zeros(4, 319)),
        ("gemm1_alpha", torch.zeros(8)),
        ("output1_scale_scalar", torch.zeros(8)),
        ("output2_scale_scalar", torch.zeros(4, dtype=torch.float64)),
        ("activation_type", 0),
        ("routing_method_type", 5),
        ("use_shuffled_weight", True),
        ("local_num_experts", 3),
    ],
)
def test_bad_argument_is_named(format: str, argument: str, value: Any) -> None:
    problem = make_problem(format)
    arguments = call_arguments(format, problem, *with_scalars(format, problem))
    with pytest.raises(InvalidArgument) as error:
        FUNCTIONS[format](**{**arguments, argument: value})
    assert error.value.argument == argument


def test_unknown_argument_is_a_type_error() -> None:
    problem = make_problem("nvfp4")
    arguments = call_arguments("nvfp4", problem, *with_scalars("nvfp4", problem))
    with pytest.raises(
        TypeError, match=r"fp4_block_scale_moe\(\) got an unexpected keyword argument 'tile_tokens_dim'"
    ):
        FUNCTIONS["nvfp4"](**arguments, tile_tokens_dim=8)


@pytest.mark.parametrize("format", ["nvfp4", "fp8_nvfp4"])
def test_factors_of_32_and_as_bytes(format: str) -> None:
    problem = make_problem(format)
    weights, scalars = with_scalars(format, problem)
    arguments = call_arguments(format, problem, weights, scalars)
    coarse = {}
    for name in ("gemm1_weights_scale", "gemm2_weights_scale"):
        codes = arguments[name].view(torch.uint8)
        arguments[name] = codes[..., ::2].repeat_interleave(2, -1).view(torch.float8_e4m3fn)
        coarse[name] = codes[..., ::2].contiguous()
    assert torch.equal(FUNCTIONS[format](**{**arguments, **coarse}), FUNCTIONS[format](**arguments))
