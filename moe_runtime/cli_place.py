"""moe-runtime place."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich import box
from rich.table import Table
from rich.text import Text

from .balancing import place as place_experts
from .cli_options import JsonOption, ModelOption, ParallelOption, err, out
from .config import MoEConfig
from .distributions import routed_part
from .parallel import Parallel
from .placement import Placements
from .recording import read_layers


def place(
    load: Annotated[Path, typer.Option(help="Recorded ids or histograms, as `moe-runtime record` writes them.")],
    model: ModelOption,
    parallel: ParallelOption,
    redundant: Annotated[int, typer.Option(help="Slots beyond one for each expert, over all ranks.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="The placement, a JSON file.")],
    nodes: Annotated[
        int, typer.Option(help="Keep groups of experts on one of so many nodes, where routing is limited to groups.")
    ] = 1,
    as_json: JsonOption = False,
) -> None:
    """Place experts over ranks for a recorded load, the busiest with replicas, for `tune --placement FILE`."""
    config = MoEConfig.preset(model)
    layers = read_layers(load, routed_part(config))
    placements = place_experts(config, layers, Parallel.parse(parallel).size, redundant, nodes)
    placements.save(output)
    if as_json:
        found = {name: placement.balance._asdict() for name, placement in placements.layers.items()}
        print(json.dumps({"digest": placements.digest(), "layers": found}, indent=2))
    else:
        out.print(_table(placements))
    err.print(f"wrote {output}")


def _table(placements: Placements) -> Table:
    ranks, slots = placements.ep_size, placements.num_physical_experts // placements.ep_size
    title = f"busiest rank over the mean of {ranks}, {slots} slots each"
    table = Table(title=title, box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("layer", overflow="fold")
    for column in ("before", "after", "experts with replicas", "most replicas"):
        table.add_column(column, justify="right")
    for name, placement in placements.layers.items():
        before, after, replicated, most = placement.balance
        table.add_row(Text(name), f"{before:.3f}", f"{after:.3f}", str(replicated), str(most))
    return table
