"""The rules of what a variant may be, and the tiles that are known to compile or not to."""

import dataclasses

import pytest

from codegen import rules
from codegen.catalogue import entry
from codegen.cutlass import EpilogueScheduleType as Epilogue
from codegen.cutlass import KernelScheduleType as Kernel
from codegen.variant import Ends, Variant

COOPERATIVE = Kernel.PtrArrayBlockwiseTmaWarpSpecializedCooperative
PINGPONG = Kernel.PtrArrayBlockwiseTmaWarpSpecializedPingpong
ONE_SM = Kernel.PtrArrayBlockwiseTmaWarpSpecialized1SmSm100
TWO_SM = Kernel.PtrArrayBlockwiseTmaWarpSpecialized2SmSm100
NVFP4 = Kernel.PtrArrayNvf4TmaWarpSpecialized1SmSm100
MXFP4 = Kernel.PtrArrayMxf8f6f4TmaWarpSpecialized1SmSm100
MXFP4_TWO_SM = Kernel.PtrArrayMxf8f6f4TmaWarpSpecialized2SmSm100
SM120 = Kernel.PtrArrayTmaWarpSpecializedCooperative


def sm90(m: int, n: int, schedule: Kernel = COOPERATIVE, *, k: int = 128, cluster=(1, 1), swap_ab=False) -> Variant:
    return entry("sm_90a", "fp8_block", (m, n, k), schedule, "", cluster=cluster, swap_ab=swap_ab).variant


def direct(m: int, n: int, schedule: Kernel = COOPERATIVE, **options) -> Variant:
    return entry("sm_90a", "fp8_block", (m, n, 128), schedule, "", family="direct", **options).variant


def mixed(m: int, n: int, k: int = 128, *, format: str = "mxfp4", swap_ab=True, **options) -> Variant:
    return entry("sm_90a", format, (m, n, k), SM120, "", family="mixed", swap_ab=swap_ab, **options).variant


def blackwell(arch: str, format: str, m: int, n: int, k: int, schedule: Kernel, cluster=(1, 1)) -> Variant:
    return entry(arch, format, (m, n, k), schedule, "", cluster=cluster).variant


