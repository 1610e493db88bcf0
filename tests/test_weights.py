from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from moe_runtime.config import MoEConfig
from moe_runtime.errors import InvalidArgument
from moe_runtime.formats import fp8_block
from moe_runtime.parallel import Parallel
from moe_runtime.weights import FP8BlockWeights
from tests import reference

CONFIG = MoEConfig("small", 256, 128, 8, 2)
SECOND_HALF = Parallel("ep", 2, 1)
PROJECTIONS = {"gate_proj": (128, 256), "up_proj": (128, 256), "down_proj": (256, 128)}


def test_random_is_finite_and_repeatable() -> None:
    weights = FP8BlockWeights.random(CONFIG, 4, seed=3)
    weights.check(CONFIG, 4)
    assert weights.gate_up.float().isfinite().all()
    assert len(weights.gate_up.view(torch.uint8).unique()) == 254
    again = FP8BlockWeights.random(CONFIG, 4, seed=3)
    other = FP8BlockWeights.random(CONFIG, 4, seed=4)
    assert torch.equal(again.down.view(torch.uint8), weights.down.view(torch.uint8))
    assert torch.equal(again.down_scale, weights.down_scale)
    assert not torch.equal(other.down.view(torch.uint8), weights.down.view(torch.uint8))


def test_random_keeps_the_variance_of_a_row() -> None:
    weights = FP8BlockWeights.random(CONFIG, 4, seed=0)
    x = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
    out = x @ fp8_block.dequantise_blocks(weights.gate_up[0], weights.gate_up_scale[0]).T
    assert 0.5 < out.std() < 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_quantise_bf16(dtype: torch.dtype) -> None:
    gate_up, down = torch.randn(3, 256, 256).to(dtype), torch.randn(3, 256, 128).to(dtype)
    weights = FP8BlockWeights.quantise_bf16(gate_up, down)
    weights.check(CONFIG, 3)
    back = fp8_block.dequantise_blocks(weights.gate_up, weights.gate_up_scale)
    assert reference.relative_error(back, gate_up) < 0.03
    assert reference.relative_error(fp8_block.dequantise_blocks(weights.down, weights.down_scale), down) < 0.03


def test_quantise_rejects_other_types() -> None:
    with pytest.raises(InvalidArgument, match=r"down: got torch.float16"):
        FP8BlockWeights.quantise_bf16(torch.zeros(1, 256, 256), torch.zeros(1, 256, 128, dtype=torch.float16))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("gate_up", torch.zeros(4, 256, 256)),
        ("gate_up", torch.zeros(4, 128, 256, dtype=torch.float8_e4m3fn)),
        ("gate_up_scale", torch.zeros(4, 1, 2)),
        ("down", torch.zeros(4, 128, 256, dtype=torch.float8_e4m3fn).mT),
        ("down", torch.zeros(5, 256, 128, dtype=torch.float8_e4m3fn)),
        ("down_scale", torch.zeros(4, 2, 1, dtype=torch.float64)),
        ("down_scale", torch.zeros(4, 2, 1, device="meta")),
    ],
)
def test_check_names_the_tensor(field: str, value: torch.Tensor) -> None:
    weights = dataclasses.replace(FP8BlockWeights.random(CONFIG, 4), **{field: value})
    with pytest.raises(InvalidArgument) as error:
        weights.check(CONFIG, 4)
    assert error.value.argument == field


def test_to_moves_every_tensor() -> None:
    weights = dataclasses.replace(FP8BlockWeights.random(CONFIG, 2), gate_first=False)
    moved = weights.to("meta")
    moved.check(CONFIG, 2)
    assert moved.device.type == "meta" and moved.gate_first is False


def checkpoint(experts: Iterator[int] | range, dtype: torch.dtype, layer: int = 3) -> dict[str, torch.Tensor]:
    """Tensors of a checkpoint under DeepSeek's names; every one differs from every other."""
    tensors = {}
    for expert in experts:
        for number, (projection, shape) in enumerate(PROJECTIONS.items()):
            name = f"model.layers.{layer}.mlp.experts.{expert}.{projection}.weight"
            w = torch.randn(shape, generator=torch.Generator().manual_seed(10 * expert + number))
            if dtype == torch.bfloat16:
                tensors[name] = w.bfloat16()
            else:
                tensors[name], tensors[f"{name}_scale_inv"] = fp8_block.quantise_blocks(w)
    return tensors


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.bfloat16])
@pytest.mark.parametrize("layout", ["file", "folder", "index"])
def test_from_safetensors(tmp_path: Path, layout: str, dtype: torch.dtype) -> None:
    # Only this rank's experts are there, so reading any other would fail.
    tensors = checkpoint(range(4, 8), dtype)
    path = tmp_path / "model.safetensors"
    if layout == "index":
        names = sorted(tensors)
        parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
        for file, part in parts.items():
            save_file({name: tensors[name] for name in part}, tmp_path / file)
        weight_map = {name: file for file, part in parts.items() for name in part}
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    else:
        save_file(tensors, path)
    weights = FP8BlockWeights.from_safetensors(path if layout == "file" else tmp_path, 3, CONFIG, SECOND_HALF)
    weights.check(CONFIG, 4)
    assert weights.gate_first
    for local, expert in enumerate(range(4, 8)):
        for projection, values, scale in (
            ("gate_proj", weights.gate_up[local, :128], weights.gate_up_scale[local, :1]),
            ("up_proj", weights.gate_up[local, 128:], weights.gate_up_scale[local, 1:]),
            ("down_proj", weights.down[local], weights.down_scale[local]),
        ):
            name = f"model.layers.3.mlp.experts.{expert}.{projection}.weight"
            if dtype == torch.bfloat16:
                expected, expected_scale = fp8_block.quantise_blocks(tensors[name])
            else:
                expected, expected_scale = tensors[name], tensors[f"{name}_scale_inv"]
            assert torch.equal(values.view(torch.uint8), expected.view(torch.uint8))
            assert torch.equal(scale, expected_scale)


def test_from_safetensors_says_what_is_missing(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"

    def read(where: Path = path, layer: int = 3) -> None:
        FP8BlockWeights.from_safetensors(where, layer, CONFIG, SECOND_HALF)

    with pytest.raises(InvalidArgument, match=r"path: got .*model.safetensors"):
        read()
    with pytest.raises(InvalidArgument, match=r"path: got .* with 0 of them"):
        read(tmp_path)
    path.write_bytes(b"not a checkpoint")
    with pytest.raises(InvalidArgument, match=r"a readable .safetensors file"):
        read()
    tensors = checkpoint(range(4, 8), torch.float8_e4m3fn)
    save_file(tensors, path)
    with pytest.raises(InvalidArgument, match=r"holds model.layers.2.mlp.experts.4.gate_proj.weight"):
        read(layer=2)
    scale = "model.layers.3.mlp.experts.5.up_proj.weight_scale_inv"
    save_file({**tensors, scale: torch.ones(2, 2)}, path)
    with pytest.raises(InvalidArgument, match=rf"{scale}: got shape \[2, 2\]"):
        read()
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {}}))
    with pytest.raises(InvalidArgument, match="an index that lists"):
        read(tmp_path)
