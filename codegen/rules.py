"""What a variant may be. Each constraint is one predicate that returns the reason for a no, or None."""

from collections.abc import Callable

from .cutlass import EpilogueScheduleType as Epilogue
from .cutlass import KernelScheduleType as Kernel
from .variant import Variant

Rule = Callable[[Variant], str | None]

WARPGROUP_ROWS = 64  # rows of one wgmma
SCALE_BLOCK = 128  # fp8_block: one weight scale per 128x128, one token scale per 1x128
MAX_ACCUMULATORS = 64  # fp32 registers a thread; the block-scaled mainloop keeps a second set to promote into
TWO_SM = (
    Kernel.PtrArrayBlockwiseTmaWarpSpecialized2SmSm100,
    Kernel.PtrArrayNvf4TmaWarpSpecialized2SmSm100,
    Kernel.PtrArrayMxf8f6f4TmaWarpSpecialized2SmSm100,
)
COOPERATIVE = (
    Kernel.PtrArrayBlockwiseTmaWarpSpecializedCooperative,
    Kernel.PtrArrayTmaWarpSpecializedCooperative,
)
DIRECT_TILES = ((128, 128), (128, 256), (192, 128))  # with tokens as operand A
MIXED_WEIGHTS = ("mxfp4", "nvfp4", "bf16", "fp8_mxfp4")
MAX_MIXED_TOKENS = 256  # columns of one wgmma

# Kernel schedules of each (arch, format), and the epilogue schedule that runs with each.
SCHEDULES = {
    ("sm_90a", "fp8_block"): {
        Kernel.PtrArrayBlockwiseTmaWarpSpecializedCooperative: Epilogue.PtrArrayTmaWarpSpecializedCooperative,
        Kernel.PtrArrayBlockwiseTmaWarpSpecializedPingpong: Epilogue.PtrArrayTmaWarpSpecializedPingpong,
    },
    ("sm_100a", "fp8_block"): {
        Kernel.PtrArrayBlockwiseTmaWarpSpecialized1SmSm100: Epilogue.PtrArrayTmaWarpSpecialized1Sm,
        Kernel.PtrArrayBlockwiseTmaWarpSpecialized2SmSm100: Epilogue.PtrArrayTmaWarpSpecialized2Sm,
    },
    ("sm_100a", "nvfp4"): {
        Kernel.PtrArrayNvf4TmaWarpSpecialized1SmSm100: Epilogue.PtrArrayTmaWarpSpecialized1Sm,
        Kernel.PtrArrayNvf4TmaWarpSpecialized2SmSm100: Epilogue.PtrArrayTmaWarpSpecialized2Sm,
    },
    ("sm_100a", "mxfp8_mxfp4"): {
        Kernel.PtrArrayMxf8f6f4TmaWarpSpecialized1SmSm100: Epilogue.PtrArrayTmaWarpSpecialized1Sm,
        Kernel.PtrArrayMxf8f6f4TmaWarpSpecialized2SmSm100: Epilogue.PtrArrayTmaWarpSpecialized2Sm,
    },
    # Kernels of our own for packed weights: templates/mixed.
    **{
        ("sm_90a", weights): {
            Kernel.PtrArrayTmaWarpSpecializedCooperative: Epilogue.PtrArrayTmaWarpSpecializedCooperative
        }
        for weights in MIXED_WEIGHTS
    },
    # sm_120's block-scaled builder takes the grouped schedules of sm_90 and finds the format from the element types.
    **{
        ("sm_120a", format): {
            Kernel.PtrArrayTmaWarpSpecializedCooperative: Epilogue.PtrArrayTmaWarpSpecializedCooperative,
            Kernel.PtrArrayTmaWarpSpecializedPingpong: Epilogue.PtrArrayTmaWarpSpecializedPingpong,
        }
        for format in ("nvfp4", "mxfp8_mxfp4")
    },
}

# Formats of layers (moe_runtime/formats/registry.py) that have no kernels of their own on Blackwell.
NOT_ON_BLACKWELL = {
    "fp8_mxfp4": (
        "served by the kernels of mxfp8_mxfp4, whose token factors are then all 2^0 (`scale_layouts.unit_atoms`); the "
        "tensor's scale goes into alpha"
    ),
    "fp8_nvfp4": (
        "e4m3 beside e2m1 is the instruction mxf8f6f4, whose factors are ue8m0, one per 32; NVFP4's are e4m3, one per "
        "16 (static_assert)"
    ),
    "bf16_mxfp4": "no tensor-core instruction multiplies bf16 by 4-bit values; kernels that decode first are sm_90a's",
    "bf16": "a yardstick for layers, and layers run on Hopper",
}


def is_sm90(v: Variant) -> bool:
    return v.arch == "sm_90a"


def is_sm100(v: Variant) -> bool:
    return v.arch == "sm_100a"


def schedule_belongs_to_format(v: Variant) -> str | None:
    if v.schedule not in SCHEDULES.get((v.arch, v.format), {}):
        why = "" if is_sm90(v) else NOT_ON_BLACKWELL.get(v.format, "")
        return f"{v.schedule.name} has no collective for {v.format} on {v.arch}{why and f': {why}'}"
    return None


