"""A tuning run as a person sees it: progress with the time left, a plan file that grows, and a way back in."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from ..errors import PlanRefused
from ..executors.base import Executor, MoEProblem
from ..weights import ExpertWeights
from .plan import Plan, plan_lock
from .tuner import OnStep, tune


def tune_into(
    path: Path,
    problem: MoEProblem,
    weights: ExpertWeights,
    executor: Executor,
    tune_max_num_tokens: int,
    distribution: str,
    seed: int,
    console: Console,
    tuner: Callable[..., Plan] = tune,
    **settings: Any,
) -> Plan:
    """Tunes, with progress on `console` and the plan saved at `path` after every bucket.

    tuner: `tune`, or what takes its arguments. settings: its further keywords.
    An incomplete plan of the same key and seed that lies at `path` is gone on with; a complete one or another's is
    replaced. Raises PlanRefused for a file there that is no plan, InvalidArgument where `path` cannot be written.
    """
    with plan_lock(path):
        earlier = _earlier(path)
        with _progress(console, str(problem.parallel)) as on_step:
            plan = tuner(
                problem,
                weights,
                executor,
                tune_max_num_tokens,
                distribution,
                seed,
                resume=earlier,
                on_bucket=lambda so_far: so_far.save(path),
                on_step=on_step,
                **settings,
            )
        plan.save(path)
        return plan


def _earlier(path: Path) -> Plan | None:
    if not path.exists():
        return None
    try:
        return Plan.load(path)
    except PlanRefused as refusal:
        raise PlanRefused(f"{refusal}, or remove the file or name another output") from None


@contextmanager
def _progress(console: Console, title: str) -> Iterator[OnStep]:
    """A bar on a terminal; elsewhere, where a bar would be drawn only once, a line a step."""
    if not console.is_terminal:
        start = time.monotonic()

        def line(done: float, step: str) -> None:
            elapsed = time.monotonic() - start
            left = f", about {elapsed * (1 / done - 1):.0f} s left" if done else ""
            console.print(f"{title}: {done:4.0%}{left}: {step}")

        yield line
        return
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    with Progress(*columns, TextColumn("left"), TimeRemainingColumn(), console=console, transient=True) as progress:
        task = progress.add_task(title, total=1.0)
        yield lambda done, step: progress.update(task, completed=done, description=f"{title}: {step}")
