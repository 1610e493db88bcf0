"""Small random models of transformers, made from their configs, and experts in plain arithmetic."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)
from transformers.integrations.finegrained_fp8 import ALL_FP8_EXPERTS_FUNCTIONS, FP8Experts
from transformers.integrations.moe import use_experts_implementation

from moe_runtime.formats import fp8_block
from moe_runtime.integrations.transformers import layers
from moe_runtime.integrations.transformers.reading import Parameters

VOCABULARY = 64
# What stays in bf16 of an FP8 model, because transformers has no linear layer in FP8 without kernels that it downloads.
NO_LINEAR_LAYER = [r".*self_attn.*", "lm_head"]
# Weights of 0.02, the default, make experts that give next to nothing of a token.
_SHARED: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "initializer_range": 0.1,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
_ATTENTION = {"num_key_value_heads": 2, "head_dim": 16}


def _deepseek(hidden: int, inter: int) -> tuple[type[PreTrainedModel], Any]:
    attention = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16}
    routing = {"n_routed_experts": 8, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1, "n_shared_experts": 1}
    sizes = {"hidden_size": hidden, "intermediate_size": 64, "moe_intermediate_size": inter, "first_k_dense_replace": 1}
    return DeepseekV3ForCausalLM, DeepseekV3Config(**_SHARED | attention | routing | sizes, num_key_value_heads=4)


def _gpt_oss(hidden: int, inter: int) -> tuple[type[PreTrainedModel], Any]:
    sizes = {"hidden_size": hidden, "intermediate_size": inter, "num_local_experts": 8, "num_experts_per_tok": 2}
    return GptOssForCausalLM, GptOssConfig(**_SHARED | _ATTENTION | sizes, sliding_window=8)


def _mixtral(hidden: int, inter: int) -> tuple[type[PreTrainedModel], Any]:
    sizes = {"hidden_size": hidden, "intermediate_size": inter, "num_local_experts": 8, "num_experts_per_tok": 2}
    return MixtralForCausalLM, MixtralConfig(**_SHARED | _ATTENTION | sizes)


def _qwen3(hidden: int, inter: int) -> tuple[type[PreTrainedModel], Any]:
    sizes = {"hidden_size": hidden, "intermediate_size": 64, "moe_intermediate_size": inter}
    routing = {"num_experts": 8, "num_experts_per_tok": 2, "norm_topk_prob": True}
    return Qwen3MoeForCausalLM, Qwen3MoeConfig(**_SHARED | _ATTENTION | sizes | routing)


MODELS: dict[str, Callable[[int, int], tuple[type[PreTrainedModel], Any]]] = {
    "qwen3-moe": _qwen3,
    "deepseek-v3": _deepseek,
    "mixtral": _mixtral,
    "gpt-oss": _gpt_oss,
}


def make_model(
    name: str, hidden: int = 64, inter: int = 32, implementation: str = "moe_runtime", device: str = "cpu"
) -> Any:
    """The same weights for the same name and sizes, in bf16."""
    kind, config = MODELS[name](hidden, inter)
    config._experts_implementation = implementation
    torch.manual_seed(0)
    model = kind._from_config(config, dtype=torch.bfloat16).eval()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if "bias" in parameter_name:
                parameter.normal_(std=0.1)
    return model.to(device)


def prompts(device: str = "cpu", shape: tuple[int, int] = (2, 11)) -> Tensor:
    return torch.randint(2, VOCABULARY, shape, generator=torch.Generator().manual_seed(1)).to(device)


def experts_of(model: torch.nn.Module) -> Iterator[Any]:
    """Its experts modules: those that the decorator of transformers has been at."""
    return (module for module in model.modules() if hasattr(module, "has_gate"))


def layers_of(model: torch.nn.Module) -> list[Any]:
    """What our implementation made of the model: one for each of its experts modules that it runs."""
    made = (layers._made.get(Parameters.of(module).first) for module in experts_of(model))
    return [found.layer for found in made if found is not None]


def stock_logits(model: Any, ids: Tensor) -> Tensor:
    """The model's logits by transformers' own experts."""
    model.set_experts_implementation("grouped_mm")
    logits: Tensor = model(ids).logits
    model.set_experts_implementation("moe_runtime")
    return logits


def typical_error(logits: Tensor, expected: Tensor) -> float:
    """The median over tokens of ||logits - expected|| / ||expected||.

    Not over all at once: a token whose router nearly ties may rightly get another expert, which changes its logits.
    """
    difference = (logits.double() - expected.double()).norm(dim=-1)
    return float((difference / expected.double().norm(dim=-1)).median())


def fp8_experts(config: Any, gate_up: Tensor, down: Tensor, **settings: Any) -> Any:
    """An experts module as transformers makes it for an FP8 checkpoint, holding these weights, bf16 or f32."""
    kind = use_experts_implementation(FP8Experts, experts_interface=ALL_FP8_EXPERTS_FUNCTIONS)
    module = kind(config, block_size=(128, 128), **settings)
    with torch.no_grad():
        for name, weights in (("gate_up_proj", gate_up), ("down_proj", down)):
            values, scale = fp8_block.quantise_blocks(weights)
            getattr(module, name).copy_(values)
            getattr(module, f"{name}_scale_inv").copy_(scale)
    return module.to(gate_up.device)


def to_fp8(model: Any) -> None:
    """Quantises a model's experts, as loading an FP8 checkpoint would do on a GPU; without one transformers refuses.

    What it leaves of the bf16 weights is not needed any more.
    """
    for name, module in list(model.named_modules()):
        if hasattr(module, "has_gate"):
            model.set_submodule(name, fp8_experts(module.config, module.gate_up_proj, module.down_proj))


def reference(
    x: Tensor,
    ids: Tensor,
    weights: Tensor,
    first: Tensor,
    down: Tensor,
    gate: Callable[[Tensor], Tensor],
    first_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    norm: Callable[[Tensor], Tensor] = lambda row: row,
) -> Tensor:
    """One token and slot after the other in float64; first [E, N1, H], down [E, H, I]; other ids add nothing."""
    output = torch.zeros(x.shape, dtype=torch.float64)
    for token, slots in enumerate(ids.tolist()):
        for slot, expert in enumerate(slots):
            if not 0 <= expert < len(first):
                continue
            rows = first[expert].double() @ x[token].double()
            rows = gate(rows if first_bias is None else rows + first_bias[expert].double())
            result = down[expert].double() @ rows
            result = norm(result if down_bias is None else result + down_bias[expert].double())
            output[token] += weights[token, slot].double() * result
    return output
