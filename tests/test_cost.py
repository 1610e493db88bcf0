"""The cost model against times of one H200, and the buckets against where tiles fill up."""

import dataclasses
import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_runtime import MoEConfig, Parallel
from moe_runtime.errors import InvalidArgument
from moe_runtime.executors import get_executor
from moe_runtime.executors.base import GEMMS, MoEProblem
from moe_runtime.formats import WeightLayout
from moe_runtime.kernels import KernelVariant
from moe_runtime.roofs import ROOFS, Roofs
from moe_runtime.tuning.buckets import MOST, by_usefulness, plan_buckets, propose
from moe_runtime.tuning.cost import HEADROOM, cost, predict, promising
from moe_runtime.workload import buckets as powers_of_two
from moe_runtime.workload import kernel_rows, make_workload

from .test_cuda_tactics import executor, library
from .test_tuner import FakeExecutor

MEASURED = Path(__file__).parent.parent / "benchmarks" / "results" / "h200" / "gemm.json"
H200 = ROOFS["NVIDIA H200"]
SMS = 132


def variants(catalogue: str = "select") -> dict[str, KernelVariant]:
    """Those of fp8_block in the whole catalogue, or in what "default_entries" puts into a library."""
    return library(catalogue=catalogue)


LIBRARY = variants("default_entries")
FUSED = {name: variant for name, variant in LIBRARY.items() if variant.swiglu}
COLLECTIVES = {name: variant for name, variant in variants().items() if name not in LIBRARY}


def points(known: dict[str, KernelVariant]) -> list[tuple[str, dict[str, float], dict[str, float]]]:
    """(name, measured, predicted) of every GEMM and number of rows, for those of the variants that were measured."""
    found = []
    for name, gemm in json.loads(MEASURED.read_text())["results"].items():
        for rows, point in gemm["by_rows_per_expert"].items():
            measured = {tactic: us for tactic, us in point["interleaved_us"].items() if tactic in known}
            load, shape = [int(rows)] * gemm["groups"], (gemm["N"], gemm["K"])
            predicted = {tactic: cost(known[tactic], load, shape, SMS, H200).us for tactic in measured}
            found.append((f"{name}, {rows} rows", measured, predicted))
    return found


# Measured, the fastest nowhere, and so no longer in the catalogue. Both serve gemm1 only.
LEFT = {
    "sm90a_fp8_block_direct_256x64x128_1x1x1_warpspecialized_cooperative_swap_ab_swiglu",
    "sm90a_fp8_block_direct_256x32x128_1x1x1_warpspecialized_cooperative_swap_ab_gather_swiglu",
}


def test_every_measured_variant_is_known_and_every_one_measured() -> None:
    """Each at every point: as gemm1 all that combine nothing, as gemm2 all that neither activate nor gather."""
    for name, gemm in json.loads(MEASURED.read_text())["results"].items():
        gemm1 = name.endswith("g1")
        expected = {tactic for tactic, v in variants().items() if not (v.combines if gemm1 else v.swiglu)}
        expected |= LEFT if gemm1 else set()
        for rows, point in gemm["by_rows_per_expert"].items():
            assert point["interleaved_us"].keys() == expected, (name, rows)


def test_no_variant_is_faster_than_predicted() -> None:
    assert len(points(variants())) == 44
    for name, measured, predicted in points(variants()):
        assert measured
        assert {tactic for tactic in measured if measured[tactic] < predicted[tactic]} == set(), name


def worst(found: list[tuple[str, dict[str, float], dict[str, float]]]) -> float:
    return max(min(measured.values()) / min(predicted.values()) for _, measured, predicted in found)


def test_the_headroom_is_what_it_says() -> None:
    assert 1.67 < worst(points(COLLECTIVES)) < 1.69
    assert 1.28 < worst(points(LIBRARY)) < 1.3 < HEADROOM


@pytest.mark.parametrize(
    ("known", "racing"),
    [(variants(), variants()), (LIBRARY, LIBRARY), (LIBRARY, FUSED), (COLLECTIVES, COLLECTIVES)],
    ids=["all", "the library", "the activation fused", "collectives"],
)
def test_pruning_keeps_what_is_near_the_best(known: dict[str, KernelVariant], racing: dict[str, KernelVariant]) -> None:
    for name, measured, predicted in points(known):
        kept, times = promising(predicted), {tactic: us for tactic, us in measured.items() if tactic in racing}
        best = min(times.values(), default=0.0)
        assert {tactic for tactic in times if times[tactic] <= 1.03 * best} <= kept, name