def epilogue_matches_schedule(v: Variant) -> str | None:
    expected = SCHEDULES.get((v.arch, v.format), {}).get(v.schedule, v.epilogue_schedule)
    if v.epilogue_schedule is not expected:
        return f"{v.schedule.name} hands its tile to the epilogue {expected.name}, not {v.epilogue_schedule.name}"
    return None


def k_tile_is_one_scale_block(v: Variant) -> str | None:
    if v.format == "fp8_block" and v.tile.k != SCALE_BLOCK:
        return (
            f"the fp8_block mainloop promotes once a K tile, so tile k is {SCALE_BLOCK}, not {v.tile.k} (static_assert)"
        )
    return None


def block_scaled_k_tile(v: Variant) -> str | None:
    if v.arch == "sm_100a" and v.format == "nvfp4" and v.tile.k != 256:
        return f"256 packed values fill the 128-byte rows that sm_100 reads: tile k is 256, not {v.tile.k}"
    if v.arch == "sm_120a" and v.format == "nvfp4" and v.tile.k != 128:
        return f"shared memory of sm_120 holds four stages of tile k 128, only two of 256; got {v.tile.k}"
    if v.format == "mxfp8_mxfp4" and v.tile.k != 128:
        return f"128 values, each a byte once unpacked, fill the 128-byte rows of shared memory: not tile k {v.tile.k}"
    return None


def weight_tile_is_whole_scale_blocks(v: Variant) -> str | None:
    if v.format == "fp8_block" and v.weight_tile % SCALE_BLOCK:
        return f"the weights' scale block of {SCALE_BLOCK} must divide their tile ({v.weight_tile}): static_assert"
    return None


def unswapped_weight_tile_is_one_scale_block(v: Variant) -> str | None:
    if is_sm90(v) and not v.swap_ab and v.instruction_n != SCALE_BLOCK:
        return f"with a token scale per row, a tile takes one weight scale: n is {SCALE_BLOCK}, not {v.instruction_n}"
    return None


def warpgroups_divide_m(v: Variant) -> str | None:
    rows = WARPGROUP_ROWS * (2 if v.schedule in COOPERATIVE else 1)
    if is_sm90(v) and v.family != "direct" and (v.tile.m % rows or v.tile.m & (v.tile.m - 1)):
        return f"{v.schedule.name} takes {rows} rows a step: tile m is a power of two times that, not {v.tile.m}"
    return None


def accumulators_fit_registers(v: Variant) -> str | None:
    threads = 256 if v.schedule in COOPERATIVE else 128
    if v.family == "direct" and not v.swap_ab:
        threads = 2 * v.tile.m  # 64 tokens a warpgroup
    accumulators = v.tile.m * v.instruction_n // threads
    if is_sm90(v) and v.format == "fp8_block" and accumulators > MAX_ACCUMULATORS:
        return (
            f"{v.tile.m}x{v.tile.n} over {threads} threads needs {accumulators} accumulators a thread, twice for the "
            f"promotion; more than {MAX_ACCUMULATORS} spills"
        )
    return None


def token_tile_fits_the_epilogue(v: Variant) -> str | None:
    if is_sm90(v) and v.swap_ab and v.tile.n != 8 and v.tile.n % 16:
        return f"a swapped epilogue stores columns of 8 or 16s: tile n {v.tile.n} fails a static_assert"
    return None


def token_scales_are_masked(v: Variant) -> str | None:
    if is_sm90(v) and v.family == "collective" and v.token_tile > 32 and v.token_tile % 32:
        return (
            f"32 threads load a tile's token scales and only the first pass is masked: with {v.token_tile} tokens the "
            "last pass overwrites the next stage's scales (compiles, and gives wrong results)"
        )
    return None


def small_token_tile_has_no_token_cluster(v: Variant) -> str | None:
    if v.token_cluster > 1 and v.token_tile < SCALE_BLOCK:
        return (
            f"the grouped scheduler rounds each group's tiles up to the cluster: {v.token_cluster} thread blocks along "
            f"the tokens waste half their work at few rows, which a token tile of {v.token_tile} is for"
        )
    return None


def two_sm_has_a_pair(v: Variant) -> str | None:
    if v.schedule in TWO_SM and (v.cluster.m % 2 or v.tile.m != 256):
        return f"a 2SM instruction spans two thread blocks: cluster m even, tile m 256; got {v.cluster.m}, {v.tile.m}"
    return None


def one_sm_rows(v: Variant) -> str | None:
    if is_sm100(v) and v.schedule not in TWO_SM and v.tile.m != 128:
        return f"a 1SM instruction of sm_100 has 128 rows here, not {v.tile.m}"
    return None


def scale_copy_is_unmasked(v: Variant) -> str | None:
    if is_sm100(v) and v.format == "fp8_block" and (v.tile.m % 32 or v.tile.n % 32):
        return f"sm_100 copies scales 32 rows at a time, unmasked: {v.tile.m}x{v.tile.n} would write past its stage"
    return None


