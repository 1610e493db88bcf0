"""Whole models of transformers, with their experts run by our layers, against transformers' own experts."""

from __future__ import annotations

import copy
import gc
import io
import json
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

pytest.importorskip("transformers")

from transformers import AutoModelForCausalLM, FineGrainedFP8Config, Mxfp4Config
from transformers.quantizers.quantizer_finegrained_fp8 import FineGrainedFP8HfQuantizer

from moe_runtime import InvalidArgument, Unsupported
from moe_runtime.formats import fp8_block, mxfp4
from moe_runtime.integrations import transformers as integration
from moe_runtime.integrations.transformers import layers

from .transformers_models import (
    MODELS,
    NO_LINEAR_LAYER,
    VOCABULARY,
    experts_of,
    layers_of,
    make_model,
    prompts,
    stock_logits,
    to_fp8,
    typical_error,
)

# Both arms round to bf16, by 2^-9, at each of some ten steps of two layers, but not at the same points.
BF16_BOUND = 2e-2
# e4m3 rounds by up to 2^-4: rows and activations together cost some 4 % of what an expert gives, in each of two layers.
FP8_BOUND = 8e-2


@pytest.fixture(autouse=True)
def registered() -> None:
    integration.register()


def without_experts(model: Any, ids: Tensor) -> Tensor:
    silent = copy.deepcopy(model)
    with torch.no_grad():
        for module in experts_of(silent):
            module.down_proj.zero_()
            if module.has_bias:
                module.down_proj_bias.zero_()
    return silent(ids).logits


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_logits_are_those_of_the_stock_implementation(name: str) -> None:
    model, ids = make_model(name), prompts()
    logits = model(ids).logits
    assert logits.dtype == torch.bfloat16 and logits.isfinite().all()
    assert len(layers_of(model)) == len(list(experts_of(model))) > 0
    expected = stock_logits(model, ids)
    assert typical_error(logits, expected) <= BF16_BOUND
    assert typical_error(without_experts(model, ids), expected) > 10 * BF16_BOUND


@pytest.mark.parametrize("name", MODELS)
def test_generate(name: str) -> None:
    model, ids = make_model(name), prompts()
    tokens = model.generate(ids, max_new_tokens=6, do_sample=False)
    assert tokens.shape == (2, ids.shape[1] + 6) and torch.equal(tokens[:, : ids.shape[1]], ids)
    assert tokens.min() >= 0 and tokens.max() < VOCABULARY
    assert torch.equal(model.generate(ids, max_new_tokens=6, do_sample=False), tokens)
    assert len(layers_of(model)) == len(list(experts_of(model)))
    with torch.no_grad():
        assert torch.equal(model(ids).logits[:, -1].argmax(-1), tokens[:, ids.shape[1]])


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_saved_and_loaded(name: str, tmp_path: Path) -> None:
    model, ids = make_model(name), prompts()
    keys = set(model.state_dict())
    logits = model(ids).logits
    assert set(model.state_dict()) == keys
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="bfloat16", experts_implementation="moe_runtime")
    assert again.config._experts_implementation == "moe_runtime"
    assert torch.equal(again.eval()(ids).logits, logits)
    assert len(layers_of(again)) == len(list(experts_of(again)))


@torch.no_grad()
def test_what_was_made_is_copied_pickled_and_dropped_with_the_model() -> None:
    model, ids = make_model("qwen3-moe"), prompts()
    logits, made = model(ids).logits, len(layers._made)
    twin = copy.deepcopy(model)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    unpickled = torch.load(file, weights_only=False)
    assert layers_of(twin) == layers_of(unpickled) == [] and len(layers._made) == made
    assert torch.equal(twin(ids).logits, logits) and torch.equal(unpickled(ids).logits, logits)
    kept = [weakref.ref(layer) for layer in layers_of(model)]
    assert len(kept) == 2
    del model
    gc.collect()
    assert [reference() for reference in kept] == [None, None]


@torch.no_grad()
def test_remade_when_parameters_are_written_or_replaced() -> None:
    model, ids = make_model("mixtral"), prompts()
    before = model(ids).logits
    made = layers_of(model)
    assert torch.equal(model(ids).logits, before) and layers_of(model) == made
    experts = next(experts_of(model))
    experts.gate_up_proj.mul_(0.5)
    written = model(ids).logits
    assert typical_error(written, stock_logits(model, ids)) <= BF16_BOUND and not torch.equal(written, before)
    assert layers_of(model)[0] is not made[0] and layers_of(model)[1] is made[1]
    experts.gate_up_proj = torch.nn.Parameter(experts.gate_up_proj * 2)
    assert torch.equal(model(ids).logits, before)
    other = make_model("mixtral")
    other.load_state_dict({name: value * 1.5 for name, value in model.state_dict().items()})
    changed = other(ids).logits
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(ids).logits, before) and not torch.equal(changed, before)


