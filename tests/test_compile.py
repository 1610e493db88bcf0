"""The real nvcc on a small subset of the catalogue: one variant of each kind, and every op.

A cold object cache makes this some minutes on two cores; a warm one, seconds.
"""

import ctypes
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from codegen.arch import ARCHES
from codegen.build import FLAGS, Build, LibraryVariant, build, library_variants, read_manifest
from codegen.catalogue import Entry, select
from codegen.emit import include_folders
from codegen.errors import ToolchainMissing
from codegen.files import TEMPLATES, cache_folder
from codegen.objects import ObjectCache
from codegen.toolchain import NVCC_PACKAGES, Toolchain, find_toolchain
from moe_runtime.formats import FORMATS
from moe_runtime.kernels import KernelLibrary

pytestmark = [pytest.mark.compile, pytest.mark.timeout(1800)]

OPS = {path.stem for path in (TEMPLATES / "ops").glob("*.cu")}
WEIGHTS = {"fp8_block": 0, "mxfp4": 1, "nvfp4": 2, "bf16": 3, "fp8_mxfp4": 4}  # MoeWeights
SM90_SHARED_MEMORY = 227 * 1024  # what one thread block may have


def chosen(arch: str, *patterns: str) -> tuple[Entry, ...]:
    entries = tuple(entry for pattern in patterns for entry in select(arch, only=pattern))
    assert len(entries) == len(set(entries)) == len(patterns)
    return entries


SUBSET = {
    "sm_90a": chosen(
        "sm_90a",
        "direct_128x128x128_1x1x1_*_combine",
        "direct_256x16x128_1x1x1_*_gather_swiglu",
        "fp8_block_128x16x128_1x1x1_*cooperative_swap_ab",
        "_mxfp4_mixed_128x256x64_1x1x1_*_combine",
        "nvfp4_mixed_128x64x128_1x1x1_*_swiglu",
        "fp8_mxfp4_mixed_128x256x128_1x1x1_*_swiglu",
        "direct_192x128x128_1x1x1_*_combine",
    ),
    # Between them, on Blackwell: every format, one and two thread blocks an instruction, either operand order.
    "sm_100a": chosen(
        "sm_100a", "fp8_block_256x128x128_2x1x1_2sm_swap_ab", "_nvfp4_256x128x256", "mxfp8_mxfp4_128x64x128"
    ),
    "sm_120a": chosen("sm_120a", "mxfp8_mxfp4"),
}
OWN = [entry.variant for entry in SUBSET["sm_90a"] if entry.variant.family != "collective"]
E4M3_OPERANDS, BF16_OPERANDS = "k32.f32.e4m3.e4m3", "k16.f32.bf16.bf16"
OPERANDS = {"fp8_block": E4M3_OPERANDS, "fp8_mxfp4": E4M3_OPERANDS, "mxfp4": BF16_OPERANDS, "nvfp4": BF16_OPERANDS}
# SASS of PTX' tcgen05.mma (its descriptors, its operands in tensor memory, factors last) and mma.sync, less registers:
# kinds f8f6f4, mxf4nvf4 and mxf8f6f4. {pair} is for two thread blocks.
MULTIPLICATIONS = {
    ("sm_100a", "fp8_block"): "UTCQMMA{pair} gdesc gdesc tmem tmem idesc",
    ("sm_100a", "nvfp4"): "UTCOMMA{pair}.4X gdesc gdesc tmem tmem idesc tmem",
    ("sm_100a", "mxfp8_mxfp4"): "UTCQMMA{pair} gdesc gdesc tmem tmem idesc tmem",
    ("sm_120a", "mxfp8_mxfp4"): "QMMA.SF.16832.F32.E4M3.E2M1.E8",
}
DISASSEMBLER = ("nvidia-cuda-cuobjdump==13.4.92", "nvidia-cuda-nvdisasm==13.4.92")


class BlockScaledVariant(ctypes.Structure):
    """MoeBlockScaledVariant of templates/abi_block_scaled.h: begins as MoeVariant does."""

    _fields_ = [*LibraryVariant._fields_[:12], ("weights", ctypes.c_int32), ("tokens", ctypes.c_int32)]


@pytest.fixture(scope="session")
def toolchain() -> Toolchain:
    try:
        return find_toolchain()
    except ToolchainMissing:
        subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", *NVCC_PACKAGES], check=False)
    try:
        return find_toolchain()
    except ToolchainMissing as missing:
        pytest.skip(f"no nvcc, and installing it failed: {missing}")


@pytest.fixture(scope="session", params=SUBSET, ids=str)
def built(request, toolchain, tmp_path_factory) -> Build:
    folder = tmp_path_factory.mktemp(request.param)
    return build(ARCHES[request.param], SUBSET[request.param], folder, toolchain=toolchain)