def test_pruning_saves_time() -> None:
    pruned = total = 0
    kept_us = all_us = 0.0
    for _, measured, predicted in points(LIBRARY):
        kept, best = promising(predicted), min(measured.values())
        pruned, total = pruned + len(measured) - len(kept), total + len(measured)
        kept_us += sum(measured[tactic] for tactic in kept) / best
        all_us += sum(measured.values()) / best
    print(f"pruned {pruned} of {total} variants; timing the rest takes {kept_us / all_us:.0%} of timing all")
    assert pruned / total > 0.2 and kept_us / all_us < 0.6


def variant(
    tile: tuple[int, int],
    swap_ab: bool = False,
    cluster: tuple[int, int] = (1, 1),
    swiglu: bool = False,
    name: str = "v",
) -> KernelVariant:
    return KernelVariant(0, name, (*tile, 128), cluster, swap_ab, 0, 0, swiglu)


def test_tiles_and_waves_by_hand() -> None:
    # 3 experts with rows: 1, 1 and 2 tiles of 64 tokens, each times 4 tiles of 128 weights.
    roofs = dataclasses.replace(H200, l2_tbps=1e3)
    found = cost(variant((128, 64), swap_ab=True), [1, 64, 0, 65], (512, 1024), 10, roofs)
    assert (found.tiles, found.waves) == (16, 2)
    assert found.tiles_us == pytest.approx(2 * 10 * (2 * 64 * 128) * 1024 / roofs.block_scaled_tflops / 1e6)
    read = 3 * (512 * 1024 + 4 * 4 * 8) + 130 * (1024 + 8 * 4 + 2 * 512)
    assert found.memory_us == pytest.approx(read / H200.read_tbps / 1e6)
    # Tiles of 16 tokens, 1, 4 and 5 of them: too narrow for the tensor cores, so L2 is their limit.
    found = cost(variant((128, 16), swap_ab=True), [1, 64, 0, 65], (512, 1024), 10, H200)
    assert (found.tiles, found.waves) == (40, 4)
    assert found.tiles_us == pytest.approx(4 * 10 * (16 + 128) * 1024 / H200.l2_tbps / 1e6)


@pytest.mark.parametrize(
    ("name", "l2_tbps", "waves"),
    [
        ("direct", 1e3, 2.0),  # a half multiplies half as much: 4 + 4 / 2 tiles over 3 SMs
        ("direct", H200.l2_tbps, 2.0),  # its bytes take no longer than that
        ("direct", 1e-3, 2.5),  # and needs 5/6 of the bytes: 4 + 4 * 5/6 tiles, to the next half
        ("collective", H200.l2_tbps, 3.0),
    ],
)
def test_halves_of_tiles_by_hand(name: str, l2_tbps: float, waves: float) -> None:
    """Two whole tiles and two of at most 64 rows, each times 2 of 256 weights."""
    v, roofs = variant((128, 256), name=f"sm90a_{name}_128x256"), dataclasses.replace(H200, l2_tbps=l2_tbps)
    found = cost(v, [128, 65, 0, 64, 1], (512, 1024), 3, roofs)
    assert (found.tiles, found.waves) == (8, waves)


@pytest.mark.parametrize(
    ("weights", "each", "row_bytes", "tflops"),
    [
        (WeightLayout.MXFP4, 17 / 32, 2, H200.bf16_tflops),
        (WeightLayout.NVFP4, 9 / 16, 2, H200.bf16_tflops),
        (WeightLayout.BF16, 2.0, 2, H200.bf16_tflops),
        (WeightLayout.FP8_MXFP4, 17 / 32, 1, H200.block_scaled_tflops),
    ],
    ids=str,
)
def test_weights_of_fewer_bits_read_less(weights: WeightLayout, each: float, row_bytes: int, tflops: float) -> None:
    """Beside bf16 rows, and as fast as bf16 multiplies, or beside e4m3 rows."""
    v = dataclasses.replace(variant((128, 64), swap_ab=True), weights=weights)
    found = cost(v, [1, 64, 0, 65], (512, 1024), 10, H200)
    read = 3 * 512 * 1024 * each + 130 * (row_bytes * 1024 + 2 * 512)
    assert found.memory_us == pytest.approx(read / H200.read_tbps / 1e6)
    tile = max(2 * 64 * 128 / tflops, (row_bytes * 64 + each * 128) / H200.l2_tbps) * 1024
    assert found.tiles_us == pytest.approx(2 * 10 * tile / 1e6)


