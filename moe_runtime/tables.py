"""Plans as a person reads them."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table

from .executors.base import GEMMS
from .tuning import GemmChoice, Plan, PlanEntry

PIPED_WIDTH = 120


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
        for gemm, choice in _choices(entry):
            gain = f"{choice.default_us / choice.us - 1:+.1%}" if choice.us and choice.default_us else ""
            table.add_row(str(entry.bucket), str(entry.rows), gemm, _short(choice, plan), *_times(choice), gain)
    return table


def regimes_table(plans: Sequence[Plan]) -> Table:
    """Plans of the same buckets side by side; marks the lines where their tactics differ."""
    columns = ["tokens", "gemm"]
    for plan in plans:
        columns += [f"{_layout(plan)} tactic", "us", "default us"]
    table = _table([*columns, "differ"])
    for entries in zip(*(plan.entries for plan in plans), strict=True):
        for choices in zip(*(_choices(entry) for entry in entries), strict=True):
            gemm, _ = choices[0]
            cells = [
                cell
                for plan, (_, choice) in zip(plans, choices, strict=True)
                for cell in (_short(choice, plan), *_times(choice))
            ]
            differ = len({choice.tactic for _, choice in choices}) > 1
            table.add_row(str(entries[0].bucket), gemm, *cells, "*" if differ else "")
    return table


def differing(plans: Sequence[Plan]) -> list[str]:
    """The buckets and GEMMs for which the plans' tactics differ, as "64 gemm1"."""
    return [
        f"{entries[0].bucket} {choices[0][0]}"
        for entries in zip(*(plan.entries for plan in plans), strict=True)
        for choices in zip(*(_choices(entry) for entry in entries), strict=True)
        if len({choice.tactic for _, choice in choices}) > 1
    ]


def _table(columns: Sequence[str]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        is_text = "tactic" in column or column in ("gemm", "differ")
        table.add_column(column, justify="left" if is_text else "right", overflow="fold")
    return table


def _choices(entry: PlanEntry) -> list[tuple[str, GemmChoice]]:
    return list(zip(GEMMS, (entry.gemm1, entry.gemm2), strict=True))


def _short(choice: GemmChoice, plan: Plan) -> str:
    """A tactic's name without what all variants of the plan share."""
    return choice.tactic.split(f"{plan.key.format}_")[-1].replace("warpspecialized_", "")


def _times(choice: GemmChoice) -> list[str]:
    return ["-" if us is None else f"{us:.1f}" for us in (choice.us, choice.default_us)]


def _layout(plan: Plan) -> str:
    return f"{plan.key.regime}{plan.key.size}"
