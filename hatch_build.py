"""pip's build hook: compiles kernels into the wheel where there is an arch to build for and a compiler."""

import json
import sys
import sysconfig
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

sys.path.insert(0, str(Path(__file__).parent))

from codegen.arch import ARCHS_VARIABLE, wanted_archs
from codegen.errors import ToolchainMissing
from codegen.toolchain import CUTLASS_PACKAGE, NVCC_PACKAGES, find_nvcc, find_toolchain

GENERATOR_PACKAGES = ("jinja2", "rich", "platformdirs", "filelock")


class CustomBuildHook(BuildHookInterface):
    """Builds for the archs of MOE_RUNTIME_CUDA_ARCHS or of the GPUs present; without arch or nvcc, a CPU-only wheel."""

    def dependencies(self) -> list[str]:
        """What the build environment needs beside hatchling: nothing for a CPU-only wheel."""
        if not wanted_archs():
            return []
        try:
            find_nvcc()
            nvcc: tuple[str, ...] = ()
        except ToolchainMissing:
            nvcc = NVCC_PACKAGES
        return [*GENERATOR_PACKAGES, CUTLASS_PACKAGE, *nvcc]

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        if version == "editable":
            # A checkout's library is looked up in generated/, where `python -m codegen build` puts it.
            return
        try:
            libraries = self._build()
        except ToolchainMissing as error:
            libraries = self._without(str(error))
        if libraries:
            platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
            build_data["tag"] = f"py3-none-{platform}"
            build_data["pure_python"] = False
        for file in (*libraries, self._manifest):
            build_data["force_include"][str(file)] = f"moe_runtime/lib/{file.name}"

    @property
    def _manifest(self) -> Path:
        return Path(self.root) / "build" / "wheel" / "manifest.json"

    def _without(self, reason: str) -> list[Path]:
        """A CPU-only wheel still carries a manifest, which says why it has no kernels."""
        self.app.display_warning(f"moe_runtime: CPU-only install, no kernels: {reason}")
        self._manifest.parent.mkdir(parents=True, exist_ok=True)
        self._manifest.write_text(json.dumps({"schema_version": 1, "archs": {}, "note": reason}) + "\n")
        return []

    def _build(self) -> list[Path]:
        archs = [arch for arch in wanted_archs() if arch.links]
        if not archs:
            return self._without(f"no GPU found that has kernels here, and {ARCHS_VARIABLE} names none")
        toolchain = find_toolchain()

        from codegen.build import build, write_manifest
        from codegen.catalogue import default_entries

        out = Path(self.root) / "generated"
        builds = [build(arch, default_entries(arch.name), out, toolchain=toolchain) for arch in archs]
        write_manifest(self._manifest, {done.arch.name: done.record() for done in builds})
        return [done.library for done in builds if done.library]