def test_a_fused_activation_writes_a_quarter() -> None:
    """e4m3 of half the columns, with a float per 128, where the GEMM alone writes bf16 of all."""
    rows, shape = [1, 64, 0, 65], (512, 1024)
    plain, fused = (cost(variant((256, 32), True, swiglu=swiglu), rows, shape, SMS, H200) for swiglu in (False, True))
    written = 130 * (2 * 512 - (256 + 4 * 2))
    assert plain.memory_us - fused.memory_us == pytest.approx(written / H200.read_tbps / 1e6)
    assert plain.tiles_us == fused.tiles_us


def test_rows_count_and_not_their_mean() -> None:
    shape, wide = (4096, 7168), variant((128, 64), swap_ab=True)
    assert cost(wide, [0, 128] * 16, shape, SMS, H200).tiles == cost(wide, [64] * 32, shape, SMS, H200).tiles
    assert cost(wide, [32, 96] * 16, shape, SMS, H200).tiles == 1.5 * cost(wide, [64] * 32, shape, SMS, H200).tiles


def test_a_cluster_takes_its_blocks_together() -> None:
    """Two token tiles share the weights: no use where an expert has only one, but half the reading where it has two."""
    alone, pair = variant((128, 128)), variant((128, 128), cluster=(2, 1))
    slow_l2 = Roofs(read_tbps=4.0, l2_tbps=1.0, block_scaled_tflops=1e9, dense_tflops=1e9, bf16_tflops=1e9)
    for rows, ratio in ((128, 1.5), (256, 0.75)):
        one, two = (cost(v, [rows] * SMS, (128, 4096), SMS, slow_l2).tiles_us for v in (alone, pair))
        assert two / one == pytest.approx(ratio)


@given(
    st.lists(st.integers(0, 3000), min_size=1, max_size=64).filter(any),
    st.sampled_from(sorted(variants())),
    st.integers(0, 63),
)
def test_more_rows_never_cost_less(rows: list[int], name: str, where: int) -> None:
    more = list(rows)
    more[where % len(rows)] += 1
    before, after = (cost(variants()[name], load, (4096, 7168), SMS, H200).us for load in (rows, more))
    assert 0 < before <= after


def test_nothing_is_predicted_for_a_cpu() -> None:
    shape = MoEProblem(MoEConfig("test", 256, 128, 8, 2), Parallel.parse("dep2"))
    workload = make_workload(shape.config, shape.parallel, 4, "balanced")
    assert predict(get_executor("cpu"), shape, "gemm1", [workload]) == {} and promising({}) == set()


TILES = sorted({v.token_tile for v in LIBRARY.values()})


def problem(model: str, parallel: str) -> MoEProblem:
    return MoEProblem(MoEConfig.preset(model), Parallel.parse(parallel))


def test_buckets_of_deepseek_r1_by_hand() -> None:
    """dep8: 4 tokens a rank bring each expert a row, so a tile of 8 is outgrown at 36 tokens, one of 128 at 516."""
    assert TILES == [8, 16, 32, 64, 128, 192]
    found = (1, 2, 4, 8, 16, 36, 68, 132, 260, 516, 772, 1028, 1540, 4096, 8192)
    assert propose(problem("deepseek-r1", "dep8"), 8192, TILES) == found
    assert propose(problem("deepseek-r1", "dep8"), 8192, [*TILES, 96]) == tuple(sorted({*found, 388}))
    assert propose(problem("deepseek-r1", "ep8"), 1024, TILES) == (1, 2, 4, 8, 16, 32, 64, 128, 288, 544, 1024)


@pytest.mark.parametrize("text", ["dep8", "ep8", "dep2", "tp2", "dep4tp2"])
@pytest.mark.parametrize("tokens", [9, 33, 40, 100, 500])
def test_one_tile_serves_a_bucket(text: str, tokens: int) -> None:
    """Under balanced routing the smallest tile that holds an expert's rows is the bucket's for all but a few calls."""
    shape = problem("deepseek-r1", text)
    found = propose(shape, 8192, TILES)
    bucket = max(start for start in found if start <= tokens)

    def smallest_tile(tokens: int) -> int | None:
        rows = int(make_workload(shape.config, shape.parallel, tokens, "balanced").rows_per_expert.max())
        return next((tile for tile in TILES if tile >= rows), None)

    rows_of_next = min((start for start in found if start > tokens), default=8192)
    last_full = rows_of_next * 15 // 16 - 1
    assert smallest_tile(bucket) == smallest_tile(max(bucket, min(tokens, last_full)))


