"""Colours of the page and its figures, and the typography of the figures."""

from __future__ import annotations

from typing import Any, NamedTuple


class Colour(NamedTuple):
    """One colour in both themes; figures are drawn in `light`, which the page makes `var(--name)`."""

    name: str
    light: str
    dark: str


PAGE = Colour("page", "#fffffe", "#14171b")
INK = Colour("ink", "#1b1e23", "#e8eaed")
SOFT = Colour("soft", "#8f959c", "#868d96")
GRID = Colour("grid", "#e1e4e8", "#343a42")
ON_COLOUR = Colour("on", "#fdfdfe", "#111317")
SERIES = (
    Colour("s0", "#0072b2", "#56b4e9"),
    Colour("s1", "#c44e00", "#ff9a5c"),
    Colour("s2", "#00795c", "#3fd1a4"),
    Colour("s3", "#a3387e", "#f08fcb"),
    Colour("s4", "#846800", "#e6c84f"),
    Colour("s5", "#4d4dd6", "#a5a5ff"),
    Colour("s6", "#7a4a2b", "#d0a283"),
    Colour("s7", "#55606b", "#b3bcc6"),
)
"""Each has a contrast of 4.5 or more against its theme's page, so that letters of `on` are legible on it."""
COLOURS = (PAGE, INK, SOFT, GRID, ON_COLOUR, *SERIES)

MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
HATCHES = ("", "///", "\\\\\\", "xxx", "...", "++")
DASHES = ("-", "--", "-.", ":")

RC: dict[Any, Any] = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.edgecolor": SOFT.light,
    "grid.color": GRID.light,
    "hatch.color": ON_COLOUR.light,
    "hatch.linewidth": 0.8,
    "legend.frameon": False,
    "legend.fontsize": 9,
} | {key: INK.light for key in ("text.color", "axes.labelcolor", "axes.titlecolor", "xtick.color", "ytick.color")}
