"""Which nvcc and which CUTLASS are found, and what is said where there is none."""

from pathlib import Path

import pytest

from codegen import toolchain
from codegen.errors import ToolchainMissing
from codegen.toolchain import Nvcc, find_cutlass, find_nvcc


@pytest.fixture
def no_nvcc(tmp_path, monkeypatch):
    """Hides every nvcc of the machine; PATH is an empty folder."""
    for variable in ("MOE_RUNTIME_NVCC", "CUDA_HOME"):
        monkeypatch.delenv(variable, raising=False)
    (tmp_path / "empty").mkdir()
    monkeypatch.setenv("PATH", f"{tmp_path / 'empty'}")
    monkeypatch.setattr(toolchain, "SYSTEM_NVCC", tmp_path / "no-such-nvcc")
    monkeypatch.setattr("sys.path", [str(tmp_path / "site")])
    return tmp_path


def nvcc_saying(folder: Path, version: str) -> Path:
    folder.mkdir(parents=True)
    path = folder / "nvcc"
    path.write_text(f"#!/bin/sh\necho Cuda compilation tools, V{version}\n")
    path.chmod(0o755)
    return path


def test_missing_nvcc_says_what_to_install(no_nvcc):
    with pytest.raises(
        ToolchainMissing, match=r"no nvcc >= 12\.8 found.*pip install nvidia-cuda-nvcc==13\.0\.88 nvidia-nvvm"
    ):
        find_nvcc()


def test_nvcc_of_pypi_packages_is_found(no_nvcc):
    path = nvcc_saying(no_nvcc / "site" / "nvidia" / "cu13" / "bin", "13.0.88")
    assert find_nvcc() == Nvcc(path, "13.0.88")
    assert find_nvcc().library_folder is None
    runtime = path.parent.parent / "lib" / "libcudart_static.a"
    runtime.parent.mkdir()
    runtime.touch()
    assert find_nvcc().library_folder == runtime.parent


def test_old_nvcc_is_passed_over_and_named(no_nvcc, monkeypatch):
    old = nvcc_saying(no_nvcc / "old", "12.4.131")
    monkeypatch.setenv("PATH", str(old.parent))
    with pytest.raises(ToolchainMissing, match=rf"{old} is 12\.4\.131"):
        find_nvcc()
    recent = nvcc_saying(no_nvcc / "site" / "nvidia" / "cu13" / "bin", "13.0.88")
    assert find_nvcc().path == recent


def test_named_nvcc_is_never_passed_over(no_nvcc, monkeypatch):
    nvcc_saying(no_nvcc / "site" / "nvidia" / "cu13" / "bin", "13.0.88")
    monkeypatch.setenv("CUDA_HOME", str(no_nvcc / "cuda"))
    with pytest.raises(ToolchainMissing, match=r"CUDA_HOME: .*no working nvcc"):
        find_nvcc()
    named = nvcc_saying(no_nvcc / "cuda" / "bin", "12.9.0")
    toolchain.nvcc_version.cache_clear()
    assert find_nvcc().path == named
    monkeypatch.setenv("MOE_RUNTIME_NVCC", str(nvcc_saying(no_nvcc / "mine", "12.0.1")))
    with pytest.raises(ToolchainMissing, match=r"MOE_RUNTIME_NVCC: .*version 12\.0\.1"):
        find_nvcc()


def test_cutlass_headers_come_with_their_version():
    found = find_cutlass()
    assert (found.include / "cutlass" / "cutlass.h").exists()
    assert found.version == "4.2.0"


def test_missing_cutlass_says_what_to_install(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(ToolchainMissing, match=r"pip install --no-deps nvidia-cutlass==4\.2\.0\.0"):
        find_cutlass()
