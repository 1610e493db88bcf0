"""The build around nvcc: cache, progress, checks, manifest, interruption. nvcc itself is a stand-in here."""

import ctypes
import dataclasses
import io
import json
import os
import shutil
import signal
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from codegen import __main__ as command_line
from codegen import compile as compile_module
from codegen import emit, ptxas
from codegen.arch import ARCHES
from codegen.build import build, library_variants, read_manifest
from codegen.catalogue import Entry, select
from codegen.errors import BuildError
from codegen.files import TEMPLATES, write_atomically
from codegen.objects import ObjectCache
from codegen.toolchain import Cutlass, Nvcc, Toolchain

from . import fake_nvcc

SM90 = ARCHES["sm_90a"]
ENTRIES = (
    *select("sm_90a", only="direct_256x16x128*_gather_swiglu"),
    *select("sm_90a", only="fp8_block_128x16x128*cooperative_swap_ab"),
)
DIRECT, COLLECTIVE_NAME = (item.variant.name for item in ENTRIES)
KERNELS = {DIRECT, COLLECTIVE_NAME}
SOURCES = {item.variant.source for item in ENTRIES}
KERNEL_LOG = """\
ptxas info    : Compiling entry function '{name}' for 'sm_90a'
ptxas info    : Function properties for {name}
    {stack} bytes stack frame, {spill} bytes spill stores, {spill} bytes spill loads
ptxas info    : Used {registers} registers, used 2 barriers, 1040 bytes smem, 400 bytes cmem[0]"""


def log(registers: int = 168, spill: int = 0, stack: int = 0, name: str = "k") -> str:
    lines = KERNEL_LOG.format(registers=registers, spill=spill, stack=stack, name=name).splitlines()
    return "".join(f"// log: {line}\n" for line in lines)


KERNEL = """\
#include "abi.h"
#include "FAMILY/launch.cuh"
static int32_t run(MoeGroupedGemm const*) { return 0; }
static int32_t check_abi(void) { return kAnswer; }
{% for v in variants %}
extern "C" MoeVariant const {{ v.name }};
extern "C" MoeVariant const {{ v.name }} = {"{{ v.name }}", {{ v.tile.m }}, {{ v.tile.n }}, {{ v.tile.k }},
  {{ v.cluster.m }}, {{ v.cluster.n }}, {{ v.swap_ab | int }}, 7, 229376, 384, &run, &check_abi,
  {{ v.swiglu | int }}, MOE_WEIGHTS_FP8_BLOCK, {{ v.gathers | int }}, {{ v.combines | int }}};
{% endfor %}
"""


def stand_ins(templates: Path) -> None:
    """Put a small template of each family into `templates`; their sources tell of themselves and compute nothing."""
    for family, name in (("collective", "fp8_block"), ("direct", "fp8_block"), ("mixed", "grouped_gemm")):
        folder = templates / family
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{name}.cu.j2").write_text(kernel(family))
        (folder / "launch.cuh").write_text("constexpr int kAnswer = 0;\n")


def kernel(family: str, **figures: int) -> str:
    told = log(**figures, name="{{ v.types }}")
    return "{% for v in variants %}\n" + told + "{% endfor %}\n" + KERNEL.replace("FAMILY", family)


@dataclass(frozen=True)
class Tree:
    """Small templates, a stand-in compiler and a fresh cache."""

    templates: Path
    out: Path
    cache: Path
    toolchain: Toolchain
    screen: io.StringIO

    def build(self, entries: tuple[Entry, ...] = ENTRIES, **options):
        console = Console(file=self.screen, width=200)
        return build(SM90, entries, self.out, toolchain=self.toolchain, console=console, **options)


@pytest.fixture
def tree(tmp_path, monkeypatch):
    templates = tmp_path / "templates"
    (templates / "ops").mkdir(parents=True)
    stand_ins(templates)
    for name in ("abi.h", "registry.cu.j2"):
        shutil.copy(TEMPLATES / name, templates / name)
    (templates / "ops" / "gather.cu").write_text(
        log(registers=40) + '#include "ops.cuh"\nint gather() { return kOps; }\n'
    )
    (templates / "ops" / "ops.cuh").write_text("constexpr int kOps = 1;\n")
    monkeypatch.setattr(emit, "TEMPLATES", templates)
    monkeypatch.setenv("MOE_RUNTIME_CACHE_DIR", str(tmp_path / "cache"))
    nvcc = Nvcc(fake_nvcc.install(tmp_path / "bin"), fake_nvcc.VERSION)
    return Tree(
        templates, tmp_path / "out", tmp_path / "cache", Toolchain(nvcc, Cutlass(tmp_path, "4.2.0")), io.StringIO()
    )


