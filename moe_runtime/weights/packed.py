"""Expert weights of one rank in the formats of 4-bit and bf16 weights."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ..config import MoEConfig
from ..errors import InvalidArgument
from ..executors.base import check_tensor
from ..formats import Extra, WeightLayout, Weights, find_format
from ..formats.elements import E2M1_VALUES, UE8M0_BIAS
from ..formats.weights import Encoded, check_factors, described, quantise_experts
from .base import Operands


# eq=False: two sets of weights are the same only if they are one object, and comparing tensors is no bool.
@dataclass(frozen=True, eq=False)
class PackedWeights:
    """The L local experts of one layer. Contiguous, on one device, and not changed after the first call.

    I is the rank's intermediate size: under tensor parallelism its slice of each expert's. N1 is 2I, or I where the
    activation is not gated. Packed e2m1 holds two values a byte, the earlier in the low nibble.

    format: any name of `formats.FORMATS` but fp8_block.
    gate_up: packed uint8 [L, N1, H/2], or bf16 [L, N1, H]; rows [gate; up], or [up; gate] with gate_first=False.
    gate_up_scale: ue8m0 as uint8 [L, N1, H/32] or e4m3 [L, N1, H/16] by the format; None for bf16.
    down: packed uint8 [L, H, I/2], or bf16 [L, H, I]. down_scale: likewise, along I.
    gate_up_global, down_global: f32 [L], fp32 scales of an expert's weights; None for 1.
    gate_up_bias: f32 [L, N1]. down_bias: f32 [L, H]; one rank of a tensor-parallel group adds it.
    alpha, beta, clamp: f32 [L]: g * sigmoid(alpha * g) * (u + beta) with g = min(gate, clamp), u = clip(up, +-clamp).
    input_scale: fp32 scale of the token rows, for formats whose tokens have one.
    intermediate_scale: that of the activations, a number or f32 [L].
    """

    format: str
    gate_up: Tensor
    gate_up_scale: Tensor | None
    down: Tensor
    down_scale: Tensor | None
    gate_up_global: Tensor | None = None
    down_global: Tensor | None = None
    gate_up_bias: Tensor | None = None
    down_bias: Tensor | None = None
    alpha: Tensor | None = None
    beta: Tensor | None = None
    clamp: Tensor | None = None
    input_scale: float = 1.0
    intermediate_scale: Tensor | float = 1.0
    gate_first: bool = True

    @property
    def device(self) -> torch.device:
        return self.gate_up.device

    @cached_property
    def operands(self) -> Operands:
        multiplier = None
        if isinstance(self.intermediate_scale, Tensor) or self.intermediate_scale != 1.0:
            multiplier = self._per_expert(self.intermediate_scale).reciprocal()
        return Operands(
            self.gate_up,
            self.gate_up_scale,
            self.down,
            self.down_scale,
            gemm1_scale=self._product(self.input_scale, self.gate_up_global),
            gemm1_bias=self.gate_up_bias,
            alpha=self.alpha,
            beta=self.beta,
            clamp=self.clamp,
            activation_multiplier=multiplier,
            gemm2_scale=self._product(self.intermediate_scale, self.down_global),
            gemm2_bias=self.down_bias,
            gate_first=self.gate_first,
            input_scale=self.input_scale,
        )

    @cached_property
    def tiled_operands(self) -> Operands:
        layout = find_format(self.format).weight_layout
        gate_up, gate_up_factor = _tiles(layout, *self._gate_beside_up())
        down, down_factor = _tiles(layout, self.down, self.down_scale)
        return self.operands._replace(
            gate_up=gate_up,
            gate_up_scale=None,
            gemm1_scale=self._product(gate_up_factor, self.operands.gemm1_scale),
            down=down,
            down_scale=None,
            gemm2_scale=self._product(down_factor, self.operands.gemm2_scale),
        )

    def _gate_beside_up(self) -> tuple[Tensor, Tensor | None]:
        """gate_up and its scale, where the activation is gated with 8 rows of gate and the same of up in turns: the
        kernels, whose warps multiply 16 rows, activate what they multiplied."""
        width = self.down.shape[2] * (1 if self.down_scale is None else 2)
        if self.gate_up.shape[1] == width:
            return self.gate_up, self.gate_up_scale

        def in_turns(rows: Tensor) -> Tensor:
            halves = rows.view(torch.uint8).unflatten(1, (2, -1, _WARP_OUTPUTS))
            ordered = halves if self.gate_first else halves.flip(1)
            return ordered.transpose(1, 2).flatten(1, 3).view(rows.dtype)

        return in_turns(self.gate_up), None if self.gate_up_scale is None else in_turns(self.gate_up_scale)

    @property
    def encoding(self) -> Weights:
        return find_format(self.format).weights

    def check(
        self, config: MoEConfig, num_local_experts: int, names: Mapping[str, str] | None = None, *, tp_size: int = 1
    ) -> None:
        """As `ExpertWeights.check`; reads the factors, and on a GPU waits for them."""
        names = names or {}
        if self.format != config.format:
            raise InvalidArgument("weights", f"weights of the format {self.format}", config.format)
        hidden, inter = config.hidden_size, config.intermediate_size // tp_size
        rows = inter * (2 if config.is_gated else 1)
        self._check_matrix("gate_up", (num_local_experts, rows, hidden), names)
        self._check_matrix("down", (num_local_experts, hidden, inter), names)
        shapes = {
            "gate_up_global": (num_local_experts,),
            "down_global": (num_local_experts,),
            "gate_up_bias": (num_local_experts, rows),
            "down_bias": (num_local_experts, hidden),
            "alpha": (num_local_experts,),
            "beta": (num_local_experts,),
            "clamp": (num_local_experts,),
            "intermediate_scale": (num_local_experts,),
        }
        for field, shape in shapes.items():
            value = getattr(self, field)
            if isinstance(value, Tensor):
                check_tensor(names.get(field, field), value, shape, (torch.float32,), self.device)
        self._check_extras(config, names)

    def _check_matrix(self, field: str, shape: tuple[int, int, int], names: Mapping[str, str]) -> None:
        values, scale = getattr(self, field), getattr(self, f"{field}_scale")
        name, scale_name = names.get(field, field), names.get(f"{field}_scale", f"{field}_scale")
        of_values, of_scale = described(self.encoding, shape)
        check_tensor(name, values, of_values[0], (of_values[1],), self.device)
        if (scale is None) != (of_scale is None):
            accepted = "None" if of_scale is None else f"{of_scale[1]} of shape {list(of_scale[0])}"
            raise InvalidArgument(scale_name, "None" if scale is None else "a tensor", f"{accepted} for {self.format}")
        if of_scale is not None:
            check_tensor(scale_name, scale, of_scale[0], (of_scale[1],), self.device)
            check_factors(scale_name, self.encoding, scale)

    def _check_extras(self, config: MoEConfig, names: Mapping[str, str]) -> None:
        number_format = find_format(self.format)
        for field, extra in _EXTRA_OF_FIELD.items():
            if getattr(self, field) is None:
                continue
            if extra not in number_format.extras:
                raise InvalidArgument(names.get(field, field), "a tensor", f"None: {self.format} takes none")
            if extra != Extra.BIAS and not config.is_gated:
                raise InvalidArgument(names.get(field, field), "a tensor", f"None: {config.activation} reads none")
        for field in ("input_scale", "intermediate_scale"):
            value = getattr(self, field)
            if isinstance(value, float | int):
                if not (value > 0 and math.isfinite(value)):
                    raise InvalidArgument(field, value, "a positive number")
                if value == 1:
                    continue
            if not number_format.tokens.has_tensor_scale:
                raise InvalidArgument(field, "a scale", f"1: {number_format.tokens.name.lower()} tokens have none")

    def to(self, device: torch.device | str) -> PackedWeights:
        moved: dict[str, Any] = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        for name, value in moved.items():
            if isinstance(value, Tensor):
                moved[name] = value.to(device)
        return PackedWeights(**moved)

    @classmethod
    def quantise_bf16(cls, format: str, gate_up: Tensor, down: Tensor, **others: Any) -> PackedWeights:
        """gate_up [L, N1, H] and down [L, H, I], bf16 or f32, in any format but fp8_block.

        others: fields of the class that the format's encoding does not give, such as biases and scales of tokens.
        """
        encoding = find_format(format).weights
        encoded = (quantise_experts(encoding, w, name) for w, name in ((gate_up, "gate_up"), (down, "down")))
        return cls.from_encoded(format, *encoded, **others)

    @classmethod
    def from_encoded(cls, format: str, gate_up: Encoded, down: Encoded, **others: Any) -> PackedWeights:
        """others: the class's further fields."""
        return cls(
            format,
            gate_up.values,
            gate_up.scale,
            down.values,
            down.scale,
            gate_up_global=gate_up.global_scale,
            down_global=down.global_scale,
            **others,
        )

    @classmethod
    def random(
        cls,
        config: MoEConfig,
        num_local_experts: int,
        seed: int = 0,
        device: torch.device | str = "cpu",
        *,
        tp_size: int = 1,
        extras: bool = False,
    ) -> PackedWeights:
        """Every code alike, scaled so that a row of unit variance keeps about that through a GEMM.

        tp_size: ranks that share each expert; the weights are one rank's, of 1 / tp_size of the intermediate size.
        extras: also everything that the format and the activation take beside the weights, each different from neutral.
        """
        found = find_format(config.format)
        generator = torch.Generator(device).manual_seed(seed)

        def uniform(low: float, high: float, *shape: int) -> Tensor:
            return torch.rand(shape, device=device, generator=generator) * (high - low) + low

        inter, experts = config.intermediate_size // tp_size, num_local_experts
        rows = inter * (2 if config.is_gated else 1)
        gate_up = _random_encoded(found.weights, (experts, rows, config.hidden_size), generator, device)
        down = _random_encoded(found.weights, (experts, config.hidden_size, inter), generator, device)
        others: dict[str, Any] = {}
        if extras:
            if Extra.BIAS in found.extras:
                others["gate_up_bias"] = uniform(-1, 1, experts, rows)
                others["down_bias"] = uniform(-1, 1, experts, config.hidden_size)
            if Extra.ALPHA in found.extras and config.is_gated:
                others |= {"alpha": uniform(1, 2, experts), "beta": uniform(0.5, 1.5, experts)}
                others["clamp"] = uniform(0.5, 2, experts)
            if found.tokens.has_tensor_scale:
                others |= {"input_scale": 0.5, "intermediate_scale": uniform(0.5, 1.5, experts)}
        return cls.from_encoded(config.format, gate_up, down, **others)

    def _per_expert(self, value: Tensor | float) -> Tensor:
        experts = self.gate_up.shape[0]
        return torch.as_tensor(value, dtype=torch.float32, device=self.device).expand(experts).contiguous()

    def _product(self, scale: Tensor | float, global_scale: Tensor | None) -> Tensor | None:
        if not isinstance(scale, Tensor) and scale == 1.0:
            return global_scale
        return self._per_expert(scale) if global_scale is None else self._per_expert(scale) * global_scale


