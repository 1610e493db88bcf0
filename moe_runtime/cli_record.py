"""moe-runtime record."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any

import torch
import typer
from rich.progress import track
from torch import nn

from .cli_options import ModelOption, err
from .config import MoEConfig
from .errors import InvalidArgument
from .recording import ROUTERS
from .recording import record as recording

_TARGET = "FILE.py:FUNCTION or package.module:FUNCTION"


def record(
    target: Annotated[
        str,
        typer.Argument(
            metavar="TARGET",
            help=f"{_TARGET}, which returns a torch module and what to call it with: an iterable of dicts of keyword "
            "arguments, or of single arguments.",
        ),
    ],
    model: ModelOption,
    output: Annotated[Path, typer.Option("-o", "--output", help="The recording, a .safetensors file.")],
    routers: Annotated[str, typer.Option(help="Regular expression for whole names of the router modules.")] = ROUTERS,
    histogram: Annotated[
        bool, typer.Option("--histogram", help="Keep how often each expert was chosen, not each token's ids.")
    ] = False,
) -> None:
    """Run a model and write what its routers chose, for `tune --distribution recorded:FILE` and `place --load FILE`.

    Ctrl-C keeps the calls that are done.
    """
    config = MoEConfig.preset(model)
    module, batches = _load(target)
    stopped = False
    with torch.inference_mode(), recording(module, config, routers) as recorded:
        try:
            for batch in track(batches, "recording", console=err):
                module(**batch) if isinstance(batch, Mapping) else module(batch)
        except KeyboardInterrupt:
            stopped = True
    recorded.save(output, histogram)
    err.print(f"{'stopped; ' if stopped else ''}wrote {output}: {len(recorded.layers)} routers")
    if stopped:
        raise typer.Exit(130)


def _load(target: str) -> tuple[nn.Module, Iterable[Any]]:
    """What the target's function returns. Raises InvalidArgument; what the user's own code raises goes through."""
    returned = _function(target)()
    if not (isinstance(returned, tuple) and len(returned) == 2 and isinstance(returned[0], nn.Module)):
        accepted = "a function that returns (torch.nn.Module, an iterable of its arguments)"
        raise InvalidArgument("TARGET", f"{target}, which returned {type(returned).__name__}", accepted)
    return returned


def _function(target: str) -> Callable[[], Any]:
    place, _, name = target.rpartition(":")
    function = getattr(_module(target, place), name, None)
    if not callable(function):
        raise InvalidArgument("TARGET", f"{target!r}, which has no function {name!r}", _TARGET)
    return function


def _module(target: str, place: str) -> ModuleType:
    if not place.endswith(".py"):
        try:
            return importlib.import_module(place)
        except (ImportError, ValueError) as error:
            raise InvalidArgument("TARGET", f"{target!r} ({error})", _TARGET) from None
    spec = importlib.util.spec_from_file_location(Path(place).stem, place)
    if spec is None or spec.loader is None or not Path(place).is_file():
        raise InvalidArgument("TARGET", f"{target!r}, where there is no file {place}", _TARGET)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
