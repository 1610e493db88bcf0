"""Finds nvcc, the host compiler and CUTLASS' headers. Standard library only: the pip build hook imports it."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from .errors import ToolchainMissing

MINIMUM_NVCC = (12, 8)  # first to know sm_100a and sm_120a
CUTLASS_PACKAGE = "nvidia-cutlass==4.2.0.0"
SYSTEM_NVCC = Path("/usr/local/cuda/bin/nvcc")
NVCC_PACKAGES = (
    "nvidia-cuda-nvcc==13.0.88",
    "nvidia-nvvm==13.0.88",
    "nvidia-cuda-crt==13.0.88",
    "nvidia-cuda-runtime==13.0.96",
    "nvidia-cuda-cccl==13.0.85",
)


@dataclass(frozen=True)
class Nvcc:
    path: Path
    version: str

    @property
    def library_folder(self) -> Path | None:
        """Where PyPI's packages keep libcudart_static.a; nvcc itself only looks in lib64."""
        folder = self.path.parent.parent / "lib"
        return folder if (folder / "libcudart_static.a").exists() else None


@dataclass(frozen=True)
class Cutlass:
    include: Path
    version: str


@dataclass(frozen=True)
class Toolchain:
    nvcc: Nvcc
    cutlass: Cutlass


def _named_by_user() -> tuple[str, Path] | None:
    if named := os.environ.get("MOE_RUNTIME_NVCC"):
        return "MOE_RUNTIME_NVCC", Path(named)
    if home := os.environ.get("CUDA_HOME"):
        return "CUDA_HOME", Path(home) / "bin" / "nvcc"
    return None


def _candidates() -> Iterator[Path]:
    if on_path := shutil.which("nvcc"):
        yield Path(on_path)
    yield SYSTEM_NVCC
    for folder in sys.path:
        yield from sorted(Path(folder).glob("nvidia/cu*/bin/nvcc"), reverse=True)


@cache
def nvcc_version(path: Path) -> str | None:
    """Full version such as "13.0.88", or None where `path` is no working nvcc."""
    try:
        text = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=60, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    found = re.search(r"\bV(\d+\.\d+\.\d+)", text)
    return found[1] if found else None


def _recent(version: str) -> bool:
    return tuple(int(part) for part in version.split(".")[:2]) >= MINIMUM_NVCC


def find_nvcc() -> Nvcc:
    """The first recent enough nvcc of MOE_RUNTIME_NVCC, CUDA_HOME, PATH, /usr/local/cuda and PyPI's nvidia packages.

    One that the user names in a variable is used or refused, never passed over. Raises ToolchainMissing.
    """
    minimum = ".".join(map(str, MINIMUM_NVCC))
    install = f"pip install {' '.join(NVCC_PACKAGES)}"
    if named := _named_by_user():
        variable, path = named
        version = nvcc_version(path)
        if version is None or not _recent(version):
            found = f"version {version}" if version else "no working nvcc"
            raise ToolchainMissing(f"{variable}: {path} is {found}; needed: nvcc >= {minimum}. Correct it or unset it")
        return Nvcc(path, version)
    old = []
    for path in _candidates():
        if version := nvcc_version(path):
            if _recent(version):
                return Nvcc(path, version)
            old.append(f"{path} is {version}")
    found = f" ({'; '.join(old)})" if old else ""
    raise ToolchainMissing(f"no nvcc >= {minimum} found{found}. Install a CUDA toolkit, or: {install}")


def find_cutlass() -> Cutlass:
    """CUTLASS' headers inside the installed cutlass_library. Raises ToolchainMissing."""
    spec = importlib.util.find_spec("cutlass_library")
    roots = spec.submodule_search_locations if spec else None
    include = Path(roots[0]) / "source" / "include" if roots else None
    if include is None or not (include / "cutlass" / "version.h").exists():
        raise ToolchainMissing(f"CUTLASS' headers not found: pip install --no-deps {CUTLASS_PACKAGE}")
    text = (include / "cutlass" / "version.h").read_text()
    numbers = [re.search(rf"#define CUTLASS_{part}\s+(\d+)", text) for part in ("MAJOR", "MINOR", "PATCH")]
    return Cutlass(include, ".".join(number[1] for number in numbers if number))


def find_toolchain() -> Toolchain:
    """Everything a compile needs. Raises ToolchainMissing with what to install."""
    if shutil.which("g++") is None:
        raise ToolchainMissing("nvcc needs a host compiler, and g++ is not on PATH: install it (apt install g++)")
    return Toolchain(find_nvcc(), find_cutlass())
