"""Experts modules of transformers one by one: each layout, gate and format, and what is left to transformers."""

from __future__ import annotations

import inspect
import logging
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers")

from transformers.activations import ACT2FN
from transformers.integrations.finegrained_fp8 import ALL_FP8_EXPERTS_FUNCTIONS, FP8Experts
from transformers.integrations.moe import use_experts_implementation

from moe_runtime import InvalidArgument, MoEConfig, Parallel, Unsupported
from moe_runtime.executors.base import MoEProblem
from moe_runtime.formats import fp8_block, mxfp4
from moe_runtime.integrations import transformers as integration
from moe_runtime.integrations.transformers import experts as module_under_test
from moe_runtime.integrations.transformers import layers
from moe_runtime.reference import relative_error

from .test_ops import make_plan, spy_on_tactics
from .transformers_models import fp8_experts, reference

EXPERTS, HIDDEN, INTER, TOP_K = 6, 64, 32, 3
EPSILON = 1e-5  # of the norm after an expert
# Rows, activations and each expert's share are rounded to bf16, by up to 2^-9 each.
BF16_BOUND = 6e-3
E4M3_BOUND = 6e-2  # of rows and activations, each by up to 2^-4

Gate = Callable[[Tensor], Tensor]


@pytest.fixture(autouse=True)
def registered() -> None:
    integration.register()
    module_under_test._warn.cache_clear()


def silu(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-x))


def clamped(rows: Tensor, limit: float) -> tuple[Tensor, Tensor]:
    gate, up = rows.chunk(2, -1)
    return gate.clamp(max=limit), up.clamp(-limit, limit)


def swiglu(rows: Tensor, limit: float = math.inf) -> Tensor:
    gate, up = clamped(rows, limit)
    return silu(gate) * up


def of_gpt_oss(rows: Tensor, alpha: float = 1.702, limit: float = 7.0) -> Tensor:
    gate, up = clamped(rows, limit)
    return gate * torch.sigmoid(alpha * gate) * (up + 1)


def clamped_after_silu(rows: Tensor) -> Tensor:
    gate, up = rows.chunk(2, -1)
    return silu(gate).clamp(max=0.5) * up.clamp(-0.5, 0.5)


def make_experts(
    gate: Gate | None = None,
    *,
    transposed: bool = False,
    interleaved: bool = False,
    bias: bool = False,
    gated: bool = True,
    norm: bool = False,
    act: str = "silu",
    hidden: int = HIDDEN,
    inter: int = INTER,
    dtype: torch.dtype = torch.bfloat16,
    **constants: float | None,
) -> Any:
    """An experts module with the decorator of transformers, as models have them. gate: of rows [gate; up]."""

    class SomeExperts(torch.nn.Module):
        def __init__(self, config: Any) -> None:
            super().__init__()
            self.num_experts, self.act_fn = EXPERTS, ACT2FN[act]
            first = "gate_up_proj" if gated else "up_proj"
            rows = 2 * inter if gated else inter
            for name, shape in ((first, (rows, hidden)), ("down_proj", (hidden, inter))):
                matrix = torch.randn(EXPERTS, *(reversed(shape) if transposed else shape)) / math.sqrt(shape[1])
                setattr(self, name, torch.nn.Parameter(matrix.to(dtype)))
                if bias:
                    setattr(self, f"{name}_bias", torch.nn.Parameter(torch.randn(EXPERTS, shape[0]).to(dtype)))
            if norm:
                self.post_expert_norm = torch.nn.RMSNorm(hidden, EPSILON, dtype=dtype)
            for name, value in constants.items():
                setattr(self, name, value)

        def forward(self, *_: Tensor) -> Tensor:
            raise AssertionError("the model's own loop")

    if gate is not None:

        def _apply_gate(self: Any, rows: Tensor) -> Tensor:
            return gate(deinterleaved(rows, interleaved))

        SomeExperts._apply_gate = _apply_gate  # type: ignore[attr-defined]
    flags = {"is_transposed": transposed, "is_concatenated": not interleaved, "has_bias": bias, "has_gate": gated}
    if norm:
        flags["has_post_expert_norm"] = True
    torch.manual_seed(0)
    return use_experts_implementation(SomeExperts, **flags)(SimpleNamespace(_experts_implementation="moe_runtime"))


