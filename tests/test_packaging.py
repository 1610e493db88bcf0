"""What `pip install .` and `pip wheel .` put into site-packages, with a stand-in for nvcc."""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from codegen.catalogue import default_entries, select

from . import fake_nvcc
from .test_codegen_build import stand_ins

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def checkout(tmp_path):
    """A copy of what a wheel is built from, so that the test leaves the real tree alone."""
    copy = tmp_path / "checkout"
    copy.mkdir()
    (copy / "README.md").write_text("# moe_runtime\n")
    for name in ("pyproject.toml", "hatch_build.py"):
        shutil.copy(ROOT / name, copy / name)
    for name in ("codegen", "templates", "moe_runtime"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    return copy


def wheel(checkout: Path, **environment: str) -> tuple[zipfile.ZipFile, str]:
    """Build a wheel through the backend's command; returns it and what was printed."""
    target = checkout.parent / "dist"
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(target)]
    variables = os.environ | {"MOE_RUNTIME_CACHE_DIR": str(checkout.parent / "cache")} | environment
    run = subprocess.run(
        command, cwd=checkout, env=variables, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    assert run.returncode == 0, run.stdout
    (path,) = target.glob("*.whl")
    return zipfile.ZipFile(path), run.stdout


def top_level(archive: zipfile.ZipFile) -> set[str]:
    return {name.split("/")[0] for name in archive.namelist() if ".dist-info/" not in name}


def run_installed(archive: zipfile.ZipFile, folder: Path, *command: str) -> str:
    archive.extractall(folder)
    run = subprocess.run(
        [sys.executable, *command], cwd=folder, text=True, capture_output=True, check=True,
        env=os.environ | {"PYTHONPATH": str(folder)},
    )  # fmt: skip
    return run.stdout


@pytest.mark.parametrize(
    ("environment", "reason"),
    [
        ({"MOE_RUNTIME_CUDA_ARCHS": ""}, "MOE_RUNTIME_CUDA_ARCHS names none"),
        ({"MOE_RUNTIME_CUDA_ARCHS": "sm_90a", "MOE_RUNTIME_NVCC": "/nowhere/nvcc"}, "no working nvcc"),
    ],
    ids=["no arch", "no nvcc"],
)
def test_without_arch_or_nvcc_the_install_is_cpu_only(checkout, tmp_path, environment, reason):
    archive, printed = wheel(checkout, **environment)
    assert archive.filename.endswith("-py3-none-any.whl")
    assert "CPU-only" in printed and reason in printed
    assert top_level(archive) == {"moe_runtime"}
    assert not [name for name in archive.namelist() if name.endswith(".so") or "__pycache__" in name]
    manifest = json.loads(archive.read("moe_runtime/lib/manifest.json"))
    assert manifest["archs"] == {} and reason in manifest["note"]

    listed = json.loads(run_installed(archive, tmp_path / "site", "-m", "moe_runtime.codegen", "list", "--json"))
    assert [variant["name"] for variant in listed if variant["arch"] == "sm_90a"] == [
        item.variant.name for item in select("sm_90a")
    ]
    emitted = run_installed(
        archive, tmp_path / "site", "-m", "moe_runtime.codegen", "emit", "--out", str(tmp_path / "out")
    )
    assert f"sm_90a: {len(select('sm_90a'))} variants" in emitted
    assert "moe_runtime" in run_installed(
        archive, tmp_path / "site", "-c", "import moe_runtime; print(moe_runtime.__file__)"
    )


def test_with_arch_and_nvcc_the_wheel_carries_the_library(checkout):
    stand_ins(checkout / "templates")
    for op in (checkout / "templates" / "ops").iterdir():
        op.unlink()
    nvcc = fake_nvcc.install(checkout.parent / "bin")
    archive, _ = wheel(checkout, MOE_RUNTIME_CUDA_ARCHS="90a;sm_100a", MOE_RUNTIME_NVCC=str(nvcc))
    assert archive.filename.endswith("-py3-none-linux_x86_64.whl")
    assert top_level(archive) == {"moe_runtime"}
    manifest = json.loads(archive.read("moe_runtime/lib/manifest.json"))
    assert set(manifest["archs"]) == {"sm_90a"}
    assert archive.getinfo(f"moe_runtime/lib/{manifest['archs']['sm_90a']['library']}").file_size > 0
    kernels = {kernel["name"] for kernel in manifest["archs"]["sm_90a"]["kernels"]}
    assert kernels == {item.variant.name for item in default_entries("sm_90a")} | {"registry"}
