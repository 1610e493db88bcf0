"""Which variants exist, and why each does."""

import dataclasses
import fnmatch
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

from .cutlass import KernelScheduleType as Kernel
from .errors import BuildError
from .rules import NOT_ON_BLACKWELL, SCHEDULES, check
from .variant import Ends, Family, Shape, Variant

COOPERATIVE = Kernel.PtrArrayBlockwiseTmaWarpSpecializedCooperative
PINGPONG = Kernel.PtrArrayBlockwiseTmaWarpSpecializedPingpong
ONE_SM = Kernel.PtrArrayBlockwiseTmaWarpSpecialized1SmSm100
TWO_SM = Kernel.PtrArrayBlockwiseTmaWarpSpecialized2SmSm100
NVFP4_ONE_SM = Kernel.PtrArrayNvf4TmaWarpSpecialized1SmSm100
NVFP4_TWO_SM = Kernel.PtrArrayNvf4TmaWarpSpecialized2SmSm100
MXFP4_ONE_SM = Kernel.PtrArrayMxf8f6f4TmaWarpSpecialized1SmSm100
MXFP4_TWO_SM = Kernel.PtrArrayMxf8f6f4TmaWarpSpecialized2SmSm100
PLAIN_COOPERATIVE = Kernel.PtrArrayTmaWarpSpecializedCooperative
SM120_PINGPONG = Kernel.PtrArrayTmaWarpSpecializedPingpong

PRODUCER_SPILLS = "CUTLASS' producer warps keep 48 registers: some words go to memory once a tile, outside every K loop"


@dataclass(frozen=True)
class Entry:
    """A variant, the reason it exists, and the reason its register spills are accepted where they are.

    `yardstick`: gains too little anywhere for minutes of compiling, and is kept to compare with; a library holds it
    only where that is asked for.
    """

    variant: Variant
    why: str
    allow_spill: str | None = None
    yardstick: bool = False


def entry(
    arch: str,
    format: str,
    tile: tuple[int, int, int],
    schedule: Kernel,
    why: str,
    *,
    cluster: tuple[int, int] = (1, 1),
    swap_ab: bool = False,
    family: Family = "collective",
    ends: Ends = "plain",
    allow_spill: str | None = None,
    yardstick: bool = False,
) -> Entry:
    epilogue = SCHEDULES[arch, format][schedule]
    variant = Variant(
        arch, format, Shape(*tile), schedule, epilogue, Shape(*cluster, 1), swap_ab, family=family, ends=ends
    )
    return Entry(variant, why, allow_spill, yardstick)


def sm90(tile: tuple[int, int], schedule: Kernel, why: str, **options: Any) -> Entry:
    return entry("sm_90a", "fp8_block", (*tile, 128), schedule, why, **options)


def collective(tile: tuple[int, int], schedule: Kernel, why: str, **options: Any) -> Entry:
    return sm90(tile, schedule, why, yardstick=True, **options)


def collective_swapped(tile: tuple[int, int], schedule: Kernel, why: str) -> Entry:
    return collective(tile, schedule, why, swap_ab=True)


def direct(tile: tuple[int, int], why: str, **options: Any) -> Entry:
    return sm90(tile, COOPERATIVE, why, family="direct", **options)


def mixed(format: str, tokens: int, why: str, *, k: int = 128) -> tuple[Entry, Entry, Entry]:
    """A tile's kernels: one that leaves rows, its twin that adds them up, and gate_up's, which activates."""
    plain = entry("sm_90a", format, (128, tokens, k), PLAIN_COOPERATIVE, why, swap_ab=True, family="mixed")
    activates = dataclasses.replace(plain.variant, ends="swiglu")
    fused = dataclasses.replace(plain, variant=activates, why="gate_up of a gated activation, applied in place")
    return (*with_combine(plain, "the same, added up as gemm2"), fused)


def with_combine(plain: Entry, why: str) -> tuple[Entry, Entry]:
    """A kernel that leaves rows, for GEMM1, for callers that want them and for results that repeat bit by bit, and its
    twin that adds them up as GEMM2, which spares a layer the rows' way to memory and back, 1 to 4 % of it."""
    variant = dataclasses.replace(plain.variant, ends="combine")
    return plain, dataclasses.replace(plain, variant=variant, why=why)


def sm100(tile: tuple[int, int], schedule: Kernel, why: str, **options: Any) -> Entry:
    return entry("sm_100a", "fp8_block", (*tile, 128), schedule, why, **options)


def block_scaled(format: str, k: int, one_sm: Kernel, two_sm: Kernel) -> tuple[Entry, ...]:
    return (
        entry("sm_100a", format, (128, 128, k), one_sm, "many rows per expert, where tiles are too few for pairs"),
        entry("sm_100a", format, (128, 64, k), one_sm, "up to 64 rows per expert", swap_ab=True),
        entry("sm_100a", format, (256, 128, k), two_sm, "two thread blocks share operand B: many rows", cluster=(2, 1)),
    )