def deinterleaved(rows: Tensor, interleaved: bool) -> Tensor:
    return torch.cat([rows[..., ::2], rows[..., 1::2]], -1) if interleaved else rows


def inputs(tokens: int, hidden: int = HIDDEN, experts: int = EXPERTS, seed: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.rand(tokens, experts, generator=generator).argsort(-1)[:, :TOP_K]
    x = torch.randn(tokens, hidden, generator=generator).to(torch.bfloat16)
    return x, ids, torch.rand(tokens, TOP_K, generator=generator)


def expected(module: Any, x: Tensor, ids: Tensor, weights: Tensor, gate: Gate, **others: Any) -> Tensor:
    first = module.gate_up_proj if module.has_gate else module.up_proj
    down = module.down_proj
    first_bias = down_bias = None
    if module.is_transposed:
        first, down = first.transpose(1, 2), down.transpose(1, 2)
    if module.has_bias:
        first_bias, down_bias = getattr(module, "gate_up_proj_bias", None), module.down_proj_bias
        first_bias = module.up_proj_bias if first_bias is None else first_bias
    if not module.is_concatenated:
        first = deinterleaved(first.transpose(1, 2), True).transpose(1, 2)
        first_bias = None if first_bias is None else deinterleaved(first_bias, True)
    return reference(x, ids, weights, first, down, gate, first_bias, down_bias, **others)


def runs_ours(module: Any) -> bool:
    return getattr(module, "_moe_runtime_reading").recipe is not None  # noqa: B009


@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("interleaved", [False, True], ids=["concatenated", "interleaved"])
@pytest.mark.parametrize("transposed", [False, True], ids=["", "transposed"])
@torch.no_grad()
def test_layouts(transposed: bool, interleaved: bool, bias: bool) -> None:
    gate = swiglu if interleaved else None
    module = make_experts(gate, transposed=transposed, interleaved=interleaved, bias=bias)
    x, ids, weights = inputs(9)
    assert relative_error(module(x, ids, weights), expected(module, x, ids, weights, swiglu)) <= BF16_BOUND
    assert runs_ours(module)


GATES: dict[str, tuple[Gate | None, Gate, dict[str, Any]]] = {
    "silu": (None, swiglu, {}),
    "clamped": (lambda rows: swiglu(rows, 0.5), lambda rows: swiglu(rows, 0.5), {"limit": 0.5}),
    "clamped by another name": (lambda rows: swiglu(rows, 0.5), lambda rows: swiglu(rows, 0.5), {"swiglu_limit": 0.5}),
    "clamped at infinity": (lambda rows: swiglu(rows, math.inf), swiglu, {"limit": math.inf}),
    "constants that it does not use": (swiglu, swiglu, {"limit": 0.5, "alpha": 1.702}),
    "gpt-oss": (of_gpt_oss, of_gpt_oss, {"alpha": 1.702, "limit": 7.0}),
    "gpt-oss, small": (
        lambda rows: of_gpt_oss(rows, 1.3, 0.4),
        lambda rows: of_gpt_oss(rows, 1.3, 0.4),
        {"swiglu_alpha": 1.3, "swiglu_limit": 0.4},
    ),
    "relu^2": (None, lambda rows: rows.clamp(min=0) ** 2, {"gated": False, "act": "relu2"}),
}


@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("name", GATES)
@torch.no_grad()
def test_gates_that_kernels_have(name: str, bias: bool) -> None:
    own, formula, settings = GATES[name]
    module = make_experts(own, bias=bias, **settings)
    x, ids, weights = inputs(9)
    assert relative_error(module(3 * x, ids, weights), expected(module, 3 * x, ids, weights, formula)) <= BF16_BOUND
    assert runs_ours(module)


OTHERS: dict[str, dict[str, Any]] = {
    "no kernel has its gate": {"act": "gelu"},
    "no kernel has its gate (after)": {"gate": clamped_after_silu, "limit": 0.5},
    "no kernel has its activation": {"gated": False, "act": "silu"},
    "bf16 takes multiples of 32, and its sizes are 48 and 32": {"hidden": 48},
    "its tokens are torch.float16": {"dtype": torch.float16},
    "its tokens are torch.float32": {"dtype": torch.float32},
}


@pytest.mark.parametrize("reason", OTHERS)
@torch.no_grad()
def test_what_is_left_to_transformers(reason: str, caplog: pytest.LogCaptureFixture) -> None:
    module = make_experts(**OTHERS[reason])
    x, ids, weights = inputs(9, OTHERS[reason].get("hidden", HIDDEN))
    x = x.to(module.down_proj.dtype)
    with caplog.at_level(logging.WARNING):
        found = module(x, ids, weights)
        module(x, ids, weights)
    module.config._experts_implementation = "grouped_mm"
    assert torch.equal(found, module(x, ids, weights))
    said = "moe_runtime leaves SomeExperts to transformers' own implementation: " + reason.removesuffix(" (after)")
    assert [record.getMessage() for record in caplog.records] == [said]


def test_gradients_are_left_to_transformers(caplog: pytest.LogCaptureFixture) -> None:
    module = make_experts()
    x, ids, weights = inputs(9)
    module(x, ids, weights).sum().backward()
    assert "gradients must pass through it" in caplog.text
    found = module.gate_up_proj.grad.clone()
    module.zero_grad()
    module.config._experts_implementation = "grouped_mm"
    module(x, ids, weights).sum().backward()
    assert torch.equal(module.gate_up_proj.grad, found)
    module.config._experts_implementation = "moe_runtime"
    module.requires_grad_(False)
    assert not module(x, ids, weights).requires_grad
    assert module(x.requires_grad_(), ids, weights).requires_grad


@hypothesis.given(
    ids=st.lists(st.lists(st.integers(0, EXPERTS), min_size=TOP_K, max_size=TOP_K, unique=True), max_size=12),
    norm=st.booleans(),
)
@torch.no_grad()
def test_ids_of_other_ranks_add_nothing(ids: list[list[int]], norm: bool) -> None:
    if norm and "has_post_expert_norm" not in inspect.signature(use_experts_implementation).parameters:
        hypothesis.reject()
    module = make_experts(norm=norm)
    module._is_expert_parallel = True
    chosen = torch.tensor(ids, dtype=torch.int64).view(-1, TOP_K)
    x, _, weights = inputs(len(ids))
    weights = weights.masked_fill(chosen == EXPERTS, 0)
    others = {"norm": lambda row: row / row.square().mean().add(EPSILON).sqrt()} if norm else {}
    output = module(x, chosen, weights)
    assert output.shape == x.shape and output.isfinite().all()
    assert relative_error(output, expected(module, x, chosen, weights, swiglu, **others)) <= 2 * BF16_BOUND


@torch.no_grad()
def test_one_rank_of_expert_parallelism() -> None:
    # Two local experts, fewer than a token has slots; the config counts those of all ranks.
    module = make_experts()
    x, ids, weights = inputs(9)
    module.config.num_experts = EXPERTS
    whole = expected(module, x, ids, weights, swiglu)
    parts = []
    full = module.gate_up_proj.detach(), module.down_proj.detach()
    for first in range(0, EXPERTS, 2):
        module.num_experts, module._is_expert_parallel = 2, True
        module.gate_up_proj, module.down_proj = (torch.nn.Parameter(weight[first : first + 2]) for weight in full)
        remote = ids // 2 != first // 2
        parts.append(module(x, ids.remainder(2).masked_fill(remote, 2), weights.masked_fill(remote, 0)).double())
        layer = layers._made[module.gate_up_proj].layer
        assert (layer.problem.parallel, layer.problem.num_local_experts) == (Parallel("ep", 3), 2)
        del module._moe_runtime_reading
    assert relative_error(sum(parts), whole) <= 2 * BF16_BOUND


@torch.no_grad()
def test_an_id_out_of_range_is_an_error_on_the_cpu_where_no_rank_has_it() -> None:
    module, (x, ids, weights) = make_experts(), inputs(3)
    ids[1, 1] = EXPERTS
    with pytest.raises(InvalidArgument, match="topk_ids"):
        module(x, ids, weights)


def fp8_config(**others: Any) -> Any:
    sizes = {"hidden_size": 128, "moe_intermediate_size": 256, "num_local_experts": EXPERTS, "hidden_act": "silu"}
    return SimpleNamespace(_experts_implementation="moe_runtime", **sizes, **others)


@pytest.mark.parametrize("scale_fmt", ["float", "ue8m0"])
@pytest.mark.parametrize("limit", [None, 1.0])
@torch.no_grad()
def test_fp8_experts(scale_fmt: str, limit: float | None) -> None:
    plain = make_experts(hidden=128, inter=256)
    config = fp8_config(**({} if limit is None else {"swiglu_limit": limit}))
    module = fp8_experts(config, plain.gate_up_proj, plain.down_proj, scale_fmt=scale_fmt)
    x, ids, weights = inputs(9, 128)
    first, down = (
        fp8_block.dequantise_blocks(getattr(module, name), getattr(module, f"{name}_scale_inv").float())
        for name in ("gate_up_proj", "down_proj")
    )
    formula = swiglu if limit is None else lambda rows: swiglu(rows, limit)
    assert relative_error(module(x, ids, weights), reference(x, ids, weights, first, down, formula)) <= E4M3_BOUND
    assert runs_ours(module)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"swiglu_alpha": 1.7, "swiglu_limit": 7.0}, "fp8_block does not have its gate"),
        ({"mlp_gate_softcap": 5.0, "mlp_up_softcap": 5.0}, "no kernel has its gate"),
    ],
)
@torch.no_grad()
def test_fp8_experts_that_nothing_here_can_run(
    settings: dict[str, float], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module_under_test, "is_kernels_available", lambda: False)
    plain = make_experts(hidden=128, inter=256)
    module = fp8_experts(fp8_config(**settings), plain.gate_up_proj, plain.down_proj)
    with pytest.raises(Unsupported, match=f"{reason}; transformers' own implementation needs the package kernels"):
        module(*inputs(9, 128))


