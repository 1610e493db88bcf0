"""Checkpoints in the names and layouts in which they are published, written small and read back."""

from __future__ import annotations

import dataclasses
import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import save_file
from torch import Tensor

from moe_runtime import FP8BlockWeights, FusedMoE, InvalidArgument, MoEConfig, PackedWeights, Parallel, load_experts
from moe_runtime.formats import FORMATS, Weights, fp8_block
from moe_runtime.formats.weights import dequantise_weights, quantise_weights
from tests import reference
from tests.test_format_layers import make_config, make_inputs, share

LAYER = 3
PREFIX = f"model.layers.{LAYER}.mlp.experts."
LAYOUTS = [("ep1", 0), ("ep2", 1), ("tp5", 0), ("tp5", 3), ("ep2tp5", 7)]


def with_weights(*encodings: Weights) -> list[str]:
    return [name for name, format in FORMATS.items() if format.weights in encodings]


def projections(weights: PackedWeights) -> dict[str, tuple[Tensor, Tensor | None]]:
    """(values, scale) of {expert}.{projection}."""
    found = {}
    for expert in range(len(weights.down)):
        gate, up = weights.gate_up[expert].chunk(2)
        scales: tuple[Tensor | None, ...] = (None, None)
        if weights.gate_up_scale is not None:
            raw = weights.gate_up_scale.view(torch.uint8)[expert].chunk(2)
            scales = tuple(each.view(weights.gate_up_scale.dtype).contiguous() for each in raw)
        found[f"{expert}.gate_proj"] = (gate.contiguous(), scales[0])
        found[f"{expert}.up_proj"] = (up.contiguous(), scales[1])
        down_scale = None if weights.down_scale is None else weights.down_scale.view(torch.uint8)[expert]
        down = None if down_scale is None else down_scale.view(weights.down_scale.dtype).contiguous()  # type: ignore[union-attr]
        found[f"{expert}.down_proj"] = (weights.down[expert].contiguous(), down)
    return found


def as_nvfp4(weights: PackedWeights, naming: str) -> dict[str, Tensor]:
    """With input scales of 0.5 and of 0.25 for activations, and for expert 7 of twice as much."""
    tensors = {}
    for name, (values, factors) in projections(weights).items():
        expert, is_down = int(name.split(".")[0]), name.endswith("down_proj")
        all_scales = weights.down_global if is_down else weights.gate_up_global
        assert all_scales is not None and factors is not None
        scale, input_scale = (
            all_scales[expert].clone(),
            torch.tensor((0.25 if is_down else 0.5) * (2 if expert == 7 else 1)),
        )
        base = f"{PREFIX}{name}"
        tensors[f"{base}.weight_scale"] = factors
        if naming == "modelopt":
            tensors |= {f"{base}.weight": values, f"{base}.weight_scale_2": scale, f"{base}.input_scale": input_scale}
        else:
            tensors |= {
                f"{base}.weight_packed": values,
                f"{base}.weight_global_scale": 1 / scale[None],
                f"{base}.input_global_scale": 1 / input_scale[None],
            }
    return tensors


def as_gpt_oss(weights: PackedWeights) -> dict[str, Tensor]:
    def turns(rows: Tensor) -> Tensor:
        gate, up = rows.chunk(2, 1)
        return torch.stack([gate, up], 2).flatten(1, 2)

    assert weights.gate_up_scale is not None and weights.down_scale is not None
    assert weights.gate_up_bias is not None and weights.down_bias is not None
    return {
        f"{PREFIX}gate_up_proj_blocks": turns(weights.gate_up).unflatten(-1, (-1, 16)).contiguous(),
        f"{PREFIX}gate_up_proj_scales": turns(weights.gate_up_scale),
        f"{PREFIX}gate_up_proj_bias": turns(weights.gate_up_bias).bfloat16(),
        f"{PREFIX}down_proj_blocks": weights.down.unflatten(-1, (-1, 16)).contiguous(),
        f"{PREFIX}down_proj_scales": weights.down_scale,
        f"{PREFIX}down_proj_bias": weights.down_bias.bfloat16(),
    }


