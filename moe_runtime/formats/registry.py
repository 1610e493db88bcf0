"""Which number formats there are: the one list from which layer, tuner, operators and command line take them.

A format pairs an encoding of the weights with one of the token rows. Nothing here needs torch.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

from ..errors import InvalidArgument


class Weights(enum.IntEnum):
    """How weights are encoded."""

    FP8_BLOCK = 0
    MXFP4 = 1
    NVFP4 = 2
    BF16 = 3

    @property
    def bytes_per_value(self) -> float:
        """With its share of the block's scale."""
        return {self.FP8_BLOCK: 1 + 4 / 128**2, self.MXFP4: 1 / 2 + 1 / 32, self.NVFP4: 1 / 2 + 1 / 16, self.BF16: 2.0}[
            self
        ]


class WeightLayout(enum.IntEnum):
    """How weights lie for kernels, each served by kernels of its own; the numbers are those of MoeWeights in
    templates/abi.h."""

    FP8_BLOCK = 0
    MXFP4 = 1
    NVFP4 = 2
    BF16 = 3
    FP8_MXFP4 = 4
    """MXFP4's for tokens whose e4m3 the kernels multiply; those of all others, but fp8_block, they multiply as bf16."""

    @property
    def encoding(self) -> Weights:
        return Weights.MXFP4 if self == self.FP8_MXFP4 else Weights(self)

    @property
    def multiplies_e4m3(self) -> bool:
        """Rows of tokens are e4m3, a byte a value, not bf16."""
        return self in (self.FP8_BLOCK, self.FP8_MXFP4)

    @property
    def token_bytes(self) -> int:
        """Of a value in a row of tokens."""
        return 1 if self.multiplies_e4m3 else 2


class Tokens(enum.IntEnum):
    """How token rows and activations are encoded; the numbers are those of MoeTokens in templates/abi.h."""

    FP8_BLOCK = 0
    BF16 = 1
    FP8 = 2
    MXFP8 = 3
    NVFP4 = 4

    @property
    def has_tensor_scale(self) -> bool:
        """One fp32 scale for all rows: an e4m3 code or factor alone does not reach every magnitude."""
        return self in (self.FP8, self.NVFP4)


class Extra(enum.Flag):
    """What a layer may carry for each expert beside its weights."""

    NONE = 0
    BIAS = enum.auto()
    ALPHA = enum.auto()
    BETA = enum.auto()
    CLAMP = enum.auto()
    OUTPUT_SCALES = enum.auto()


@dataclass(frozen=True)
class Format:
    """One number format of a layer.

    extras: per-expert tensors that it takes. multiple: what hidden and intermediate size must be multiples of.
    activations: kinds between the GEMMs. operator: the function in `moe_runtime.flashinfer` by its runner's name, if
    there is such a runner.
    """

    name: str
    weights: Weights
    tokens: Tokens
    extras: Extra
    multiple: int = 32
    activations: tuple[str, ...] = ("swiglu", "relu2")
    operator: str | None = None

    @property
    def weight_layout(self) -> WeightLayout:
        both = (self.weights, self.tokens)
        return WeightLayout.FP8_MXFP4 if both == (Weights.MXFP4, Tokens.FP8) else WeightLayout(self.weights)


_GPT_OSS = Extra.BIAS | Extra.ALPHA | Extra.BETA | Extra.CLAMP

FORMATS: dict[str, Format] = {
    format.name: format
    for format in (
        # Its activation kernels serve gated layers only, and one clamp for all experts, which the config holds.
        Format(
            "fp8_block",
            Weights.FP8_BLOCK,
            Tokens.FP8_BLOCK,
            Extra.NONE,
            multiple=128,
            activations=("swiglu",),
            operator="fp8_block_scale_moe",
        ),
        Format("nvfp4", Weights.NVFP4, Tokens.NVFP4, _GPT_OSS | Extra.OUTPUT_SCALES, operator="fp4_block_scale_moe"),
        Format("mxfp8_mxfp4", Weights.MXFP4, Tokens.MXFP8, _GPT_OSS, operator="mxe4m3_mxe2m1_block_scale_moe"),
        Format(
            "fp8_mxfp4",
            Weights.MXFP4,
            Tokens.FP8,
            _GPT_OSS | Extra.OUTPUT_SCALES,
            operator="e4m3_mxe2m1_block_scale_moe",
        ),
        Format("bf16_mxfp4", Weights.MXFP4, Tokens.BF16, _GPT_OSS, operator="bf16_mxe2m1_block_scale_moe"),
        Format("fp8_nvfp4", Weights.NVFP4, Tokens.FP8, Extra.OUTPUT_SCALES, operator="fp8_fp4_block_scale_moe"),
        Format("bf16", Weights.BF16, Tokens.BF16, _GPT_OSS),
    )
}

ACTIVATIONS = tuple(dict.fromkeys(kind for format in FORMATS.values() for kind in format.activations))


def find_format(name: str) -> Format:
    """Raises InvalidArgument with the known names."""
    try:
        return FORMATS[name]
    except KeyError:
        raise InvalidArgument("format", repr(name), ", ".join(FORMATS)) from None