FP8_NVFP4 = dataclasses.replace(blackwell("sm_100a", "mxfp8_mxfp4", 128, 128, 128, MXFP4), format="fp8_nvfp4")
BAD = [
    (rules.schedule_belongs_to_format, dataclasses.replace(sm90(128, 128), schedule=NVFP4), "no collective"),
    (rules.schedule_belongs_to_format, dataclasses.replace(sm90(128, 128), format="nvfp4"), "no collective"),
    (
        rules.epilogue_matches_schedule,
        dataclasses.replace(sm90(64, 128, PINGPONG), epilogue_schedule=Epilogue.PtrArrayTmaWarpSpecializedCooperative),
        "PtrArrayTmaWarpSpecializedPingpong",
    ),
    (rules.k_tile_is_one_scale_block, sm90(128, 128, k=256), "not 256"),
    (rules.schedule_belongs_to_format, FP8_NVFP4, "static_assert"),
    (rules.block_scaled_k_tile, blackwell("sm_100a", "nvfp4", 128, 64, 128, NVFP4), "not 128"),
    (rules.block_scaled_k_tile, blackwell("sm_120a", "nvfp4", 128, 128, 256, SM120), "two of 256"),
    (rules.block_scaled_k_tile, blackwell("sm_100a", "mxfp8_mxfp4", 128, 64, 256, MXFP4), "not tile k 256"),
    (rules.block_scaled_k_tile, blackwell("sm_120a", "mxfp8_mxfp4", 128, 128, 64, SM120), "not tile k 64"),
    (rules.weight_tile_is_whole_scale_blocks, sm90(64, 16, PINGPONG, swap_ab=True), "(64)"),
    (rules.weight_tile_is_whole_scale_blocks, sm90(128, 64), "(64)"),
    (rules.unswapped_weight_tile_is_one_scale_block, sm90(128, 256), "not 256"),
    (rules.warpgroups_divide_m, sm90(64, 128), "not 64"),
    (rules.warpgroups_divide_m, sm90(192, 128), "not 192"),
    (rules.accumulators_fit_registers, sm90(256, 128), "128 accumulators"),
    (rules.accumulators_fit_registers, sm90(128, 192, swap_ab=True), "96 accumulators"),
    (rules.accumulators_fit_registers, sm90(128, 128, PINGPONG), "128 accumulators"),
    (rules.token_tile_fits_the_epilogue, sm90(128, 24, swap_ab=True), "tile n 24"),
    (rules.token_scales_are_masked, sm90(128, 48, swap_ab=True), "with 48 tokens"),
    (rules.small_token_tile_has_no_token_cluster, sm90(128, 16, cluster=(1, 2), swap_ab=True), "token tile of 16"),
    (rules.small_token_tile_has_no_token_cluster, sm90(64, 128, PINGPONG, cluster=(2, 1)), "token tile of 64"),
    (rules.two_sm_has_a_pair, blackwell("sm_100a", "fp8_block", 256, 128, 128, TWO_SM), "got 1, 256"),
    (rules.two_sm_has_a_pair, blackwell("sm_100a", "fp8_block", 128, 128, 128, TWO_SM, (2, 1)), "got 2, 128"),
    (rules.two_sm_has_a_pair, blackwell("sm_100a", "mxfp8_mxfp4", 256, 128, 128, MXFP4_TWO_SM), "got 1, 256"),
    (rules.one_sm_rows, blackwell("sm_100a", "fp8_block", 256, 128, 128, ONE_SM), "not 256"),
    (rules.scale_copy_is_unmasked, blackwell("sm_100a", "fp8_block", 128, 16, 128, ONE_SM), "128x16"),
    (rules.sm100_block_scaled_columns, blackwell("sm_100a", "nvfp4", 128, 32, 256, NVFP4), "got 32"),
    (rules.sm100_block_scaled_columns, blackwell("sm_100a", "nvfp4", 128, 256, 256, NVFP4), "got 256"),
    (rules.sm100_block_scaled_columns, blackwell("sm_100a", "mxfp8_mxfp4", 128, 32, 128, MXFP4), "got 32"),
    (rules.sm120_whole_scale_atoms, blackwell("sm_120a", "nvfp4", 128, 32, 128, SM120), "128x32"),
    (rules.sm120_whole_scale_atoms, blackwell("sm_120a", "nvfp4", 64, 128, 128, SM120), "64x128"),
    (rules.sm120_has_no_cluster, blackwell("sm_120a", "nvfp4", 128, 128, 128, SM120, (2, 1)), "2x1x1"),
    (rules.direct_is_sm90_fp8_block, direct(64, 128, PINGPONG), "not PtrArrayBlockwiseTmaWarpSpecializedPingpong"),
    (
        rules.direct_is_sm90_fp8_block,
        dataclasses.replace(blackwell("sm_100a", "fp8_block", 128, 128, 128, ONE_SM), family="direct"),
        "fp8_block, sm_100a",
    ),
    (
        rules.direct_is_sm90_fp8_block,
        dataclasses.replace(blackwell("sm_120a", "nvfp4", 128, 128, 128, SM120), family="direct"),
        "nvfp4, sm_120a",
    ),
    (rules.direct_unswapped_tile, direct(256, 128), "not 256x128"),
    (rules.direct_unswapped_tile, direct(128, 64), "not 128x64"),
    (rules.direct_has_no_cluster, direct(128, 128, cluster=(1, 2)), "not 1x2x1"),
    (rules.direct_has_no_cluster, direct(128, 16, cluster=(2, 1), swap_ab=True), "not 2x1x1"),
    (rules.direct_has_no_cluster, mixed(128, 16, cluster=(1, 2)), "not 1x2x1"),
    (
        rules.mixed_is_what_reads_packed_weights,
        dataclasses.replace(direct(128, 16, swap_ab=True), family="mixed"),
        "mixed, fp8_block, sm_90a",
    ),
    (
        rules.mixed_is_what_reads_packed_weights,
        dataclasses.replace(mixed(128, 16, format="nvfp4"), family="collective"),
        "collective, nvfp4, sm_90a",
    ),
    (
        rules.mixed_is_what_reads_packed_weights,
        dataclasses.replace(blackwell("sm_100a", "nvfp4", 128, 128, 256, NVFP4), family="mixed"),
        "mixed, nvfp4, sm_100a",
    ),
    (rules.mixed_tile, mixed(128, 128, swap_ab=False), "swapped"),
    (rules.mixed_tile, mixed(256, 16), "not 256x16"),
    (rules.mixed_tile, mixed(128, 320), "not 128x320"),
    (rules.mixed_tile, mixed(128, 16, 256), "not 256"),
    (rules.mixed_tile, mixed(128, 16, 64, format="fp8_mxfp4"), "not 64"),
    (
        rules.swiglu_has_whole_scale_blocks,
        dataclasses.replace(sm90(256, 16, swap_ab=True), ends="swiglu"),
        "collectives",
    ),
    (rules.swiglu_has_whole_scale_blocks, mixed(128, 16, ends="gather_swiglu"), "does not gather"),
    (rules.swiglu_has_whole_scale_blocks, direct(128, 16, swap_ab=True, ends="swiglu"), "not 128"),
    (rules.swiglu_has_whole_scale_blocks, direct(128, 128, ends="swiglu"), "256 weights: not 128"),
    (rules.swiglu_has_whole_scale_blocks, direct(128, 16, swap_ab=True, ends="gather_swiglu"), "not 128"),
]