@pytest.mark.parametrize("name", ["qwen3-moe", "deepseek-v3", "mixtral"])
@torch.no_grad()
def test_fp8_blocks(name: str) -> None:
    model, ids = make_model(name, hidden=128, inter=128), prompts()
    to_fp8(model)
    logits = model(ids).logits
    assert [layer.problem.config.format for layer in layers_of(model)] == ["fp8_block"] * len(list(experts_of(model)))
    plain = make_model(name, hidden=128, inter=128)
    for own, quantised in zip(experts_of(plain), experts_of(model), strict=True):
        for projection in ("gate_up_proj", "down_proj"):
            values, scale = getattr(quantised, projection), getattr(quantised, f"{projection}_scale_inv")
            getattr(own, projection).copy_(fp8_block.dequantise_blocks(values, scale))
    assert typical_error(logits, stock_logits(plain, ids)) <= FP8_BOUND
    again = make_model(name, hidden=128, inter=128)
    to_fp8(again)
    again.load_state_dict(model.state_dict())
    assert torch.equal(again(ids).logits, logits)
    assert model.generate(ids, max_new_tokens=3).shape == (2, ids.shape[1] + 3)


@torch.no_grad()
def test_fp8_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Which refuses machines without a GPU for want of its own kernels.
    monkeypatch.setattr(FineGrainedFP8HfQuantizer, "validate_environment", lambda *_, **__: None)
    plain, ids = make_model("qwen3-moe", hidden=128, inter=128), prompts()
    plain.save_pretrained(tmp_path / "bf16")
    settings: dict[str, Any] = {"dtype": "bfloat16", "experts_implementation": "moe_runtime"}
    config = FineGrainedFP8Config(modules_to_not_convert=NO_LINEAR_LAYER)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "bf16", quantization_config=config, **settings).eval()
    logits = model(ids).logits
    assert [layer.problem.config.format for layer in layers_of(model)] == ["fp8_block"] * 2
    assert typical_error(logits, stock_logits(plain, ids)) <= 2 * FP8_BOUND  # e4m3 rounds the weights too
    model.save_pretrained(tmp_path / "fp8")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "fp8", **settings).eval()
    assert torch.equal(again(ids).logits, logits)
    assert next(experts_of(again)).gate_up_proj.dtype == torch.float8_e4m3fn


@torch.no_grad()
def test_fp8_weights_are_read_where_they_are() -> None:
    model = make_model("qwen3-moe", hidden=128, inter=128)
    to_fp8(model)
    model(prompts())
    for experts, layer in zip(experts_of(model), layers_of(model), strict=True):
        operands = layer.executor.prepare(layer._weights)
        assert operands.gate_up.data_ptr() == experts.gate_up_proj.data_ptr()
        assert operands.down.data_ptr() == experts.down_proj.data_ptr()


@torch.no_grad()
def test_gpt_oss_checkpoint_in_mxfp4(tmp_path: Path) -> None:
    model, ids = make_model("gpt-oss"), prompts()
    model.save_pretrained(tmp_path)
    tensors, codes = load_file(tmp_path / "model.safetensors"), {}
    for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
        packed, factors = mxfp4.quantise(tensors.pop(name).mT)
        codes[f"{name}_scales"], codes[f"{name}_blocks"] = factors, packed.unflatten(-1, (-1, 16))
    save_file(tensors | codes, tmp_path / "model.safetensors", {"format": "pt"})
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "mxfp4"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    integration.register(format="bf16_mxfp4")
    loaded = AutoModelForCausalLM.from_pretrained(
        tmp_path,
        dtype="bfloat16",
        experts_implementation="moe_runtime",
        quantization_config=Mxfp4Config(dequantize=True),
    ).eval()
    logits = loaded(ids).logits
    assert [layer.problem.config.format for layer in layers_of(loaded)] == ["bf16_mxfp4"] * 2
    assert typical_error(logits, stock_logits(loaded, ids)) <= BF16_BOUND
    # Not merely near: quantising what was dequantised changes nothing.
    for index, layer in enumerate(layers_of(loaded)):
        operands = layer.executor.prepare(layer._weights)
        name = f"model.layers.{index}.mlp.experts.down_proj"
        given = mxfp4.dequantise(codes[f"{name}_blocks"].flatten(-2), codes[f"{name}_scales"])
        assert torch.equal(mxfp4.dequantise(operands.down, operands.down_scale), given)


@torch.no_grad()
def test_parameters_let_go() -> None:
    integration.register(format="fp8_block", keep_parameters=False)
    model, ids = make_model("qwen3-moe", hidden=128, inter=128), prompts()
    kept = copy.deepcopy(model)
    logits = model(ids).logits
    assert sum(p.numel() for module in experts_of(model) for p in module.parameters()) == 0
    assert torch.equal(model(ids).logits, logits)
    assert typical_error(logits, stock_logits(kept, ids)) <= 2 * FP8_BOUND  # e4m3 rounds the weights too
    with pytest.raises(Unsupported, match=r"mlp\.experts\. cannot be saved.*keep_parameters=False"):
        model.state_dict()
    with pytest.raises(Unsupported, match="load the model again"):
        copy.deepcopy(model)(ids)
    with torch.enable_grad(), pytest.raises(Unsupported, match="gradients must pass"):
        model(ids)


@torch.no_grad()
def test_parameters_that_are_read_in_place_are_not_let_go() -> None:
    integration.register(keep_parameters=False)
    model, ids = make_model("mixtral"), prompts()
    model(ids)
    assert all(module.gate_up_proj.numel() for module in experts_of(model))
    assert typical_error(model(ids).logits, stock_logits(model, ids)) <= BF16_BOUND
    assert model.state_dict()


def test_formats_that_bf16_experts_cannot_become() -> None:
    with pytest.raises(InvalidArgument, match="format: got 'nvfp4'; accepted: 'bf16' or 'fp8_block'"):
        integration.register(format="nvfp4")
