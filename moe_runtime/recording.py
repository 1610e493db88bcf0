"""Routing as it really happened: recorded from a model's routers, and read back for a workload.

A recording is a .safetensors, .pt or .npy file. Each tensor of it is one of

    [tokens, top_k]          integer expert ids of one layer; tokens with an id of -1 (padding) are left out
    [layers, tokens, top_k]  of several layers
    [num_experts]            one layer's histogram: how often each expert was chosen
    [layers, num_experts]    of several layers

Several tensors in a file are layers in the natural order of their names. `record` writes .safetensors files with a
tensor per router, named after its module.
"""

from __future__ import annotations

import os
import pickle
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from .config import MoEConfig
from .errors import InvalidArgument
from .files import replacing
from .routing import route

ROUTERS = r"(.*\.)?(gate|router)"
"""Names of router modules in transformers, vLLM and SGLang: `gate` or `router`, wherever they sit."""


@dataclass(frozen=True)
class Recording:
    """What the routers of a model chose. layers: int32 [tokens, top_k] by module name, a tensor a call."""

    config: MoEConfig
    layers: dict[str, list[Tensor]] = field(default_factory=dict)

    def save(self, path: str | os.PathLike[str], histogram: bool = False) -> None:
        """Writes ids, or with `histogram` int64 counts [num_experts], of each router; the whole file or none.

        Raises InvalidArgument where nothing was recorded, for another suffix than .safetensors, and where the
        folder cannot be written.
        """
        target = Path(path)
        if target.suffix != ".safetensors":
            raise InvalidArgument("output", target, "a file name that ends in .safetensors")
        tensors = {name: torch.cat(calls) for name, calls in self.layers.items() if calls}
        if not tensors:
            raise InvalidArgument("model", "no call of its routers", "one call or more while it is recorded")
        if histogram:
            experts = self.config.num_experts
            tensors = {name: ids.flatten().bincount(minlength=experts) for name, ids in tensors.items()}
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with replacing(target) as temporary:
                save_file(tensors, temporary)
        except (OSError, SafetensorError) as error:
            raise InvalidArgument("output", target, "a file in a folder that can be written", f"({error})") from error


@contextmanager
def record(model: nn.Module, config: MoEConfig, routers: str = ROUTERS) -> Iterator[Recording]:
    """Records what the routers of `model` choose while the context is open, by forward hooks on those modules.

    routers: regular expression that a router's whole name (of model.named_modules()) matches.
    A router returns, alone or in a tuple, expert ids [..., top_k] or logits [..., num_experts]; logits are routed as
    `config` says, with the module's e_score_correction_bias where it has one. Experts and this package's FusedMoE
    get what their router returned, so the router is the one place to look. Hooks run in eager calls only: not in a
    replayed CUDA graph, and each copies ids to the CPU.

    Raises InvalidArgument when no module matches, and from a call whose router returns neither.
    """
    matching = {name: module for name, module in model.named_modules() if re.fullmatch(routers, name)}
    if not matching:
        raise InvalidArgument("routers", repr(routers), f"a pattern of module names of {type(model).__name__}")
    recording = Recording(config, {name: [] for name in matching})

    def hook(name: str) -> Any:
        def keep(module: nn.Module, _: Any, output: Any) -> None:
            ids = _chosen(output, config, getattr(module, "e_score_correction_bias", None))
            if ids is None:
                returned = [list(tensor.shape) for tensor in _tensors(output)]
                accepted = f"integer ids [..., {config.top_k}] or logits [..., {config.num_experts}]"
                raise InvalidArgument("routers", f"{name}, which returned {returned}", accepted)
            recording.layers[name].append(ids.to("cpu", torch.int32))

        return keep

    handles = [module.register_forward_hook(hook(name)) for name, module in matching.items()]
    try:
        yield recording
    finally:
        for handle in handles:
            handle.remove()


def _tensors(output: Any) -> list[Tensor]:
    return [part for part in (output if isinstance(output, tuple | list) else [output]) if isinstance(part, Tensor)]


def _chosen(output: Any, config: MoEConfig, bias: Tensor | None) -> Tensor | None:
    """Ids [tokens, k] from what a router returned; None where neither ids nor logits are among it."""
    tensors = [tensor for tensor in _tensors(output) if tensor.ndim]
    for tensor in tensors:
        if tensor.shape[-1] == config.top_k and not tensor.is_floating_point():
            return tensor.detach().flatten(end_dim=-2)
    for tensor in tensors:
        if tensor.shape[-1] == config.num_experts and tensor.is_floating_point():
            return route(config, tensor.detach().flatten(end_dim=-2), bias)[0]
    return None


