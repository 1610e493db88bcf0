"""The catalogue, its rules, and the sources rendered from it."""

import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

from codegen import __main__ as command_line
from codegen import emit, rules
from codegen.__main__ import app
from codegen.arch import ARCHES, ARCHS_VARIABLE, find_arch, parse_archs, wanted_archs
from codegen.catalogue import CATALOGUE, Entry, default_entries, entry, markdown, select, validate
from codegen.cutlass import EpilogueScheduleType as Epilogue
from codegen.cutlass import KernelScheduleTag
from codegen.cutlass import KernelScheduleType as Kernel
from codegen.errors import BuildError
from codegen.variant import Ends, Shape, Variant
from moe_runtime.formats import FORMATS

ROOT = Path(__file__).resolve().parent.parent
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
    (rules.swiglu_has_whole_scale_blocks, mixed(128, 16, ends="swiglu"), "mixed kernels"),
    (
        rules.swiglu_has_whole_scale_blocks,
        dataclasses.replace(sm90(256, 16, swap_ab=True), ends="swiglu"),
        "collectives",
    ),
    (rules.swiglu_has_whole_scale_blocks, mixed(128, 16, ends="gather_swiglu"), "mixed kernels"),
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
# What compiled without spills and gave right results, and what did not, as measured with nvcc 13.0.88.
GOOD_TILES = [
    *(sm90(128, 128, cluster=cluster) for cluster in ((1, 1), (1, 2), (2, 1))),
    sm90(64, 128, PINGPONG),
    *(sm90(128, n, swap_ab=True) for n in (8, 16, 32, 64, 96)),
    *(sm90(128, n, PINGPONG, swap_ab=True) for n in (16, 32, 64)),
    *(sm90(256, n, swap_ab=True) for n in (32, 64)),
    *(direct(128, n, ends=ends) for n in (128, 256) for ends in TWINS),
    direct(128, 256, ends="swiglu"),
    *(direct(128, n, swap_ab=True, ends=ends) for n in (8, 16, 32, 64) for ends in TWINS),
    *(direct(256, n, swap_ab=True, ends=ends) for n in (32, 64) for ends in TWINS),
    *(direct(256, n, swap_ab=True, ends="swiglu") for n in (16, 32, 64)),
    *(direct(256, n, swap_ab=True, ends="gather_swiglu") for n in (16, 32)),
    *(
        mixed(128, n, k, format=weights, ends=ends)
        for weights, wide_k in (("mxfp4", 128), ("nvfp4", 128), ("bf16", 64))
        for n, k in ((8, 128), (16, 128), (32, 128), (64, 128), (128, wide_k), (256, 64))
        for ends in TWINS
    ),
    sm90(128, 16, cluster=(2, 1), swap_ab=True),
]
BAD_TILES = [
    *(sm90(m, n) for m, n in ((256, 128), (128, 256), (192, 128), (64, 128))),
    *(sm90(m, n, swap_ab=True) for m, n in ((128, 192), (64, 32), (64, 16), (128, 24), (128, 48))),
    *(sm90(m, n, PINGPONG) for m, n in ((128, 128), (64, 256))),
    *(direct(m, n) for m, n in ((256, 128), (128, 192), (64, 128))),
    *(direct(256, n, swap_ab=True, ends="swiglu") for n in (24, 128)),
    mixed(128, 24),
]


@pytest.mark.parametrize("variant", GOOD_TILES, ids=lambda v: v.name)
def test_tiles_known_to_compile_pass(variant):
    assert rules.check(variant) == []


@pytest.mark.parametrize("variant", BAD_TILES, ids=lambda v: v.name)
def test_tiles_known_to_fail_are_rejected(variant):
    assert rules.check(variant)


def test_catalogue_is_sound_and_reasoned():
    validate(CATALOGUE)
    assert all(item.why and "\n" not in item.why for item in CATALOGUE)
    assert {v.variant for v in select("sm_90a")} == set(GOOD_TILES[:-1])


def test_validate_names_bad_and_repeated_entries():
    bad = Entry(sm90(128, 24, swap_ab=True), "why")
    with pytest.raises(BuildError, match=f"{bad.variant.name}: .*tile n 24"):
        validate([bad])
    with pytest.raises(BuildError, match="twice"):
        validate([CATALOGUE[0], CATALOGUE[0]])


@pytest.mark.parametrize("item", CATALOGUE, ids=lambda item: item.variant.name)
def test_name_is_an_identifier_that_tells_the_fields(item):
    v = item.variant
    assert re.fullmatch(r"sm\d+a_[a-z0-9_]+", v.name)
    assert f"_{v.tile.m}x{v.tile.n}x{v.tile.k}_{v.cluster.m}x{v.cluster.n}x1_" in v.name
    options = re.search(r"(?:_swap_ab)?(?:_swiglu|_gather_swiglu|_combine)?$", v.name)[0]
    assert options == "_swap_ab" * v.swap_ab + f"_{v.ends}" * (v.ends != "plain")
    assert ("_direct_" in v.name, "_mixed_" in v.name) == (v.family == "direct", v.family == "mixed")
    assert ("pingpong" in v.name) == ("Pingpong" in v.schedule.name)


