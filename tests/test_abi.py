"""The ctypes mirror against templates/abi.h, field by field."""

from __future__ import annotations

import ctypes
import re
from pathlib import Path

import pytest

from codegen.build import LibraryVariant
from moe_runtime import kernels

HEADER = (Path(__file__).parent.parent / "templates" / "abi.h").read_text()
CODE = re.sub(r"//[^\n]*", "", HEADER)
SCALARS = {"int32_t": ctypes.c_int32, "int64_t": ctypes.c_int64, "float": ctypes.c_float}


def fields_of(name: str) -> list[tuple[str, object]]:
    """(field, its ctypes type) of a struct in the header; any pointer is "pointer"."""
    found = re.search(rf"typedef struct {name} \{{(.*?)\}} {name};", CODE, re.DOTALL)
    assert found, f"{name} is not in abi.h"
    fields: list[tuple[str, object]] = []
    for declaration in filter(None, (part.strip() for part in found[1].split(";"))):
        if function := re.match(r"\w+ \(\*(\w+)\)", declaration):
            fields.append((function[1], "pointer"))
        elif "*" in declaration:
            fields.append((declaration.rsplit("*", 1)[1].strip(), "pointer"))
        else:
            kind, names = declaration.split(None, 1)
            fields += [(field.strip(), SCALARS[kind]) for field in names.split(",")]
    return fields


def mirrored(structure: type[ctypes.Structure]) -> list[tuple[str, object]]:
    scalars = tuple(SCALARS.values())
    return [(name, kind if kind in scalars else "pointer") for name, kind, *_ in structure._fields_]


@pytest.mark.parametrize(
    ("name", "structure"),
    [
        ("MoeFp8BlockLayer", kernels.LayerArguments),
        ("MoeFp8BlockWorkspace", kernels.WorkspaceLayout),
        ("MoeVariant", kernels.VariantRecord),
        ("MoeVariant", LibraryVariant),
    ],
)
def test_structs_match_the_header(name: str, structure: type[ctypes.Structure]) -> None:
    assert mirrored(structure) == fields_of(name)


def test_the_parser_sees_every_kind_of_field() -> None:
    fields = dict(fields_of("MoeVariant"))
    assert fields["name"] == "pointer" and fields["run"] == "pointer" and fields["cluster_n"] is ctypes.c_int32


def test_the_activation_is_behind_what_a_variant_was() -> None:
    """A source that ends before it, such as those of Blackwell, leaves it 0."""
    assert fields_of("MoeVariant")[-1] == ("swiglu", ctypes.c_int32)
    assert kernels.VariantRecord.swiglu.offset == LibraryVariant.swiglu.offset > LibraryVariant.check_abi.offset


def test_stages_match_the_header() -> None:
    in_header = {name: int(value) for name, value in re.findall(r"MOE_STAGE_(\w+) = (\d+)", CODE)}
    assert {stage.name: stage.value for stage in kernels.Stage} == in_header


def test_dtypes_and_version_match_the_header() -> None:
    dtypes = {name: int(value) for name, value in re.findall(r"MOE_DTYPE_(\w+) = (\d+)", CODE)}
    assert dtypes == {"BF16": kernels.DTYPE_BF16, "F32": kernels.DTYPE_F32, "E4M3": kernels.DTYPE_E4M3}
    assert f"#define MOE_ABI_VERSION {kernels.ABI_VERSION}\n" in HEADER