def as_bf16(config: MoEConfig) -> dict[str, Tensor]:
    generator, tensors = torch.Generator().manual_seed(0), {}
    hidden, inter = config.hidden_size, config.intermediate_size
    for expert in range(config.num_experts):
        for name, shape in {
            "gate_proj": (inter, hidden),
            "up_proj": (inter, hidden),
            "down_proj": (hidden, inter),
        }.items():
            weight = torch.randn(shape, generator=generator) / 16
            tensors[f"{PREFIX}{expert}.{name}.weight"] = weight.bfloat16()
    return tensors


def as_deepseek(config: MoEConfig) -> dict[str, Tensor]:
    tensors = {}
    for name, weight in as_bf16(config).items():
        tensors[name], tensors[f"{name}_scale_inv"] = fp8_block.quantise_blocks(weight)
    return tensors


def write(folder: Path, tensors: dict[str, Tensor], shards: int = 1) -> Path:
    if shards == 1:
        save_file(tensors, folder / "model.safetensors")
        return folder
    names, weight_map = sorted(tensors), {}
    for shard in range(shards):
        file = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        part = {name: tensors[name] for name in names[shard::shards]}
        save_file(part, folder / file)
        weight_map |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def same(found: Any, wanted: Any, but: frozenset[str] = frozenset()) -> None:
    for field in dataclasses.fields(wanted):
        ours, theirs = getattr(found, field.name), getattr(wanted, field.name)
        if field.name in but:
            continue
        if isinstance(theirs, Tensor):
            assert ours.dtype == theirs.dtype and ours.is_contiguous(), field.name
            assert torch.equal(ours.view(torch.uint8), theirs.contiguous().view(torch.uint8)), field.name
        else:
            assert ours == theirs, field.name


@pytest.mark.parametrize(("layout", "rank"), LAYOUTS)
@pytest.mark.parametrize("naming", ["modelopt", "compressed-tensors"])
@pytest.mark.parametrize("format", with_weights(Weights.NVFP4))
def test_nvfp4(tmp_path: Path, format: str, naming: str, layout: str, rank: int) -> None:
    config, parallel = make_config(format), Parallel.parse(layout, rank)
    whole = PackedWeights.random(config, 8, seed=5)
    write(tmp_path, as_nvfp4(whole, naming))
    found = load_experts(tmp_path, LAYER, config, parallel)
    assert isinstance(found, PackedWeights)
    wanted = share(whole, config, parallel)
    scales = frozenset({"input_scale", "intermediate_scale", "gate_up_global", "down_global"})
    same(found, wanted, but=scales)
    for ours, theirs in ((found.gate_up_global, wanted.gate_up_global), (found.down_global, wanted.down_global)):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)
    # Codes of e4m3 alone reach 448, those under factors 6 * 448.
    factor = 1 if format == "nvfp4" else 6
    experts = parallel.shard(8)
    assert found.input_scale == factor * (1.0 if 7 in experts else 0.5)
    assert found.intermediate_scale.tolist() == [factor * (0.5 if expert == 7 else 0.25) for expert in experts]  # type: ignore[union-attr]


def test_nvfp4_without_calibrated_inputs(tmp_path: Path) -> None:
    config = make_config("nvfp4")
    tensors = as_nvfp4(PackedWeights.random(config, 8), "modelopt")
    write(tmp_path, {name: tensor for name, tensor in tensors.items() if "input_scale" not in name})
    found = load_experts(tmp_path, LAYER, config, Parallel("ep", 1))
    assert isinstance(found, PackedWeights)
    assert (found.input_scale, found.intermediate_scale) == (1.0, 1.0)


@pytest.mark.parametrize(("layout", "rank"), LAYOUTS)
@pytest.mark.parametrize("format", with_weights(Weights.MXFP4))
def test_gpt_oss(tmp_path: Path, format: str, layout: str, rank: int) -> None:
    config, parallel = make_config(format), Parallel.parse(layout, rank)
    whole = PackedWeights.random(config, 8, seed=5, extras=True)
    assert whole.gate_up_bias is not None and whole.down_bias is not None
    whole = dataclasses.replace(
        whole,
        gate_up_bias=whole.gate_up_bias.bfloat16().float(),
        down_bias=whole.down_bias.bfloat16().float(),
        alpha=torch.full((8,), 1.702),
        beta=torch.ones(8),
        clamp=torch.full((8,), 7.0),
        input_scale=1.0,
        intermediate_scale=1.0,
    )
    write(tmp_path, as_gpt_oss(whole))
    same(load_experts(tmp_path, LAYER, config, parallel), share(whole, config, parallel))


