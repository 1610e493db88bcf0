"""Sources -> one library an arch: compiles what the object cache lacks, checks it, links it, records how it went."""

import ctypes
import dataclasses
import hashlib
import json
import os
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import filelock
from rich.console import Console

from . import ptxas
from .arch import Arch
from .catalogue import Entry
from .compile import Job, compile_all, error_lines, parallel_compiles
from .emit import Unit, emit, include_folders
from .errors import BuildError
from .files import cache_folder, write_atomically
from .objects import ObjectCache, Record, content_key, own_headers
from .toolchain import Toolchain, find_toolchain

MANIFEST_VERSION = 1
# NDEBUG is not a matter of speed alone: with asserts ptxas serialises wgmma.
FLAGS = ("-std=c++17", "-O3", "-DNDEBUG", "--expt-relaxed-constexpr", "-Xptxas", "-v", "-Xcompiler", "-fPIC")


@dataclass(frozen=True)
class Kernel:
    """A variant, or another compiled unit, as the manifest records it.

    `compile_seconds` are its source's, which variants may share. `dynamic_shared_memory` (bytes) and `stages` are None
    where no linked library tells them.
    """

    name: str
    kind: str
    format: str | None
    key: str
    compile_seconds: float
    cached: bool
    registers: int
    spill_bytes: int
    static_shared_memory: int
    dynamic_shared_memory: int | None
    stages: int | None
    functions: tuple[ptxas.Function, ...]


@dataclass(frozen=True)
class Build:
    """A finished build of one arch. `library` is None for an arch that is compiled but not linked."""

    arch: Arch
    library: Path | None
    library_hash: str
    toolchain: Toolchain
    kernels: tuple[Kernel, ...]

    def record(self) -> dict[str, object]:
        """The build as the manifest's plain JSON values."""
        return {
            "library": self.library.name if self.library else None,
            "library_hash": self.library_hash,
            "nvcc": self.toolchain.nvcc.version,
            "cutlass": self.toolchain.cutlass.version,
            "flags": [*FLAGS, *self.arch.flags, self.arch.gencode],
            "kernels": [dataclasses.asdict(kernel) for kernel in self.kernels],
        }


class LibraryVariant(ctypes.Structure):
    """MoeVariant of templates/abi.h, as far as a host without a GPU can use it."""

    _fields_ = [
        ("name", ctypes.c_char_p),
        *((field, ctypes.c_int32) for field in ("tile_m", "tile_n", "tile_k", "cluster_m", "cluster_n", "swap_ab")),
        *((field, ctypes.c_int32) for field in ("stages", "shared_memory_bytes", "threads")),
        ("run", ctypes.c_void_p),
        ("check_abi", ctypes.CFUNCTYPE(ctypes.c_int32)),
        ("swiglu", ctypes.c_int32),
        *((field, ctypes.c_int32) for field in ("weights", "gathers", "combines")),
    ]


def library_variants(path: Path) -> dict[str, LibraryVariant]:
    """The variants in the library at `path`, by name. Needs no GPU. Raises BuildError if it does not load."""
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        raise BuildError(f"{path} does not load: {error}") from error
    library.moe_variant.restype = ctypes.POINTER(LibraryVariant)
    variants = [library.moe_variant(index).contents for index in range(library.moe_variant_count())]
    return {variant.name.decode(): variant for variant in variants}


def build(
    arch: Arch,
    entries: Sequence[Entry],
    out: Path,
    *,
    jobs: int | None = None,
    toolchain: Toolchain | None = None,
    console: Console | None = None,
) -> Build:
    """Emit, compile, check and link the library that holds `entries`, and record it in out/manifest.json.

    Every op of templates/ops is compiled as well. `jobs` caps the compiles at once, beside memory (4 GB each).
    Raises BuildError for a failing compile, and for a kernel that spills without its entry allowing it.
    """
    if not entries:
        raise BuildError("no variant to build: `python -m codegen list` shows what exists")
    console = console or Console()
    toolchain = toolchain or find_toolchain()
    cache = ObjectCache(cache_folder())
    out = out.absolute()
    out.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(out / ".lock")
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        console.print(f"another build is at work in {out}: waiting for it")
        lock.acquire()
    try:
        return _build(arch, entries, out, parallel_compiles(jobs), toolchain, cache, console)
    finally:
        lock.release()


