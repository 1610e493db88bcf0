"""The stages around the GEMMs in the token encodings that are stored without scales, against reference_formats.py.

The stages ask nothing of the weights, so none are here, and no kernel that multiplies them need be built.
"""

from __future__ import annotations

import enum
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from moe_runtime.config import RoutingMethod
from moe_runtime.errors import KernelError
from moe_runtime.formats import Tokens, WeightLayout
from moe_runtime.kernels import (
    DTYPE_BF16,
    DTYPE_E2M1,
    DTYPE_E4M3,
    DTYPE_F32,
    Activation,
    LayerArguments,
    Stage,
)
from moe_runtime.reference import relative_error
from tests import reference
from tests.gpu import support
from tests.reference_formats import decode_e2m1, decode_ue8m0, round_rows

HIDDEN, INTER = 288, 160  # multiples of 32 and not of 128, so that warps straddle rows
EXPERTS, FIRST, LOCAL, TOP_K = 24, 6, 12, 4


class Encoding(enum.Enum):
    """Of rows: MoeTokens, and MoeWeights beside which they are kept as bf16 or as e4m3."""

    FP8_BLOCK = (Tokens.FP8_BLOCK, WeightLayout.FP8_BLOCK)
    BF16 = (Tokens.BF16, WeightLayout.BF16)
    FP8 = (Tokens.FP8, WeightLayout.BF16)
    FP8_CODES = (Tokens.FP8, WeightLayout.FP8_MXFP4)
    MXFP8 = (Tokens.MXFP8, WeightLayout.BF16)
    NVFP4 = (Tokens.NVFP4, WeightLayout.BF16)

    @property
    def tokens(self) -> Tokens:
        return self.value[0]

    @property
    def weights(self) -> WeightLayout:
        return self.value[1]

    @property
    def dtype(self) -> torch.dtype:
        return torch.float8_e4m3fn if self.weights.multiplies_e4m3 else torch.bfloat16


WITHOUT_SCALES = [encoding for encoding in Encoding if encoding != Encoding.FP8_BLOCK]
INVERSE = {Tokens.FP8: 3.7, Tokens.NVFP4: 41.3}  # of the scale of a tensor


def name_of(value: object) -> str:
    """What pytest calls a parameter: it writes an IntEnum as its number."""
    return value.name if isinstance(value, enum.Enum) else str(value)


