"""Experts of transformers' models run by our layers: `from_pretrained(..., experts_implementation="moe_runtime")`.

    from moe_runtime.integrations import transformers as moe_transformers

    moe_transformers.register()
    model = AutoModelForCausalLM.from_pretrained(name, dtype="bfloat16", experts_implementation="moe_runtime")

For transformers 5.17 and newer. Served are the experts whose implementation transformers lets one choose, in bf16, in
FP8 with 128x128 blocks of scales, and in 4 bits with a power of two per 32; with SwiGLU, clamped or not, with gpt-oss'
gate (bf16 and 4 bits), or with relu^2 and no gate; with biases in bf16 and 4 bits, and with a norm after each expert.
Anything else runs in transformers' own implementation, and a warning says so once for each reason: float16 and float32,
other gates, sizes that are no multiples of what the format takes, and calls that gradients must pass through.

gpt-oss checkpoints in MXFP4 that are loaded dequantised (`Mxfp4Config(dequantize=True)`, or for want of transformers'
kernels for them) are bf16 here, and `register(format="bf16_mxfp4")` gives them their 4 bits back. Loaded as MXFP4 they
have a module of their own, for which transformers offers no choice.

Memory. FP8 weights are read where they are. On a GPU bf16 and 4-bit weights are packed in the kernels' own layout by
the first call and held twice from then on, unless `register(keep_parameters=False)` lets the plain ones go;
`register(format="fp8_block")` halves what is added to bf16.

torch.compile takes a model whole, with `fullgraph=True` from its second call on: the first, which looks at the values
of the experts, must be outside or finds a graph break. A GPU for which there are no compiled kernels is an error.
"""

from __future__ import annotations

from pathlib import Path

from transformers.integrations.finegrained_fp8 import FP8ExpertsInterface
from transformers.integrations.moe import ExpertsInterface

from ... import machine
from ...errors import InvalidArgument
from .experts import Settings, experts_forward, use
from .reading import BF16_FORMATS

NAME = "moe_runtime"

__all__ = ["NAME", "register"]


def register(format: str = "bf16", plan_dir: str | Path | None = None, keep_parameters: bool = True) -> None:
    """Makes `experts_implementation="moe_runtime"` known to transformers.

    format: what bf16 experts become: "bf16", or "fp8_block", "mxfp8_mxfp4" or "bf16_mxfp4", to which their first call
        quantises them. Experts that come quantised stay what they are.
    plan_dir: a folder of tuned plans, each for the layers that it fits; by default that of `moe-runtime tune`.
    keep_parameters: False frees weights that the kernels read in another layout, each module's on its first call
        outside torch.compile. The model can then not be saved, moved, copied or trained any more.

    Holds for experts that have not been called yet. Raises InvalidArgument for another format.
    """
    if format not in BF16_FORMATS:
        raise InvalidArgument("format", repr(format), " or ".join(map(repr, BF16_FORMATS)))
    use(Settings(format, str(machine.plan_folder() if plan_dir is None else plan_dir), keep_parameters))
    # Experts look the name up in one of the two, by whether they are quantised; loading accepts a name of either.
    ExpertsInterface.register(NAME, experts_forward)
    FP8ExpertsInterface.register(NAME, experts_forward)
