"""What a kernel is: one frozen record, named in CUTLASS' own terms."""

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

ELEMENT_INPUT = {"fp8_block": DataType.e4m3, "nvfp4": DataType.e2m1}
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
    element_input: str
    element_output: str
    kernel_schedule: str
    epilogue_schedule: str


@dataclass(frozen=True)
class Variant:
    """One grouped GEMM kernel. `swap_ab`: the weights are operand A, so the token tile is `tile.n`.

    `family`: one of CUTLASS' collectives, or a kernel of our own (templates/direct). `swiglu`: the epilogue applies the
    activation and quantises, so the kernel serves as GEMM1 only and its weight tile counts rows of gate and up alike.
    """

    arch: str
    format: str
    tile: Shape
    schedule: KernelScheduleType
    epilogue_schedule: EpilogueScheduleType
    cluster: Shape = Shape(1, 1, 1)
    swap_ab: bool = False
    family: Literal["collective", "direct"] = "collective"
    stages: Literal["auto"] = "auto"
    swiglu: bool = False

    @property
    def name(self) -> str:
        """A C identifier derived from the fields: file name, symbol and identity everywhere."""
        family = () if self.family == "collective" else (self.family,)
        parts = (self.arch.replace("_", ""), self.format, *family, str(self.tile), str(self.cluster))
        options = ("_swap_ab" if self.swap_ab else "") + ("_swiglu" if self.swiglu else "")
        return "_".join(parts) + KernelScheduleSuffixes[self.schedule] + options

    @property
    def target(self) -> Arch:
        return ARCHES[self.arch]

    @property
    def template(self) -> str:
        """Path of the variant's template below templates/."""
        return f"{self.family}/{self.format}.cu.j2"

    @property
    def tags(self) -> Tags:
        return Tags(
            arch=self.target.cutlass_tag,
            element_input=DataTypeTag[ELEMENT_INPUT[self.format]],
            element_output=DataTypeTag[ELEMENT_OUTPUT],
            kernel_schedule=KernelScheduleTag[self.schedule],
            epilogue_schedule=EpilogueScheduleTag[self.epilogue_schedule],
        )

    @property
    def token_tile(self) -> int:
        return self.tile.n if self.swap_ab else self.tile.m

    @property
    def weight_tile(self) -> int:
        return self.tile.m if self.swap_ab else self.tile.n

    @property
    def instruction_n(self) -> int:
        """Columns of one wgmma: unswapped, a direct kernel takes its weight tile by scale blocks."""
        return 128 if self.family == "direct" and not self.swap_ab else self.tile.n

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
            "stages": self.stages,
        }
