"""The catalogue, and the sources rendered from it."""

import dataclasses
import os
import re
import subprocess
import sys
from itertools import chain
from pathlib import Path

import pytest

from codegen import emit, rules
from codegen.arch import ARCHES
from codegen.catalogue import CATALOGUE, Entry, default_entries, markdown, select, validate
from codegen.cutlass import KernelScheduleTag
from codegen.errors import BuildError
from codegen.variant import Shape
from moe_runtime.formats import FORMATS
from tests.test_codegen_rules import GOOD_TILES, direct, mixed, sm90

ROOT = Path(__file__).resolve().parent.parent


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
    assert mixed(128, 256, 64, format="nvfp4", ends="swiglu").name == name + "_swiglu"


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


@pytest.mark.parametrize(("format", "tiles"), [("mxfp4", 6), ("nvfp4", 6), ("bf16", 6), ("fp8_mxfp4", 7)])
def test_every_tile_of_packed_weights_serves_either_gemm(format, tiles):
    """A gated gemm1 by the kernel that activates, one without gate by the plain kernel, gemm2 by either other."""
    of_tile = {}
    for v in VARIANTS:
        if (v.arch, v.format) == ("sm_90a", format):
            of_tile.setdefault(v.tile, set()).add(v.ends)
    assert len(of_tile) == tiles and all(ends == {"plain", "combine", "swiglu"} for ends in of_tile.values())


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
    text, end = emit.render(v.target, [item])[f"{v.source}.cu"], f"\n}}  // namespace moe::{v.types}\n\n"
    if v.family == "collective":
        assert KernelScheduleTag[v.schedule] in text
        assert f"Shape<_{v.tile.m}, _{v.tile.n}, _{v.tile.k}>" in text
        assert f"Shape<_{v.cluster.m}, _{v.cluster.n}, _1>" in text
        a, b = reversed(OPERANDS[v.format]) if v.swap_ab else OPERANDS[v.format]
        assert f"using ElementA = {a};\nusing ElementB = {b};\n" in text
    elif v.family == "mixed":
        of_e4m3, weights = v.format == "fp8_mxfp4", v.format.title().replace("_", "")
        mma = f"{min(v.tile.n, 64)}x32_F32E4M3E4M3_RS_TN<>" if of_e4m3 else f"{v.tile.n}x16_F32BF16BF16_RS<"
        assert f"MMA_64x{mma}" in text
        ends = {"plain": "Plain", "combine": "Combine", "swiglu": "Swiglu"}[v.ends]
        config = f"mixed::{weights}, Mma, {v.tile.n}, {v.tile.k}, direct::{ends}"
        assert f"Config<{config}>" in text
        assert f"{v.tile.m}, {v.tile.n}, {v.tile.k}, 1, 1, true," in text
        swiglu, combines = (str(v.ends == end).lower() for end in ("swiglu", "combine"))
        told = f"&Launch::check_abi, {swiglu}, MOE_WEIGHTS_{v.format.upper()},\n    false, {combines},\n}};\n"
        assert text.endswith(told + end)
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
        assert f"Config<Mma, {tokens}, {weights}, {str(v.swap_ab).lower()}, direct::{ends}>" in text
        extents = f"{v.tile.m}, {v.tile.n}, {v.tile.k}, {v.cluster.m}, {v.cluster.n}, {v.swap_ab},".lower()
        told = f"&Launch::check_abi, {swiglu}, MOE_WEIGHTS_FP8_BLOCK,\n    {gathers}, {combines},\n}};\n"
        assert extents in text and text.endswith(told + end)
    assert f"const {v.name} = {{" in text
    assert "{{" not in text and "{%" not in text


def test_kernels_of_a_tile_share_a_source():
    """And no others: what a source costs to compile is mostly headers, and sources are compiled side by side."""
    entries = select("sm_90a")
    sources = emit.by_source(entries)
    assert sorted(chain.from_iterable(sources.values()), key=entries.index) == list(entries)
    for name, shared in sources.items():
        assert {dataclasses.replace(e.variant, ends="plain").name for e in shared} == {name}
    source = mixed(128, 8, format="nvfp4").source
    text = emit.render(ARCHES["sm_90a"], entries)[f"{source}.cu"]
    assert re.findall(r"direct::(\w+)> {};", text) == ["Plain", "Combine", "Swiglu"]
    assert len(re.findall(r"^#include", text, re.MULTILINE)) == 1


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
    sources = sum(len(emit.by_source(select(name))) + arch.links for name, arch in ARCHES.items())
    assert len(trees[0]) == sources + 1  # and the catalogue


def test_emit_writes_only_what_changed_and_removes_what_is_gone(tmp_path):
    arch = ARCHES["sm_90a"]
    entries = select("sm_90a", only="_swap_ab")[:3]
    first = emit.emit(arch, entries, tmp_path)
    sources = {f"{e.variant.source}.cu" for e in entries}
    assert {path.name for path in first.written} == sources | {"registry.cu"} and len(sources) == 2
    again = emit.emit(arch, entries, tmp_path)
    assert (again.written, again.removed) == ((), ())

    other = tmp_path / arch.name / "notes.txt"
    other.write_text("not generated")
    fewer = emit.emit(arch, entries[:2], tmp_path)
    assert [path.name for path in fewer.written] == ["registry.cu"]
    assert [path.name for path in fewer.removed] == [f"{entries[2].variant.source}.cu"]
    assert other.exists()
    assert [(unit.name, unit.entries) for unit in fewer.units if unit.kind == "direct"] == [
        (entries[0].variant.source, entries[:2])
    ]


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


def test_shape_text():
    assert str(Shape(128, 16, 128)) == "128x16x128"
