"""GPU architectures the generator knows. Standard library only: the pip build hook imports it."""

import os
import re
import subprocess
from dataclasses import dataclass

from .errors import BuildError

ARCHS_VARIABLE = "MOE_RUNTIME_CUDA_ARCHS"


@dataclass(frozen=True)
class Arch:
    """One nvcc target.

    `cutlass_tag` is its name in cutlass::arch, `capability` what nvidia-smi calls it, `flags` are nvcc's beside the
    common ones. `links` is False where the kernels are generated and compiled but no library is made of them.
    """

    name: str
    cutlass_tag: str
    capability: str
    links: bool
    flags: tuple[str, ...] = ()

    @property
    def gencode(self) -> str:
        """nvcc's option that makes code for this arch and no other."""
        return f"-gencode=arch={self.name.replace('sm', 'compute')},code={self.name}"


ARCHES = {
    arch.name: arch
    for arch in (
        Arch("sm_90a", "Sm90", "9.0", links=True),
        # Compiled to keep the templates honest; a library waits for a GPU to prove the kernels on.
        Arch("sm_100a", "Sm100", "10.0", links=False),
        # ptxas' default -O3 spills some 60 bytes in every tile here; -O2 spills none and its loops are no longer.
        Arch("sm_120a", "Sm120", "12.0", links=False, flags=("-Xptxas", "-O2")),
    )
}


def find_arch(name: str) -> Arch:
    """The arch called `name`: "sm_90a", "90a" or a compute capability "9.0". Raises BuildError for any other."""
    for arch in ARCHES.values():
        if name in (arch.name, arch.name.removeprefix("sm_"), arch.capability):
            return arch
    raise BuildError(f"arch: got {name!r}; accepted: {', '.join(ARCHES)}")


def parse_archs(text: str) -> tuple[Arch, ...]:
    """Archs of a list such as "sm_90a;sm_100a" or "90a"; empty text gives none."""
    return tuple(dict.fromkeys(find_arch(name) for name in re.split(r"[;,\s]+", text) if name))


def present_archs() -> tuple[Arch, ...]:
    """Archs of the GPUs that nvidia-smi lists and that the catalogue has kernels for."""
    try:
        listing = subprocess.run(
            ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"],
            capture_output=True, text=True, timeout=60, check=True,
        ).stdout  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return ()
    capabilities = {line.strip() for line in listing.splitlines()}
    return tuple(arch for arch in ARCHES.values() if arch.capability in capabilities)


def wanted_archs() -> tuple[Arch, ...]:
    """Archs named by MOE_RUNTIME_CUDA_ARCHS where it is set (empty: none), otherwise those of the GPUs present."""
    named = os.environ.get(ARCHS_VARIABLE)
    return present_archs() if named is None else parse_archs(named)