def _build(
    arch: Arch,
    entries: Sequence[Entry],
    out: Path,
    parallel: int,
    toolchain: Toolchain,
    cache: ObjectCache,
    console: Console,
) -> Build:
    units = emit(arch, entries, out).units
    prepared = [_job(unit, arch, out, toolchain) for unit in units if unit.kind != "registry"]
    digest = hashlib.sha256(json.dumps([(job.unit.name, job.key) for job in prepared]).encode())
    library_hash = f"h{digest.hexdigest()[:16]}"  # the letter keeps it one token of the preprocessor
    define = f"-DMOE_LIBRARY_HASH={library_hash}"
    prepared += [_job(unit, arch, out, toolchain, define) for unit in units if unit.kind == "registry"]

    missing = [job for job in prepared if cache.find(job.key) is None]
    console.print(
        f"{arch.name}: {len(prepared)} objects, {len(missing)} to compile, {parallel} at once "
        f"(nvcc {toolchain.nvcc.version}, CUTLASS {toolchain.cutlass.version})",
        highlight=False,
    )
    if missing:
        compile_all(missing, cache, parallel, console)
    records = [(job, _cached(cache, job)) for job in prepared]
    _check(records)

    library = _link(prepared, arch, out, toolchain, cache) if arch.links else None
    told = library_variants(library) if library else {}
    kernels = tuple(
        _kernel(job, record, entry, job not in missing, told)
        for job, record in records
        for entry in job.unit.entries or (None,)
    )
    result = Build(arch, library, library_hash, toolchain, kernels)
    write_manifest(out / "manifest.json", read_manifest(out / "manifest.json") | {arch.name: result.record()})
    return result


def _job(unit: Unit, arch: Arch, out: Path, toolchain: Toolchain, *defines: str) -> Job:
    folders = include_folders()
    flags = (*FLAGS, *arch.flags, arch.gencode, *defines)
    inputs = (*flags, toolchain.nvcc.version, toolchain.cutlass.version)
    key = content_key(unit.source, own_headers(unit.source, folders), inputs)
    includes = tuple(f"-I{folder}" for folder in (*folders, toolchain.cutlass.include))
    command = (str(toolchain.nvcc.path), *flags, *includes, "-c", str(unit.source))
    return Job(unit, key, command, out / arch.name / "logs" / f"{unit.name}.log")


def _cached(cache: ObjectCache, job: Job) -> Record:
    record = cache.find(job.key)
    if record is None:
        raise BuildError(f"{job.unit.name}: {cache.object(job.key)} vanished while the build ran; run it again")
    return record


def _check(records: Sequence[tuple[Job, Record]]) -> None:
    problems = []
    for job, record in records:
        spills = []
        for function in record.functions:
            owner = _owner(job.unit, function)
            if function.spill_bytes and not (owner and owner.allow_spill):
                name = owner.variant.name if owner else function.function[:100]
                spills.append(f"{function.spill_bytes} B in {name} ({function.registers} registers)")
        if spills:
            remedy = "make its tile smaller, or give its catalogue entry a reason in allow_spill"
            problems.append(f"{job.unit.name} spills registers: {'; '.join(spills)}; {remedy}")
        if record.serialised:
            problems.append(f"{job.unit.name}: ptxas serialised its wgmma instructions, see {job.log}")
    if problems:
        raise BuildError("\n".join(problems))


def _link(jobs: Sequence[Job], arch: Arch, out: Path, toolchain: Toolchain, cache: ObjectCache) -> Path:
    library = out / arch.name / f"libmoe_runtime_{arch.name}.so"
    search = [f"-L{toolchain.nvcc.library_folder}"] if toolchain.nvcc.library_folder else []
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        linked = Path(folder) / library.name
        command = [
            *(str(toolchain.nvcc.path), "-shared", "-cudart", "static", arch.gencode, *search),
            *("-Xlinker", "--no-undefined", "-o", str(linked)),
            *(str(cache.object(job.key)) for job in jobs),
        ]
        run = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
        if run.returncode:
            raise BuildError(f"{library.name}: linking failed\n{error_lines(run.stdout + run.stderr)}")
        # A new file, not new bytes in the old one: a process that has the old library mapped keeps it.
        os.replace(linked, library)
    return library


def _owner(unit: Unit, function: ptxas.Function) -> Entry | None:
    """Whose a compiled function is: all are the only entry's, as of a collective, and else tell by their names."""
    return next((e for e in unit.entries if len(unit.entries) == 1 or e.variant.types in function.function), None)


def _kernel(job: Job, record: Record, entry: Entry | None, cached: bool, told: dict[str, LibraryVariant]) -> Kernel:
    """Of an entry of the unit, or of a unit that has none."""
    name = entry.variant.name if entry else job.unit.name
    functions = tuple(function for function in record.functions if _owner(job.unit, function) is entry)
    variant = told.get(name)
    return Kernel(
        name=name,
        kind=job.unit.kind,
        format=entry.variant.format if entry else None,
        key=job.key,
        compile_seconds=record.seconds,
        cached=cached,
        registers=max((function.registers for function in functions), default=0),
        spill_bytes=ptxas.spill_bytes(functions),
        static_shared_memory=max((function.static_shared_memory for function in functions), default=0),
        dynamic_shared_memory=variant.shared_memory_bytes if variant else None,
        stages=variant.stages if variant else None,
        functions=functions,
    )


def read_manifest(path: Path) -> dict[str, object]:
    """Builds recorded in a manifest by arch; empty where there is none of this version."""
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        return dict(manifest["archs"]) if manifest["schema_version"] == MANIFEST_VERSION else {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def write_manifest(path: Path, archs: Mapping[str, object]) -> None:
    write_atomically(path, json.dumps({"schema_version": MANIFEST_VERSION, "archs": archs}, indent=1) + "\n")