def read_layer(path: Path, config: MoEConfig, index: int) -> Tensor:
    """The (index modulo layers)-th layer of a recording: ids int64 [tokens, top_k], or a histogram float64 [E].

    Raises InvalidArgument that names `distribution` for a file that is missing, damaged, of another type, or of
    a model with another number of experts or top_k.
    """
    try:
        layers = list(_stored(path, config).values())
    except _Refused as refused:
        raise InvalidArgument("distribution", f"recorded:{path} ({refused.reason})", refused.accepted) from None
    return layers[index % len(layers)]


def read_layers(path: Path, config: MoEConfig) -> dict[str, Tensor]:
    """Every layer of a recording as `read_layer` gives it, by its tensor's name and, of several in one, a number.

    Raises InvalidArgument that names `load`, for the same files.
    """
    try:
        return _stored(path, config)
    except _Refused as refused:
        raise InvalidArgument("load", f"{path} ({refused.reason})", refused.accepted) from None


def _stored(path: Path, config: MoEConfig) -> dict[str, Tensor]:
    try:
        stamp = path.stat()
    except OSError as error:
        raise _Refused(str(error.strerror), "a recording that can be read") from None
    # Tuning asks for the same file once a bucket and sample.
    return _read(path, config.num_experts, config.top_k, stamp.st_mtime_ns, stamp.st_size)


class _Refused(Exception):
    def __init__(self, reason: str, accepted: str) -> None:
        super().__init__(reason)
        self.reason, self.accepted = reason, accepted


@lru_cache(maxsize=1)
def _read(path: Path, num_experts: int, top_k: int, *version: int) -> dict[str, Tensor]:
    layers: dict[str, Tensor] = {}
    for name, tensor in _load(path).items():
        is_ids = not tensor.is_floating_point() and tensor.shape[-1:] == (top_k,) and tensor.ndim in (2, 3)
        if not is_ids and not (tensor.shape[-1:] == (num_experts,) and tensor.ndim in (1, 2)):
            accepted = (
                f"histograms [num_experts = {num_experts}] or integer ids [tokens, top_k = {top_k}], of one or more "
                "layers"
            )
            raise _Refused(f"{tensor.dtype} of shape {list(tensor.shape)}", accepted)
        parts = {name: tensor}
        if tensor.ndim == 2 + is_ids:
            parts = {f"{name}.{index}" if name else str(index): part for index, part in enumerate(tensor.unbind())}
        for each, part in parts.items():
            layers[each or "0"] = (_ids if is_ids else _histogram)(part, num_experts, top_k)
    if not layers:
        raise _Refused("no tensors", "one layer or more")
    return layers


def _ids(recorded: Tensor, num_experts: int, top_k: int) -> Tensor:
    ids = recorded.long()
    ids = ids[(ids != -1).all(1)]
    ascending = ids.sort(1).values
    if not len(ids):
        raise _Refused("ids of no token", "one token or more")
    if not 0 <= int(ids.min()) <= int(ids.max()) < num_experts:
        raise _Refused(f"ids from {int(ids.min())} to {int(ids.max())}", f"ids below num_experts = {num_experts}")
    if (ascending[:, 1:] == ascending[:, :-1]).any():
        raise _Refused("a token with one expert twice", f"{top_k} distinct ids a token")
    return ids


def _histogram(recorded: Tensor, num_experts: int, top_k: int) -> Tensor:
    counts = recorded.double()
    if not (counts.isfinite() & (counts >= 0)).all() or int((counts > 0).sum()) < top_k:
        raise _Refused("other counts", f"counts of 0 and more, with top_k = {top_k} or more above 0")
    return counts


def _load(path: Path) -> dict[str, Tensor]:
    """The file's tensors by name, "" for one without.

    Nothing in it is executed: pickles are read with weights_only, arrays without pickles.
    """
    try:
        if path.suffix == ".npy":
            return {"": torch.from_numpy(np.load(path, allow_pickle=False))}
        if path.suffix == ".safetensors":
            content: Any = load_file(path)
        elif path.suffix == ".pt":
            content = torch.load(path, map_location="cpu", weights_only=True)
        else:
            raise _Refused(f"suffix {path.suffix!r}", ".npy, .pt or .safetensors")
    except pickle.UnpicklingError:  # torch's own text tells how to switch the protection off
        raise _Refused("damaged, or a pickle of more than tensors", "an undamaged file of tensors") from None
    except (OSError, EOFError, RuntimeError, ValueError, TypeError, SafetensorError) as error:
        raise _Refused(f"{type(error).__name__}: {error}", "an undamaged file of tensors") from None
    if isinstance(content, list | tuple):
        content = {str(index): each for index, each in enumerate(content)}
    elif not isinstance(content, dict):
        content = {"": content}
    if not all(isinstance(tensor, Tensor) for tensor in content.values()):
        raise _Refused("something else than tensors", "a tensor, or a dict or list of tensors")
    return {str(name): content[name] for name in sorted(content, key=_natural)}


def _natural(name: object) -> list[tuple[int, str]]:
    """Sorts layers.2 before layers.10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", str(name))]