_EXTRA_OF_FIELD = {
    "gate_up_bias": Extra.BIAS,
    "down_bias": Extra.BIAS,
    "alpha": Extra.ALPHA,
    "beta": Extra.BETA,
    "clamp": Extra.CLAMP,
}

_WARP_OUTPUTS = 8  # templates/mixed/swiglu.cuh

# Root mean square of the 16 codes.
_CODE_RMS = math.sqrt(sum(value**2 for value in E2M1_VALUES) / len(E2M1_VALUES))


def deinterleave(rows: Tensor) -> Tensor:
    """[L, 2I, ...] with gate and up in turns, as gpt-oss has them -> [gate; up]."""
    return torch.cat([rows[:, ::2], rows[:, 1::2]], 1)


def _tiles(layout: WeightLayout, values: Tensor, scale: Tensor | None) -> tuple[Tensor, float]:
    """The weights as the kernels read them, and what their products must be multiplied by."""
    from ..formats import packing

    if scale is None:
        return packing.pack_bf16(values), 1.0
    match layout:
        case WeightLayout.MXFP4:
            return packing.pack_mxfp4(values, scale)
        case WeightLayout.FP8_MXFP4:
            return packing.pack_fp8_mxfp4(values, scale), 1.0
        case _:
            return packing.pack_nvfp4(values, scale), 1.0


def _random_encoded(
    encoding: Weights, shape: tuple[int, int, int], generator: torch.Generator, device: torch.device | str
) -> Encoded:
    """Weights of about 1 / sqrt(K) root mean square."""
    of_values, of_scale = described(encoding, shape)
    target = 1 / math.sqrt(shape[2])
    if of_scale is None:
        return Encoded((torch.randn(shape, generator=generator, device=device) * target).to(torch.bfloat16))

    def integers(low: int, high: int, size: tuple[int, ...]) -> Tensor:
        return torch.randint(low, high, size, dtype=torch.uint8, generator=generator, device=device)

    values = integers(0, 256, of_values[0])
    if encoding == Weights.MXFP4:
        exponent = round(math.log2(target / _CODE_RMS)) + UE8M0_BIAS
        return Encoded(values, integers(exponent - 1, exponent + 2, of_scale[0]))
    factors = integers(0x30, 0x40, of_scale[0]).view(torch.float8_e4m3fn)  # 0.5 to 1.875
    spread = torch.rand(shape[:1], generator=generator, device=device) + 0.5
    return Encoded(values, factors, spread * (target / _CODE_RMS))
