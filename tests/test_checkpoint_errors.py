"""Checkpoints that cannot be read: an error that names the file, the tensor and what was expected."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from moe_runtime import InvalidArgument, Parallel, load_experts
from tests.test_checkpoints import CHECKPOINTS, LAYER, PREFIX, as_deepseek, write
from tests.test_format_layers import make_config


@pytest.mark.parametrize(
    ("naming", "format", "accepted"),
    [
        ("gpt-oss", "nvfp4", "mxfp8_mxfp4, fp8_mxfp4, bf16_mxfp4 for weights in gpt-oss MXFP4"),
        ("modelopt", "bf16_mxfp4", "nvfp4, fp8_nvfp4 for weights in ModelOpt NVFP4"),
        ("compressed-tensors", "bf16", "nvfp4, fp8_nvfp4 for weights in compressed-tensors NVFP4"),
        ("deepseek", "bf16", "fp8_block for weights in DeepSeek FP8"),
    ],
)
def test_another_format_is_refused(tmp_path: Path, naming: str, format: str, accepted: str) -> None:
    stored, make = CHECKPOINTS[naming]
    write(tmp_path, make(make_config(stored)))
    with pytest.raises(InvalidArgument, match=f"format: got '{format}'; accepted: {accepted}"):
        load_experts(tmp_path, LAYER, make_config(format), Parallel("ep", 1))


def changed(naming: str, tensor: str, change: Any) -> dict[str, Tensor]:
    format, make = CHECKPOINTS[naming]
    tensors = make(make_config(format))
    return {**tensors, PREFIX + tensor: change(tensors[PREFIX + tensor]).contiguous()}


def spoiled(factors: Tensor) -> Tensor:
    bad = factors.clone().view(torch.uint8)
    bad.view(-1)[5] = 0xFF
    return bad.view(factors.dtype)


@pytest.mark.parametrize(
    ("naming", "tensor", "change", "reason"),
    [
        ("gpt-oss", "gate_up_proj_scales", spoiled, "got the factor 0xff at .* in "),
        ("gpt-oss", "down_proj_scales", lambda t: t[..., 1:], r"got shape \[8, 96, 4\] in .*: shape \[8, 96, 5\]"),
        ("gpt-oss", "gate_up_proj_bias", lambda t: t.float(), "got F32 in .*; accepted: torch.bfloat16"),
        ("gpt-oss", "down_proj_blocks", lambda t: t.view(torch.int8), "got I8 in .*; accepted: torch.uint8"),
        ("modelopt", "2.up_proj.weight_scale", spoiled, "got the factor 0xff at .* in "),
        ("modelopt", "2.up_proj.weight_scale", lambda t: t.float(), "got F32 in .*; accepted: torch.float8_e4m3fn"),
        ("modelopt", "3.down_proj.weight", lambda t: t[:, 1:], r"got shape \[96, 79\] in .*: shape \[96, 80\]"),
        ("modelopt", "3.down_proj.weight_scale_2", lambda t: t * 0, "got 0.0; accepted: a positive number"),
        ("modelopt", "0.down_proj.input_scale", lambda t: t[None], r"got shape \[1\] in .*; accepted: shape \[\]"),
        ("compressed-tensors", "5.gate_proj.weight_packed", lambda t: t[1:], r"got shape \[159, 48\]"),
        ("compressed-tensors", "5.gate_proj.weight_global_scale", lambda t: t * torch.inf, "got inf"),
        ("deepseek", "6.down_proj.weight_scale_inv", lambda t: t.repeat(1, 2), r"got shape \[1, 2\]"),
        ("deepseek", "6.down_proj.weight", lambda t: t.bfloat16(), "got BF16 in .*; accepted: torch.float8_e4m3fn"),
        ("bf16", "6.up_proj.weight", lambda t: t.half(), "got F16 in .*; accepted: torch.bfloat16"),
        ("bf16", "0.gate_proj.weight", lambda t: t.half(), "got F16 in .*; accepted: .*bfloat16"),
    ],
)  # fmt: skip
def test_a_bad_tensor_is_named(tmp_path: Path, naming: str, tensor: str, change: Any, reason: str) -> None:
    write(tmp_path, changed(naming, tensor, change))
    with pytest.raises(InvalidArgument, match=reason) as error:
        load_experts(tmp_path, LAYER, make_config(CHECKPOINTS[naming][0]), Parallel("ep", 1))
    assert error.value.argument == PREFIX + tensor
    if " in " in reason:
        assert str(tmp_path / "model.safetensors") in str(error.value)


def test_gate_and_up_of_different_scales_are_refused(tmp_path: Path) -> None:
    write(tmp_path, changed("modelopt", "4.up_proj.weight_scale_2", lambda t: t * 2))
    with pytest.raises(InvalidArgument, match=r"experts\.4\.gate_proj: got an fp32 scale of .* beside .* of up_proj"):
        load_experts(tmp_path, LAYER, make_config("nvfp4"), Parallel("ep", 1))


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    config = make_config("fp8_block")

    def read(where: Path = tmp_path / "model.safetensors", layer: int = LAYER) -> None:
        load_experts(where, layer, config, Parallel("ep", 1))

    with pytest.raises(InvalidArgument, match=r"path: got .*model.safetensors"):
        read()
    with pytest.raises(InvalidArgument, match=r"path: got .* with 0 of them"):
        read(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"not a checkpoint")
    with pytest.raises(InvalidArgument, match=r"a readable .safetensors file"):
        read()
    tensors = as_deepseek(config)
    write(tmp_path, tensors)
    with pytest.raises(InvalidArgument, match=r"holds model.layers.2.mlp.experts.0.gate_proj.weight"):
        read(layer=2)
    del tensors[f"{PREFIX}4.up_proj.weight_scale_inv"]
    write(tmp_path, tensors)
    with pytest.raises(InvalidArgument, match=r"holds model.layers.3.mlp.experts.4.up_proj.weight_scale_inv"):
        read()
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {}}))
    with pytest.raises(InvalidArgument, match="an index that lists"):
        read(tmp_path)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    config = make_config("fp8_block")
    write(tmp_path, as_deepseek(config), shards=3)
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(
        InvalidArgument, match=r"path: got no file .*model-00002-of-00003.safetensors; accepted: the shard"
    ):
        load_experts(tmp_path, LAYER, config, Parallel("ep", 1))