@pytest.fixture(scope="session")
def sm90(toolchain, tmp_path_factory) -> Build:
    return build(ARCHES["sm_90a"], SUBSET["sm_90a"], tmp_path_factory.mktemp("library"), toolchain=toolchain)


@pytest.fixture(scope="session", params=["sm_100a", "sm_120a"])
def blackwell(request, toolchain, tmp_path_factory) -> Build:
    return build(ARCHES[request.param], SUBSET[request.param], tmp_path_factory.mktemp("objects"), toolchain=toolchain)


@pytest.fixture(scope="session")
def cuobjdump(toolchain) -> str:
    """Comes with a CUDA toolkit, and from PyPI apart from nvcc; needs nvdisasm beside it."""

    def find() -> str | None:
        folders = [toolchain.nvcc.path.parent, *(bin for path in sys.path for bin in Path(path).glob("nvidia/cu*/bin"))]
        return shutil.which("cuobjdump", path=os.pathsep.join([*map(str, folders), os.environ["PATH"]]))

    if find() is None:
        subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", *DISASSEMBLER], check=False)
    return find() or pytest.skip("no cuobjdump, and installing it failed")


def objects(built: Build) -> list[tuple[Entry, Path]]:
    """The GEMMs of a build, and the object of each."""
    cache, keys = ObjectCache(cache_folder()), {kernel.name: kernel.key for kernel in built.kernels}
    return [(entry, cache.object(keys[entry.variant.name])) for entry in SUBSET[built.arch.name]]


def test_every_unit_has_an_object(built):
    cache = ObjectCache(cache_folder())
    assert all(cache.object(kernel.key).stat().st_size > 0 for kernel in built.kernels)
    names = {entry.variant.name for entry in SUBSET[built.arch.name]}
    registry = {"registry"} if built.arch.links else set()
    assert {kernel.name for kernel in built.kernels} == names | OPS | registry


def test_no_kernel_spills_unless_allowed(built):
    allowed = {entry.variant.name for entry in SUBSET[built.arch.name] if entry.allow_spill}
    spilled = {kernel.name: kernel.spill_bytes for kernel in built.kernels if kernel.spill_bytes}
    assert set(spilled) <= allowed


def test_registers_were_told_for_every_kernel(built):
    names = {entry.variant.name for entry in SUBSET[built.arch.name]}
    gemms = [kernel for kernel in built.kernels if kernel.kind in ("collective", "direct", "mixed")]
    assert {kernel.name for kernel in gemms} == names
    for kernel in gemms:
        assert 0 < kernel.registers <= 255
        assert kernel.compile_seconds > 0


def test_our_kernels_are_quick_to_compile_and_spill_nothing(sm90):
    """A ninth of a collective's seconds, 9 to 78 on two idle cores; a third leaves room for what else a machine does,
    where a bound in seconds would fail on one that is slower or busy."""
    own = [kernel for kernel in sm90.kernels if kernel.kind in ("direct", "mixed")]
    [collective] = [kernel for kernel in sm90.kernels if kernel.kind == "collective"]
    assert {kernel.name for kernel in own} == {v.name for v in OWN} and len(own) == 6
    for kernel in own:
        assert kernel.compile_seconds <= collective.compile_seconds / 3
        assert kernel.spill_bytes == 0


