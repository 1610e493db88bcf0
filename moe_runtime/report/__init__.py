"""Tuned plans as one self-contained HTML page, or as one picture."""

from __future__ import annotations

import os
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from ..errors import InvalidArgument, Unsupported
from ..files import replacing
from ..tuning import Plan

__all__ = ["write_page", "write_png"]


def write_page(plans: Sequence[Plan], path: str | os.PathLike[str]) -> None:
    """Writes the page, whole or not at all.

    Raises InvalidArgument for no plan or where the file cannot be written, Unsupported without matplotlib.
    """
    _check(plans)
    from .page import render

    target = Path(path)
    text = render(plans)
    try:
        with replacing(target) as temporary:
            temporary.write_text(text, encoding="utf-8")
    except OSError as error:
        accepted = "a file in a folder that exists and can be written"
        raise InvalidArgument("output", target, accepted, f"({error.strerror})") from error


def write_png(plans: Sequence[Plan], path: str | os.PathLike[str]) -> None:
    """Writes the page's figures as one PNG. Raises as `write_page` does."""
    _check(plans)
    from .figures import png
    from .sections import Report

    report = Report.of(plans)
    panels = [panel for section in report.sections for panel in section.panels]
    png(panels, [f"{letter}  {tactic}" for tactic, letter in report.letters.items()], Path(path))


def _check(plans: Sequence[Plan]) -> None:
    if not plans:
        raise InvalidArgument("plans", "none", "one plan or more")
    if not all(plan.entries for plan in plans):
        raise InvalidArgument("plans", "one without a tuned bucket", "plans with an entry or more", "Tune it first.")
    if find_spec("matplotlib") is None:
        raise Unsupported(
            "report: matplotlib draws the figures and is not installed: pip install 'moe_runtime[report]'"
        )
