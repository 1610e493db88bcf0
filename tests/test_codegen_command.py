"""`python -m codegen`: listing and building the catalogue, and which architectures it means."""

import json
import os
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

from codegen import __main__ as command_line
from codegen.__main__ import app
from codegen.arch import ARCHES, ARCHS_VARIABLE, find_arch, parse_archs, wanted_archs
from codegen.catalogue import CATALOGUE, default_entries, select
from codegen.errors import BuildError


def run(*arguments: str):
    return CliRunner().invoke(app, arguments)


def test_list_json():
    result = run("list", "--json")
    listed = json.loads(result.stdout)
    assert [variant["name"] for variant in listed] == [item.variant.name for item in CATALOGUE]
    swapped = next(v for v in listed if v["tile"] == [256, 64, 128] and v["family"] == "collective")
    assert swapped == {
        "name": "sm90a_fp8_block_256x64x128_1x1x1_warpspecialized_cooperative_swap_ab",
        "arch": "sm_90a",
        "format": "fp8_block",
        "family": "collective",
        "tile": [256, 64, 128],
        "cluster": [1, 1, 1],
        "schedule": "PtrArrayBlockwiseTmaWarpSpecializedCooperative",
        "swap_ab": True,
        "swiglu": False,
        "gathers": False,
        "combines": False,
        "stages": "auto",
    }
    fused = next(v for v in listed if v["swiglu"] and v["tile"] == [256, 16, 128])
    assert (fused["family"], fused["swap_ab"], fused["name"].endswith("_swap_ab_swiglu")) == ("direct", True, True)


@pytest.mark.parametrize(
    ("arguments", "count"),
    [(("--arch", "sm_90a"), 111), (("--format", "nvfp4"), 23), (("--arch", "sm_100a", "--format", "fp8_block"), 5)],
)
def test_list_filters(arguments, count):
    assert len(json.loads(run("list", "--json", *arguments).stdout)) == count


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ((), default_entries("sm_90a")),
        (("--yardsticks",), select("sm_90a")),
        (("--only", "128x96x128*swap_ab"), select("sm_90a", only="128x96x128*swap_ab")),
    ],
    ids=["default", "yardsticks", "a yardstick by name"],
)
def test_build_chooses_its_variants(monkeypatch, tmp_path, options, expected):
    asked = []

    def note(arch, entries, out, **_):
        asked.append((arch.name, entries, out))
        return SimpleNamespace(library=None)

    monkeypatch.setattr(command_line, "build_arch", note)
    assert run("build", "--arch", "sm_90a", "--out", str(tmp_path), *options).exit_code == 0
    assert asked == [("sm_90a", expected, tmp_path)] and expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("list", "--arch", "sm_80"), "arch: got 'sm_80'; accepted: sm_90a, sm_100a, sm_120a"),
        (("list", "--format", "int3"), "format 'int3'"),
        (("build", "--arch", "sm_90a", "--only", "nothing"), "only 'nothing'"),
    ],
)
def test_wrong_arguments_are_named(arguments, message):
    error = run(*arguments).exception
    assert isinstance(error, BuildError)
    assert message in str(error)


@pytest.mark.parametrize("text", ["sm_90a", "90a", "9.0", " sm_90a; 90a,"])
def test_arch_spellings(text):
    assert parse_archs(text) == (ARCHES["sm_90a"],)


def test_arch_lists(monkeypatch):
    assert parse_archs("90a;sm_100a") == (ARCHES["sm_90a"], ARCHES["sm_100a"])
    assert find_arch("12.0").gencode == "-gencode=arch=compute_120a,code=sm_120a"
    monkeypatch.setenv(ARCHS_VARIABLE, "")
    assert wanted_archs() == ()


def test_archs_of_the_gpus_present(tmp_path, monkeypatch):
    smi = tmp_path / "nvidia-smi"
    smi.write_text("#!/bin/sh\nprintf '9.0\\n9.0\\n8.0\\n'\n")
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.delenv(ARCHS_VARIABLE, raising=False)
    assert wanted_archs() == (ARCHES["sm_90a"],)
