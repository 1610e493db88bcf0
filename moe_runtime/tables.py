"""Plans as a person reads them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from rich import box
from rich.console import Console
from rich.table import Table

from .executors.base import GEMMS, Gemm
from .tuning import GemmChoice, Plan
from .tuning.plan_tools import choices, serving_entry

PIPED_WIDTH = 160
"""Holds two plans' tactics side by side."""

_SHARED = re.compile(r"^sm\d+a_\w+?_(?=direct_|mixed_|\d+x)|_1x1x1|_warpspecialized|_cooperative")


def make_console(stderr: bool = False) -> Console:
    """A console whose tables do not shrink to 80 columns where a pipe or a log file has no width of its own."""
    console = Console(stderr=stderr, highlight=False, soft_wrap=True)
    if not console.is_terminal:
        console.width = PIPED_WIDTH
    return console


def plan_table(plan: Plan) -> Table:
    """A line a bucket and GEMM, with what tuning gained over the default tactic."""
    table = _table(["tokens", "rows", "gemm", "tactic", "us", "default us", "gain"])
    for entry in plan.entries:
        for gemm, choice in choices(entry):
            gain = f"{choice.default_us / choice.us - 1:+.1%}" if choice.us and choice.default_us else ""
            table.add_row(
                str(entry.bucket),
                str(entry.rows),
                gemm,
                short_name(choice.tactic),
                *_times(choice),
                gain,
            )
    return table


def regimes_table(plans: Sequence[Plan]) -> Table:
    """What serves each number of tokens that is a bucket of any of the plans; marks where their tactics differ.

    Times stand where the number is the plan's own bucket, for they were measured there.
    """
    columns = ["tokens", "gemm"]
    for plan in plans:
        columns += [f"{plan.key.parallel} tactic", "us", "default us"]
    table = _table([*columns, "differ"])
    for tokens, gemm, served in _served(plans):
        cells = []
        for plan, choice in zip(plans, served, strict=True):
            times = _times(choice) if choice is not None and tokens in plan.buckets else ["", ""]
            cells += [short_name(choice.tactic) if choice is not None else "(default)", *times]
        table.add_row(str(tokens), gemm, *cells, "*" if _differ(served) else "")
    return table


def differing(plans: Sequence[Plan]) -> list[str]:
    """The tokens and GEMMs of `regimes_table` at which the plans' tactics differ, as "64 gemm1"."""
    return [f"{tokens} {gemm}" for tokens, gemm, served in _served(plans) if _differ(served)]


def _served(plans: Sequence[Plan]) -> Iterator[tuple[int, Gemm, list[GemmChoice | None]]]:
    """(tokens per rank, GEMM, each plan's choice for it; None where the plan leaves it to the default)."""
    for tokens in sorted({bucket for plan in plans for bucket in plan.buckets}):
        entries = [serving_entry(plan, tokens) for plan in plans]
        for gemm in GEMMS:
            yield tokens, gemm, [None if entry is None else dict(choices(entry))[gemm] for entry in entries]


def _differ(served: Sequence[GemmChoice | None]) -> bool:
    return len({None if choice is None else choice.tactic for choice in served}) > 1


def _table(columns: Sequence[str]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        is_text = "tactic" in column or column in ("gemm", "differ")
        table.add_column(column, justify="left" if is_text else "right", overflow="fold")
    return table


def short_name(tactic: str) -> str:
    """A tactic's name without what all kernels of our own for a format have in it."""
    return _SHARED.sub("", tactic)


def _times(choice: GemmChoice) -> list[str]:
    return ["-" if us is None else f"{us:.1f}" for us in (choice.us, choice.default_us)]