def test_name_example():
    name = "sm90a_fp8_block_128x16x128_1x1x1_warpspecialized_cooperative_swap_ab"
    assert sm90(128, 16, swap_ab=True).name == name
    name = "sm90a_fp8_block_direct_256x16x128_1x1x1_warpspecialized_cooperative_swap_ab_swiglu"
    assert direct(256, 16, swap_ab=True, ends="swiglu").name == name
    gathers = direct(256, 16, swap_ab=True, ends="gather_swiglu")
    assert gathers.name == name.replace("_swiglu", "_gather_swiglu")
    assert direct(128, 256, ends="combine").name == direct(128, 256).name + "_combine"
    name = "sm90a_nvfp4_mixed_128x256x64_1x1x1_warpspecialized_cooperative_swap_ab"
    assert mixed(128, 256, 64, format="nvfp4").name == name


@pytest.mark.parametrize("item", select("sm_90a"), ids=lambda item: item.variant.name)
def test_yardsticks_are_the_collectives_of_sm90(item):
    assert item.yardstick == (item.variant.family == "collective")


@pytest.mark.parametrize("arch", ARCHES)
def test_a_library_holds_no_yardsticks_by_default(arch):
    assert default_entries(arch) == tuple(item for item in select(arch) if not item.yardstick) != ()
    assert (default_entries(arch) == select(arch)) == (arch != "sm_90a")


@pytest.mark.parametrize("ends", ["plain", "swiglu", "combine"])
def test_a_library_serves_few_rows_and_many_whatever_it_does_beside_the_product(ends):
    variants = [item.variant for item in default_entries("sm_90a") if item.variant.format == "fp8_block"]
    fitting = [v for v in variants if v.ends == ends]
    assert {v.swap_ab for v in fitting} == {False, True}
    assert {v.family for v in fitting} == {"direct"}


@pytest.mark.parametrize(
    ("ends", "swiglu", "gathers", "combines"),
    [
        ("plain", False, False, False),
        ("swiglu", True, False, False),
        ("gather_swiglu", True, True, False),
        ("combine", False, False, True),
    ],
)
def test_what_the_ends_of_a_variant_are(ends, swiglu, gathers, combines):
    v = direct(256, 32, swap_ab=True, ends=ends)
    assert (v.swiglu, v.gathers, v.combines) == (swiglu, gathers, combines)
    assert {name: v.record()[name] for name in ("swiglu", "gathers", "combines")} == {
        "swiglu": swiglu, "gathers": gathers, "combines": combines,
    }  # fmt: skip


VARIANTS = {item.variant for item in CATALOGUE}


@pytest.mark.parametrize("v", [v for v in sorted(VARIANTS, key=lambda v: v.name) if v.combines], ids=lambda v: v.name)
def test_what_combines_has_a_twin_that_leaves_rows(v):
    """Callers that want rows, or results that repeat bit by bit, are served by it."""
    assert dataclasses.replace(v, ends="plain") in VARIANTS


@pytest.mark.parametrize("v", [v for v in sorted(VARIANTS, key=lambda v: v.name) if v.gathers], ids=lambda v: v.name)
def test_what_gathers_has_a_twin_that_reads_rows_in_order(v):
    assert dataclasses.replace(v, ends="swiglu") in VARIANTS


def test_every_kernel_of_our_own_that_leaves_rows_has_a_twin_that_combines():
    plain = {v for v in VARIANTS if v.ends == "plain" and v.family != "collective"}
    assert {dataclasses.replace(v, ends="combine") for v in plain} == {v for v in VARIANTS if v.combines} != set()


# C++ types of tokens and weights in CUTLASS' collectives.
OPERANDS = {
    "fp8_block": ("cutlass::float_e4m3_t", "cutlass::float_e4m3_t"),
    "nvfp4": ("cutlass::nv_float4_t<cutlass::float_e2m1_t>", "cutlass::nv_float4_t<cutlass::float_e2m1_t>"),
    "mxfp8_mxfp4": ("cutlass::mx_float8_t<cutlass::float_e4m3_t>", "cutlass::mx_float4_t<cutlass::float_e2m1_t>"),
}


