"""Finds and loads the compiled library of an architecture; the ctypes mirror of templates/abi.h.

ctypes rather than a tensor-aware binding: a call passes one pointer to one struct, costs about a microsecond, and
keeps the library free of Python, torch and any third package. tests/test_abi.py compares each struct with the header.
"""

from __future__ import annotations

import ctypes
import enum
import functools
import os
from ctypes import POINTER, Structure, c_char_p, c_float, c_int32, c_int64, c_void_p
from dataclasses import dataclass
from pathlib import Path

from .errors import Unsupported
from .formats import WeightLayout

ABI_VERSION = 9
LIBRARY_VARIABLE = "MOE_RUNTIME_LIBRARY"
_PACKAGE = Path(__file__).resolve().parent


class Stage(enum.IntFlag):
    """Stages of a layer; a call runs those whose bit is set, in this order."""

    ROUTE = 1
    PERMUTE = 2
    GATHER = 4
    GEMM1 = 8
    ACTIVATION = 16
    GEMM2 = 32
    COMBINE = 64


DTYPE_BF16, DTYPE_F32, DTYPE_E4M3, DTYPE_E2M1 = 0, 1, 2, 3


class Activation(enum.IntEnum):
    SWIGLU = 0
    RELU2 = 1


class VariantRecord(Structure):
    """MoeVariant."""

    _fields_ = [
        ("name", c_char_p),
        ("tile_m", c_int32),
        ("tile_n", c_int32),
        ("tile_k", c_int32),
        ("cluster_m", c_int32),
        ("cluster_n", c_int32),
        ("swap_ab", c_int32),
        ("stages", c_int32),
        ("shared_memory_bytes", c_int32),
        ("threads", c_int32),
        ("run", c_void_p),
        ("check_abi", ctypes.CFUNCTYPE(c_int32)),
        ("swiglu", c_int32),
        ("weights", c_int32),
        ("gathers", c_int32),
        ("combines", c_int32),
    ]


class MoeMessages(Structure):
    """Where GATHER writes rows that leave this GPU; named as in the header, which a test compares."""

    _fields_ = [
        ("rows", c_void_p),
        ("pitch", c_int64),
        ("slots", c_int32),
        ("experts_per_rank", c_int32),
        ("ids", c_void_p),
        ("weights", c_void_p),
        ("notice", c_void_p),
        ("later", c_int64),
    ]


class MoeUnpack(Structure):
    """Ids and weights of messages that came; named as in the header."""

    _fields_ = [
        ("messages", c_void_p),
        ("pitch", c_int64),
        ("offset", c_int64),
        ("num_rows", c_int32),
        ("num_came", c_int32),
        ("slots", c_int32),
        ("ids", c_void_p),
        ("weights", c_void_p),
        ("stream", c_void_p),
    ]


class LayerArguments(Structure):
    """MoeLayer."""

    _fields_ = [
        ("num_tokens", c_int32),
        ("hidden_size", c_int32),
        ("intermediate_size", c_int32),
        ("num_experts", c_int32),
        ("top_k", c_int32),
        ("local_expert_offset", c_int32),
        ("num_local_experts", c_int32),
        ("stages", c_int32),
        ("gemm1_variant", c_int32),
        ("gemm2_variant", c_int32),
        ("weights", c_int32),
        ("tokens", c_int32),
        ("routing_method", c_int32),
        ("n_group", c_int32),
        ("topk_group", c_int32),
        ("num_fused_shared_experts", c_int32),
        ("routed_scaling_factor", c_float),
        ("activation", c_int32),
        ("clamp_limit", c_float),
        ("gate_first", c_int32),
        ("hidden_states_dtype", c_int32),
        ("input_scale_inverse", c_float),
        ("routing_logits_dtype", c_int32),
        ("routing_bias_dtype", c_int32),
        ("sm_count", c_int32),
        ("hidden_states_stride", c_int64),
        ("scale_token_stride", c_int64),
        ("scale_block_stride", c_int64),
        ("workspace_bytes", c_int64),
        ("routing_logits", c_void_p),
        ("routing_bias", c_void_p),
        ("topk_ids", c_void_p),
        ("topk_weights", c_void_p),
        ("hidden_states", c_void_p),
        ("messages", MoeMessages),
        ("hidden_states_scale", c_void_p),
        ("gemm1_weights", c_void_p),
        ("gemm1_weights_scale", c_void_p),
        ("gemm2_weights", c_void_p),
        ("gemm2_weights_scale", c_void_p),
        ("gemm1_scale", c_void_p),
        ("gemm1_bias", c_void_p),
        ("alpha", c_void_p),
        ("beta", c_void_p),
        ("clamp", c_void_p),
        ("activation_multiplier", c_void_p),
        ("gemm2_scale", c_void_p),
        ("gemm2_bias", c_void_p),
        ("output", c_void_p),
        ("workspace", c_void_p),
        ("stream", c_void_p),
    ]


class WorkspaceLayout(Structure):
    """MoeWorkspace: byte offsets of the regions of a workspace."""

    _fields_ = [
        ("topk_ids", c_int64),
        ("topk_weights", c_int64),
        ("expert_offsets", c_int64),
        ("permuted_row", c_int64),
        ("row_origins", c_int64),
        ("rows", c_int64),
        ("row_scales", c_int64),
        ("gemm1_output", c_int64),
        ("activation", c_int64),
        ("activation_scales", c_int64),
        ("gemm2_output", c_int64),
        ("metadata", c_int64),
        ("gemm_workspace", c_int64),
        ("total_bytes", c_int64),
    ]