@pytest.mark.parametrize("scale_fmt", ["float", "ue8m0"])
@torch.no_grad()
def test_4_bit_experts(scale_fmt: str) -> None:
    kind = use_experts_implementation(FP8Experts, experts_interface=ALL_FP8_EXPERTS_FUNCTIONS)
    module = kind(fp8_config(swiglu_limit=1.5), block_size=(128, 128), scale_fmt=scale_fmt, expert_dtype="fp4")
    plain = make_experts(hidden=128, inter=256)
    decoded = []
    for name in ("gate_up_proj", "down_proj"):
        packed, factors = mxfp4.quantise(getattr(plain, name))
        getattr(module, name).copy_(packed.view(torch.int8))
        scale = torch.exp2(factors.float() - 127)
        getattr(module, f"{name}_scale_inv").copy_(scale)
        codes = torch.stack([packed & 15, packed >> 4], -1).flatten(-2).long()
        magnitudes = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])[codes & 7]
        decoded.append(torch.where(codes > 7, -magnitudes, magnitudes) * scale.repeat_interleave(32, -1))
    x, ids, weights = inputs(9, 128)
    result = module(x, ids, weights)
    assert relative_error(result, reference(x, ids, weights, *decoded, lambda rows: swiglu(rows, 1.5))) <= BF16_BOUND
    if scale_fmt == "float":
        module.down_proj_scale_inv[2, 3, 1] *= 1.5
        with pytest.raises(InvalidArgument, match="down_proj_scale_inv: got float32 scales; accepted: powers of two"):
            module(x, ids, weights)


