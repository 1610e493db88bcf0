"""Tables of plans: names that a person can tell apart, in lines that stay whole."""

import msgspec
import pytest

from codegen.catalogue import CATALOGUE, default_entries
from moe_runtime.tables import PIPED_WIDTH, make_console, regimes_table, short_name
from moe_runtime.tuning import GemmChoice, PlanEntry, Timing

from .test_plan import make_plan


@pytest.mark.parametrize(
    ("tactic", "short"),
    [
        ("sm90a_fp8_block_direct_128x256x128_1x1x1_warpspecialized_cooperative_swiglu", "direct_128x256x128_swiglu"),
        (
            "sm90a_fp8_mxfp4_mixed_128x8x128_1x1x1_warpspecialized_cooperative_swap_ab_combine",
            "mixed_128x8x128_swap_ab_combine",
        ),
        ("sm90a_mxfp4_mixed_128x256x64_1x1x1_warpspecialized_cooperative_swap_ab", "mixed_128x256x64_swap_ab"),
        ("sm90a_fp8_block_128x128x128_2x1x1_warpspecialized_cooperative", "128x128x128_2x1x1"),
        ("sm90a_fp8_block_64x128x128_1x1x1_warpspecialized_pingpong", "64x128x128_pingpong"),
        ("sorted_segments", "sorted_segments"),
    ],
)
def test_short_names(tactic: str, short: str) -> None:
    assert short_name(tactic) == short


@pytest.mark.parametrize("format", sorted({item.variant.format for item in default_entries("sm_90a")}))
def test_short_names_tell_a_formats_kernels_apart(format: str) -> None:
    names = [item.variant.name for item in CATALOGUE if (item.variant.arch, item.variant.format) == ("sm_90a", format)]
    assert len({short_name(name) for name in names}) == len(names) > 1


def test_two_plans_of_kernels_fit_a_pipe_side_by_side(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    longest = max((item.variant.name for item in default_entries("sm_90a")), key=lambda name: len(short_name(name)))
    times = {longest: Timing(12345.6, 12345.6, 12345.6), "plain": Timing(23456.7, 23456.7, 23456.7)}
    choice = GemmChoice(longest, default_tactic="plain", timings=times)
    entry = PlanEntry(bucket=8192, rows=65536, gemm1=choice, gemm2=choice)
    plans = [
        msgspec.structs.replace(make_plan(layout, 8192, starts=[8192]), entries=(entry,)) for layout in ("dep2", "ep2")
    ]
    console = make_console()
    assert console.width == PIPED_WIDTH
    with console.capture() as captured:
        console.print(regimes_table(plans))
    rows = [line.split() for line in captured.get().splitlines() if line.strip().startswith("8192")]
    assert [row[2] for row in rows] == [row[5] for row in rows] == [short_name(longest)] * 2
    assert all(row[3:5] == row[6:8] == ["12345.6", "23456.7"] for row in rows)
