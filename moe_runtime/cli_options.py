"""What the commands share: options, the layer and executor they name, and where text goes."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Annotated

import torch
import typer

from . import machine
from .config import PRESETS, MoEConfig
from .errors import InvalidArgument, Unsupported
from .executors import get_executor
from .executors.base import Executor, MoEProblem
from .formats import FORMATS
from .parallel import Parallel
from .placement import Placements, physical_config
from .tables import make_console

out, err = make_console(), make_console(stderr=True)

DEVICES = ("cuda", "cpu")

ModelOption = Annotated[str, typer.Option(help=f"One of {', '.join(PRESETS)}.")]
ParallelOption = Annotated[
    str, typer.Option(help="dep<N> (attention data-parallel), ep<N>, tp<N>, or mixes such as dep4tp2.")
]
FormatOption = Annotated[
    str | None, typer.Option("--format", help=f"{', '.join(FORMATS)}; by default the model's own.")
]
RankOption = Annotated[int, typer.Option(help="The rank whose share is run, 0 to N - 1.")]
DeviceOption = Annotated[str | None, typer.Option(help="cuda or cpu; the GPU where there is one.")]
ScaleOption = Annotated[int, typer.Option(min=1, help="Divide hidden and intermediate size by this.")]
SmallOption = Annotated[bool, typer.Option("--small", help="Scale the layer to what this machine's CPU can time.")]
PlacementOption = Annotated[
    Path | None, typer.Option(help="Where experts lie and which have replicas, from `moe-runtime place`.")
]
MovedPlacementOption = Annotated[
    list[Path] | None,
    typer.Option("--placement", help="Where a placement that a plan was tuned under is now, if not where it was."),
]
SeedOption = Annotated[int, typer.Option(help="Of the random weights, rows and routing.")]
JsonOption = Annotated[bool, typer.Option("--json", help="JSON on stdout in place of a table.")]


def named_executor(device: str | None) -> Executor:
    """The executor of --device. Raises InvalidArgument for an unknown one, Unsupported for one that is not here."""
    name = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if name not in DEVICES:
        raise InvalidArgument("--device", repr(name), " or ".join(DEVICES))
    if name == "cuda" and not torch.cuda.is_available():
        raise Unsupported("--device cuda, but torch sees no GPU here: `moe-runtime info` says what was found")
    return get_executor(name)


def named_config(model: str, format: str | None, scale: int, small: bool) -> MoEConfig:
    """The layer of --model in --format, scaled by --scale or --small. Raises InvalidArgument."""
    config = MoEConfig.preset(model)
    if format is not None:
        config = dataclasses.replace(config, format=format)
    if small and scale > 1:
        raise InvalidArgument("--small", f"with --scale {scale}", "one of the two")
    if small:
        return machine.scaled_to_cpu(config)
    return config if scale == 1 else machine.scaled_by(config, scale)


def load_placements(placement: Path | None) -> Placements | None:
    """Those of --placement, if it was given. Raises InvalidArgument."""
    return None if placement is None else Placements.load(placement)


def placed_config(config: MoEConfig, parallel: Parallel, placements: Placements | None) -> MoEConfig:
    """The layer with an expert for each slot of the placements; as it is without any. Raises InvalidArgument."""
    if placements is None:
        return config
    physical = physical_config(config, placements)
    placements.check_problem(physical, parallel)
    return physical


def title(problem: MoEProblem) -> str:
    return f"{problem.config.name} under {problem.parallel} ({machine.shape_text(problem.config)})"


def parse_seconds(text: str) -> float:
    """--budget: a number of seconds, or with a unit, 120s, 2m or 1h. Raises InvalidArgument."""
    match = re.fullmatch(r"([0-9]+\.?[0-9]*|\.[0-9]+)([smh]?)", text.strip())
    if match is None:
        raise InvalidArgument("--budget", repr(text), "a number of seconds, or with a unit, such as 120s, 2m or 1h")
    return float(match[1]) * {"": 1, "s": 1, "m": 60, "h": 3600}[match[2]]