def compiled(result) -> set[str]:
    return {kernel.name for kernel in result.kernels if not kernel.cached}


def test_library_holds_the_selected_variants(tree):
    entries = (*ENTRIES, *select("sm_90a", only="direct_128x8x128"))
    result = tree.build(entries)
    variants = library_variants(result.library)
    told_ends = [(told.swiglu, told.gathers, told.combines) for told in variants.values()]
    assert told_ends == [(1, 1, 0), (0, 0, 0), (0, 0, 0), (0, 0, 1)]
    assert list(variants) == [item.variant.name for item in entries]
    for item in entries:
        told, v = variants[item.variant.name], item.variant
        assert (told.tile_m, told.tile_n, told.tile_k, told.swap_ab) == (v.tile.m, v.tile.n, v.tile.k, 1)
        assert told.check_abi() == 0
    library = ctypes.CDLL(str(result.library))
    library.moe_library_hash.restype = ctypes.c_char_p
    assert library.moe_library_hash().decode() == result.library_hash
    library.moe_variant.restype = ctypes.c_void_p
    assert library.moe_variant(-1) is None and library.moe_variant(len(entries)) is None


def test_manifest_records_each_kernel(tree):
    result = tree.build()
    manifest = json.loads((tree.out / "manifest.json").read_text())
    recorded = manifest["archs"]["sm_90a"]
    assert recorded["library_hash"] == result.library_hash
    assert (recorded["nvcc"], recorded["cutlass"]) == (fake_nvcc.VERSION, "4.2.0")
    kernels = {kernel["name"]: kernel for kernel in recorded["kernels"]}
    assert {name: kernel["kind"] for name, kernel in kernels.items()} == {
        DIRECT: "direct", COLLECTIVE_NAME: "collective", "gather": "op", "registry": "registry"
    }  # fmt: skip
    for name in KERNELS:
        recorded = kernels[name]
        assert recorded["registers"] == 168
        assert recorded["spill_bytes"] == 0
        assert (recorded["static_shared_memory"], recorded["dynamic_shared_memory"]) == (1040, 229376)
        assert recorded["stages"] == 7
        assert recorded["compile_seconds"] > 0
        assert recorded["cached"] is False
    assert kernels["gather"]["registers"] == 40
    assert kernels["gather"]["dynamic_shared_memory"] is None
    assert all(ObjectCache(tree.cache).object(kernel["key"]).exists() for kernel in kernels.values())


def test_second_build_compiles_nothing(tree):
    first = tree.build()
    assert compiled(first) == KERNELS | {"gather", "registry"}
    second = tree.build()
    assert compiled(second) == set()
    assert second.library_hash == first.library_hash
    assert [k.compile_seconds for k in second.kernels] == [k.compile_seconds for k in first.kernels]


def test_cache_does_not_depend_on_where_the_tree_lies(tree, tmp_path, monkeypatch):
    first = tree.build()
    moved = tmp_path / "elsewhere"
    shutil.copytree(tree.templates, moved)
    monkeypatch.setattr(emit, "TEMPLATES", moved)
    other = dataclasses.replace(tree, templates=moved, out=tmp_path / "other-out").build()
    assert compiled(other) == set()
    assert other.library_hash == first.library_hash


@pytest.mark.parametrize(
    ("file", "recompiled"),
    [
        ("ops/ops.cuh", {"gather", "registry"}),
        ("ops/gather.cu", {"gather", "registry"}),
        ("collective/launch.cuh", {COLLECTIVE_NAME, "registry"}),
        ("collective/fp8_block.cu.j2", {COLLECTIVE_NAME, "registry"}),
        ("direct/launch.cuh", {DIRECT, "registry"}),
        ("direct/fp8_block.cu.j2", {DIRECT, "registry"}),
        ("abi.h", KERNELS | {"registry"}),
    ],
)
def test_a_change_recompiles_what_includes_it(tree, file, recompiled):
    first = tree.build()
    path = tree.templates / file
    path.write_text(path.read_text() + "// changed\n")
    second = tree.build()
    assert compiled(second) == recompiled
    assert second.library_hash != first.library_hash


@pytest.mark.parametrize("part", ["nvcc", "cutlass"])
def test_another_toolchain_recompiles_everything(tree, part):
    tree.build()
    newer = dataclasses.replace(getattr(tree.toolchain, part), version="99.0.0")
    changed = dataclasses.replace(tree, toolchain=dataclasses.replace(tree.toolchain, **{part: newer}))
    assert compiled(changed.build()) == KERNELS | {"gather", "registry"}