@pytest.mark.parametrize(("format", "bound"), [("fp8_block", 8e-2), ("mxfp8_mxfp4", 0.25), ("bf16_mxfp4", 0.25)])
@torch.no_grad()
def test_bf16_experts_become_another_format(format: str, bound: float) -> None:
    integration.register(format=format)
    module = make_experts(hidden=128, inter=256)
    x, ids, weights = inputs(9, 128)
    assert relative_error(module(x, ids, weights), expected(module, x, ids, weights, swiglu)) <= bound
    assert layers._made[module.gate_up_proj].layer.problem.config.format == format


@torch.no_grad()
def test_a_tuned_plan_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = MoEConfig("any", HIDDEN, INTER, EXPERTS, TOP_K, format="bf16")
    other = MoEConfig("any", HIDDEN, INTER, EXPERTS, 2, format="bf16")
    make_plan(MoEProblem(config, Parallel.parse("dep1"))).save(tmp_path / "ours.json")
    make_plan(MoEProblem(other, Parallel.parse("ep1")), tune_max=128).save(tmp_path / "other.json")
    (tmp_path / "damaged.json").write_text("{")
    seen = spy_on_tactics(monkeypatch)
    x, ids, weights = inputs(9)
    make_experts()(x, ids, weights)
    integration.register(plan_dir=tmp_path)
    make_experts()(x, ids, weights)
    assert seen[1] == ("padded_batch", "grouped_mm") != seen[0]