TILES_OF_PACKED = (
    (8, "up to 8 rows per expert"),
    (16, "9 to 16 rows per expert"),
    (32, "17 to 32 rows per expert"),
    (64, "33 to 64 rows per expert"),
    (128, "65 to 128 rows per expert"),
)
"""Tokens of the tiles that all packed weights have, and what they are for."""

CATALOGUE: tuple[Entry, ...] = (
    # Each says how often it was the fastest of 268 GEMMs (six layouts, 15 token counts, three distributions), as gemm1
    # or as gemm2, which is timed with the sum over a token's experts, and what the worst of them loses without it:
    # benchmarks/results/h200/grid.json.
    *with_combine(
        direct((128, 128), "gate_up that tiles of 256 do not divide; fastest 4 times, 1 % lost without it"),
        "down of 33 to 128 rows, added up; fastest 51 times, 6 %",
    ),
    *with_combine(
        direct((128, 256), "gate_up with its activation apart; fastest twice, 4 %"),
        "down from 129 rows per expert on; fastest 64 times, 7 %",
    ),
    *with_combine(
        direct(
            (192, 128), "gate_up of 129 to 192 rows; fastest once, 4 %, and 17 % at 160 and 192, which the grid lacks"
        ),
        "down, 129 to 192 rows per expert; fastest 3 times, 3 %, and 16 %",
    ),
    direct((128, 256), "gate_up from 33 rows on, activated in place; fastest 117 times, 21 %", ends="swiglu"),
    *with_combine(
        direct((128, 8), "gate_up of up to 8 rows where few experts have any; fastest 17 times, 3 %", swap_ab=True),
        "down, up to 8 rows per expert; fastest 58 times, 3 %",
    ),
    *with_combine(
        direct((128, 16), "gate_up of up to 16 rows where few experts have any; fastest 10 times, 4 %", swap_ab=True),
        "down, up to 16 rows per expert; fastest 49 times, 2 %",
    ),
    *with_combine(
        direct((128, 32), "gate_up of unequal 17 to 32 rows; fastest 3 times, under 1 %", swap_ab=True),
        "down, 17 to 32 rows per expert; fastest 19 times, 2 %",
    ),
    *with_combine(
        direct((128, 64), "gate_up of unequal 33 to 64 rows; fastest 6 times, 1 %", swap_ab=True),
        "down, 33 to 64 rows per expert; fastest 10 times, 2 %",
    ),
    *with_combine(
        direct(
            (256, 32),
            "gate_up of unequal 17 to 32 rows, half as many tiles; nowhere, within 1 % 7 times",
            swap_ab=True,
        ),
        "down, 17 to 32 rows, half as many tiles; fastest 7 times, 1 %",
    ),
    *with_combine(
        direct((256, 64), "gate_up of 33 to 64 rows, half as many tiles; nowhere, within 1 % 5 times", swap_ab=True),
        "down, 33 to 64 rows, half as many tiles; fastest 6 times, 4 %",
    ),
    direct((256, 16), "gate_up of up to 16 rows, activated too; fastest 51 times, 4 %", swap_ab=True, ends="swiglu"),
    direct((256, 32), "gate_up of up to 32 rows, activated too; fastest 16 times, 7 %", swap_ab=True, ends="swiglu"),
    direct((256, 16), "tokens from where they came in; fastest 44 times, 1 %", swap_ab=True, ends="gather_swiglu"),
    *chain.from_iterable(
        mixed(weights, tokens, why, k=64 if (weights, tokens) == ("bf16", 128) or tokens == 256 else 128)
        for weights in ("mxfp4", "nvfp4", "bf16")
        for tokens, why in (
            *TILES_OF_PACKED,
            (256, "more rows: weights are decoded half as often; stages of 64 for four to fit"),
        )
    ),
    *chain.from_iterable(
        mixed("fp8_mxfp4", tokens, why)
        for tokens, why in (
            *TILES_OF_PACKED,
            (192, "129 to 192 rows per expert: 0.8 of the time of 256"),
            (256, "more rows: weights are decoded half as often as for 128, 15 % faster"),
        )
    ),
    collective((128, 128), COOPERATIVE, "most reuse that fits the registers: many rows per expert"),
    collective((128, 128), COOPERATIVE, "two weight tiles share one load of the tokens", cluster=(1, 2)),
    collective(
        (128, 128), COOPERATIVE, "two token tiles share one load of the weights: well over 256 rows", cluster=(2, 1)
    ),
    collective(
        (64, 128), PINGPONG, "epilogue of one tile under the mainloop of the next; half the padding of 128 rows"
    ),
    collective_swapped((128, 8), COOPERATIVE, "up to 8 rows per expert: decode with many experts"),
    collective_swapped((128, 16), COOPERATIVE, "up to 16 rows per expert"),
    collective_swapped((128, 32), COOPERATIVE, "up to 32 rows per expert"),
    collective_swapped((128, 64), COOPERATIVE, "up to 64 rows per expert"),
    collective_swapped((128, 96), COOPERATIVE, "65 to 96 rows in one tile: the widest swapped tile without spills"),
    collective_swapped((128, 16), PINGPONG, "16 rows: hides the epilogue where K is short"),
    collective_swapped((128, 32), PINGPONG, "32 rows: hides the epilogue where K is short"),
    collective_swapped((128, 64), PINGPONG, "64 rows: hides the epilogue where K is short"),
    collective_swapped(
        (256, 32), COOPERATIVE, "32 rows with half as many tiles: wide weights, fewer tensormap changes"
    ),
    collective_swapped(
        (256, 64), COOPERATIVE, "64 rows with half as many tiles: wide weights, fewer tensormap changes"
    ),
    sm100((128, 128), ONE_SM, "many rows per expert, where tiles are too few for pairs of thread blocks"),
    sm100((128, 64), ONE_SM, "up to 64 rows per expert", swap_ab=True),
    sm100((128, 32), ONE_SM, "up to 32 rows per expert: decode", swap_ab=True, allow_spill=PRODUCER_SPILLS),
    sm100((256, 128), TWO_SM, "two thread blocks share operand B: many rows per expert", cluster=(2, 1)),
    sm100((256, 128), TWO_SM, "the pair spans weights: 65 to 128 rows per expert", cluster=(2, 1), swap_ab=True),
    *block_scaled("nvfp4", 256, NVFP4_ONE_SM, NVFP4_TWO_SM),
    *block_scaled("mxfp8_mxfp4", 128, MXFP4_ONE_SM, MXFP4_TWO_SM),
    entry(
        "sm_120a", "nvfp4", (128, 128, 128), PLAIN_COOPERATIVE, "the tile with four stages in 99 KB of shared memory"
    ),
    entry("sm_120a", "nvfp4", (128, 128, 128), SM120_PINGPONG, "epilogue of one tile under the mainloop of the next"),
    entry("sm_120a", "mxfp8_mxfp4", (128, 128, 128), PLAIN_COOPERATIVE, "unpacked to bytes, two stages fit in 99 KB"),
)


