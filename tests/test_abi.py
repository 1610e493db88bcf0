"""The ctypes mirror against templates/abi.h, field by field."""

from __future__ import annotations

import ctypes
import enum
import re
from pathlib import Path

import pytest

from codegen.build import LibraryVariant
from moe_runtime import formats, kernels
from moe_runtime.config import RoutingMethod
from tests.gpu import grouped_gemm

HEADER = (Path(__file__).parent.parent / "templates" / "abi.h").read_text()
CODE = re.sub(r"//[^\n]*", "", HEADER)
SCALARS = {"int32_t": ctypes.c_int32, "int64_t": ctypes.c_int64, "float": ctypes.c_float}


def fields_of(name: str) -> list[tuple[str, object]]:
    """(field, its ctypes type) of a struct in the header; any pointer is "pointer", a struct is its name."""
    found = re.search(rf"typedef struct {name} \{{(.*?)\}} {name};", CODE, re.DOTALL)
    assert found, f"{name} is not in abi.h"
    fields: list[tuple[str, object]] = []
    for declaration in filter(None, (part.strip() for part in found[1].split(";"))):
        if function := re.match(r"\w+ \(\*(\w+)\)", declaration):
            fields.append((function[1], "pointer"))
        elif "*" in declaration:
            fields += [(name, "pointer") for name in re.findall(r"\*\s*(\w+)", declaration)]
        else:
            kind, names = declaration.split(None, 1)
            fields += [(field.strip(), SCALARS.get(kind, kind)) for field in names.split(",")]
    return fields


def mirrored(structure: type[ctypes.Structure]) -> list[tuple[str, object]]:
    scalars = tuple(SCALARS.values())

    def told(kind: type) -> object:
        return kind.__name__ if issubclass(kind, ctypes.Structure) else kind if kind in scalars else "pointer"

    return [(name, told(kind)) for name, kind, *_ in structure._fields_]


@pytest.mark.parametrize(
    ("name", "structure"),
    [
        ("MoeLayer", kernels.LayerArguments),
        ("MoeMessages", kernels.MoeMessages),
        ("MoeUnpack", kernels.MoeUnpack),
        ("MoeWorkspace", kernels.WorkspaceLayout),
        ("MoeVariant", kernels.VariantRecord),
        ("MoeVariant", LibraryVariant),
        ("MoeGemmOperands", grouped_gemm.MoeGemmOperands),
        ("MoeGroupMetadata", grouped_gemm.MoeGroupMetadata),
        ("MoeGroupedGemm", grouped_gemm.MoeGroupedGemm),
    ],
)
def test_structs_match_the_header(name: str, structure: type[ctypes.Structure]) -> None:
    assert mirrored(structure) == fields_of(name)


def test_the_parser_sees_every_kind_of_field() -> None:
    fields = dict(fields_of("MoeVariant"))
    assert fields["name"] == "pointer" and fields["run"] == "pointer" and fields["cluster_n"] is ctypes.c_int32


def test_what_a_source_may_leave_out_is_last() -> None:
    """A source that ends before, such as those of Blackwell, leaves 0: a plain GEMM, fp8_block weights."""
    optional = ["swiglu", "weights", "gathers", "combines"]
    assert fields_of("MoeVariant")[-4:] == [(name, ctypes.c_int32) for name in optional]
    assert kernels.VariantRecord.swiglu.offset == LibraryVariant.swiglu.offset > LibraryVariant.check_abi.offset


def constants(prefix: str) -> dict[str, int]:
    """Names, without the prefix, and values of an enum in the header."""
    return {name: int(value) for name, value in re.findall(rf"\b{prefix}_(\w+) = (\d+)", CODE)}


@pytest.mark.parametrize(
    ("prefix", "mirror"),
    [
        ("MOE_STAGE", kernels.Stage),
        ("MOE_WEIGHTS", formats.WeightLayout),
        ("MOE_TOKENS", formats.Tokens),
        ("MOE_ACTIVATION", kernels.Activation),
    ],
)
def test_enums_match_the_header(prefix: str, mirror: type[enum.IntEnum]) -> None:
    assert {member.name: member.value for member in mirror} == constants(prefix)


def test_routing_methods_match_the_header() -> None:
    in_header = {name.replace("_", "").lower(): value for name, value in constants("MOE_ROUTING").items()}
    assert {method.name.lower(): method.value for method in RoutingMethod} == in_header


def test_dtypes_and_version_match_the_header() -> None:
    dtypes = {name: getattr(kernels, f"DTYPE_{name}") for name in ("BF16", "F32", "E4M3", "E2M1")}
    assert constants("MOE_DTYPE") == dtypes
    assert f"#define MOE_ABI_VERSION {kernels.ABI_VERSION}\n" in HEADER
