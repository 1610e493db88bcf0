"""The experts of one layer from a published checkpoint; `namings` says which are understood."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track

from ..config import MoEConfig
from ..errors import InvalidArgument
from ..formats import FORMATS
from ..parallel import Parallel
from ..weights import ExpertWeights
from .namings import NAMINGS, Naming, Request
from .reader import CheckpointReader

__all__ = ["load_experts"]


def load_experts(
    path: str | Path,
    layer: int,
    config: MoEConfig,
    parallel: Parallel,
    device: torch.device | str = "cpu",
    console: Console | None = None,
    experts: Sequence[int] | None = None,
) -> ExpertWeights:
    """Reads a rank's share of one layer's experts, in config.format; of other experts nothing is read.

    Under tensor parallelism rows of gate and up, and columns of down, are cut with their blocks of scales.

    path: a .safetensors file, or a checkpoint folder with one or with an index. device: where the weights go once all
    of them were read and checked. console: where progress is shown; None for nowhere.
    experts: which are read, by global id, in this order, such as `Placement.local_experts`; None for the rank's shard.

    Raises InvalidArgument, naming the file and the tensor, for a path, a tensor, a dtype, a shape or a factor that does
    not fit, for a format that the checkpoint's weights are not in (bf16 weights are quantised to any), and for experts
    that the layer does not have.
    """
    prefix, wanted = f"model.layers.{layer}.mlp.", parallel.shard(config.num_experts) if experts is None else experts
    if not wanted or not set(wanted) <= set(range(config.num_experts)):
        raise InvalidArgument("experts", list(wanted), f"ids of one expert or more, below {config.num_experts}")
    with CheckpointReader(path) as reader:
        naming = _naming(reader, prefix, min(wanted[0], config.num_routed_experts - 1), config)
        shown = track(wanted, f"layer {layer}, {naming.name}", console=console, disable=console is None)
        weights = naming.load(Request(reader, prefix, config, parallel, shown))
    weights.check(config, len(wanted), tp_size=parallel.tp_size)
    return weights.to(device)


def _naming(reader: CheckpointReader, prefix: str, expert: int, config: MoEConfig) -> Naming:
    for naming in NAMINGS:
        mark = prefix + naming.mark.format(expert=expert)
        dtype = reader.dtype(mark)
        if dtype is None or naming.dtype not in (None, dtype):
            continue
        if config.number_format.weights not in naming.weights:
            fitting = [name for name, found in FORMATS.items() if found.weights in naming.weights]
            raise InvalidArgument("format", repr(config.format), f"{', '.join(fitting)} for weights in {naming.name}")
        return naming
    # Whatever it is, a bf16 checkpoint would have held this, and reading it says what is wrong.
    name = f"{prefix}experts.{expert}.gate_proj.weight"
    shape = (config.intermediate_size, config.hidden_size)
    reader.read(name, shape, (torch.float8_e4m3fn, torch.bfloat16))
    raise AssertionError(f"{name} was found by no naming")