@pytest.mark.parametrize("v", OWN, ids=lambda v: v.name)
def test_our_kernels_multiply_on_tensor_cores(sm90, toolchain, tmp_path, v):
    """Read from PTX, for pip's nvcc has no disassembler with it; that ptxas serialises nothing is the build's check."""
    source, ptx = sm90.library.parent / f"{v.source}.cu", tmp_path / "kernel.ptx"
    flags = (*(flag for flag in FLAGS if flag not in ("-Xptxas", "-v")), *v.target.flags, v.target.gencode)
    includes = [f"-I{folder}" for folder in (*include_folders(), toolchain.cutlass.include)]
    subprocess.run([toolchain.nvcc.path, *flags, *includes, "-ptx", "-o", ptx, source], check=True)
    multiplied = set(re.findall(r"wgmma\.mma_async\.sync\.aligned\.(\S+)", ptx.read_text()))
    columns = {v.instruction_n}
    if v.family == "direct" and not v.swap_ab and v.tile.m == 128:
        columns.add(v.instruction_n // 2)  # halves of tiles
    assert multiplied == {f"m64n{count}{OPERANDS[v.format]}" for count in columns}


def test_library_manifest_tells_stages_and_shared_memory(sm90):
    kernels = {kernel.name: kernel for kernel in sm90.kernels}
    unswapped, swapped, collective, *mixed, wide = (kernels[entry.variant.name] for entry in SUBSET["sm_90a"])
    for kernel in (unswapped, swapped, collective, *mixed, wide):
        assert 0 < kernel.dynamic_shared_memory <= SM90_SHARED_MEMORY
    # The larger the tile, the fewer stages of it fit: of 128x128 and 256x16 as many, 33 and 35 KB each, of 128x16 more.
    assert [kernel.stages for kernel in (unswapped, swapped)] == [6, 6]
    assert collective.stages > swapped.stages
    # The second one's shared memory is half an SM's: two run there.
    assert [kernel.stages for kernel in (*mixed, wide)] == [4, 3, 4, 4]
    recorded = read_manifest(sm90.library.parent.parent / "manifest.json")["sm_90a"]
    assert recorded["library"] == sm90.library.name


def test_blackwell_is_compiled_and_not_linked(built):
    assert (built.library is not None) == built.arch.links


def test_blackwell_multiplies_on_tensor_cores_in_its_format(blackwell, cuobjdump):
    for entry, compiled in objects(blackwell):
        v = entry.variant
        sass = subprocess.run([cuobjdump, "-sass", compiled], capture_output=True, text=True, check=True).stdout
        found = re.findall(r"\b((?:UTC)?[A-Z]MMA[\w.]*) ([^;]*);", sass)
        multiplied = {" ".join([name, *re.findall(r"[a-z]+(?=\[)", operands)]) for name, operands in found}
        pair = ".2CTA" if v.cluster.m == 2 else ""
        assert multiplied == {MULTIPLICATIONS[v.arch, v.format].format(pair=pair)}, v.name


def test_blackwell_answers_without_a_gpu(blackwell, toolchain, tmp_path):
    """Metadata and scale atoms agree with CuTe's types. Each object makes a library of its own, for the host alone."""
    folder = toolchain.nvcc.library_folder
    for entry, compiled in objects(blackwell):
        v, library = entry.variant, tmp_path / f"{entry.variant.name}.so"
        search = [f"-L{folder}"] if folder else []
        command = [toolchain.nvcc.path, "-shared", "-cudart", "static", v.target.gencode, *search]
        subprocess.run([*command, "-o", library, compiled], check=True)
        block_scaled = v.format != "fp8_block"
        told = (BlockScaledVariant if block_scaled else LibraryVariant).in_dll(ctypes.CDLL(str(library)), v.name)
        assert told.check_abi() == 0
        assert (told.tile_m, told.tile_n, told.tile_k) == (v.tile.m, v.tile.n, v.tile.k)
        assert (told.cluster_m, told.cluster_n, told.swap_ab) == (v.cluster.m, v.cluster.n, v.swap_ab)
        assert told.stages >= 2
        assert told.weights == FORMATS[v.format].weights
        assert not block_scaled or told.tokens == FORMATS[v.format].tokens


def test_library_answers_without_a_gpu(sm90):
    """Structs agree with CuTe's types, and the registry's functions with abi.h."""
    variants = library_variants(sm90.library)
    assert list(variants) == [entry.variant.name for entry in SUBSET["sm_90a"]]
    for entry in SUBSET["sm_90a"]:
        told, v = variants[entry.variant.name], entry.variant
        assert told.check_abi() == 0
        assert (told.tile_m, told.tile_n, told.tile_k) == (v.tile.m, v.tile.n, v.tile.k)
        assert (told.cluster_m, told.cluster_n, told.swap_ab) == (v.cluster.m, v.cluster.n, v.swap_ab)
        assert (told.swiglu, told.gathers, told.combines) == (v.swiglu, v.gathers, v.combines)
        assert told.weights == WEIGHTS[v.format]
        # A producer warpgroup, and two that multiply, or as many as hold a tile of 192 tokens by 64.
        assert told.threads == (512 if v.tile.m == 192 else 384)
    read = KernelLibrary(sm90.library).variants
    assert [variant.swiglu for variant in read.values()] == [False, True, False, False, True, True, False]
    assert [variant.gathers for variant in read.values()] == [False, True, False, False, False, False, False]
    assert [variant.combines for variant in read.values()] == [True, False, False, True, False, False, True]
    assert [variant.weight_rows for variant in read.values()] == [128, 256, 128, 128, 128, 128, 128]
    library = ctypes.CDLL(str(sm90.library))
    library.moe_library_hash.restype = ctypes.c_char_p
    assert library.moe_library_hash().decode() == sm90.library_hash
    version = re.search(r"#define MOE_ABI_VERSION (\d+)", (TEMPLATES / "abi.h").read_text())
    assert version and library.moe_abi_version() == int(version[1])


def test_library_needs_no_cuda_at_run_time(sm90):
    """The CUDA runtime is linked in; neither torch nor Python nor a driver is asked for."""
    needed = subprocess.run(["ldd", str(sm90.library)], capture_output=True, text=True, check=True).stdout
    assert not re.search(r"cuda|torch|python|not found", needed)
