"""Models of transformers whose experts run on the compiled kernels, against transformers' own experts."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from transformers import AutoModelForCausalLM, FineGrainedFP8Config

from moe_runtime.formats import fp8_block
from moe_runtime.integrations import transformers as integration
from moe_runtime.reference import relative_error
from tests.transformers_models import (
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

# As on the CPU, with a GEMM2 that adds up a token's experts in bf16 and in no fixed order.
BF16_BOUND = 2e-2
FP8_BOUND = 8e-2
SIZES = {"hidden": 256, "inter": 128}


@pytest.fixture(autouse=True)
def registered() -> None:
    integration.register()


def gpu_model(name: str, fp8: bool = False) -> Any:
    model = make_model(name, **SIZES, device="cuda")
    if fp8:
        to_fp8(model)
    return model


def dequantised(name: str, quantised: Any) -> Any:
    plain = gpu_model(name)
    for own, module in zip(experts_of(plain), experts_of(quantised), strict=True):
        for projection in ("gate_up_proj", "down_proj"):
            values, scale = getattr(module, projection), getattr(module, f"{projection}_scale_inv")
            getattr(own, projection).copy_(fp8_block.dequantise_blocks(values, scale))
    return plain


@pytest.mark.parametrize("shape", [(1, 1), (2, 11), (4, 300)], ids=str)
@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_bf16_logits(name: str, shape: tuple[int, int]) -> None:
    model, ids = gpu_model(name), prompts("cuda", shape)
    logits = model(ids).logits
    assert typical_error(logits, stock_logits(model, ids)) <= BF16_BOUND
    assert [layer.executor.name for layer in layers_of(model)] == ["cuda"] * len(list(experts_of(model)))


# One token alone may choose other experts in the second layer than the stock model's; half of several do not.
@pytest.mark.parametrize("shape", [(7, 1), (2, 11), (4, 300)], ids=str)
@pytest.mark.parametrize("name", ["qwen3-moe", "deepseek-v3", "mixtral"])
@torch.no_grad()
def test_fp8_logits(name: str, shape: tuple[int, int]) -> None:
    model, ids = gpu_model(name, fp8=True), prompts("cuda", shape)
    assert typical_error(model(ids).logits, stock_logits(dequantised(name, model), ids)) <= FP8_BOUND


@pytest.mark.parametrize("name", MODELS)
def test_generate(name: str) -> None:
    model, ids = gpu_model(name), prompts("cuda")
    tokens = model.generate(ids, max_new_tokens=6, do_sample=False)
    assert tokens.shape == (2, ids.shape[1] + 6) and torch.equal(tokens[:, : ids.shape[1]], ids)
    assert tokens.min() >= 0 and tokens.max() < VOCABULARY


@torch.no_grad()
def test_fp8_checkpoint_saved_and_loaded(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")  # without it transformers loads no quantised checkpoint
    make_model("qwen3-moe", **SIZES).save_pretrained(tmp_path / "bf16")
    settings = {"dtype": "bfloat16", "experts_implementation": "moe_runtime", "device_map": "cuda"}
    config = FineGrainedFP8Config(modules_to_not_convert=NO_LINEAR_LAYER)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "bf16", quantization_config=config, **settings).eval()
    ids = prompts("cuda")
    logits = model(ids).logits
    assert [layer.problem.config.format for layer in layers_of(model)] == ["fp8_block"] * 2
    assert typical_error(logits, stock_logits(dequantised("qwen3-moe", model), ids)) <= FP8_BOUND
    model.save_pretrained(tmp_path / "fp8")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "fp8", **settings).eval()
    assert typical_error(again(ids).logits, logits) <= BF16_BOUND
    for own, loaded in zip(experts_of(model), experts_of(again), strict=True):
        assert torch.equal(own.gate_up_proj.view(torch.uint8), loaded.gate_up_proj.view(torch.uint8))


@pytest.mark.parametrize("format", ["bf16", "fp8_block"])
@torch.no_grad()
def test_parameters_let_go_are_freed(format: str) -> None:
    integration.register(format=format, keep_parameters=False)
    model, ids = gpu_model("mixtral"), prompts("cuda")
    expected = stock_logits(model, ids)
    weights = sum(p.nbytes for module in experts_of(model) for p in module.parameters())
    gc.collect()
    before = torch.cuda.memory_allocated()
    logits = model(ids).logits
    gc.collect()
    grown = torch.cuda.memory_allocated() - before - logits.nbytes
    assert grown <= (0.1 if format == "bf16" else -0.4) * weights
    assert typical_error(logits, expected) <= (BF16_BOUND if format == "bf16" else 2 * FP8_BOUND)


@pytest.mark.parametrize("fp8", [False, True], ids=["bf16", "fp8"])
@torch.no_grad()
def test_ids_of_other_ranks_add_nothing(fp8: bool) -> None:
    module = next(experts_of(gpu_model("mixtral", fp8)))
    module._is_expert_parallel = True
    x = torch.randn(5, SIZES["hidden"], device="cuda", dtype=torch.bfloat16)
    weights = torch.full((5, 2), 0.5, device="cuda")
    ids = torch.tensor([[0, 8], [8, 1], [8, 8], [2, 3], [7, 8]], device="cuda")
    output = module(x, ids, weights.masked_fill(ids == 8, 0))
    alone = module(x, ids.masked_fill(ids == 8, 0), weights.masked_fill(ids == 8, 0))
    assert output.isfinite().all() and not output[2].any()
    assert relative_error(output, alone) <= 1e-2


@pytest.mark.parametrize("fp8", [False, True], ids=["bf16", "fp8"])
@torch.no_grad()
def test_captured_in_a_cuda_graph(fp8: bool) -> None:
    block = gpu_model("qwen3-moe", fp8).model.layers[0].mlp
    x = torch.randn(1, 7, SIZES["hidden"], device="cuda", dtype=torch.bfloat16)
    block(x)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = block(x)
    x.copy_(torch.randn_like(x))
    graph.replay()
    assert relative_error(captured, block(x)) <= 1e-2


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
@torch.no_grad()
def test_compiled_block(mode: str) -> None:
    block = gpu_model("qwen3-moe").model.layers[0].mlp
    x = torch.randn(1, 7, SIZES["hidden"], device="cuda", dtype=torch.bfloat16)
    expected = block(x)
    torch._dynamo.reset()
    compiled = torch.compile(block, fullgraph=True, mode=mode)
    for _ in range(4):
        found = compiled(x).clone()
    assert relative_error(found, expected) <= 1e-2
