"""moe-runtime plan show | diff | check | merge, and moe-runtime explain."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import msgspec
import typer
from rich import box
from rich.table import Table
from rich.text import Text

from . import machine
from .cli_options import (
    DeviceOption,
    FormatOption,
    JsonOption,
    MovedPlacementOption,
    PlacementOption,
    ScaleOption,
    SmallOption,
    err,
    load_placements,
    named_config,
    named_executor,
    out,
    placed_config,
    title,
)
from .errors import InvalidArgument, MoEError, PlanRefused
from .executors.base import MoEProblem
from .parallel import Parallel
from .tables import plan_table
from .tuning import Plan, PlanKey, Timing
from .tuning import plan_tools as tools
from .tuning.draws import DRAWS_OF_FEW_ROWS
from .tuning.explain import Candidate, Explanation, RowsPerExpert
from .tuning.explain import explain as explain_plan
from .workload import kernel_rows

plans = typer.Typer(no_args_is_help=True, help="Look at tuned plans, compare them, check and merge them.")

PlanArgument = Annotated[Path, typer.Argument(metavar="PLAN", help="A plan's file.")]


@plans.command()
def show(
    plan: Annotated[
        Path | None, typer.Argument(metavar="[PLAN]", help="A plan's file; by default all are listed.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Show a plan, or list those in the plan folder."""
    if plan is None:
        _list(machine.plan_folder(), as_json)
        return
    shown = Plan.load(plan)
    if as_json:
        _print_json(shown)
        return
    _say(f"{_layer(shown.key)}, {_workload(shown.key)}, on {shown.key.device} (library {shown.key.library_hash})")
    plural = "s" if shown.samples > 1 else ""
    samples = f"{shown.samples} sample{plural} a bucket ({DRAWS_OF_FEW_ROWS} draws where rows are few)"
    _say(f"{_progress(shown)}, {samples}, seed {shown.seed}, {shown.created}, {shown.digest()[:12]}")
    out.print(plan_table(shown))
    for tactic, reason in shown.quarantined.items():
        _say(f"quarantined {tactic}: {reason}")


@plans.command()
def diff(first: PlanArgument, second: PlanArgument, as_json: JsonOption = False) -> None:
    """Compare two plans; exit status 1 when they differ in more than times and dates."""
    found = tools.diff(Plan.load(first), Plan.load(second))
    if as_json:
        _print_json({"differ": found.differ} | msgspec.to_builtins(found))
    else:
        _print_diff(found)
    if found.differ:
        raise typer.Exit(1)


@plans.command()
def check(
    plan: PlanArgument,
    model: Annotated[str | None, typer.Option(help="The model it is to serve; by default the plan's own.")] = None,
    parallel: Annotated[str | None, typer.Option(help="The layout it is to serve, such as dep8; with --model.")] = None,
    format: FormatOption = None,
    scale: ScaleOption = 1,
    small: SmallOption = False,
    placement: PlacementOption = None,
    device: DeviceOption = None,
    as_json: JsonOption = False,
) -> None:
    """Say whether a plan can be used here, and what to do where it cannot; exit status 1 when it cannot."""
    problem = _problem(model, parallel, format, scale, small, placement)
    executor = named_executor(device)
    try:
        findings = tools.check(Plan.load(plan), executor, problem)
    except MoEError as refusal:
        findings = (tools.Finding(str(refusal), "restore the file, or tune again into another", refused=True),)
    refused = any(finding.refused for finding in findings)
    if as_json:
        _print_json({"fits": not refused, "findings": findings})
    else:
        for finding in findings:
            _say(f"{'refused' if finding.refused else 'note'}: {finding.what}\n         {finding.todo}")
        wanted = "its layer" if problem is None else title(problem)
        _say(f"{plan} {'does not fit' if refused else 'fits'} {wanted} on {executor.device_name}")
    if refused:
        raise typer.Exit(1)


