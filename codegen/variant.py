"""What a kernel is: one frozen record, named in CUTLASS' own terms."""

import dataclasses
from dataclasses import dataclass
from typing import Literal

from .arch import ARCHES, Arch
from .cutlass import (
    DataType,
    DataTypeTag,
    EpilogueScheduleTag,
    EpilogueScheduleType,
    KernelScheduleSuffixes,
    KernelScheduleTag,
    KernelScheduleType,
)

Family = Literal["collective", "direct", "mixed"]

Ends = Literal["plain", "swiglu", "gather_swiglu", "combine"]

E4M3, E2M1 = DataTypeTag[DataType.e4m3], DataTypeTag[DataType.e2m1]


@dataclass(frozen=True)
class Operand:
    """An operand of a collective: its encoding as MoeTokens and MoeWeights of templates/abi.h end, and its C++ type."""

    encoding: str
    type: str


FP8_BLOCK = Operand("FP8_BLOCK", E4M3)
NVFP4 = Operand("NVFP4", f"cutlass::nv_float4_t<{E2M1}>")
MXFP8 = Operand("MXFP8", f"cutlass::mx_float8_t<{E4M3}>")
MXFP4 = Operand("MXFP4", f"cutlass::mx_float4_t<{E2M1}>")
# Tokens and weights of each format that CUTLASS' collectives multiply.
COLLECTIVE_OPERANDS = {
    "fp8_block": (FP8_BLOCK, FP8_BLOCK),
    "nvfp4": (NVFP4, NVFP4),
    "mxfp8_mxfp4": (MXFP8, MXFP4),
}
ELEMENT_OUTPUT = DataType.bf16


@dataclass(frozen=True)
class Shape:
    """Extents along the GEMM's M, N and K: elements of a tile, thread blocks of a cluster."""

    m: int
    n: int
    k: int

    def __str__(self) -> str:
        return f"{self.m}x{self.n}x{self.k}"


@dataclass(frozen=True)
class Tags:
    """C++ spellings of a variant's types, as the templates read them."""

    arch: str
    element_output: str
    kernel_schedule: str
    epilogue_schedule: str


@dataclass(frozen=True)
class Variant:
    """One grouped GEMM kernel. `swap_ab`: the weights are operand A, so the token tile is `tile.n`.

    `family`: one of CUTLASS' collectives, or a kernel of our own: templates/direct, or templates/mixed, for packed
    weights, whose encoding alone is its `format`, and bf16 tokens; of fp8_mxfp4 for mxfp4's weights and e4m3 tokens.
    `ends`: what it does beside the product. swiglu: the epilogue applies the activation and quantises, so the kernel
    serves as GEMM1 only and its weight tile counts rows of gate and up alike; gather_swiglu: it also loads tokens
    from where they came in. combine: the epilogue adds weighted rows to the tokens' output, so the kernel serves as
    GEMM2 only.
    """

    arch: str
    format: str
    tile: Shape
    schedule: KernelScheduleType
    epilogue_schedule: EpilogueScheduleType
    cluster: Shape = Shape(1, 1, 1)
    swap_ab: bool = False
    family: Family = "collective"
    stages: Literal["auto"] = "auto"
    ends: Ends = "plain"

    @property
    def name(self) -> str:
        """A C identifier derived from the fields: file name, symbol and identity everywhere."""
        family = () if self.family == "collective" else (self.family,)
        parts = (self.arch.replace("_", ""), self.format, *family, str(self.tile), str(self.cluster))
        options = ("_swap_ab" if self.swap_ab else "") + ("" if self.ends == "plain" else f"_{self.ends}")
        return "_".join(parts) + KernelScheduleSuffixes[self.schedule] + options

    @property
    def source(self) -> str:
        """Name of the source that it is generated into: kernels of one tile, which differ in their ends, share theirs.
        Headers are nine tenths of the 9 s that one takes to compile; a second and a third take a second more each."""
        return dataclasses.replace(self, ends="plain").name

    @property
    def types(self) -> str:
        """The C++ namespace of its types, which the names of its compiled functions hold."""
        return f"{self.name}_types"

    @property
    def target(self) -> Arch:
        return ARCHES[self.arch]

    @property
    def template(self) -> str:
        """Path of the variant's template below templates/."""
        if self.family == "mixed":
            return "mixed/grouped_gemm.cu.j2"
        return f"{self.family}/{'fp8_block' if self.format == 'fp8_block' else 'block_scaled'}.cu.j2"

    @property
    def tokens(self) -> Operand:
        """Of a collective; kernels of our own name their types themselves."""
        return COLLECTIVE_OPERANDS[self.format][0]

    @property
    def weights(self) -> Operand:
        return COLLECTIVE_OPERANDS[self.format][1]

    @property
    def tags(self) -> Tags:
        return Tags(
            arch=self.target.cutlass_tag,
            element_output=DataTypeTag[ELEMENT_OUTPUT],
            kernel_schedule=KernelScheduleTag[self.schedule],
            epilogue_schedule=EpilogueScheduleTag[self.epilogue_schedule],
        )

    @property
    def ends_type(self) -> str:
        """Of templates/direct/config.cuh."""
        return self.ends.title().replace("_", "")

    @property
    def swiglu(self) -> bool:
        return self.ends.endswith("swiglu")

    @property
    def gathers(self) -> bool:
        return self.ends.startswith("gather")

    @property
    def combines(self) -> bool:
        return self.ends == "combine"

    @property
    def token_tile(self) -> int:
        return self.tile.n if self.swap_ab else self.tile.m

    @property
    def weight_tile(self) -> int:
        return self.tile.m if self.swap_ab else self.tile.n

    @property
    def instruction_n(self) -> int:
        """Columns of one wgmma: unswapped, a direct kernel takes its weight tile by scale blocks; a mixed kernel of
        e4m3 tokens takes 64 at a time, whose sums are promoted while the next multiply."""
        if self.family == "direct" and not self.swap_ab:
            return 128
        return min(self.tile.n, 64) if self.format == "fp8_mxfp4" else self.tile.n

    @property
    def packed_type(self) -> str:
        """Of templates/mixed/decode.cuh."""
        return self.format.title().replace("_", "")

    @property
    def token_cluster(self) -> int:
        return self.cluster.n if self.swap_ab else self.cluster.m

    def record(self) -> dict[str, object]:
        """The variant as plain JSON values."""
        return {
            "name": self.name,
            "arch": self.arch,
            "format": self.format,
            "family": self.family,
            "tile": [self.tile.m, self.tile.n, self.tile.k],
            "cluster": [self.cluster.m, self.cluster.n, self.cluster.k],
            "schedule": self.schedule.name,
            "swap_ab": self.swap_ab,
            "swiglu": self.swiglu,
            "gathers": self.gathers,
            "combines": self.combines,
            "stages": self.stages,
        }
