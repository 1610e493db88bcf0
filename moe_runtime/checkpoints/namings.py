"""How published checkpoints name and lay out the experts of a layer, and the weights that each gives.

All begin with model.layers.{layer}.mlp. Then come, for an expert E and each of gate_proj, up_proj, down_proj:

- DeepSeek: experts.E.gate_proj.weight e4m3 [N, K] with .weight_scale_inv f32 [N/128, K/128].
- bf16: experts.E.gate_proj.weight bf16 [N, K], quantised here to whatever the format asks.
- NVFP4 as ModelOpt writes it: .weight packed uint8 [N, K/2], .weight_scale e4m3 [N, K/16], .weight_scale_2 and, where
  activations were calibrated, .input_scale f32 numbers.
- NVFP4 as compressed-tensors writes it: .weight_packed, .weight_scale, and .weight_global_scale and .input_global_scale
  f32 [1], both reciprocals of what the others hold.
- In all of these, shared_experts.gate_proj instead for the experts that every token has; where these are several, one
  behind the other along I.
- gpt-oss, all experts in one tensor: experts.gate_up_proj_blocks uint8 [E, 2I, H/32, 16], gate_up_proj_scales ue8m0 as
  uint8 [E, 2I, H/32], gate_up_proj_bias bf16 [E, 2I], rows of gate and up in turns; and the same of down_proj.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..config import MoEConfig
from ..errors import InvalidArgument
from ..formats import Tokens, Weights, fp8_block, mxfp4, nvfp4
from ..formats.elements import E2M1_MAX, concatenate
from ..formats.weights import Encoded, check_factors, quantise_weights, stack_experts
from ..parallel import Parallel
from ..weights import ExpertWeights, FP8BlockWeights, PackedWeights, deinterleave
from .reader import CheckpointReader

GPT_OSS_ALPHA, GPT_OSS_BETA, GPT_OSS_CLAMP = 1.702, 1.0, 7.0


@dataclass(frozen=True)
class Request:
    """The rank's share of a layer's experts, and where it is read from.

    experts: their global ids; `load_experts` shows progress as they are walked through. inter: of the rank's slice.
    """

    reader: CheckpointReader
    prefix: str
    config: MoEConfig
    parallel: Parallel
    experts: Iterable[int]

    @property
    def inter(self) -> int:
        multiple = self.config.number_format.multiple
        return self.parallel.local_intermediate_size(self.config.intermediate_size, multiple)

    def cut(self, per: int = 1, before: int = 0) -> slice:
        """The rank's slice of intermediate_size / per, of the expert with so many before it in the tensor."""
        size, whole = self.inter // per, self.config.intermediate_size // per
        first = before * whole + self.parallel.tp_rank * size
        return slice(first, first + size)

    def name(self, expert: int, projection: str) -> str:
        if expert < self.config.num_routed_experts:
            return f"{self.prefix}experts.{expert}.{projection}"
        return f"{self.prefix}shared_experts.{projection}"

    def matrix(
        self,
        expert: int,
        projection: str,
        suffix: str,
        dtypes: tuple[torch.dtype, ...],
        per_row: int = 1,
        per_column: int = 1,
    ) -> Tensor:
        """The rank's part [1, ...] of an expert's tensor [N / per_row, K / per_column]."""
        config = self.config
        before = max(0, expert - config.num_routed_experts)
        experts = 1 if expert < config.num_routed_experts else config.num_fused_shared_experts
        hidden, inter = config.hidden_size, experts * config.intermediate_size
        if projection == "down_proj":
            shape = (hidden // per_row, inter // per_column)
            part = (slice(None), self.cut(per_column, before))
        else:
            shape = (inter // per_row, hidden // per_column)
            part = (self.cut(per_row, before), slice(None))
        return self.reader.read(f"{self.name(expert, projection)}.{suffix}", shape, dtypes, part)[None]

    def check_factors(self, name: str, factors: Tensor) -> None:
        check_factors(name, self.config.number_format.weights, factors, self.reader.file(name))

    def number(self, name: str, shape: tuple[int, ...] = ()) -> float:
        """A positive f32 number. Raises InvalidArgument for another."""
        value = float(self.reader.read(name, shape, (torch.float32,)))
        if not 0 < value < float("inf"):
            raise InvalidArgument(name, value, "a positive number")
        return value


@dataclass(frozen=True)
class Naming:
    """mark: the name, after the prefix and for an expert {expert}, by which a checkpoint of it is known.

    weights: the encodings that its weights may be used in; dtype: of the marking tensor, where it tells.
    """

    name: str
    mark: str
    weights: tuple[Weights, ...]
    load: Callable[[Request], ExpertWeights]
    dtype: torch.dtype | None = None


def _load_deepseek(request: Request) -> ExpertWeights:
    def projection(expert: int, name: str) -> Encoded:
        block = fp8_block.BLOCK
        values = request.matrix(expert, name, "weight", (torch.float8_e4m3fn,))
        return Encoded(values, request.matrix(expert, name, "weight_scale_inv", (torch.float32,), block, block))

    return _fp8_block(*_experts(request, projection))


def _load_bf16(request: Request) -> ExpertWeights:
    def projection(expert: int, name: str) -> Encoded:
        return Encoded(request.matrix(expert, name, "weight", (torch.bfloat16,)))

    encoding = request.config.number_format.weights
    # Each expert is quantised as it is read, gate and up together: for nvfp4 they share a scale.
    gate_up, down = _experts(request, projection, lambda w: quantise_weights(encoding, w.values))
    if encoding == Weights.FP8_BLOCK:
        return _fp8_block(gate_up, down)
    return PackedWeights.from_encoded(request.config.format, gate_up, down)


def _load_modelopt(request: Request) -> ExpertWeights:
    def scale(name: str, of_input: bool) -> float:
        return request.number(f"{name}.{'input_scale' if of_input else 'weight_scale_2'}")

    return _nvfp4(request, "weight", "input_scale", scale)


def _load_compressed_tensors(request: Request) -> ExpertWeights:
    def scale(name: str, of_input: bool) -> float:
        return 1 / request.number(f"{name}.{'input_global_scale' if of_input else 'weight_global_scale'}", (1,))

    return _nvfp4(request, "weight_packed", "input_global_scale", scale)


def _nvfp4(request: Request, values: str, input_scale: str, scale: Callable[[str, bool], float]) -> ExpertWeights:
    """scale: the fp32 scale of a projection's weights or of its input."""
    tokens = request.config.number_format.tokens
    # What was calibrated for e2m1 codes under factors up to 448 is a 6th of what e4m3 codes alone need.
    factor = 1.0 if tokens == Tokens.NVFP4 else E2M1_MAX
    of_rows: list[float] = []
    of_activations: list[float] = []

    def projection(expert: int, name: str) -> Encoded:
        base = request.name(expert, name)
        packed = request.matrix(expert, name, values, (torch.uint8,), per_column=2)
        factors = request.matrix(expert, name, "weight_scale", (torch.float8_e4m3fn,), per_column=nvfp4.BLOCK)
        request.check_factors(f"{base}.weight_scale", factors)
        if f"{base}.{input_scale}" in request.reader:
            (of_activations if name == "down_proj" else of_rows).append(scale(base, True) * factor)
        return Encoded(packed, factors, torch.tensor([scale(base, False)]))

    gate_up, down = _experts(request, projection)
    # Rows are quantised once for all experts.
    rows_scale = max(of_rows, default=1.0)
    activations_scale = torch.tensor(of_activations) if of_activations else 1.0
    return PackedWeights.from_encoded(
        request.config.format, gate_up, down, input_scale=rows_scale, intermediate_scale=activations_scale
    )


def _load_gpt_oss(request: Request) -> ExpertWeights:
    config, reader, block = request.config, request.reader, mxfp4.BLOCK
    hidden, inter, experts = config.hidden_size, config.intermediate_size, config.num_experts
    # Gate and up of a neuron are neighbours, so that a slice of neurons is a run of rows.
    rows = slice(2 * request.cut().start, 2 * request.cut().stop)
    columns = request.cut(block)
    uint8, bf16 = (torch.uint8,), (torch.bfloat16,)
    parts: dict[str, list[Tensor]] = {name: [] for name in ("gate_up", "gate_up_bias", "down", "down_bias")}
    factors: dict[str, list[Tensor]] = {"gate_up": [], "down": []}
    for expert in request.experts:
        one = slice(expert, expert + 1)

        def read(
            name: str, shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...], *part: slice, one: slice = one
        ) -> Tensor:
            return reader.read(f"{request.prefix}experts.{name}", (experts, *shape), dtypes, (one, *part))

        for name, n, k, part in (
            ("gate_up", 2 * inter, hidden, (rows,)),
            ("down", hidden, inter, (slice(None), columns)),
        ):
            blocks = read(f"{name}_proj_blocks", (n, k // block, block // 2), uint8, *part)
            scales = read(f"{name}_proj_scales", (n, k // block), uint8, *part)
            request.check_factors(f"{request.prefix}experts.{name}_proj_scales", scales)
            bias = read(f"{name}_proj_bias", (n,), bf16, *(part if name == "gate_up" else ()))
            is_gate_up = name == "gate_up"
            parts[name].append(deinterleave(blocks.flatten(2)) if is_gate_up else blocks.flatten(2))
            factors[name].append(deinterleave(scales) if is_gate_up else scales)
            parts[f"{name}_bias"].append((deinterleave(bias) if is_gate_up else bias).float())
    stacked = {name: torch.cat(tensors) for name, tensors in parts.items()}
    local = len(stacked["down"])
    return PackedWeights(
        config.format,
        stacked["gate_up"],
        torch.cat(factors["gate_up"]),
        stacked["down"],
        torch.cat(factors["down"]),
        gate_up_bias=stacked["gate_up_bias"],
        # A partial sum of each slice's rank; the bias is in one of them.
        down_bias=stacked["down_bias"] if request.parallel.tp_rank == 0 else None,
        alpha=torch.full((local,), GPT_OSS_ALPHA),
        beta=torch.full((local,), GPT_OSS_BETA),
        clamp=torch.full((local,), GPT_OSS_CLAMP),
    )


def _experts(
    request: Request,
    projection: Callable[[int, str], Encoded],
    encode: Callable[[Encoded], Encoded] = lambda weights: weights,
) -> tuple[Encoded, Encoded]:
    """(gate_up, down) of the experts, from a reader of one projection [1, N, K]; encode: applied to each expert's."""
    gate_up, down = [], []
    for expert in request.experts:
        gate, up = projection(expert, "gate_proj"), projection(expert, "up_proj")
        if gate.global_scale is not None and not torch.equal(gate.global_scale, up.global_scale):  # type: ignore[arg-type]
            name = request.name(expert, "gate_proj")
            got = f"an fp32 scale of {float(gate.global_scale)} beside {float(up.global_scale)} of up_proj"  # type: ignore[arg-type]
            raise InvalidArgument(name, got, "the same of both, whose products are scaled together")
        joined = Encoded(
            concatenate((gate.values, up.values), 1),
            None if gate.scale is None or up.scale is None else concatenate((gate.scale, up.scale), 1),
            gate.global_scale,
        )
        gate_up.append(encode(joined))
        down.append(encode(projection(expert, "down_proj")))
    return stack_experts(gate_up), stack_experts(down)


def _fp8_block(gate_up: Encoded, down: Encoded) -> FP8BlockWeights:
    assert gate_up.scale is not None and down.scale is not None
    return FP8BlockWeights(gate_up.values, gate_up.scale, down.values, down.scale)


# In the order in which a checkpoint is tried for them: those with a name of their own first.
NAMINGS = (
    Naming("gpt-oss MXFP4", "experts.gate_up_proj_blocks", (Weights.MXFP4,), _load_gpt_oss),
    Naming(
        "compressed-tensors NVFP4",
        "experts.{expert}.gate_proj.weight_packed",
        (Weights.NVFP4,),
        _load_compressed_tensors,
    ),
    Naming("ModelOpt NVFP4", "experts.{expert}.gate_proj.weight_scale_2", (Weights.NVFP4,), _load_modelopt),
    Naming(
        "DeepSeek FP8", "experts.{expert}.gate_proj.weight", (Weights.FP8_BLOCK,), _load_deepseek, torch.float8_e4m3fn
    ),
    Naming("bf16", "experts.{expert}.gate_proj.weight", tuple(Weights), _load_bf16, torch.bfloat16),
)