def select(arch: str | None = None, format: str | None = None, only: str | None = None) -> tuple[Entry, ...]:
    """Entries of an arch and a format whose name contains the glob pattern `only`."""
    return tuple(
        entry
        for entry in CATALOGUE
        if arch in (None, entry.variant.arch)
        and format in (None, entry.variant.format)
        and (only is None or fnmatch.fnmatchcase(entry.variant.name, f"*{only}*"))
    )


def default_entries(arch: str) -> tuple[Entry, ...]:
    """What a library of the arch holds unless other variants are asked for."""
    return tuple(entry for entry in select(arch) if not entry.yardstick)


def validate(entries: Sequence[Entry]) -> None:
    """Raise BuildError when an entry breaks a rule or two entries share a name."""
    problems = [f"{entry.variant.name}: {reason}" for entry in entries for reason in check(entry.variant)]
    names = [entry.variant.name for entry in entries]
    problems += [f"{name}: twice in the catalogue" for name in sorted({n for n in names if names.count(n) > 1})]
    if problems:
        raise BuildError("catalogue:\n  " + "\n  ".join(problems))


def markdown(entries: Sequence[Entry] = CATALOGUE) -> str:
    """The catalogue as a Markdown document."""
    lines = [
        "# Catalogue of kernel variants",
        "",
        "Rendered from `codegen/catalogue.py` by `python -m codegen emit`; do not edit. A tile is M x N x K.",
        "Swapped: the weights are operand A and the tokens operand B, so that few tokens make a small N tile.",
        "Yardsticks: nowhere 3 % faster on an H200, mostly slower; kept to compare with, built by `--yardsticks`.",
    ]
    for arch, format in dict.fromkeys((entry.variant.arch, entry.variant.format) for entry in entries):
        compile_only = "" if select(arch)[0].variant.target.links else " (generated and compiled, not linked)"
        lines += ["", f"## {arch} {format}{compile_only}", ""]
        lines += ["| variant | tile | cluster | swapped | why |", "|---|---|---|---|---|"]
        for e in entries:
            v = e.variant
            if (v.arch, v.format) == (arch, format):
                spill = f"; spills accepted: {e.allow_spill}" if e.allow_spill else ""
                yardstick = "; yardstick" if e.yardstick else ""
                swapped = "yes" if v.swap_ab else ""
                lines.append(f"| `{v.name}` | {v.tile} | {v.cluster} | {swapped} | {e.why}{spill}{yardstick} |")
    lines += ["", "## Formats without kernels of their own on sm_100a and sm_120a", ""]
    lines += [f"- `{format}`: {reason}" for format, reason in NOT_ON_BLACKWELL.items()]
    return "\n".join(lines) + "\n"