@plans.command()
def merge(
    sources: Annotated[
        list[Path], typer.Argument(metavar="PLAN...", help="Plans of one key and one way of measuring.")
    ],
    output: Annotated[Path, typer.Option("-o", "--output", help="Where to; a plan that is there is merged as well.")],
) -> None:
    """Make one plan of several: each bucket from the plan that measured it most surely."""
    merged = tools.merge_into(output, sources)
    for name in dict.fromkeys(merged.sources.values()):
        taken = [str(bucket) for bucket, source in merged.sources.items() if source == name]
        _say(f"{name}: buckets {', '.join(taken)}")
    for bucket, reason in merged.dropped.items():
        _say(f"bucket {bucket} is left to be tuned again: {reason}")
    err.print(f"wrote {output}: {_progress(merged.plan)}", markup=False)


def explain(
    plan: PlanArgument,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens per rank; under dep<N> the kernels get N times as many.")],
    placement: MovedPlacementOption = None,
    as_json: JsonOption = False,
) -> None:
    """Tell why a plan runs which tactics at so many tokens: the bucket, its workload, the candidates, the rule."""
    (loaded,) = tools.with_placement([Plan.load(plan)], placement or [])
    found = explain_plan(loaded, tokens)
    if as_json:
        _print_json(found)
    else:
        _print_explanation(loaded, found)


def _list(folder: Path, as_json: bool) -> None:
    try:
        paths = sorted(path for path in folder.iterdir() if path.suffix == ".json") if folder.exists() else []
    except OSError as error:
        name = machine.PLAN_FOLDER_VARIABLE
        raise InvalidArgument(name, folder, "a folder of plans that can be read", f"({error.strerror})") from error
    read: dict[Path, Plan] = {}
    refused: dict[Path, str] = {}
    for path in paths:
        try:
            read[path] = Plan.load(path)
        except PlanRefused as refusal:
            refused[path] = str(refusal)
    if as_json:
        listed = [{"path": str(path), "key": plan.key, "complete": plan.complete} for path, plan in read.items()]
        _print_json(listed + [{"path": str(path), "refused": reason} for path, reason in refused.items()])
        return
    count = "1 plan" if len(paths) == 1 else f"{len(paths) or 'no'} plans"
    _say(f"{count} in {folder} ({machine.PLAN_FOLDER_VARIABLE} names another folder)")
    if read:
        table = _table("file", "layer", "workload", "device", "tuned")
        for path, plan in read.items():
            cells = (
                path.name,
                _layer(plan.key),
                _workload(plan.key),
                plan.key.device,
                f"{_progress(plan)}, {plan.created}",
            )
            _row(table, *cells)
        out.print(table)
    for reason in refused.values():
        _say(f"refused: {reason}")


def _print_diff(found: tools.PlanDiff) -> None:
    if not found.differ:
        _say("the same key, buckets and tactics")
        return
    for field, (a, b) in (*found.key.items(), *found.settings.items()):
        _say(f"{field}: {_listed(a)} | {_listed(b)}")
    for place, untuned in zip(("first", "second"), found.untuned, strict=True):
        if untuned:
            _say(f"only the {place} plan lacks tactics at {_listed(untuned)} tokens")
    if not found.tactics:
        _say("the same tactics where both are tuned")
        return
    table = _table("tokens", "gemm", "first", "second", "second's in the first", "first's in the second", "so it is")
    for one in found.tactics:
        _row(table, str(one.tokens), one.gemm, *one.tactics, *map(_loss_text, one.losses), one.verdict)
    out.print(table)
    _say("Each plan's own times of the other's tactic, against its own choice. Where intervals overlap it is noise.")


