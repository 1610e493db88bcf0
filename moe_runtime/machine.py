"""What this machine has: the generator, the compiler, the kernels, and layer shapes that it can hold and time."""

from __future__ import annotations

import importlib
import importlib.util
import os
import platform
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import platformdirs
import torch

from .config import MoEConfig
from .errors import MoEError, Unsupported
from .kernels import load_library

PLAN_FOLDER_VARIABLE = "MOE_RUNTIME_PLAN_DIR"
CORE_WEIGHTS = 1 << 17
"""Elements of one expert's projection that one CPU core can be asked to time at every bucket in a minute or two."""
SMALL_DIMENSION = 128


def plan_folder() -> Path:
    """Where plans go that are given no path: MOE_RUNTIME_PLAN_DIR, or the user's data folder."""
    named = os.environ.get(PLAN_FOLDER_VARIABLE)
    return Path(named) if named else Path(platformdirs.user_data_dir("moe_runtime", appauthor=False)) / "plans"


def scaled_by(config: MoEConfig, divisor: int) -> MoEConfig:
    """Hidden and intermediate size divided by `divisor`, rounded to the multiple of 128 that the format needs."""

    def scaled(size: int) -> int:
        return max(SMALL_DIMENSION, round(size / divisor / SMALL_DIMENSION) * SMALL_DIMENSION)

    return config.scaled(scaled(config.hidden_size), scaled(config.intermediate_size))


def scaled_to_cpu(config: MoEConfig) -> MoEConfig:
    """The layer made small enough to tune on this machine's cores; the same one where it is small already.

    Sizes are halved together until a projection holds at most CORE_WEIGHTS a core, experts down to 4 * top_k, which
    still leaves a rank of two more experts than a token has slots.
    """
    limit = CORE_WEIGHTS * (os.cpu_count() or 1)
    divisor = 1
    while config.hidden_size * config.intermediate_size > limit * divisor**2:
        divisor *= 2
    experts = config.num_experts
    while experts % 2 == 0 and experts // 2 >= 4 * config.top_k:
        experts //= 2
    if (divisor, experts) == (1, config.num_experts):
        return config
    small = scaled_by(config, divisor) if divisor > 1 else config
    return config.scaled(small.hidden_size, small.intermediate_size, experts)


def shape_text(config: MoEConfig) -> str:
    return (
        f"H {config.hidden_size}, I {config.intermediate_size}, {config.num_experts} experts, "
        f"top {config.top_k}, {config.format}"
    )


def generator(module: str) -> ModuleType:
    """A module of the kernel generator, which travels inside an installed package and beside it in a checkout.

    Raises Unsupported where the generator cannot be imported.
    """
    package = "moe_runtime.codegen" if importlib.util.find_spec("moe_runtime.codegen") else "codegen"
    try:
        return importlib.import_module(f"{package}.{module}")
    except ModuleNotFoundError as error:
        remedy = "pip install --no-deps nvidia-cutlass==4.2.0.0" if error.name == "cutlass_library" else "install it"
        raise Unsupported(f"the kernel generator needs the package {error.name}: {remedy}") from error


@dataclass(frozen=True)
class Fact:
    """found: what there is, or None; todo: what to do where something is missing."""

    name: str
    found: str | None
    todo: str = ""


def facts() -> Iterator[Fact]:
    """What `moe-runtime info` tells, cheapest first."""
    yield Fact("python", f"{platform.python_version()}, torch {torch.__version__}")
    yield Fact("cpu", f"{os.cpu_count()} cores, {platform.machine()}")
    yield from _gpus()
    yield _tool("nvcc", lambda tools: f"{tools.find_nvcc().path}, {tools.find_nvcc().version}")
    yield _tool("CUTLASS", lambda tools: f"{tools.find_cutlass().version}, {tools.find_cutlass().include}")
    yield _archs()
    yield _library("sm_90a")
    yield Fact("plan folder", str(plan_folder()) + ("" if plan_folder().is_dir() else " (made by the first tune)"))


def _gpus() -> Iterator[Fact]:
    if not torch.cuda.is_available():
        built = "this torch is built without CUDA" if torch.version.cuda is None else "torch sees no GPU"
        yield Fact("gpu", None, f"{built}; layers run on the CPU executor")
    for index in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(index)
        memory = torch.cuda.get_device_properties(index).total_memory >> 30
        yield Fact(f"gpu {index}", f"{torch.cuda.get_device_name(index)}, {major}.{minor}, {memory} GiB")


def _tool(name: str, describe: Callable[[Any], str]) -> Fact:
    try:
        tools, errors = generator("toolchain"), generator("errors")
    except Unsupported as error:
        return Fact(name, None, str(error))
    try:
        return Fact(name, describe(tools))
    except errors.BuildError as error:
        return Fact(name, None, str(error))


def _archs() -> Fact:
    try:
        arch, errors = generator("arch"), generator("errors")
    except Unsupported as error:
        return Fact("archs", None, str(error))
    known = ", ".join(arch.ARCHES)
    try:
        wanted = [wanted.name for wanted in arch.wanted_archs()]
    except errors.BuildError as error:
        return Fact("archs", None, str(error))
    here = ", ".join(wanted) if wanted else f"none (no GPU of these, {arch.ARCHS_VARIABLE} not set)"
    return Fact("archs", f"generator knows {known}; a build here makes {here}")


def _library(arch: str) -> Fact:
    try:
        library = load_library(arch)
    except MoEError as error:
        return Fact(f"library {arch}", None, str(error))
    return Fact(f"library {arch}", f"{library.path}, {len(library.variants)} variants, hash {library.hash}")