@pytest.mark.parametrize("item", CATALOGUE, ids=lambda item: item.variant.name)
def test_source_says_what_the_variant_is(item):
    v = item.variant
    text = emit.render(v.target, [item])[f"{v.name}.cu"]
    if v.family == "collective":
        assert KernelScheduleTag[v.schedule] in text
        assert f"Shape<_{v.tile.m}, _{v.tile.n}, _{v.tile.k}>" in text
        assert f"Shape<_{v.cluster.m}, _{v.cluster.n}, _1>" in text
        a, b = reversed(OPERANDS[v.format]) if v.swap_ab else OPERANDS[v.format]
        assert f"using ElementA = {a};\nusing ElementB = {b};\n" in text
    elif v.family == "mixed":
        assert f"MMA_64x{v.tile.n}x16_F32BF16BF16_RS<" in text
        ends = {"plain": "Plain", "combine": "Combine"}[v.ends]
        config = f"moe::mixed::{v.format.capitalize()}, Mma, {v.tile.n}, {v.tile.k}, moe::direct::{ends}"
        assert f"Config<{config}>" in text
        assert f"{v.tile.m}, {v.tile.n}, {v.tile.k}, 1, 1, true," in text
        combines = str(v.ends == "combine").lower()
        told = f"&Launch::check_abi, false, MOE_WEIGHTS_{v.format.upper()},\n    false, {combines},\n}};\n"
        assert text.endswith(told)
    else:
        tokens, weights = reversed((v.tile.m, v.tile.n)) if v.swap_ab else (v.tile.m, v.tile.n)
        columns = tokens if v.swap_ab else 128
        assert f"MMA_64x{columns}x32_F32E4M3E4M3_SS_TN<>" in text
        ends, flags = {
            "plain": ("Plain", (False, False, False)),
            "swiglu": ("Swiglu", (True, False, False)),
            "gather_swiglu": ("GatherSwiglu", (True, True, False)),
            "combine": ("Combine", (False, False, True)),
        }[v.ends]
        swiglu, gathers, combines = (str(flag).lower() for flag in flags)
        assert f"Config<Mma, {tokens}, {weights}, {str(v.swap_ab).lower()}, moe::direct::{ends}>" in text
        extents = f"{v.tile.m}, {v.tile.n}, {v.tile.k}, {v.cluster.m}, {v.cluster.n}, {v.swap_ab},".lower()
        told = f"&Launch::check_abi, {swiglu}, MOE_WEIGHTS_FP8_BLOCK,\n    {gathers}, {combines},\n}};\n"
        assert extents in text and text.endswith(told)
    assert f"const {v.name} = {{" in text
    assert "{{" not in text and "{%" not in text


def test_registry_lists_every_variant_in_order():
    entries = select("sm_90a")
    text = emit.render(ARCHES["sm_90a"], entries)["registry.cu"]
    assert re.findall(r"^    &(\w+),$", text, re.MULTILINE) == [item.variant.name for item in entries]


@pytest.mark.parametrize("arch", [arch for arch in ARCHES.values() if not arch.links], ids=lambda arch: arch.name)
def test_arch_that_does_not_link_has_no_registry(arch):
    assert "registry.cu" not in emit.render(arch, select(arch.name))


def test_emission_does_not_depend_on_the_process(tmp_path):
    """Two processes with different hash seeds write the same bytes."""
    trees = []
    for seed in ("0", "1"):
        out = tmp_path / seed
        command = [sys.executable, "-m", "codegen", "emit", "--out", str(out)]
        subprocess.run(command, cwd=ROOT, check=True, capture_output=True, env=os.environ | {"PYTHONHASHSEED": seed})
        trees.append({path.relative_to(out): path.read_bytes() for path in out.rglob("*") if path.is_file()})
    assert trees[0] == trees[1]
    assert len(trees[0]) > len(CATALOGUE)


def test_emit_writes_only_what_changed_and_removes_what_is_gone(tmp_path):
    arch = ARCHES["sm_90a"]
    entries = select("sm_90a")[:3]
    first = emit.emit(arch, entries, tmp_path)
    assert {path.name for path in first.written} == {f"{e.variant.name}.cu" for e in entries} | {"registry.cu"}
    again = emit.emit(arch, entries, tmp_path)
    assert (again.written, again.removed) == ((), ())

    other = tmp_path / arch.name / "notes.txt"
    other.write_text("not generated")
    fewer = emit.emit(arch, entries[:2], tmp_path)
    assert [path.name for path in fewer.written] == ["registry.cu"]
    assert [path.name for path in fewer.removed] == [f"{entries[2].variant.name}.cu"]
    assert other.exists()
    assert [unit.name for unit in fewer.units if unit.kind == "direct"] == [e.variant.name for e in entries[:2]]