@pytest.mark.parametrize("format", FORMATS)
def test_bf16_to_any_format(tmp_path: Path, format: str) -> None:
    config, parallel = make_config(format), Parallel("ep", 2, 1)
    tensors = as_bf16(config)
    found = load_experts(write(tmp_path, tensors), LAYER, config, parallel)
    operands, encoding = found.operands, config.number_format.weights
    for local, expert in enumerate(range(4, 8)):
        gate, up, down = (tensors[f"{PREFIX}{expert}.{name}_proj.weight"] for name in ("gate", "up", "down"))
        for values, scale, factor, weight in (
            (operands.gate_up, operands.gate_up_scale, operands.gemm1_scale, torch.cat([gate, up])),
            (operands.down, operands.down_scale, operands.gemm2_scale, down),
        ):
            codes = quantise_weights(encoding, weight[None])
            whole = dequantise_weights(encoding, codes.values, codes.scale)[0]
            mine = dequantise_weights(encoding, values, scale)[local]
            assert torch.equal(mine, whole)
            assert factor is None or factor[local] == codes.global_scale
    x, logits = make_inputs(config)
    assert FusedMoE(config, parallel, found)(x, logits).isfinite().all()


@pytest.mark.parametrize(("layout", "rank"), [("ep1", 0), ("ep2", 1), ("ep4", 2)])
def test_deepseek(tmp_path: Path, layout: str, rank: int) -> None:
    config, parallel = make_config("fp8_block"), Parallel.parse(layout, rank)
    tensors = as_deepseek(config)
    found = load_experts(write(tmp_path, tensors), LAYER, config, parallel)
    assert isinstance(found, FP8BlockWeights) and found.gate_first
    for local, expert in enumerate(parallel.shard(8)):
        for name, values, scale in (
            ("gate_proj", found.gate_up[local, :128], found.gate_up_scale[local, :1]),
            ("up_proj", found.gate_up[local, 128:], found.gate_up_scale[local, 1:]),
            ("down_proj", found.down[local], found.down_scale[local]),
        ):
            full = f"{PREFIX}{expert}.{name}.weight"
            assert torch.equal(values.view(torch.uint8), tensors[full].view(torch.uint8))
            assert torch.equal(scale, tensors[f"{full}_scale_inv"])


CHECKPOINTS = {
    "gpt-oss": ("bf16_mxfp4", lambda config: as_gpt_oss(PackedWeights.random(config, 8, extras=True))),
    "modelopt": ("nvfp4", lambda config: as_nvfp4(PackedWeights.random(config, 8), "modelopt")),
    "compressed-tensors": ("nvfp4", lambda config: as_nvfp4(PackedWeights.random(config, 8), "compressed-tensors")),
    "deepseek": ("fp8_block", as_deepseek),
    "bf16": ("bf16", as_bf16),
}


@pytest.mark.parametrize("naming", CHECKPOINTS)
def test_shards_with_an_index(tmp_path: Path, naming: str) -> None:
    format, make = CHECKPOINTS[naming]
    config = make_config(format)
    tensors, (one, many) = make(config), (tmp_path / "one", tmp_path / "many")
    for folder, shards in ((one, 1), (many, 3)):
        folder.mkdir()
        write(folder, tensors, shards)
    found = load_experts(many, LAYER, config, Parallel("ep", 1))
    same(found, load_experts(one, LAYER, config, Parallel("ep", 1)))
    same(found, load_experts(one / "model.safetensors", LAYER, config, Parallel("ep", 1)))