def sm100_block_scaled_columns(v: Variant) -> str | None:
    if is_sm100(v) and v.format != "fp8_block" and v.tile.n not in (64, 128):
        return (
            f"{v.format} on sm_100 takes tile n 64 or 128: 32 does not compile, 256 leaves no second accumulator for "
            f"the epilogue to empty meanwhile; got {v.tile.n}"
        )
    return None


def sm120_whole_scale_atoms(v: Variant) -> str | None:
    if v.arch == "sm_120a" and (v.tile.m % 128 or v.tile.n % 128):
        return f"sm_120 loads scale factors in atoms of 128 rows: {v.tile.m}x{v.tile.n} does not divide into them"
    return None


def sm120_has_no_cluster(v: Variant) -> str | None:
    if v.arch == "sm_120a" and (v.cluster.m, v.cluster.n) != (1, 1):
        return f"sm_120 has no multicast: the cluster is 1x1x1, not {v.cluster}"
    return None


def direct_is_sm90_fp8_block(v: Variant) -> str | None:
    if v.family == "direct" and ((v.arch, v.format) != ("sm_90a", "fp8_block") or v.schedule not in COOPERATIVE):
        return f"direct kernels are cooperative, of fp8_block on sm_90a; not {v.schedule.name}, {v.format}, {v.arch}"
    return None


def direct_unswapped_tile(v: Variant) -> str | None:
    if v.family == "direct" and not v.swap_ab and (v.tile.m, v.tile.n) not in DIRECT_TILES:
        tiles = ", ".join(f"{m}x{n}" for m, n in DIRECT_TILES)
        return f"with tokens as operand A a direct tile is one of {tiles}, not {v.tile.m}x{v.tile.n}"
    return None


def direct_has_no_cluster(v: Variant) -> str | None:
    if v.family in ("direct", "mixed") and (v.cluster.m, v.cluster.n) != (1, 1):
        return (
            "two thread blocks that shared loads of tokens were slower than each for itself, of weights within 1 % "
            f"where rows fill tiles: 1x1x1, not {v.cluster}"
        )
    return None


def mixed_is_what_reads_packed_weights(v: Variant) -> str | None:
    if (v.family == "mixed") != (v.arch == "sm_90a" and v.format in MIXED_WEIGHTS):
        return (
            f"mixed kernels, and no others, read weights of {', '.join(MIXED_WEIGHTS)} on sm_90a; "
            f"not {v.family}, {v.format}, {v.arch}"
        )
    return None


def mixed_tile(v: Variant) -> str | None:
    if v.family == "mixed" and (not v.swap_ab or v.tile.m != 128 or v.tile.n > MAX_MIXED_TOKENS):
        return (
            f"decoded weights are operand A, in registers: 128 of them by up to {MAX_MIXED_TOKENS} tokens, swapped; "
            f"not {v.tile.m}x{v.tile.n}"
        )
    if v.family == "mixed" and v.format == "fp8_mxfp4" and v.tile.k != SCALE_BLOCK:
        return f"sums of e4m3 products are promoted every {SCALE_BLOCK} of K, which is tile k: not {v.tile.k}"
    if v.family == "mixed" and v.tile.k not in (64, 128):
        return f"weights are packed in slices of 64 of K, two to a block: tile k is 64 or 128, not {v.tile.k}"
    return None


def swiglu_has_whole_scale_blocks(v: Variant) -> str | None:
    if v.swiglu and v.family == "collective":
        return "CUTLASS' collectives have no epilogue that quantises: SwiGLU needs a kernel of our own"
    if v.gathers and v.family == "mixed":
        return "a mixed kernel loads tokens by boxes of as many rows as a tile has: it does not gather"
    if v.swiglu and v.family == "direct" and v.weight_tile != 2 * SCALE_BLOCK:
        return f"a tile holds one block of {SCALE_BLOCK} activations, so {2 * SCALE_BLOCK} weights: not {v.weight_tile}"
    return None


RULES: tuple[Rule, ...] = (
    schedule_belongs_to_format,
    epilogue_matches_schedule,
    k_tile_is_one_scale_block,
    block_scaled_k_tile,
    weight_tile_is_whole_scale_blocks,
    unswapped_weight_tile_is_one_scale_block,
    warpgroups_divide_m,
    accumulators_fit_registers,
    token_tile_fits_the_epilogue,
    token_scales_are_masked,
    small_token_tile_has_no_token_cluster,
    two_sm_has_a_pair,
    one_sm_rows,
    scale_copy_is_unmasked,
    sm100_block_scaled_columns,
    sm120_whole_scale_atoms,
    sm120_has_no_cluster,
    direct_is_sm90_fp8_block,
    direct_unswapped_tile,
    direct_has_no_cluster,
    mixed_is_what_reads_packed_weights,
    mixed_tile,
    swiglu_has_whole_scale_blocks,
)


def check(variant: Variant) -> list[str]:
    """Reasons why `variant` cannot be built or is not worth building; empty when it is sound."""
    return [reason for rule in RULES if (reason := rule(variant))]