def test_template_errors_name_the_template(tmp_path, monkeypatch):
    monkeypatch.setattr(emit, "TEMPLATES", tmp_path)
    with pytest.raises(BuildError, match=r"templates/direct/fp8_block\.cu\.j2 does not exist"):
        emit.render(ARCHES["sm_90a"], select("sm_90a")[:1])
    (tmp_path / "direct").mkdir()
    (tmp_path / "direct" / "fp8_block.cu.j2").write_text("{{ v.no_such_field }}")
    with pytest.raises(BuildError, match="no_such_field"):
        emit.render(ARCHES["sm_90a"], select("sm_90a")[:1])


@pytest.mark.parametrize("format", FORMATS)
def test_every_format_has_kernels_on_blackwell_or_a_reason_why_not(format):
    assert bool(select("sm_100a", format)) != (format in rules.NOT_ON_BLACKWELL)
    assert (f"- `{format}`: " in markdown()) == (format in rules.NOT_ON_BLACKWELL)


def test_catalogue_document_is_fresh():
    """`python -m codegen emit` rewrites it."""
    assert (ROOT / "generated" / "CATALOGUE.md").read_text() == markdown()
    assert all(f"`{item.variant.name}`" in markdown() for item in CATALOGUE)


def run(*arguments: str):
    return CliRunner().invoke(app, arguments)


def test_list_json():
    result = run("list", "--json")
    listed = json.loads(result.stdout)
    assert [variant["name"] for variant in listed] == [item.variant.name for item in CATALOGUE]
    swapped = next(v for v in listed if v["tile"] == [256, 64, 128] and v["family"] == "collective")
    assert swapped == {
        "name": "sm90a_fp8_block_256x64x128_1x1x1_warpspecialized_cooperative_swap_ab",
        "arch": "sm_90a",
        "format": "fp8_block",
        "family": "collective",
        "tile": [256, 64, 128],
        "cluster": [1, 1, 1],
        "schedule": "PtrArrayBlockwiseTmaWarpSpecializedCooperative",
        "swap_ab": True,
        "swiglu": False,
        "gathers": False,
        "combines": False,
        "stages": "auto",
    }
    fused = next(v for v in listed if v["swiglu"] and v["tile"] == [256, 16, 128])
    assert (fused["family"], fused["swap_ab"], fused["name"].endswith("_swap_ab_swiglu")) == ("direct", True, True)


@pytest.mark.parametrize(
    ("arguments", "count"),
    [(("--arch", "sm_90a"), 72), (("--format", "nvfp4"), 17), (("--arch", "sm_100a", "--format", "fp8_block"), 5)],
)
def test_list_filters(arguments, count):
    assert len(json.loads(run("list", "--json", *arguments).stdout)) == count


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ((), default_entries("sm_90a")),
        (("--yardsticks",), select("sm_90a")),
        (("--only", "128x96x128*swap_ab"), select("sm_90a", only="128x96x128*swap_ab")),
    ],
    ids=["default", "yardsticks", "a yardstick by name"],
)
def test_build_chooses_its_variants(monkeypatch, tmp_path, options, expected):
    asked = []

    def note(arch, entries, out, **_):
        asked.append((arch.name, entries, out))
        return SimpleNamespace(library=None)

    monkeypatch.setattr(command_line, "build_arch", note)
    assert run("build", "--arch", "sm_90a", "--out", str(tmp_path), *options).exit_code == 0
    assert asked == [("sm_90a", expected, tmp_path)] and expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("list", "--arch", "sm_80"), "arch: got 'sm_80'; accepted: sm_90a, sm_100a, sm_120a"),
        (("list", "--format", "int3"), "format 'int3'"),
        (("build", "--arch", "sm_90a", "--only", "nothing"), "only 'nothing'"),
    ],
)
def test_wrong_arguments_are_named(arguments, message):
    error = run(*arguments).exception
    assert isinstance(error, BuildError)
    assert message in str(error)


@pytest.mark.parametrize("text", ["sm_90a", "90a", "9.0", " sm_90a; 90a,"])
def test_arch_spellings(text):
    assert parse_archs(text) == (ARCHES["sm_90a"],)


def test_arch_lists(monkeypatch):
    assert parse_archs("90a;sm_100a") == (ARCHES["sm_90a"], ARCHES["sm_100a"])
    assert find_arch("12.0").gencode == "-gencode=arch=compute_120a,code=sm_120a"
    monkeypatch.setenv(ARCHS_VARIABLE, "")
    assert wanted_archs() == ()


def test_archs_of_the_gpus_present(tmp_path, monkeypatch):
    smi = tmp_path / "nvidia-smi"
    smi.write_text("#!/bin/sh\nprintf '9.0\\n9.0\\n8.0\\n'\n")
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.delenv(ARCHS_VARIABLE, raising=False)
    assert wanted_archs() == (ARCHES["sm_90a"],)


def test_shape_text():
    assert str(Shape(128, 16, 128)) == "128x16x128"
