"""Which kernels the CUDA executor takes for which GEMM; no GPU, no library."""

from __future__ import annotations

import functools
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from moe_runtime import MoEConfig, Parallel, machine
from moe_runtime.executors.base import GEMMS, Gemm, MoEProblem, able_tactics
from moe_runtime.executors.cuda import CudaExecutor
from moe_runtime.executors.default_tactic import twin
from moe_runtime.formats import FORMATS, WeightLayout
from moe_runtime.kernels import KernelVariant, LayerArguments, WorkspaceLayout
from moe_runtime.workload import kernel_rows, make_workload

ENCODINGS = tuple(WeightLayout)
GRID = Path(__file__).parent.parent / "benchmarks/results/h200/grid.json"
NAME = "sm90a_fp8_block_{}128_{}x1_warpspecialized_cooperative{}".format


def library(
    *chosen: str, catalogue: str = "default_entries", weights: Sequence[WeightLayout] = (WeightLayout.FP8_BLOCK,)
) -> dict[str, KernelVariant]:
    """The variants of a library built of the catalogue that read such weights, or the ones of these names."""
    entries = [entry.variant for entry in getattr(machine.generator("catalogue"), catalogue)("sm_90a")]
    return {
        v.name: KernelVariant(
            index, v.name, (v.tile.m, v.tile.n, v.tile.k), (v.cluster.m, v.cluster.n), v.swap_ab, 4, 0, v.swiglu,
            WeightLayout[v.format.upper()], v.gathers, v.combines,
        )
        for index, v in enumerate(entries)
        if WeightLayout[v.format.upper()] in weights and (not chosen or v.name in chosen)
    }  # fmt: skip


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


def problem(hidden: int = 7168, intermediate: int = 2048, parallel: str = "dep8", **options: Any) -> MoEProblem:
    return MoEProblem(MoEConfig("test", hidden, intermediate, 256, 8, **options), Parallel.parse(parallel))


@pytest.mark.parametrize("gemm", GEMMS)
@pytest.mark.parametrize("format", FORMATS)
def test_every_format_has_kernels_of_its_own(format: str, gemm: Gemm) -> None:
    """Also at sizes that their tiles do not divide, but for those of fp8_block."""
    sizes = (768, 384) if format == "fp8_block" else (2880, 2880)
    made, shape = executor(library(weights=ENCODINGS)), problem(*sizes, format=format)
    tactics = made.tactics(shape, gemm)
    assert tactics and {made.variants[name].weights for name in tactics} == {FORMATS[format].weight_layout}
    chosen = [made.default_tactic(shape, gemm, rows) for rows in (1, 512, 8192)]
    assert set(chosen) <= set(able_tactics(made, shape, gemm))
    if format != "fp8_block":
        serving = {name for name in tactics if made.variants[name].swiglu == (gemm == "gemm1")}
        assert serving == set(able_tactics(made, shape, gemm))
        tiles = [made.variants[name].token_tile for name in chosen]
        assert tiles == sorted(set(tiles))


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


ACTIVATES, ADDS_UP = (
    "it applies the activation, which only gemm1 has",
    "it adds up the experts' results, which only gemm2 has",
)


@pytest.mark.parametrize(
    ("ends", "gemm1", "gemm2"),
    [
        ("cooperative", None, None),
        ("cooperative_swap_ab", None, None),
        ("_combine", ADDS_UP, None),
        ("_swap_ab_swiglu", None, ACTIVATES),
        ("_gather_swiglu", None, ACTIVATES),
    ],
)
def test_what_a_kernel_does_beside_the_product_decides_whom_it_serves(
    ends: str, gemm1: str | None, gemm2: str | None
) -> None:
    made = executor(library())
    found = [name for name in made.tactics(problem(), "gemm1") if name.endswith(ends)]
    assert len(found) >= (1 if ends == "_gather_swiglu" else 2)
    for name in found:
        assert made.can_implement(problem(), "gemm1", name) == gemm1
        assert made.can_implement(problem(), "gemm2", name) == gemm2


NO_GATE, ROWS_APART = "it applies SwiGLU, not relu2", "gate and up are packed for kernels that activate"
REFUSALS_OF_PACKED = {
    ("swiglu", "gemm1"): {"plain": ROWS_APART, "combine": ADDS_UP, "swiglu": None},
    ("swiglu", "gemm2"): {"plain": None, "combine": None, "swiglu": ACTIVATES},
    ("relu2", "gemm1"): {"plain": None, "combine": ADDS_UP, "swiglu": NO_GATE},
    ("relu2", "gemm2"): {"plain": None, "combine": None, "swiglu": ACTIVATES},
}


def ends_of(name: str) -> str:
    return next((end for end in ("combine", "swiglu") if name.endswith(f"_{end}")), "plain")


@pytest.mark.parametrize(("activation", "gemm"), REFUSALS_OF_PACKED)
@pytest.mark.parametrize("format", ["mxfp8_mxfp4", "nvfp4", "bf16"])
def test_a_third_of_the_kernels_of_packed_weights_is_for_each_end(format: str, activation: str, gemm: Gemm) -> None:
    made, shape = executor(library(weights=ENCODINGS)), problem(format=format, activation=activation)
    found, refusals = made.tactics(shape, gemm), REFUSALS_OF_PACKED[activation, gemm]
    assert Counter(map(ends_of, found)) == dict.fromkeys(refusals, 6)
    for name in found:
        assert made.can_implement(shape, gemm, name) == refusals[ends_of(name)]


