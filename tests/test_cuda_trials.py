"""How a trial on a GPU judges its kernels' results; no GPU, no library."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from moe_runtime import MoEConfig, PackedWeights, Parallel
from moe_runtime.activation import swiglu
from moe_runtime.executors.base import MoEProblem
from moe_runtime.executors.cuda_trial import CudaGemmTrial
from moe_runtime.formats import FORMATS, Tokens, Weights
from moe_runtime.formats.fp8_block import dequantise_rows, quantise_rows, rounding_of_rows
from moe_runtime.formats.weights import dequantise_weights
from moe_runtime.kernels import LayerArguments
from moe_runtime.reference import relative_error
from tests.reference_formats import round_rows
from tests.test_cuda_tactics import NAME, library

FUSED, PLAIN = NAME("direct_256x32x", "1x1", "_swap_ab_swiglu"), NAME("direct_256x32x", "1x1", "_swap_ab")


def trial(gate_first: bool = True, clamp_limit: float | None = None) -> CudaGemmTrial:
    made = object.__new__(CudaGemmTrial)
    made._variants = library(FUSED, PLAIN)
    made._operands = SimpleNamespace(gate_first=gate_first)  # type: ignore[assignment]
    made._problem = MoEProblem(MoEConfig("test", 256, 128, 8, 2, clamp_limit=clamp_limit), Parallel("ep", 1))
    made._formats = made._problem.config.number_format
    return made


def gate_up() -> Tensor:
    return 3 * torch.randn(20, 256, generator=torch.Generator().manual_seed(0))


def through_e4m3(x: Tensor) -> Tensor:
    return dequantise_rows(*quantise_rows(x))


def test_the_error_of_a_plain_gemm_is_relative() -> None:
    expected = gate_up()
    rows = expected.bfloat16()
    assert trial().error(PLAIN, rows, expected) == relative_error(rows, expected) > 1e-4
    assert trial().error(PLAIN, 0 * rows, expected) == 1


@pytest.mark.parametrize("clamp_limit", [None, 2.0])
@pytest.mark.parametrize("gate_first", [True, False])
def test_rounding_to_e4m3_is_no_error_of_a_fused_gemm(gate_first: bool, clamp_limit: float | None) -> None:
    """Quantising alone moves the rows by 2 %, which would hide what a wrong GEMM adds."""
    made, expected = trial(gate_first, clamp_limit), gate_up()
    exact = swiglu(expected, gate_first, clamp_limit)
    rows = through_e4m3(exact)
    assert relative_error(rows, exact) > 0.015
    assert made.error(FUSED, rows, expected) < 1e-6
    assert trial(not gate_first, clamp_limit).error(FUSED, rows, expected) > 0.5
    if clamp_limit is not None:
        assert trial(gate_first).error(FUSED, rows, expected) > 0.1


def test_the_error_of_a_fused_gemm_is_what_lies_beyond_the_rounding() -> None:
    expected = gate_up()
    exact = swiglu(expected, True, None)
    beyond = torch.zeros_like(exact)
    beyond[3] = 0.5
    error = trial().error(FUSED, exact + (rounding_of_rows(exact) + beyond), expected)
    assert error == pytest.approx(float(beyond.norm() / exact.norm()), rel=1e-4)
    assert trial().error(FUSED, torch.zeros_like(exact), expected) > 0.9


@pytest.mark.parametrize(
    ("name", "before"),
    [
        (PLAIN, torch.nan),
        (PLAIN + "_combine", 0.0),
        (FUSED, torch.nan),
        (NAME("direct_256x16x", "1x1", "_swap_ab_gather_swiglu"), torch.nan),
    ],
    ids=["plain", "combine", "swiglu", "gather_swiglu"],
)
def test_a_trial_takes_its_rows_for_tokens(name: str, before: float) -> None:
    """So that what gathers finds them where they lie, and what combines adds each to zeros of its own."""
    made, launched = trial(), []
    made._variants = library()
    as_it_was = torch.randint(1000, (5, 2), dtype=torch.int32, generator=torch.Generator().manual_seed(0))
    made._origins, made._output = as_it_was.clone(), torch.ones(5, 256).bfloat16()
    made._activation, made._activation_scales = quantise_rows(torch.ones(5, 128))
    elsewhere = torch.empty(1)
    made._arguments = {name: LayerArguments(output=elsewhere.data_ptr())}

    def launch(args: LayerArguments) -> None:
        launched.append((made._origins.clone(), made._output.clone(), args.output))
        made._output.fill_(2.0)
        made._activation.copy_(torch.full((5, 128), 3.0).to(torch.float8_e4m3fn))
        made._activation_scales.fill_(1.0)  # type: ignore[union-attr]

    made._launch = launch  # type: ignore[assignment]
    for _ in range(2):
        assert (made.run(name) == (3.0 if "swiglu" in name else 2.0)).all()
        assert torch.equal(made._origins, as_it_was)
    variant = made._variants[name]
    for origins, output, to in launched:
        assert output.isnan().all() if before != before else (output == before).all()
        if variant.gathers or variant.combines:
            assert origins[:, 0].tolist() == [0, 1, 2, 3, 4]
            assert origins[:, 1].contiguous().view(torch.float32).tolist() == [1.0] * 5
            assert to == made._output.data_ptr()
        else:
            assert torch.equal(origins, as_it_was) and to == elsewhere.data_ptr()


def test_an_unwritten_row_of_a_fused_gemm_shows() -> None:
    expected = gate_up()
    rows = through_e4m3(swiglu(expected, True, None))
    rows[7, 5] = torch.nan
    error = trial().error(FUSED, rows, expected)
    assert error != error


COUNTS = (3, 0, 1, 40, 9)
PACKED = [name for name in FORMATS if name != "fp8_block"]


def packed_trial(format: str, gate_first: bool = True, extras: bool = True, **options: Any) -> CudaGemmTrial:
    """gemm1 on random tokens; its intermediate size is a block and a half of 64."""
    config = MoEConfig("test", 64, 96, len(COUNTS), 2, format=format, **options)
    weights = dataclasses.replace(PackedWeights.random(config, len(COUNTS), 3, extras=extras), gate_first=gate_first)
    made = object.__new__(CudaGemmTrial)
    made._variants, made._operands, made._gemm = library(weights=tuple(Weights)), weights.operands, "gemm1"
    made._problem, made._formats = MoEProblem(config, Parallel("ep", 1)), config.number_format
    made._workload = SimpleNamespace(rows_per_expert=torch.tensor(COUNTS))  # type: ignore[assignment]
    made.tokens, made.scales = torch.randn(sum(COUNTS), 64, generator=torch.Generator().manual_seed(4)).bfloat16(), None
    return made


def fused_kernel(format: str) -> str:
    stem = f"sm90a_{FORMATS[format].weights.name.lower()}_mixed_128x32x128_1x1x1_warpspecialized_cooperative_swap_ab"
    return f"{stem}_swiglu"


def by_definition(made: CudaGemmTrial, index: Tensor) -> Tensor:
    """The layer's own formula in float64: factors of each row's expert, then the activation."""
    o, expert = made._operands, torch.arange(len(COUNTS)).repeat_interleave(torch.tensor(COUNTS))[index]

    def of_row(values: Tensor | None, neutral: float) -> Tensor:
        return torch.full((len(index), 1), neutral).double() if values is None else values[expert].double()[:, None]

    weights = torch.stack([
        dequantise_weights(made._formats.weights, o.gate_up[e], None if o.gate_up_scale is None else o.gate_up_scale[e])
        for e in range(len(COUNTS))
    ]).double()  # fmt: skip
    sums = of_row(o.gemm1_scale, 1) * torch.einsum("sk,snk->sn", made.tokens[index].double(), weights[expert])
    if o.gemm1_bias is not None:
        sums = sums + o.gemm1_bias[expert].double()
    if not made._problem.config.is_gated:
        return sums
    halves = sums.split(96, 1)
    gate, up = halves if o.gate_first else halves[::-1]
    clamp = of_row(o.clamp, made._problem.config.clamp_limit or torch.inf)
    gate, up = torch.minimum(gate, clamp), torch.maximum(torch.minimum(up, clamp), -clamp)
    activation = gate / (1 + torch.exp(-of_row(o.alpha, 1) * gate)) * (up + of_row(o.beta, 0))
    return activation * of_row(o.activation_multiplier, 1)


@pytest.mark.parametrize("options", [{}, {"clamp_limit": 0.4}, {"activation": "relu2"}], ids=str)
@pytest.mark.parametrize("extras", [False, True], ids=["bare", "extras"])
@pytest.mark.parametrize("gate_first", [True, False])
@pytest.mark.parametrize("format", PACKED)
def test_the_reference_of_packed_gate_up_is_activated(
    format: str, gate_first: bool, extras: bool, options: dict[str, Any]
) -> None:
    made = packed_trial(format, gate_first, extras, **options)
    index, values = made.reference()
    assert len(index) > 16 and values.shape == (len(index), 96)
    assert relative_error(values, by_definition(made, index)) <= 1e-5


def through(made: CudaGemmTrial, exact: Tensor) -> Tensor:
    return torch.from_numpy(round_rows(made._formats.tokens.name.lower(), exact.numpy())).float()


@pytest.mark.parametrize("gate_first", [True, False])
@pytest.mark.parametrize("format", PACKED)
def test_rounding_to_a_neighbour_is_no_error_of_fused_packed_gemms(format: str, gate_first: bool) -> None:
    """Values that are off by some 5e-4 before the rounding: a few of them become the next code."""
    made, name = packed_trial(format, gate_first), fused_kernel(format)
    _, expected = made.reference()
    noise = 1 + 5e-4 * torch.randn(expected.shape, generator=torch.Generator().manual_seed(1))
    rows = through(made, expected * noise)
    quantises = made._formats.tokens != Tokens.BF16
    assert relative_error(rows, expected) > (0.01 if quantises else 1e-3)
    assert not torch.equal(rows, through(made, expected))
    assert made.error(name, rows, expected) < (1e-4 if quantises else 3e-3)


WRONG: dict[str, Callable[[Tensor], Tensor]] = {
    "another row's": lambda exact: exact.roll(1, 0),
    "another column's": lambda exact: exact.roll(1, 1),
    "a tile left out": lambda exact: torch.cat([exact[:, :64], torch.zeros_like(exact[:, 64:])], 1),
    "twice as large": lambda exact: 2 * exact,
    "of the wrong sign": lambda exact: -exact,
}


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("format", PACKED)
def test_what_is_wrong_shows_beyond_the_rounding(format: str, wrong: str) -> None:
    made = packed_trial(format)
    _, expected = made.reference()
    assert made.error(fused_kernel(format), through(made, WRONG[wrong](expected)), expected) > 0.3


FACTORS = ("alpha", "beta", "clamp", "activation_multiplier", "gemm1_bias", "gate_first")
LEFT_OUT = [
    (format, factor)
    for format in ("fp8_mxfp4", "bf16_mxfp4", "nvfp4")
    for factor in FACTORS
    if factor != "activation_multiplier" or FORMATS[format].tokens.has_tensor_scale
]


@pytest.mark.parametrize(("format", "factor"), LEFT_OUT)
def test_a_factor_left_out_shows(format: str, factor: str) -> None:
    made = packed_trial(format)
    _, expected = made.reference()
    changed: dict[str, Any] = {factor: False if factor == "gate_first" else None}
    made._operands = made._operands._replace(**changed)
    _, other = made.reference()
    assert made.error(fused_kernel(format), through(made, other), expected) > 0.02


@pytest.mark.parametrize("format", PACKED)
def test_an_unwritten_value_of_a_fused_packed_gemm_shows(format: str) -> None:
    made, name = packed_trial(format), fused_kernel(format)
    _, expected = made.reference()
    made._origins, made._output = torch.zeros(5, 2, dtype=torch.int32), torch.ones(5, 192).bfloat16()
    made._activation, made._activation_scales = torch.ones(5, 96).bfloat16(), None
    made._arguments = {name: LayerArguments()}
    made._launch = lambda args: made._activation[:4].fill_(2.0)  # type: ignore[assignment]
    rows = made.run(name)
    assert rows.dtype == torch.float32 and (rows[:4] == 2).all() and rows[4].isnan().all()
    error = made.error(name, rows, expected[:5])
    assert error != error
