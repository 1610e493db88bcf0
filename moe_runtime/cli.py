"""moe-runtime tune | run | plan | explain | report | record | place | info | variants."""

from __future__ import annotations

import dataclasses
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import msgspec
import typer
from rich import box
from rich.table import Table

from . import cli_place, cli_plan, cli_record, cli_report, machine, tuning
from .cli_options import (
    DeviceOption,
    FormatOption,
    JsonOption,
    ModelOption,
    ParallelOption,
    PlacementOption,
    RankOption,
    ScaleOption,
    SeedOption,
    SmallOption,
    err,
    load_placements,
    named_config,
    named_executor,
    out,
    parse_seconds,
    placed_config,
    title,
)
from .errors import InvalidArgument, MoEError
from .executors.base import GEMMS, MoEProblem
from .kernels import library_path
from .parallel import Parallel
from .tables import plan_table
from .trial_run import run_once
from .tuning import Plan
from .tuning.measure import CONFIDENCE, MARGIN
from .tuning.plan import OBJECTIVES
from .tuning.quarantine import vetting
from .tuning.ranks import is_writer, launched, tune_over_ranks, use_local_gpu
from .tuning.session import tune_into
from .weights import random_weights
from .workload import (
    DISPATCH,
    DISPATCHES,
    DISTRIBUTION_VARIABLE,
    DISTRIBUTIONS,
    check_distribution,
    default_distribution,
)

app = typer.Typer(add_completion=False, no_args_is_help=True, help="Mixture-of-experts layers: tune, run, look.")
app.add_typer(cli_plan.plans, name="plan")
app.command()(cli_plan.explain)
app.command()(cli_report.report)
app.command()(cli_record.record)
app.command()(cli_place.place)


@app.command()
def tune(
    model: ModelOption,
    parallel: ParallelOption,
    max_tokens: Annotated[int, typer.Option(help="tune_max_num_tokens: the most tokens per rank of a call.")] = 8192,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="The plan's file; by default one in the plan folder.")
    ] = None,
    distribution: Annotated[
        str | None, typer.Option(help=f"{' or '.join(DISTRIBUTIONS)}; by default {DISTRIBUTION_VARIABLE}, or balanced.")
    ] = None,
    rank: RankOption = 0,
    placement: PlacementOption = None,
    dispatch: Annotated[str, typer.Option(help=f"How tokens reach the rank: {' or '.join(DISPATCHES)}.")] = DISPATCH,
    objective: Annotated[str, typer.Option(help=f"{' or '.join(OBJECTIVES)} of the time over the samples.")] = "mean",
    samples: Annotated[int, typer.Option(help="Workloads that are drawn and timed per bucket.")] = 1,
    margin: Annotated[float, typer.Option(help="Least gain for which a tactic replaces the default.")] = MARGIN,
    confidence: Annotated[float, typer.Option(help="How sure that gain must be, from repeated times.")] = CONFIDENCE,
    budget: Annotated[
        str | None, typer.Option(help="Most time to spend, such as 120s or 2m; what does not fit keeps the default.")
    ] = None,
    device: DeviceOption = None,
    format: FormatOption = None,
    scale: ScaleOption = 1,
    small: SmallOption = False,
    seed: SeedOption = 0,
    as_json: JsonOption = False,
) -> None:
    """Time every tactic on what one rank sees and write the plan. Stopped by Ctrl-C, the same command goes on.

    Started by torchrun, with one process a GPU, the processes share the work and rank 0 writes the plan.
    """
    layout = Parallel.parse(parallel, rank)
    placements = load_placements(placement)
    problem = MoEProblem(placed_config(named_config(model, format, scale, small), layout, placements), layout)
    chosen = default_distribution() if distribution is None else check_distribution(distribution)
    if launched() and device != "cpu":
        use_local_gpu()
    executor = named_executor(device)
    other = [dispatch] * (dispatch != DISPATCH) + [objective] * (objective != "mean")
    other += [] if format is None else [format]
    other += [] if placements is None else ["placed", placements.digest()]
    path = output or _plan_path(problem, [chosen, *other], max_tokens, executor.device_name)
    weights = random_weights(problem, seed, executor.name)
    settings: dict[str, Any] = {
        "dispatch": dispatch, "objective": objective, "samples": samples, "margin": margin, "confidence": confidence,
        "budget_seconds": None if budget is None else parse_seconds(budget), "placement": str(placement or ""),
    }  # fmt: skip
    if not is_writer():
        with vetting(problem, str(weights.device), seed) as vet:
            tune_over_ranks(problem, weights, executor, max_tokens, chosen, seed, vet=vet, **settings)
        return
    err.print(f"tuning {title(problem)} on {executor.device_name}: {chosen} routing, up to {max_tokens} tokens a rank")
    tuner = tune_over_ranks if launched() else tuning.tune
    try:
        with vetting(problem, str(weights.device), seed) as vet:
            plan = tune_into(
                path, problem, weights, executor, max_tokens, chosen, seed, err, tuner, vet=vet, **settings
            )
    except KeyboardInterrupt:
        err.print(f"stopped; buckets tuned so far are kept in {path}: the same command goes on from there")
        raise typer.Exit(130) from None
    if as_json:
        print(json.dumps(msgspec.to_builtins(plan), indent=2))
    else:
        out.print(plan_table(plan))
    err.print(f"wrote {path}")


