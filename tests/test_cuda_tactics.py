"""Which kernels the CUDA executor takes for which GEMM, and how a trial judges them; no GPU, no library."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from moe_runtime import MoEConfig, Parallel, machine
from moe_runtime.activation import swiglu
from moe_runtime.executors.base import GEMMS, Gemm, MoEProblem
from moe_runtime.executors.cuda import CudaExecutor
from moe_runtime.executors.cuda_trial import CudaGemmTrial
from moe_runtime.formats.fp8_block import dequantise_rows, quantise_rows, rounding_of_rows
from moe_runtime.kernels import KernelVariant, LayerArguments, WorkspaceLayout
from moe_runtime.reference import relative_error
from moe_runtime.workload import kernel_rows, make_workload

GRID = Path(__file__).parent.parent / "benchmarks/results/h200/grid.json"
NAME = "sm90a_fp8_block_{}128_{}x1_warpspecialized_cooperative{}".format


def library(*chosen: str, catalogue: str = "default_entries") -> dict[str, KernelVariant]:
    """The variants of a library built of the catalogue, or of those of it whose names are given."""
    entries = [entry.variant for entry in getattr(machine.generator("catalogue"), catalogue)("sm_90a")]
    return {
        v.name: KernelVariant(
            index, v.name, (v.tile.m, v.tile.n, v.tile.k), (v.cluster.m, v.cluster.n), v.swap_ab, 4, 0, v.swiglu
        )
        for index, v in enumerate(entries)
        if not chosen or v.name in chosen
    }


def executor(variants: dict[str, KernelVariant], most_experts: int = 1024) -> CudaExecutor:
    """As far as choosing takes it: a CudaExecutor that never saw a device."""

    def workspace_layout(args: LayerArguments) -> WorkspaceLayout | None:
        return WorkspaceLayout(total_bytes=1) if args.num_experts <= most_experts else None

    made = object.__new__(CudaExecutor)
    made.sm_count = 132
    made.library = SimpleNamespace(path=Path("fake.so"), workspace_layout=workspace_layout)  # type: ignore[assignment]
    made._variants = variants
    made._default = functools.lru_cache(made._choose_default)
    return made


def problem(hidden: int = 7168, intermediate: int = 2048, parallel: str = "dep8") -> MoEProblem:
    return MoEProblem(MoEConfig("test", hidden, intermediate, 256, 8), Parallel.parse(parallel))


@pytest.mark.parametrize(
    ("name", "rows"),
    [
        (NAME("direct_128x128x", "1x1", ""), 128),
        (NAME("128x128x", "1x2", ""), 256),
        (NAME("direct_128x256x", "1x1", "_swiglu"), 256),
        (NAME("direct_128x16x", "1x1", "_swap_ab"), 128),
        (NAME("direct_256x16x", "1x1", "_swap_ab_swiglu"), 256),
        (NAME("128x128x", "2x1", ""), 128),
    ],
)
def test_rows_of_weights_at_a_time(name: str, rows: int) -> None:
    assert library(name, catalogue="select")[name].weight_rows == rows


def test_a_fused_activation_is_for_gemm1() -> None:
    made = executor(library())
    for name, variant in made.variants.items():
        assert made.can_implement(problem(), "gemm1", name) is None
        refusal = made.can_implement(problem(), "gemm2", name)
        assert refusal == ("it applies the activation, which only gemm1 has" if variant.swiglu else None)


@pytest.mark.parametrize(
    ("hidden", "intermediate", "gemm", "allowed"),
    [
        (7168, 2048, "gemm1", {128, 256, 512}),
        (7168, 384, "gemm1", {128, 256}),
        (384, 2048, "gemm2", {128}),
        (768, 2048, "gemm2", {128, 256}),
    ],
)
def test_weights_are_taken_whole(hidden: int, intermediate: int, gemm: Gemm, allowed: set[int]) -> None:
    n, _ = problem(hidden, intermediate).gemm_shape(gemm)
    made = executor(library())
    for name, variant in made.variants.items():
        if variant.swiglu and gemm == "gemm2":
            continue
        refusal = made.can_implement(problem(hidden, intermediate), gemm, name)
        if variant.weight_rows in allowed:
            assert refusal is None, name
        else:
            assert (
                refusal == f"{n} rows of weights are no multiple of the {variant.weight_rows} that it takes at a time"
            )


def test_refused_by_name_and_by_the_library() -> None:
    made = executor(library(), most_experts=128)
    assert made.can_implement(problem(), "gemm1", "gone") == "no variant gone in fake.so"
    for gemm in GEMMS:
        name = (
            made.default_tactic(problem(), gemm, 8)
            if made.variants is None
            else NAME("direct_128x8x", "1x1", "_swap_ab")
        )
        assert "outside what the kernels implement" in str(made.can_implement(problem(), gemm, name))


@pytest.mark.parametrize(
    ("tokens_a_rank", "gemm1", "gemm2"),
    [
        (1, "256x16", "128x8"),
        (18, "256x16", "128x8"),
        (19, "256x16", "128x16"),
        (98, "256x32", "128x32"),
        (99, "256x64", "256x64"),
        (213, "128x256", "128x256"),
        (449, "128x256", "128x256"),
        (8192, "128x256", "128x256"),
    ],
)
def test_defaults_hold_the_rows_and_their_spread(tokens_a_rank: int, gemm1: str, gemm2: str) -> None:
    """dep8: 8 slots of each of 8 ranks' tokens over 256 experts are 4.75 rows an expert for 19 tokens a rank."""
    made = executor(library())
    for gemm, tile in zip(GEMMS, (gemm1, gemm2), strict=True):
        chosen = made.variants[made.default_tactic(problem(), gemm, kernel_rows(tokens_a_rank, problem().parallel))]
        assert f"_direct_{tile}x128_" in chosen.name
        # Fusing needs half of the tiles, so it waits for a tile of many rows where 32 hold no expert's.
        assert chosen.swiglu == (gemm == "gemm1" and tile != "256x64")
        assert made.can_implement(problem(), gemm, chosen.name) is None


