"""moe-runtime report."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .cli_options import MovedPlacementOption, err
from .report import write_page, write_png
from .tuning import Plan
from .tuning.plan_tools import with_placement


def report(
    plans: Annotated[list[Path], typer.Argument(help="Tuned plans; several are set beside each other.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="The page's file.")] = Path("report.html"),
    placement: MovedPlacementOption = None,
    png: Annotated[Path | None, typer.Option(help="The figures as one PNG, too.")] = None,
) -> None:
    """Draw plans as one self-contained HTML page: times, chosen tactics, roofline, rows per expert, gain and regret."""
    loaded = with_placement([Plan.load(path) for path in plans], placement or [])
    write_page(loaded, output)
    err.print(f"wrote {output}")
    if png is not None:
        write_png(loaded, png)
        err.print(f"wrote {png}")
