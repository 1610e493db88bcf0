"""Headers of kernels compiled for the host, so that a test without a GPU runs the kernels' own code."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest

from codegen.files import TEMPLATES

needs_gxx = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")


def compile_shim(name: str, folder: Path, *options: str) -> ctypes.CDLL:
    """tests/NAME.cpp with templates/ on its include path, after what `options` add; the library goes into folder."""
    library, source = folder / f"{name}.so", Path(__file__).with_name(f"{name}.cpp")
    command = ["g++", "-std=c++17", "-O1", "-Wno-unknown-pragmas", "-shared", "-fPIC", *options, f"-I{TEMPLATES}"]
    subprocess.run([*command, "-o", str(library), str(source)], check=True)
    return ctypes.CDLL(str(library))