@pytest.mark.parametrize("parallel", ["dep8", "ep8"])
@pytest.mark.parametrize("mean_rows", [4, 8, 16, 24, 32, 48, 64, 96])
def test_few_experts_outgrow_their_default_on_random_routing(mean_rows: int, parallel: str) -> None:
    """A tile that holds the mean alone is outgrown by two experts of five."""
    made, shape = executor(library()), problem(parallel=parallel)
    tokens = mean_rows * 256 // 8 // kernel_rows(1, shape.parallel)
    rows = torch.cat([
        make_workload(shape.config, shape.parallel, tokens, "random", seed).rows_per_expert for seed in range(20)
    ])  # fmt: skip
    assert float(rows.float().mean()) == pytest.approx(mean_rows, rel=0.1)
    for gemm in GEMMS:
        name = made.default_tactic(shape, gemm, kernel_rows(tokens, shape.parallel))
        assert float((rows > made.variants[name].token_tile).float().mean()) < 0.1


@pytest.mark.parametrize(("tokens_a_rank", "fused"), [(1, False), (8, True), (64, True)])
def test_fusing_waits_for_enough_tiles_to_fill_the_gpu(tokens_a_rank: int, fused: bool) -> None:
    """A layer of 16 tiles of 256 gate_up rows an expert; one token at ep8 keeps one of the 32 experts busy."""
    made, shape = executor(library()), problem(parallel="ep8")
    name = made.default_tactic(shape, "gemm1", kernel_rows(tokens_a_rank, shape.parallel))
    assert made.variants[name].swiglu == fused


WORST_OVER_FASTEST = {"balanced": 0.08, "random": 0.035, "zipf:1.0": 0.065}
MEAN_OVER_FASTEST = {"balanced": 0.008, "random": 0.004, "zipf:1.0": 0.01}


@pytest.mark.parametrize("distribution", WORST_OVER_FASTEST)
def test_defaults_are_near_the_fastest_that_was_measured(distribution: str) -> None:
    made, slower = executor(library()), []
    for point in json.loads(GRID.read_text())["points"]:
        if point["distribution"] != distribution:
            continue
        model, layout = point["case"].split(":")
        shape, default, fastest = MoEProblem(MoEConfig.preset(model), Parallel.parse(layout)), 0.0, 0.0
        for gemm in GEMMS:
            times = point["gemms"][gemm]["scouted"] | point["gemms"][gemm]["us"]
            default += times[made.default_tactic(shape, gemm, kernel_rows(point["tokens"], shape.parallel))]
            fastest += min(times.values())
        slower.append(default / fastest - 1)
    assert len(slower) > 80
    assert max(slower) < WORST_OVER_FASTEST[distribution]
    assert sum(slower) / len(slower) < MEAN_OVER_FASTEST[distribution]


def test_defaults_take_what_divides_the_weights() -> None:
    """2 * 384 rows of gate_up are three tiles of 256; 384 of hidden are three of 128."""
    made = executor(library())
    shape = problem(384, 384)
    assert made.default_tactic(shape, "gemm1", 8192) == NAME("direct_128x256x", "1x1", "_swiglu")
    assert made.default_tactic(shape, "gemm2", 8192) == NAME("direct_128x128x", "1x1", "")


def test_defaults_of_a_library_without_the_family() -> None:
    names = (NAME("128x16x", "1x1", "_swap_ab"), NAME("128x128x", "1x1", ""))
    made = executor(library(*names, catalogue="select"))
    for gemm in GEMMS:
        assert made.default_tactic(problem(), gemm, 8) == names[0]
        assert made.default_tactic(problem(), gemm, 8192) == names[1]


FUSED, PLAIN = NAME("direct_256x32x", "1x1", "_swap_ab_swiglu"), NAME("direct_256x32x", "1x1", "_swap_ab")


def trial(gate_first: bool = True, clamp_limit: float | None = None) -> CudaGemmTrial:
    made = object.__new__(CudaGemmTrial)
    made._variants = library(FUSED, PLAIN)
    made._gate_first = gate_first
    made._problem = MoEProblem(MoEConfig("test", 256, 128, 8, 2, clamp_limit=clamp_limit), Parallel("ep", 1))
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


def test_an_unwritten_row_of_a_fused_gemm_shows() -> None:
    expected = gate_up()
    rows = through_e4m3(swiglu(expected, True, None))
    rows[7, 5] = torch.nan
    error = trial().error(FUSED, rows, expected)
    assert error != error