@pytest.mark.parametrize(("rule", "variant", "reason"), BAD, ids=lambda value: getattr(value, "__name__", ""))
def test_rule_rejects_with_its_reason(rule, variant, reason):
    assert reason in rule(variant)
    assert rule(variant) in rules.check(variant)


def test_every_rule_has_a_bad_variant():
    assert {rule for rule, _, _ in BAD} == set(rules.RULES)


TWINS: tuple[Ends, ...] = ("plain", "combine")
OF_MIXED: tuple[Ends, ...] = (*TWINS, "swiglu")
# What compiled without spills and gave right results, and what did not, as measured with nvcc 13.0.88.
GOOD_TILES = [
    *(sm90(128, 128, cluster=cluster) for cluster in ((1, 1), (1, 2), (2, 1))),
    sm90(64, 128, PINGPONG),
    *(sm90(128, n, swap_ab=True) for n in (8, 16, 32, 64, 96)),
    *(sm90(128, n, PINGPONG, swap_ab=True) for n in (16, 32, 64)),
    *(sm90(256, n, swap_ab=True) for n in (32, 64)),
    *(direct(128, n, ends=ends) for n in (128, 256) for ends in TWINS),
    *(direct(192, 128, ends=ends) for ends in TWINS),
    direct(128, 256, ends="swiglu"),
    *(direct(128, n, swap_ab=True, ends=ends) for n in (8, 16, 32, 64) for ends in TWINS),
    *(direct(256, n, swap_ab=True, ends=ends) for n in (32, 64) for ends in TWINS),
    *(direct(256, n, swap_ab=True, ends="swiglu") for n in (16, 32)),
    direct(256, 16, swap_ab=True, ends="gather_swiglu"),
    *(
        mixed(128, n, k, format=weights, ends=ends)
        for weights, wide_k in (("mxfp4", 128), ("nvfp4", 128), ("bf16", 64))
        for n, k in ((8, 128), (16, 128), (32, 128), (64, 128), (128, wide_k), (256, 64))
        for ends in OF_MIXED
    ),
    *(mixed(128, n, format="fp8_mxfp4", ends=ends) for n in (8, 16, 32, 64, 128, 192, 256) for ends in OF_MIXED),
    sm90(128, 16, cluster=(2, 1), swap_ab=True),
]
BAD_TILES = [
    *(sm90(m, n) for m, n in ((256, 128), (128, 256), (192, 128), (64, 128))),
    *(sm90(m, n, swap_ab=True) for m, n in ((128, 192), (64, 32), (64, 16), (128, 24), (128, 48))),
    *(sm90(m, n, PINGPONG) for m, n in ((128, 128), (64, 256))),
    *(direct(m, n) for m, n in ((256, 128), (128, 192), (64, 128), (192, 256))),
    *(direct(256, n, swap_ab=True, ends="swiglu") for n in (24, 128)),
    mixed(128, 24),
    mixed(128, 64, 64, format="fp8_mxfp4"),
]


@pytest.mark.parametrize("variant", GOOD_TILES, ids=lambda v: v.name)
def test_tiles_known_to_compile_pass(variant):
    assert rules.check(variant) == []


@pytest.mark.parametrize("variant", BAD_TILES, ids=lambda v: v.name)
def test_tiles_known_to_fail_are_rejected(variant):
    assert rules.check(variant)