class Layer:
    """The arguments of one call, and what the tensors behind them hold."""

    def __init__(self, encoding: Encoding, num_tokens: int, **changes: Any) -> None:
        sizes = {"num_experts": EXPERTS, "top_k": TOP_K, "local_expert_offset": FIRST, "num_local_experts": LOCAL}
        sizes |= {"hidden_size": HIDDEN, "intermediate_size": INTER, "n_group": 1, "topk_group": 1}
        sizes |= {name: changes.pop(name) for name in sizes.keys() & changes.keys()}
        self.tokens, self.top_k, self.hidden = num_tokens, sizes["top_k"], sizes["hidden_size"]
        self.dtype = encoding.dtype
        self.arguments = LayerArguments(
            num_tokens=num_tokens,
            **sizes,
            weights=encoding.weights,
            tokens=encoding.tokens,
            routing_method=RoutingMethod.Renormalize,
            routed_scaling_factor=1.0,
            input_scale_inverse=INVERSE.get(encoding.tokens, 1.0),
            gate_first=1,
            hidden_states_stride=sizes["hidden_size"],
            sm_count=support.executor().sm_count,
        )
        self._kept: dict[str, Tensor] = {}
        self.set(**changes)
        layout = support.executor().library.workspace_layout(self.arguments)
        assert layout is not None
        self.layout = layout
        self.workspace = torch.full((layout.total_bytes,), 0xFF, dtype=torch.uint8, device="cuda")
        self.set(workspace=self.workspace, workspace_bytes=layout.total_bytes)

    def set(self, **values: Any) -> None:
        for name, value in values.items():
            if isinstance(value, Tensor):
                self._kept[name] = value = value.to("cuda").contiguous()
                value = value.data_ptr()
            setattr(self.arguments, name, value)

    def run(self, *runs: Stage) -> Layer:
        for stages in runs:
            support.executor().launch(self.arguments, stages)
        return self

    def region(self, name: str, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        start = getattr(self.layout, name)
        return self.workspace[start : start + dtype.itemsize * int(np.prod(shape))].view(dtype).view(shape)

    @property
    def permuted_row(self) -> Tensor:
        return self.region("permuted_row", self.tokens * self.top_k, dtype=torch.int32)

    def gathered(self, *runs: Stage) -> tuple[Tensor, Tensor]:
        """(token of each local slot, the slot's row as float64), on the CPU."""
        self.run(*runs or (Stage.PERMUTE, Stage.GATHER))
        rows = self.region("rows", self.tokens * self.top_k, self.hidden, dtype=self.dtype)
        slots = (self.permuted_row >= 0).nonzero().flatten()
        return (slots // self.top_k).cpu(), rows.float()[self.permuted_row[slots].long()].double().cpu()


def random_ids(num_tokens: int, top_k: int = TOP_K) -> Tensor:
    generator = torch.Generator().manual_seed(num_tokens)
    ids = torch.rand(num_tokens, EXPERTS, generator=generator).argsort(-1)[:, :top_k].to(torch.int32)
    ids[num_tokens // 2, 0] = -1
    return ids


def random_tokens(num_tokens: int) -> Tensor:
    """bf16 rows with a block of zeros, one of tiny and one of huge values."""
    x = torch.randn(num_tokens, HIDDEN, generator=torch.Generator().manual_seed(num_tokens))
    x[0, :32] = 0
    x[-1, 32:64] *= 2e-5
    x[-1, 64:96] *= 1e5
    return x.bfloat16()


def rounded(encoding: Encoding, x: Tensor) -> Tensor:
    """x f32 [..., K] -> float64."""
    return torch.from_numpy(round_rows(encoding.tokens.name.lower(), x.numpy()))


APART, TOGETHER = (Stage.PERMUTE, Stage.GATHER), (Stage.PERMUTE | Stage.GATHER,)


@pytest.mark.parametrize("stages", [APART, TOGETHER], ids=["apart", "together"])
@pytest.mark.parametrize("num_tokens", [1, 37, 300])
@pytest.mark.parametrize("encoding", WITHOUT_SCALES, ids=name_of)
def test_gather_rounds_bit_for_bit(encoding: Encoding, num_tokens: int, stages: tuple[Stage, ...]) -> None:
    x = random_tokens(num_tokens)
    layer = Layer(encoding, num_tokens, hidden_states=x, topk_ids=random_ids(num_tokens))
    token, rows = layer.gathered(*stages)
    expected = rounded(encoding, x.float() * torch.tensor(INVERSE.get(encoding.tokens, 1.0)))
    assert torch.equal(rows, expected[token])


def quantised_tokens(encoding: Encoding, num_tokens: int) -> tuple[dict[str, Any], Tensor]:
    """(arguments of tokens with random codes, and factors of which the largest would not be chosen; their values)"""
    generator = np.random.default_rng(num_tokens)
    if encoding == Encoding.NVFP4:
        packed = generator.integers(0, 256, (num_tokens, HIDDEN // 2), dtype=np.uint8)
        factors = generator.integers(0, 127, (num_tokens, HIDDEN // 16), dtype=np.uint8)
        values = decode_e2m1(packed) * np.repeat(reference.decode_e4m3(factors), 16, 1)
        given = {"hidden_states": torch.from_numpy(packed), "hidden_states_scale": torch.from_numpy(factors)}
        return given | {"hidden_states_dtype": DTYPE_E2M1}, torch.from_numpy(values)
    codes = generator.integers(0, 127, (num_tokens, HIDDEN), dtype=np.uint8)
    codes += 128 * generator.integers(0, 2, codes.shape, dtype=np.uint8)
    values = reference.decode_e4m3(codes)
    given = {"hidden_states": torch.from_numpy(codes), "hidden_states_dtype": DTYPE_E4M3}
    if encoding == Encoding.MXFP8:
        factors = generator.integers(60, 200, (num_tokens, HIDDEN // 32), dtype=np.uint8)
        given["hidden_states_scale"] = torch.from_numpy(factors)
        values = values * np.repeat(decode_ue8m0(factors), 32, 1)
    return given, torch.from_numpy(values)


@pytest.mark.parametrize("num_tokens", [3, 300])
@pytest.mark.parametrize("encoding", [Encoding.FP8, Encoding.FP8_CODES, Encoding.MXFP8, Encoding.NVFP4], ids=name_of)
def test_gather_takes_quantised_tokens(encoding: Encoding, num_tokens: int) -> None:
    given, values = quantised_tokens(encoding, num_tokens)
    layer = Layer(encoding, num_tokens, topk_ids=random_ids(num_tokens), **given)
    token, rows = layer.gathered(*TOGETHER)
    assert torch.equal(rows, values[token])


@pytest.mark.parametrize("stages", [APART, TOGETHER], ids=["apart", "together"])
@pytest.mark.parametrize("quantised", [False, True])
@pytest.mark.parametrize("encoding", WITHOUT_SCALES, ids=name_of)
def test_llama4_weighs_what_experts_read(encoding: Encoding, quantised: bool, stages: tuple[Stage, ...]) -> None:
    if quantised and encoding == Encoding.BF16:
        pytest.skip("bf16 has no codes")
    num_tokens = 41
    weights = torch.rand(num_tokens, 1, generator=torch.Generator().manual_seed(1))
    x, inverse = random_tokens(num_tokens), torch.tensor(INVERSE.get(encoding.tokens, 1.0))
    given, values = {"hidden_states": x}, x.float()
    if quantised:
        (given, exact), inverse = quantised_tokens(encoding, num_tokens), torch.tensor(1.0)
        values = exact.float()
    routed = {"routing_method": RoutingMethod.Llama4, "top_k": 1}
    layer = Layer(encoding, num_tokens, topk_ids=random_ids(num_tokens, 1), topk_weights=weights, **routed, **given)
    token, rows = layer.gathered(*stages)
    assert torch.equal(rows, rounded(encoding, values * (inverse * weights))[token])


@pytest.mark.parametrize("quantised", [False, True])
def test_llama4_weighs_the_scales_of_fp8_block(quantised: bool) -> None:
    num_tokens, hidden = 41, 256
    weights = torch.rand(num_tokens, 1, generator=torch.Generator().manual_seed(1))
    x = torch.randn(num_tokens, hidden, generator=torch.Generator().manual_seed(2)).bfloat16()
    codes, scales = reference.quantise(x.float().numpy())
    given: dict[str, Any] = {"hidden_states": x}
    if quantised:
        given = {"hidden_states": torch.from_numpy(codes), "hidden_states_scale": torch.from_numpy(scales)}
        given |= {"hidden_states_dtype": DTYPE_E4M3, "scale_token_stride": 2, "scale_block_stride": 1}
    sizes = {"hidden_size": hidden, "intermediate_size": 128, "top_k": 1, "routing_method": RoutingMethod.Llama4}
    layer = Layer(
        Encoding.FP8_BLOCK, num_tokens, topk_ids=random_ids(num_tokens, 1), topk_weights=weights, **sizes, **given
    )
    layer.run(*TOGETHER)
    token = (layer.permuted_row >= 0).nonzero().flatten()
    row = layer.permuted_row[token].long()
    found = layer.region("rows", num_tokens, hidden, dtype=torch.uint8)[row].cpu()
    assert torch.equal(found, torch.from_numpy(codes)[token.cpu()])
    found_scales = layer.region("row_scales", num_tokens, 2)[row].cpu()
    assert torch.equal(found_scales, (torch.from_numpy(scales) * weights)[token.cpu()])


@pytest.mark.parametrize("encoding", list(Encoding), ids=name_of)
def test_llama4_s_output_is_not_weighed_again(encoding: Encoding) -> None:
    num_tokens, hidden, ids = 9, 256, random_ids(9, 1)
    output = torch.full((num_tokens, hidden), torch.nan, dtype=torch.bfloat16, device="cuda")
    sizes = {"hidden_size": hidden, "intermediate_size": 128, "top_k": 1, "routing_method": RoutingMethod.Llama4}
    layer = Layer(encoding, num_tokens, topk_ids=ids, topk_weights=torch.full((9, 1), 0.25), output=output, **sizes)
    layer.run(Stage.PERMUTE)
    rows = layer.region("gemm2_output", num_tokens, hidden, dtype=torch.bfloat16).normal_()
    layer.run(Stage.COMBINE)
    row = layer.permuted_row
    assert torch.equal(output, torch.where((row >= 0)[:, None], rows[row.clamp(min=0).long()], 0))


@pytest.mark.parametrize(
    ("method", "shared"),
    [*((method, 0) for method in RoutingMethod), (RoutingMethod.Renormalize, 2), (RoutingMethod.DeepSeekV3, 1)],
    ids=name_of,
)
@pytest.mark.parametrize("num_tokens", [1, 16, 17])
@pytest.mark.parametrize("encoding", list(Encoding), ids=name_of)
def test_stages_together_leave_what_they_leave_apart(
    encoding: Encoding, num_tokens: int, method: RoutingMethod, shared: int
) -> None:
    generator = torch.Generator().manual_seed(num_tokens)
    x = torch.randn(num_tokens, 256, generator=generator).bfloat16()
    logits = torch.randn(num_tokens, EXPERTS - shared, generator=generator)
    sizes = {"hidden_size": 256, "intermediate_size": 128, "top_k": 1 if method == RoutingMethod.Llama4 else TOP_K}
    sizes |= {"local_expert_offset": EXPERTS - LOCAL, "num_fused_shared_experts": shared}
    routing = {"routing_method": method, "routing_logits": logits, "routing_logits_dtype": DTYPE_F32}
    layer = Layer(encoding, num_tokens, hidden_states=x, **sizes, **routing)
    left = []
    for runs in [(Stage.ROUTE, *APART), (Stage.ROUTE, *TOGETHER), (Stage.ROUTE | Stage.PERMUTE | Stage.GATHER,)]:
        layer.workspace.fill_(0xFF)
        layer.run(*runs)
        left.append(layer.workspace.clone())
    assert torch.equal(left[0], left[1]) and torch.equal(left[0], left[2])
    if shared:
        rows = layer.permuted_row.view(num_tokens, TOP_K)[:, TOP_K - shared :]
        assert (rows >= 0).all() and len(rows.unique()) == rows.numel()


def with_gemm1_output(encoding: Encoding, num_tokens: int, **changes: Any) -> tuple[Layer, Tensor, Tensor]:
    """(a layer whose rows are permuted, its gemm1_output [rows, N], the local expert of each row), the last on the CPU.

    Experts 3 to 5 of the shard have no rows.
    """
    ids = random_ids(num_tokens)
    ids[(ids >= FIRST + 3) & (ids < FIRST + 6)] = -1
    layer = Layer(encoding, num_tokens, topk_ids=ids, **changes)
    layer.run(Stage.PERMUTE)
    offsets = layer.region("expert_offsets", LOCAL + 1, dtype=torch.int32).cpu()
    expert = torch.repeat_interleave(torch.arange(LOCAL), offsets.diff().long())
    width = INTER if layer.arguments.activation == Activation.RELU2 else 2 * INTER
    output = layer.region("gemm1_output", num_tokens * TOP_K, width, dtype=torch.bfloat16).normal_(std=3)
    return layer, output[: len(expert)].cpu(), expert


def activated(layer: Layer, rows: int) -> Tensor:
    layer.run(Stage.ACTIVATION)
    return layer.region("activation", layer.tokens * TOP_K, INTER, dtype=layer.dtype)[:rows].float().double().cpu()


def factors(seed: int, low: float, high: float) -> Tensor:
    return low + (high - low) * torch.rand(LOCAL, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("given", ["none", "limit", "all", "multiplier"])
@pytest.mark.parametrize("gate_first", [True, False])
@pytest.mark.parametrize("num_tokens", [1, 150])
@pytest.mark.parametrize("encoding", WITHOUT_SCALES, ids=name_of)
def test_swiglu(encoding: Encoding, num_tokens: int, gate_first: bool, given: str) -> None:
    alpha, beta, clamp, multiplier = (
        torch.ones(LOCAL),
        torch.zeros(LOCAL),
        torch.full((LOCAL,), torch.inf),
        torch.ones(LOCAL),
    )
    changes: dict[str, Any] = {"gate_first": gate_first}
    if given == "limit":
        clamp = torch.full((LOCAL,), 2.5)
        changes["clamp_limit"] = 2.5
    if given == "all":
        alpha, beta, clamp = factors(1, 0.5, 2), factors(2, -1, 1), factors(3, 1, 4)
        changes |= {"alpha": alpha, "beta": beta, "clamp": clamp}
    if given in ("all", "multiplier"):
        multiplier = factors(4, 0.1, 9)
        changes["activation_multiplier"] = multiplier
    layer, output, expert = with_gemm1_output(encoding, num_tokens, **changes)
    halves = output.float().split(INTER, 1)
    gate, up = halves if gate_first else halves[::-1]
    alpha, beta, clamp, multiplier = (values[expert, None] for values in (alpha, beta, clamp, multiplier))
    gate, up = torch.minimum(gate, clamp), torch.maximum(torch.minimum(up, clamp), -clamp)
    expected = rounded(encoding, gate * torch.sigmoid(alpha * gate) * (up + beta) * multiplier)
    # An exponential that differs in its last bits moves a few values to the neighbouring code.
    assert relative_error(activated(layer, len(expert)), expected) <= 2e-3


@pytest.mark.parametrize("given", [False, True], ids=["plain", "multiplier"])
@pytest.mark.parametrize("encoding", WITHOUT_SCALES, ids=name_of)
def test_relu2_bit_for_bit(encoding: Encoding, given: bool) -> None:
    multiplier = factors(4, 0.1, 9) if given else torch.ones(LOCAL)
    changes = {"activation_multiplier": multiplier} if given else {}
    layer, output, expert = with_gemm1_output(encoding, 150, activation=Activation.RELU2, **changes)
    expected = rounded(encoding, output.float().clamp(min=0) ** 2 * multiplier[expert, None])
    assert torch.equal(activated(layer, len(expert)), expected)


@pytest.mark.parametrize("stage", [Stage.GEMM1, Stage.GEMM2])
def test_a_kernel_of_other_weights_is_refused(stage: Stage) -> None:
    found = support.executor().variants.values()
    fp8_block = next(variant.index for variant in found if variant.weights == WeightLayout.FP8_BLOCK)
    layer = Layer(Encoding.MXFP8, 1, gemm1_variant=fp8_block, gemm2_variant=fp8_block)
    with pytest.raises(KernelError, match="no such variant"):
        layer.run(stage)


def test_packed_gate_up_needs_a_kernel_that_activates() -> None:
    """For it lies as those read it."""
    found = support.executor().variants.values()
    plain = next(v.index for v in found if v.weights == WeightLayout.BF16 and v.stores_rows)
    layer = Layer(Encoding.BF16, 1, gemm1_variant=plain, gemm2_variant=plain)
    with pytest.raises(KernelError, match="no such variant"):
        layer.run(Stage.GEMM1)


@pytest.mark.parametrize(
    ("encoding", "dtype"),
    [
        (Encoding.BF16, DTYPE_E4M3),
        (Encoding.MXFP8, DTYPE_E2M1),
        (Encoding.NVFP4, DTYPE_E4M3),
        (Encoding.FP8, DTYPE_F32),
        (Encoding.FP8_CODES, DTYPE_E2M1),
    ],
    ids=name_of,
)
def test_tokens_of_another_encoding_are_refused(encoding: Encoding, dtype: int) -> None:
    layer = Layer(encoding, 1, topk_ids=random_ids(1), hidden_states=random_tokens(1), hidden_states_dtype=dtype)
    with pytest.raises(KernelError, match="combination"):
        layer.run(Stage.PERMUTE)
    layer.set(hidden_states_dtype=DTYPE_BF16)
    layer.run(Stage.PERMUTE)


@pytest.mark.parametrize(
    "changes",
    [
        {"hidden_size": 80},
        {"intermediate_size": 48},
        {"tokens": Tokens.FP8_BLOCK},
        {"tokens": 5},
        {"weights": WeightLayout.FP8_BLOCK},
        {"weights": WeightLayout.FP8_MXFP4},
        {"weights": 5},
        {"routing_method": RoutingMethod.Llama4},
        {"routing_method": 5},
        {"n_group": 2},
        {"num_fused_shared_experts": TOP_K},
        {"num_fused_shared_experts": -1},
    ],
    ids=str,
)
def test_what_no_kernel_implements_has_no_workspace(changes: dict[str, int]) -> None:
    arguments = Layer(Encoding.MXFP8, 1).arguments
    for name, value in changes.items():
        setattr(arguments, name, value)
    assert support.executor().library.workspace_layout(arguments) is None
