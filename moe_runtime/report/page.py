"""The report as one HTML page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from ..tuning import Plan
from .figures import svg
from .sections import Report
from .style import COLOURS


def render(plans: Sequence[Plan]) -> str:
    """The page, which needs no other file and no network: inline CSS and SVG, text escaped."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    report = Report.of(plans)
    return environment.get_template("page.html.j2").render(report=report, svg=svg, colours=COLOURS)