@pytest.mark.parametrize(("family", "entries"), [("direct", ENTRIES[:1]), ("collective", ENTRIES[1:])])
def test_spill_fails_the_build_and_is_not_forgotten(tree, family, entries):
    template, v = tree.templates / family / "fp8_block.cu.j2", entries[0].variant
    template.write_text(kernel(family, registers=255, spill=276))
    for _ in range(2):  # the second time from the cache
        with pytest.raises(BuildError, match=rf"{v.source} spills registers: 552 B in {v.name} \(255 registers\)"):
            tree.build(entries)
    assert not (tree.out / "manifest.json").exists()
    allowed = (dataclasses.replace(entries[0], allow_spill="outside the inner loop"),)
    result = tree.build(allowed)
    assert result.kernels[0].spill_bytes == 552


def test_kernels_of_one_source_have_figures_of_their_own(tree):
    pair = select("sm_90a", only="direct_128x8x128")
    plain, combines = (item.variant for item in pair)
    template = tree.templates / "direct" / "fp8_block.cu.j2"
    told = log(80, name=f"_ZN{plain.types}1kEv") + log(96, spill=4, name=f"_ZN{combines.types}1kEv")
    template.write_text(told + KERNEL.replace("FAMILY", "direct"))
    result = tree.build((pair[0], dataclasses.replace(pair[1], allow_spill="once a tile")))
    kernels = [kernel for kernel in result.kernels if kernel.kind == "direct"]
    assert [(k.name, k.registers, k.spill_bytes) for k in kernels] == [(plain.name, 80, 0), (combines.name, 96, 8)]
    assert len({(kernel.key, kernel.compile_seconds) for kernel in kernels}) == 1
    with pytest.raises(BuildError, match=rf"{plain.source} spills registers: 8 B in {combines.name} \(96 registers\)"):
        tree.build(pair)
    with pytest.raises(BuildError, match="spills"):
        tree.build((dataclasses.replace(pair[0], allow_spill="of its twin"), pair[1]))


@pytest.mark.parametrize("family", ["direct", "collective"])
def test_serialised_wgmma_fails_the_build(tree, family):
    message = (
        "// log: ptxas info : (C7510) Potential Performance Loss: wgmma.mma_async instructions are serialized due to\n"
    )
    template = tree.templates / family / "fp8_block.cu.j2"
    template.write_text(message + template.read_text())
    with pytest.raises(BuildError, match="serialised its wgmma"):
        tree.build()


def test_failing_compile_says_which_where_and_why(tree):
    op = tree.templates / "ops" / "gather.cu"
    op.write_text('// log: gather.cu(3): error: identifier "x" is undefined\n// log: 1 error detected\n// fail\n')
    with pytest.raises(BuildError) as caught:
        tree.build(jobs=1)
    message = str(caught.value)
    assert message.startswith("gather: nvcc failed (2)\n  gather.cu(3): error: identifier")
    logged = tree.out / "sm_90a" / "logs" / "gather.log"
    assert str(logged) in message and logged.exists()
    assert str(op) in message
    assert not list(tree.cache.glob("compiling-*"))
    op.write_text("int gather() { return 0; }\n")
    tree.build()  # the failed build, whose frames `caught` still holds, has let go of the folder


def test_what_finished_beside_a_failure_is_kept(tree):
    op = tree.templates / "ops" / "gather.cu"
    good = op.read_text()
    op.write_text("// fail\n")
    with pytest.raises(BuildError):
        tree.build(jobs=1)  # expected: the collective takes longest, so it comes first; the direct kernel as an op
    op.write_text(good)
    assert compiled(tree.build()) == {DIRECT, "gather", "registry"}


def test_undefined_symbol_fails_the_link(tree):
    op = tree.templates / "ops" / "gather.cu"
    op.write_text("int nowhere();\nint gather() { return nowhere(); }\n")
    with pytest.raises(BuildError, match=r"linking failed\n.*undefined reference to .nowhere"):
        tree.build()


@pytest.fixture
def interruptible():
    """Ctrl-C as a terminal's foreground job sees it; a background shell starts its jobs with the signal ignored."""
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, previous)


