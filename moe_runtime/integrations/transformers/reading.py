"""How an experts module of transformers keeps its weights, and those weights as a layer takes them."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, NamedTuple

import msgspec
import torch
from torch import Tensor

from ...config import MoEConfig
from ...errors import InvalidArgument, Unsupported
from ...formats import Extra, Weights, find_format
from ...formats.elements import UE8M0_BIAS
from ...parallel import Parallel
from ...weights import ExpertWeights, FP8BlockWeights, PackedWeights, deinterleave
from .gates import Gate, recognise

BF16_FORMATS = ("bf16", "fp8_block", "mxfp8_mxfp4", "bf16_mxfp4")
"""What bf16 experts can become: the formats whose tokens need no scale from a calibration."""

_CONFIG_COUNTS = ("num_local_experts", "num_experts", "n_routed_experts")


class Parameters(NamedTuple):
    """An experts module's own, L local experts; None where it has none.

    first: gate_up_proj, or up_proj of a module without gate. Transposed: [L, H, N1] and [L, I, H].
    """

    first: Tensor
    first_scale: Tensor | None
    first_bias: Tensor | None
    down: Tensor
    down_scale: Tensor | None
    down_bias: Tensor | None

    @classmethod
    def of(cls, module: torch.nn.Module) -> Parameters:
        experts: Any = module
        found: list[Tensor | None] = []
        for name in ("gate_up_proj" if experts.has_gate else "up_proj", "down_proj"):
            found.append(getattr(experts, name))
            found.append(getattr(experts, f"{name}_scale_inv", None))
            found.append(getattr(experts, f"{name}_bias", None) if experts.has_bias else None)
        return cls(*found)  # type: ignore[arg-type]

    @property
    def are_released(self) -> bool:
        return self.first.numel() == 0


@dataclass(frozen=True)
class Recipe:
    """What turns an experts module's parameters into a layer.

    ep_size: over how many ranks transformers spread the experts, of which the parameters are one rank's.
    plan_dir: the folder of tuned plans.
    """

    format: str
    gate: Gate
    is_transposed: bool
    is_interleaved: bool
    ep_size: int
    plan_dir: str

    @functools.cached_property
    def text(self) -> str:
        """As `parse_recipe` reads it. A graph can carry text; numbers it may take for inputs."""
        return msgspec.json.encode(self).decode()

    def config(self, parameters: Parameters, top_k: int) -> tuple[MoEConfig, Parallel]:
        """The layer under expert parallelism is rank 0's: local ids start at 0, and the id that stands for other
        ranks' experts is past the local ones on whichever rank."""
        experts, hidden, inter = _sizes(parameters, self.is_transposed, self.gate.activation == "swiglu")
        config = MoEConfig(
            "transformers",
            hidden,
            inter,
            experts * self.ep_size,
            top_k,
            format=self.format,
            clamp_limit=self.gate.clamp,
            activation=self.gate.activation,
        )
        return config, Parallel("ep", self.ep_size)


@functools.lru_cache(maxsize=1024)
def parse_recipe(text: str) -> Recipe:
    return msgspec.json.decode(text, type=Recipe)


def read(module: torch.nn.Module, bf16_format: str, plan_dir: str) -> Recipe | str:
    """How to make a layer of the module, or why that cannot be.

    bf16_format: one of BF16_FORMATS, for bf16 weights. Raises Unsupported where the parameters were let go.
    """
    experts: Any = module
    parameters = Parameters.of(module)
    if parameters.are_released:
        raise Unsupported(RELEASED)
    first = parameters.first
    if type(first) not in (Tensor, torch.nn.Parameter):
        return f"its weights are of the type {type(first).__name__}"
    if first.device.type not in ("cpu", "cuda"):
        return f"its weights are on {first.device}"
    match first.dtype:
        case torch.bfloat16:
            name = bf16_format
        case torch.float8_e4m3fn:
            name = FP8BlockWeights.format
            if tuple(experts.block_size or ()) != (128, 128):
                return f"its scales are of blocks {experts.block_size}, not of 128 x 128"
            if experts.activation_scheme != "dynamic":
                return f"its scales of activations are {experts.activation_scheme}, not dynamic"
        case torch.int8:
            # The weights alone are of four bits: no encoding of the tokens is closer to the model than none.
            name = "bf16_mxfp4"
        case other:
            return f"its weights are {other}"
    found = find_format(name)
    is_transposed = getattr(experts, "is_transposed", False)
    _, hidden, inter = _sizes(parameters, is_transposed, experts.has_gate)
    if hidden % found.multiple or inter % found.multiple:
        return f"{name} takes multiples of {found.multiple}, and its sizes are {hidden} and {inter}"
    if parameters.first_bias is not None and Extra.BIAS not in found.extras:
        return f"{name} has no biases"
    gate = recognise(module, inter, first.device)
    if gate is None:
        return f"no kernel has its {'gate' if experts.has_gate else 'activation'}"
    if gate.activation not in found.activations or (gate.alpha is not None and Extra.ALPHA not in found.extras):
        return f"{name} does not have its {'gate' if experts.has_gate else 'activation'}"
    is_interleaved = not getattr(experts, "is_concatenated", True)
    return Recipe(name, gate, is_transposed, is_interleaved, _ep_size(experts), plan_dir)