@given(
    st.sampled_from(["dep2", "dep8", "ep8", "ep1", "dep64", "tp4"]),
    st.sampled_from(["qwen3-235b", "deepseek-r1"]),
    st.integers(1, 40_000),
    st.booleans(),
)
def test_buckets_cover_the_range(text: str, model: str, tune_max: int, smeared: bool) -> None:
    found = propose(problem(model, text), tune_max, TILES, smeared)
    assert found[0] == 1 and found[-1] <= tune_max and len(found) <= MOST
    assert list(found) == sorted(set(found))
    assert all(second <= 3.1 * first for first, second in pairwise((*found, tune_max)) if second <= 8192)


def test_unequal_rows_outgrow_a_tile_before_their_mean_fills_it() -> None:
    """dep8: 19 tokens a rank are 4.75 rows an expert and 8.02 with the spread, 213 are 53.25 and 64.2."""
    smeared = propose(problem("deepseek-r1", "dep8"), 8192, TILES, True)
    assert {19, 45, 99, 213, 449} <= set(smeared) and {3, 29, 145, 309} <= set(smeared) and len(smeared) <= MOST


@pytest.mark.parametrize("text", ["dep2", "ep2"])
def test_a_bucket_has_one_default(text: str) -> None:
    """So where the plan keeps the default of a bucket's first call, its other calls lose nothing to their own."""
    shape, made = problem("qwen3-235b", text), executor(LIBRARY)
    found = propose(shape, 16384, TILES, True)
    for first, after in pairwise((*found, 16384)):
        for gemm in GEMMS:
            rows = (kernel_rows(tokens, shape.parallel) for tokens in (first, after - 1))
            assert len({made.default_tactic(shape, gemm, count) for count in rows}) == 1, (first, after, gemm)


@pytest.mark.parametrize("tune_max", [1, 500, 9000])
def test_without_tiles_powers_of_two_do(tune_max: int) -> None:
    shape = problem("qwen3-235b", "dep2")
    assert list(plan_buckets(shape, get_executor("cpu"), tune_max, "random")) == powers_of_two(tune_max)


def test_kernels_of_an_executor_give_predictions_and_buckets() -> None:
    executor, shape = FakeExecutor({"plain": 1}), problem("deepseek-r1", "dep8")
    executor.variants, executor.sm_count = LIBRARY, SMS
    assert plan_buckets(shape, executor, 8192, "balanced") == propose(shape, 8192, TILES)
    workload = make_workload(shape.config, shape.parallel, 128, "balanced")
    assert predict(executor, shape, "gemm1", [workload]) == {}  # on a device without roofs
    executor.device_name = "NVIDIA H200"  # type: ignore[misc]
    predicted = predict(executor, shape, "gemm1", [workload, workload])
    assert predicted.keys() == LIBRARY.keys()
    for name, us in predicted.items():
        assert us == [cost(LIBRARY[name], [32] * 32, (4096, 7168), SMS, H200).us] * 2


def test_kernels_of_other_weights_make_no_buckets() -> None:
    """A tile of 256 tokens is one of packed weights alone."""
    executor, shape = FakeExecutor({"plain": 1}), problem("deepseek-r1", "dep8")
    executor.variants = library(weights=tuple(WeightLayout))
    assert {v.token_tile for v in executor.variants.values()} > set(TILES)
    assert plan_buckets(shape, executor, 8192, "balanced") == propose(shape, 8192, TILES)


def test_no_buckets_below_one_token() -> None:
    with pytest.raises(InvalidArgument, match=r"^tune_max_num_tokens: got 0"):
        propose(problem("qwen3-235b", "dep2"), 0, TILES)


@given(st.sets(st.integers(1, 9999), max_size=20))
def test_usefulness_orders_all_and_spreads_early(buckets: set[int]) -> None:
    ascending = sorted(buckets)
    order = by_usefulness(ascending)
    assert sorted(order) == ascending
    for done in range(1, len(order)):
        places = [-1, *sorted(ascending.index(bucket) for bucket in order[:done]), len(ascending)]
        gaps: Any = [second - first for first, second in pairwise(places)]
        assert max(gaps) <= 2 * (len(ascending) + 1) / (done + 1) + 1