@pytest.mark.usefixtures("interruptible")
def test_interrupted_build_kills_its_compiler_and_goes_on_later(tree, tmp_path):
    blocker = tmp_path / "blocker"
    blocker.touch()
    slow = tree.templates / "ops" / "slow.cu"
    slow.write_text(f"// wait while: {blocker}\nint slow() {{ return 0; }}\n")
    entries = ENTRIES[:1]

    def interrupt() -> None:
        while len(list(tree.cache.glob("objects/*/*.o"))) < 2:
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt, daemon=True).start()
    with pytest.raises(KeyboardInterrupt):
        tree.build(entries, jobs=2)
    assert not list(tree.cache.glob("compiling-*"))
    arguments = [Path(f"/proc/{pid}/cmdline") for pid in os.listdir("/proc") if pid.isdigit()]
    assert not [path for path in arguments if path.exists() and str(slow).encode() in path.read_bytes()]
    blocker.unlink()
    assert compiled(tree.build(entries)) <= {"slow", "registry"}


@pytest.mark.parametrize("moment", ["starts", "finishes"])
def test_interruption_as_a_compile_starts_or_finishes_leaves_no_folder(tree, monkeypatch, moment):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    name = {"starts": "subprocess.Popen", "finishes": "_Batch.report"}[moment]
    monkeypatch.setattr(f"codegen.compile.{name}", interrupted)
    with pytest.raises(KeyboardInterrupt):
        tree.build(jobs=1)
    assert not list(tree.cache.glob("compiling-*"))


def test_stopped_command_says_that_it_can_go_on(monkeypatch):
    def stopped(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(command_line, "build_arch", stopped)
    result = CliRunner().invoke(command_line.app, ["build", "--arch", "sm_90a"])
    assert result.exit_code == 130
    assert "goes on from there" in result.output


def test_progress_tells_figures_and_time_left(tree):
    tree.build(ENTRIES[:1], jobs=1)
    assert "sm_90a: 3 objects, 3 to compile, 1 at once (nvcc 13.0.88, CUTLASS 4.2.0)" in tree.screen.getvalue()
    assert "168 registers, 0 B spilled" in tree.screen.getvalue()
    assert "3/3" in tree.screen.getvalue() and "0:00 left" in tree.screen.getvalue()


def test_time_left_starts_from_recorded_seconds(tree):
    tree.build()
    seconds = json.loads((tree.cache / "seconds.json").read_text())
    assert set(seconds) == SOURCES | {"gather", "registry"}


@pytest.mark.parametrize(
    ("requested", "cores", "gigabytes", "expected"),
    [(None, 8, 64, 8), (None, 8, 9, 2), (4, 8, 64, 4), (16, 8, 17, 4), (None, 2, 1, 1)],
)
def test_compiles_at_once_fit_cores_and_memory(monkeypatch, requested, cores, gigabytes, expected):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(cores))
    monkeypatch.setattr(compile_module, "available_memory", lambda: gigabytes << 30)
    assert compile_module.parallel_compiles(requested) == expected


def test_manifest_keeps_other_archs_and_survives_damage(tree):
    write_atomically(
        tree.out / "manifest.json", json.dumps({"schema_version": 1, "archs": {"sm_100a": {"kernels": []}}})
    )
    tree.build()
    assert set(read_manifest(tree.out / "manifest.json")) == {"sm_90a", "sm_100a"}
    (tree.out / "manifest.json").write_text("{")
    tree.build()
    assert set(read_manifest(tree.out / "manifest.json")) == {"sm_90a"}


def test_damaged_cache_record_is_compiled_again(tree):
    first = tree.build()
    gather = next(kernel for kernel in first.kernels if kernel.name == "gather")
    ObjectCache(tree.cache).object(gather.key).with_suffix(".json").write_text("{")
    assert compiled(tree.build()) == {"gather"}


def test_nothing_selected_is_an_error(tree):
    with pytest.raises(BuildError, match="no variant"):
        tree.build(())


def test_ptxas_log_of_several_functions():
    text = """\
ptxas info    : 11 bytes gmem
ptxas info    : Compiling entry function 'a' for 'sm_90a'
ptxas info    : Function properties for a
    16 bytes stack frame, 8 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 40 registers, used 1 barriers, 16 bytes stack, 2064 bytes smem
ptxas info    : Function properties for helper
    0 bytes stack frame, 4 bytes spill stores, 0 bytes spill loads
ptxas info    : Compiling entry function 'b' for 'sm_90a'
ptxas info    : Function properties for b
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 168 registers, used 2 barriers
"""
    functions = ptxas.parse(text)
    assert functions == (
        ptxas.Function("a", 40, 20, 16, 2064),
        ptxas.Function("helper", 0, 4, 0, 0),
        ptxas.Function("b", 168, 0, 0, 0),
    )
    assert ptxas.spill_bytes(functions) == 24