@pytest.mark.parametrize("catalogue", ["default_entries", "select"])
def test_leaving_rows_takes_the_twin_of_what_combines_and_keeps_all_else(catalogue: str) -> None:
    made = executor(library(catalogue=catalogue, weights=ENCODINGS))
    assert sum(variant.combines for variant in made.variants.values()) >= 8
    for name in (*made.variants, "gone"):
        left = made.leaving_rows(name)
        assert left == name.removesuffix("_combine")
        assert left == "gone" or not made.variants[left].combines


def test_leaving_rows_of_a_library_without_the_twin() -> None:
    """Then the layer refuses by what the native call says, not by the name of a kernel that is not there."""
    name = NAME("direct_128x8x", "1x1", "_swap_ab_combine")
    assert executor(library(name)).leaving_rows(name) == name


@pytest.mark.parametrize(
    ("end", "other_end", "expected"),
    [("swiglu", "gather_swiglu", "_swap_ab_gather_swiglu"), ("swiglu", "combine", "_swap_ab_swiglu"),
     ("", "combine", "_swap_ab_swiglu"), ("combine", "", "_swap_ab_swiglu")],
)  # fmt: skip
def test_the_twin_of_a_kernel_that_activates(end: str, other_end: str, expected: str) -> None:
    kernels, stem = library(), "direct_256x16x"
    assert twin(kernels[NAME(stem, "1x1", "_swap_ab_swiglu")], kernels.values(), end, other_end).name == NAME(
        stem, "1x1", expected
    )


@pytest.mark.parametrize(("ends", "stores_rows"), [("", True), ("_combine", False), ("_swiglu", False)])
def test_which_kernels_store_rows(ends: str, stores_rows: bool) -> None:
    assert library()[NAME("direct_128x256x", "1x1", ends)].stores_rows == stores_rows


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
    for name in made.tactics(problem(), gemm):
        variant = made.variants[name]
        if variant.swiglu if gemm == "gemm2" else variant.combines:
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
        name = NAME("direct_128x8x", "1x1", "_swap_ab")
        assert "outside what the kernels implement" in str(made.can_implement(problem(), gemm, name))


@pytest.mark.parametrize(
    ("tokens_a_rank", "gemm1", "gemm2"),
    [
        (1, "256x16", "128x8"),
        (18, "256x16", "128x8"),
        (19, "256x16", "128x16"),
        (98, "256x32", "128x32"),
        (99, "128x256", "128x128"),
        (213, "128x256", "128x128"),
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
        assert chosen.swiglu == (gemm == "gemm1")
        assert not chosen.gathers
        assert chosen.combines == (gemm == "gemm2")
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
    chosen = made.variants[made.default_tactic(shape, "gemm1", kernel_rows(tokens_a_rank, shape.parallel))]
    assert (chosen.swiglu, chosen.gathers) == (fused, False)


@pytest.mark.parametrize("activation", ["swiglu", "relu2"])
@pytest.mark.parametrize("parallel", ["ep1", "ep8", "dep8"])
@pytest.mark.parametrize("format", ["mxfp8_mxfp4", "nvfp4", "bf16"])
def test_defaults_of_packed_weights_activate_and_combine(format: str, parallel: str, activation: str) -> None:
    """Whatever the rows: for a gated gemm1 there is no other kernel, however few tiles there are."""
    made = executor(library(weights=ENCODINGS))
    shape = problem(format=format, parallel=parallel, activation=activation)
    for rows in (*range(1, 34), *(2**power + more for power in range(6, 16) for more in (-1, 0, 1))):
        first, second = (made.variants[made.default_tactic(shape, gemm, rows)] for gemm in GEMMS)
        assert first.weights == second.weights == shape.config.number_format.weights
        assert (first.swiglu, first.stores_rows) == (activation == "swiglu", activation == "relu2")
        assert second.combines and first.tile == second.tile


def test_defaults_of_a_library_without_twins() -> None:
    names = [name for name in library() if not name.endswith("_combine") and "_gather_" not in name]
    made = executor(library(*names))
    for rows in (8, 64, 512, 8192):
        chosen = [made.variants[made.default_tactic(problem(), gemm, rows)] for gemm in GEMMS]
        assert not any(variant.gathers or variant.combines for variant in chosen)


WORST_OVER_FASTEST = {"balanced": 0.07, "random": 0.07, "zipf:1.0": 0.08}
MEAN_OVER_FASTEST = {"balanced": 0.009, "random": 0.006, "zipf:1.0": 0.013}


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
            chosen = made.default_tactic(shape, gemm, kernel_rows(point["tokens"], shape.parallel))
            default += times[chosen]
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
    assert made.default_tactic(shape, "gemm2", 8192) == NAME("direct_128x128x", "1x1", "_combine")


def test_defaults_of_a_library_without_the_family() -> None:
    names = (NAME("128x16x", "1x1", "_swap_ab"), NAME("128x128x", "1x1", ""))
    made = executor(library(*names, catalogue="select"))
    for gemm in GEMMS:
        assert made.default_tactic(problem(), gemm, 8) == names[0]
        assert made.default_tactic(problem(), gemm, 8192) == names[1]