def _print_explanation(plan: Plan, found: Explanation) -> None:
    rows = kernel_rows(found.tokens, plan.key.parallel)
    _say(f"{_layer(plan.key)}, {_workload(plan.key)}, on {plan.key.device}")
    _say(f"{found.tokens} tokens per rank ({rows} kernel rows): {found.rounding}")
    spread = found.rows_per_expert
    if isinstance(spread, RowsPerExpert):
        low, mean, high = spread.smallest, spread.mean, spread.largest
        spread = f"{low} to {high}, mean {mean:.1f}, over {spread.experts} experts"
    _say(f"rows per expert of bucket {found.bucket}: {spread}")
    if not found.gemms:
        _say(f"bucket {found.bucket} was not tuned: the default tactics run; `moe-runtime tune` goes on with it")
    for gemm in found.gemms:
        _say(f"\n{gemm.gemm}: {gemm.tactic}\n  {gemm.decision}")
        if gemm.roof is not None:
            _say(f"  roofs: memory {gemm.roof.memory_us:.1f} us, tensor cores {gemm.roof.flops_us:.1f} us")
        table = _table("tactic", "us", f"{plan.confidence:.0%} interval", "predicted us", "")
        for candidate in gemm.candidates:
            _row(table, candidate.tactic, *_candidate_times(candidate), candidate.note)
        out.print(table)
    if found.layer is not None:
        _say(f"\nthe whole layer\n  {found.layer.decision}")
        table = _table("gemm1 tactic", "gemm2 tactic", "us", f"{plan.confidence:.0%} interval")
        for pair in found.layer.pairs:
            _row(table, pair.gemm1, pair.gemm2, *_times(pair.timing))
        out.print(table)


def _candidate_times(candidate: Candidate) -> tuple[str, str, str]:
    predicted = "" if candidate.predicted is None else f"{candidate.predicted:.1f}"
    return (*(("", "") if candidate.timing is None else _times(candidate.timing)), predicted)


def _times(timing: Timing) -> tuple[str, str]:
    return f"{timing.us:.1f}", f"{timing.low:.1f} to {timing.high:.1f}"


def _problem(
    model: str | None, parallel: str | None, format: str | None, scale: int, small: bool, placement: Path | None
) -> MoEProblem | None:
    if (model is None) != (parallel is None):
        missing = "--model" if model is None else "--parallel"
        raise InvalidArgument(missing, "nothing", "--model and --parallel together, or neither")
    if model is None or parallel is None:
        return None
    layout = Parallel.parse(parallel)
    config = named_config(model, format, scale, small)
    return MoEProblem(placed_config(config, layout, load_placements(placement)), layout)


def _layer(key: PlanKey) -> str:
    return (
        f"{key.parallel}, H {key.hidden_size}, I {key.intermediate_size}, {key.num_experts} experts, top {key.top_k}, "
        f"{key.routing}, {key.format}"
    )


def _workload(key: PlanKey) -> str:
    placed = f"placed by {key.placement}, " if key.placement else ""
    return f"{placed}{key.distribution}, {key.dispatch}, {key.objective}, up to {key.tune_max_num_tokens} tokens a rank"


def _progress(plan: Plan) -> str:
    return f"{len(plan.entries)} of {len(plan.buckets)} buckets"


def _loss_text(loss: tools.Loss | None) -> str:
    if loss is None:
        return "not timed"
    return f"{loss.relative:+.1%} ({'clear' if loss.clear else 'within noise'})"


def _listed(value: Any) -> str:
    return (
        (", ".join(map(str, value)) or "none")
        if isinstance(value, Sequence) and not isinstance(value, str)
        else str(value)
    )


def _say(text: str) -> None:
    out.print(text, markup=False)


def _table(*columns: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        table.add_column(column, overflow="fold", justify="right" if "us" in column or "interval" in column else "left")
    return table


def _row(table: Table, *cells: str) -> None:
    """Adds a row of plain text: brackets in a reason or a path are no markup."""
    table.add_row(*map(Text, cells))


def _print_json(value: Any) -> None:
    print(json.dumps(msgspec.to_builtins(value), indent=2))