def _ep_size(experts: Any) -> int:
    config = getattr(experts, "config", None)
    total = next((count for name in _CONFIG_COUNTS if isinstance(count := getattr(config, name, None), int)), 0)
    local: int = experts.num_experts
    return total // local if total and total % local == 0 else 1


def _sizes(parameters: Parameters, is_transposed: bool, is_gated: bool) -> tuple[int, int, int]:
    """(experts, hidden size, intermediate size)."""
    experts, rows, columns = parameters.first.shape
    if is_transposed:
        rows, columns = columns, rows
    packed = 2 if parameters.first.dtype is torch.int8 else 1
    return experts, columns * packed, rows // 2 if is_gated else rows


def expert_weights(recipe: Recipe, parameters: Parameters) -> ExpertWeights:
    """The parameters as a layer takes them: views of them where their layout is the layer's, else copies.

    Raises Unsupported where the parameters were let go, InvalidArgument for scales that are no powers of two.
    """
    if parameters.are_released:
        raise Unsupported(RELEASED)
    # Detached: a layer that held the parameters themselves would keep alive what it is to go away with.
    first, first_scale, first_bias, down, down_scale, down_bias = (
        None if tensor is None else tensor.detach() for tensor in parameters
    )
    assert first is not None and down is not None
    if recipe.is_transposed:
        first, down = first.mT, down.mT
    if recipe.is_interleaved:
        first = deinterleave(first)
        first_bias = None if first_bias is None else deinterleave(first_bias)
    first, down = first.contiguous(), down.contiguous()
    if recipe.format == FP8BlockWeights.format:
        if first_scale is None or down_scale is None:
            return FP8BlockWeights.quantise_bf16(first, down)
        return FP8BlockWeights(first, first_scale.float().contiguous(), down, down_scale.float().contiguous())
    others: dict[str, Any] = {
        "gate_up_bias": None if first_bias is None else first_bias.float().contiguous(),
        "down_bias": None if down_bias is None else down_bias.float().contiguous(),
    }
    if recipe.gate.alpha is not None:
        ones = torch.ones(len(first), device=first.device)
        others |= {"alpha": ones * recipe.gate.alpha, "beta": ones}
    if first.dtype is torch.int8:
        assert first_scale is not None and down_scale is not None
        codes = _ue8m0("gate_up_proj_scale_inv", first_scale), _ue8m0("down_proj_scale_inv", down_scale)
        packed = first.view(torch.uint8), codes[0], down.view(torch.uint8), codes[1]
        return PackedWeights(recipe.format, *packed, **others)
    if find_format(recipe.format).weights == Weights.BF16:
        return PackedWeights(recipe.format, first, None, down, None, **others)
    return PackedWeights.quantise_bf16(recipe.format, first, down, **others)


def _ue8m0(name: str, scale: Tensor) -> Tensor:
    """Powers of two, as ue8m0, its bytes or f32 -> ue8m0 as uint8."""
    if scale.dtype is not torch.float32:
        return scale.view(torch.uint8).contiguous()
    mantissa, exponent = torch.frexp(scale)
    codes = exponent - 1 + UE8M0_BIAS
    if not ((mantissa == 0.5) & (codes >= 0) & (codes < 255)).all():
        raise InvalidArgument(name, "float32 scales", "powers of two from 2^-127 to 2^127 for 4-bit weights")
    return codes.to(torch.uint8)


RELEASED = (
    "this model's experts have let their parameters go (register(keep_parameters=False)), and what was made of them "
    "does not serve this; load the model again"
)