def _plan_path(problem: MoEProblem, settings: Sequence[str], max_tokens: int, device: str) -> Path:
    name = "-".join([problem.config.name, str(problem.parallel), *settings, str(max_tokens), device])
    return machine.plan_folder() / (re.sub(r"[^a-z0-9.]+", "-", name.lower()) + ".json")


@app.command()
def run(
    model: ModelOption,
    parallel: ParallelOption,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens per rank; under dep<N> the kernels get N times as many.")],
    plan: Annotated[Path | None, typer.Option(help="A tuned plan; without one the default tactics run.")] = None,
    rank: RankOption = 0,
    placement: PlacementOption = None,
    device: DeviceOption = None,
    format: FormatOption = None,
    scale: ScaleOption = 1,
    small: SmallOption = False,
    seed: SeedOption = 0,
    as_json: JsonOption = False,
) -> None:
    """Run one layer on random weights and rows; print its time and its error against a float64 reference."""
    layout = Parallel.parse(parallel, rank)
    placements = load_placements(placement)
    problem = MoEProblem(placed_config(named_config(model, format, scale, small), layout, placements), layout)
    tuned = None if plan is None else Plan.load(plan)
    executor = named_executor(device)
    if tuned is not None:
        tuned.require(problem, executor.device_name, executor.library_hash)
    weights = random_weights(problem, seed, executor.name)
    result = run_once(problem, weights, tuned, tokens, seed, placements)
    if as_json:
        print(json.dumps(dataclasses.asdict(result), indent=2))
        return
    out.print(f"{title(problem)} on {executor.device_name}, {tokens} tokens a rank: {result.rows} rows")
    for gemm, tactic in zip(GEMMS, result.tactics, strict=True):
        out.print(f"  {gemm}   {tactic} ({'default' if tuned is None else 'plan'})")
    out.print(f"  time    {result.us:.1f} us")
    out.print(f"  error   {result.error:.2e} against float64 that quantises where the kernels do")
    out.print(f"          {result.format_error:.2e} against float64 on unrounded activations")


@app.command()
def info(as_json: JsonOption = False) -> None:
    """Say what was found here (GPU, nvcc, CUTLASS, library, archs, plan folder), and what to do about what is not."""
    facts = list(machine.facts())
    if as_json:
        print(json.dumps([dataclasses.asdict(fact) for fact in facts], indent=2))
        return
    for fact in facts:
        out.print(f"{fact.name:<{max(len(fact.name) for fact in facts)}}  {fact.found or f'missing: {fact.todo}'}")


@app.command()
def variants(
    arch: Annotated[str | None, typer.Option(help="One arch, such as sm_90a.")] = None, as_json: JsonOption = False
) -> None:
    """List the kernel variants of the catalogue and, where they were compiled here, what the build found."""
    rows = _variants(arch)
    if as_json:
        print(json.dumps(rows, indent=2))
        return
    title = f"{len(rows)} variants; blank: not compiled here; kernels of a tile are compiled together"
    table = Table(title=title, box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("variant", overflow="fold")
    for column in ("compile s", "registers", "spill B", "shared KiB"):
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(row["name"], *_build_cells(row["build"]))
    out.print(table)


def _variants(arch: str | None) -> list[dict[str, Any]]:
    catalogue, errors = machine.generator("catalogue"), machine.generator("errors")
    try:
        entries = catalogue.select(machine.generator("arch").find_arch(arch).name if arch else None)
    except errors.BuildError as error:
        raise InvalidArgument("arch", repr(arch), ", ".join(machine.generator("arch").ARCHES)) from error
    built = {kernel["name"]: kernel for name in machine.generator("arch").ARCHES for kernel in _manifest_kernels(name)}
    return [entry.variant.record() | {"why": entry.why, "build": built.get(entry.variant.name)} for entry in entries]


def _manifest_kernels(arch: str) -> list[dict[str, Any]]:
    """What the build recorded beside the library that would be loaded, else in the generator's own folder."""
    library = library_path(arch)
    beside = [library.parent, library.parent.parent] if library else [machine.generator("files").generated_folder()]
    for folder in beside:
        recorded = machine.generator("build").read_manifest(folder / "manifest.json").get(arch)
        if recorded is not None:
            return list(recorded["kernels"])
    return []


def _build_cells(build: dict[str, Any] | None) -> list[str]:
    if build is None:
        return [""] * 4
    shared = build["dynamic_shared_memory"]
    kibibytes = "" if shared is None else f"{(shared + build['static_shared_memory']) / 1024:.0f}"
    return [f"{build['compile_seconds']:.0f}", str(build["registers"]), str(build["spill_bytes"]), kibibytes]


def main() -> None:
    """Runs the command line; exit status 2 and one line for an error of the user's or the machine's making."""
    try:
        app()
    except MoEError as error:
        err.print(f"error: {error}", style="red", markup=False)
        sys.exit(2)