@dataclass(frozen=True)
class KernelVariant:
    """One compiled grouped-GEMM kernel.

    index: its place in the library, which native calls select it by. tile: (M, N, K) and cluster: (M, N) of the GEMM
    as CUTLASS sees it; with swap_ab, M counts weight rows and N tokens. swiglu: serves as gemm1 only, and leaves
    activations as gemm2 reads them; its weight rows count gate and up. weights: how those lie that it reads.
    """

    index: int
    name: str
    tile: tuple[int, int, int]
    cluster: tuple[int, int]
    swap_ab: bool
    stages: int
    shared_memory_bytes: int
    swiglu: bool
    weights: WeightLayout = WeightLayout.FP8_BLOCK
    gathers: bool = False
    combines: bool = False

    @property
    def stores_rows(self) -> bool:
        """Whether it leaves the GEMM's own bf16 result, and so serves as gemm1 or gemm2."""
        return not (self.swiglu or self.combines)

    @property
    def token_tile(self) -> int:
        """Tokens of one output tile: groups are padded to a multiple of it."""
        return self.tile[1] if self.swap_ab else self.tile[0]

    @property
    def halves(self) -> bool:
        """Whether it computes tiles of at most half of token_tile rows in half the time, and splits its last tiles."""
        return not self.swap_ab and "_direct_" in self.name and self.token_tile == 128

    @property
    def weight_tile(self) -> int:
        """Rows of weights of one output tile."""
        return self.tile[0] if self.swap_ab else self.tile[1]

    @property
    def weight_rows(self) -> int:
        """Rows of weights that a cluster takes at a time, which must divide N."""
        return self.weight_tile * self.cluster[0 if self.swap_ab else 1]


class KernelLibrary:
    """A loaded library: its variants and its layer call. Raises Unsupported when it does not fit this moe_runtime."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            handle = ctypes.CDLL(str(path))
        except OSError as error:
            raise Unsupported(f"{path} cannot be loaded: {error}. {_BUILD_HINT}") from error
        handle.moe_abi_version.restype = c_int32
        version = handle.moe_abi_version()
        if version != ABI_VERSION:
            raise Unsupported(f"{path} has ABI version {version}, this moe_runtime needs {ABI_VERSION}. {_BUILD_HINT}")
        handle.moe_library_hash.restype = c_char_p
        handle.moe_variant.restype = POINTER(VariantRecord)
        handle.moe_variant.argtypes = [c_int32]
        handle.moe_error_string.restype = c_char_p
        handle.moe_error_string.argtypes = [c_int32]
        self.layer = handle.moe_layer
        self.layer.restype = c_int32
        # Takes the struct itself, whose address ctypes passes on: with byref() the call would take twice as long.
        self.layer.argtypes = [POINTER(LayerArguments)]
        self.unpack = handle.moe_unpack
        self.unpack.restype = c_int32
        self.unpack.argtypes = [POINTER(MoeUnpack)]
        self._workspace = handle.moe_layer_workspace
        self._workspace.argtypes = [POINTER(LayerArguments), POINTER(WorkspaceLayout)]
        self._handle = handle
        self.hash: str = handle.moe_library_hash().decode()
        self.variants = {variant.name: variant for variant in self._read_variants()}

    def _read_variants(self) -> list[KernelVariant]:
        variants = []
        for index in range(self._handle.moe_variant_count()):
            record = self._handle.moe_variant(index).contents
            name = record.name.decode()
            if record.check_abi() != 0:
                raise Unsupported(f"{self.path}: {name} disagrees with the library's own headers. {_BUILD_HINT}")
            variants.append(
                KernelVariant(
                    index,
                    name,
                    (record.tile_m, record.tile_n, record.tile_k),
                    (record.cluster_m, record.cluster_n),
                    bool(record.swap_ab),
                    record.stages,
                    record.shared_memory_bytes,
                    bool(record.swiglu),
                    WeightLayout(record.weights),
                    bool(record.gathers),
                    bool(record.combines),
                )
            )
        return variants

    def workspace_layout(self, arguments: LayerArguments) -> WorkspaceLayout | None:
        """Where the regions of a call's workspace lie; None when no kernel implements the shape."""
        layout = WorkspaceLayout()
        return None if self._workspace(arguments, layout) else layout

    def error_string(self, code: int) -> str:
        return self._handle.moe_error_string(code).decode()


_BUILD_HINT = "Build it again: `python -m codegen build --arch ARCH` (installed: `python -m moe_runtime.codegen ...`)."


def library_path(arch: str) -> Path | None:
    """The library of an arch such as sm_90a: MOE_RUNTIME_LIBRARY, else the installed one, else the source tree's."""
    override = os.environ.get(LIBRARY_VARIABLE)
    if override:
        return Path(override)
    name = f"libmoe_runtime_{arch}.so"
    for folder in (_PACKAGE / "lib", _PACKAGE.parent / "generated" / arch):
        if (folder / name).is_file():
            return folder / name
    return None


@functools.cache
def load_library(arch: str) -> KernelLibrary:
    """Loads the library of an arch, once. Raises Unsupported when there is none or it does not fit."""
    path = library_path(arch)
    if path is None:
        raise Unsupported(f"no compiled kernels for {arch}. {_BUILD_HINT.replace('ARCH', arch)}")
    if not path.is_file():
        raise Unsupported(f"{LIBRARY_VARIABLE}={path} is not a file. Unset it or point it at a built library.")
    return KernelLibrary(path)
