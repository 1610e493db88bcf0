"""What a report is made of, whatever it says: sections with words, figures and tables of ready cells."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from .figures import Panel


class Column(NamedTuple):
    heading: str
    numeric: bool = True


@dataclass(frozen=True)
class Table:
    """cells: a row a line, as they are shown. folded: shown on request, as the figures above say it at a glance."""

    caption: str
    columns: Sequence[Column]
    cells: Sequence[Sequence[str]]
    folded: bool = False


@dataclass(frozen=True)
class Section:
    name: str
    title: str
    words: Sequence[str]
    panels: Sequence[Panel] = ()
    tables: Sequence[Table] = ()


def us(value: float | None) -> str:
    return "-" if value is None else f"{value:,.1f}"


def percent(value: float | None) -> str:
    """Signed; "-" where not known."""
    return "-" if value is None else f"{value + 0.0:+.1%}"