@pytest.mark.parametrize("naming", [name for name in CHECKPOINTS if name != "gpt-oss"])
def test_only_the_rank_s_experts_are_read(tmp_path: Path, naming: str) -> None:
    format, make = CHECKPOINTS[naming]
    config = make_config(format)
    mine = {name: t for name, t in make(config).items() if int(name.removeprefix(PREFIX).split(".")[0]) >= 4}
    weights = load_experts(write(tmp_path, mine), LAYER, config, Parallel("ep", 2, 1))
    assert weights.operands.down.shape[0] == 4
    with pytest.raises(InvalidArgument, match=r"holds model\.layers\.3\.mlp\.experts\.0\.gate_proj\.weight"):
        load_experts(tmp_path, LAYER, config, Parallel("ep", 2, 0))


@pytest.mark.parametrize("shared", [1, 2])
@pytest.mark.parametrize(("layout", "rank"), [("ep1", 0), ("tp5", 2)])
@pytest.mark.parametrize("naming", ["modelopt", "bf16"])
def test_shared_experts_are_the_last(tmp_path: Path, naming: str, layout: str, rank: int, shared: int) -> None:
    """The same experts, the last of them written as shared ones: one behind the other along I."""
    format, make = CHECKPOINTS[naming]
    config, parallel = make_config(format), Parallel.parse(layout, rank)
    folders = (tmp_path / "routed", tmp_path / "shared")
    tensors = make(config)
    if naming == "modelopt":
        # Shared experts are one matrix, which has one scale.
        one = {name: t for name, t in tensors.items() if name.startswith(f"{PREFIX}7.") and t.ndim == 0}
        tensors |= {name.replace("experts.7.", f"experts.{8 - shared}."): t.clone() for name, t in one.items()}
    renamed = {name: t for name, t in tensors.items() if int(name.removeprefix(PREFIX).split(".")[0]) < 8 - shared}
    for name, tensor in tensors.items():
        if name.startswith(f"{PREFIX}7."):
            parts = [tensors[name.replace("experts.7.", f"experts.{expert}.")] for expert in range(8 - shared, 8)]
            along = 1 if "down_proj" in name else 0
            raw = [part.view(torch.uint8) if part.dtype == torch.float8_e4m3fn else part for part in parts]
            whole = torch.cat(raw, along).view(tensor.dtype) if tensor.ndim else tensor
            renamed[name.replace("experts.7.", "shared_experts.")] = whole
    for folder, content in zip(folders, (tensors, renamed), strict=True):
        folder.mkdir()
        write(folder, content)
    fused = dataclasses.replace(config, top_k=shared + 1, num_fused_shared_experts=shared)
    same(load_experts(folders[1], LAYER, fused, parallel), load_experts(folders[0], LAYER, config, parallel))


@pytest.mark.parametrize("naming", CHECKPOINTS)
def test_progress_and_device(tmp_path: Path, naming: str) -> None:
    format, make = CHECKPOINTS[naming]
    config, shown = make_config(format), io.StringIO()
    console = Console(file=shown, force_terminal=True, width=100)
    weights = load_experts(write(tmp_path, make(config)), LAYER, config, Parallel("ep", 1), "meta", console)
    assert weights.device.type == "meta"
    assert "layer 3" in shown.getvalue() and "100%" in shown.getvalue()


def test_a_checkpoint_serves_a_layer(tmp_path: Path) -> None:
    """gpt-oss' own arithmetic, on weights written interleaved."""
    config = make_config("bf16_mxfp4")
    weights = PackedWeights.random(config, 8, extras=True)
    found = load_experts(write(tmp_path, as_gpt_oss(weights)), LAYER, config, Parallel("ep", 1))
    assert weights.gate_up_bias is not None and weights.down_bias is not None
    direct = dataclasses.replace(
        weights,
        gate_up_bias=weights.gate_up_bias.bfloat16().float(),
        down_bias=weights.down_bias.bfloat16().float(),
        alpha=torch.full((8,), 1.702),
        beta=torch.ones(8),
        clamp=torch.full((8,), 7.0),
    )
    x, logits = make_inputs(config)
    layers = [FusedMoE(config, Parallel("ep", 1), each)(x, logits) for each in (found, direct)]
    assert reference.relative_error(*layers) == 0
