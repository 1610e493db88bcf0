"""The main job on whatever is here: generate the kernels, tune a layer under both regimes, run it with the plans."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from . import machine
from .config import MoEConfig
from .errors import MoEError, Unsupported
from .executors import get_executor
from .executors.base import MoEProblem
from .kernels import library_path
from .parallel import Parallel
from .tables import differing, make_console, regimes_table
from .trial_run import run_once
from .tuning.plan_tools import choices
from .tuning.session import tune_into
from .weights import random_weights

MODEL = "qwen3-235b"
LAYOUTS = ("dep2", "ep2")
MAX_TOKENS = {"cuda": 4096, "cpu": 256}
RUN_TOKENS = 64
OUTPUT = Path("out") / "demo"

console = make_console()


def main() -> None:
    """Exit status 2 with the reason where something is missing, 130 when stopped."""
    try:
        demo(OUTPUT)
    except MoEError as error:
        console.print(f"error: {error}", style="red", markup=False)
        sys.exit(2)
    except KeyboardInterrupt:
        console.print(f"stopped; what was built and tuned is kept, `make demo` goes on from there ({OUTPUT})")
        sys.exit(130)


def demo(output: Path) -> None:
    """Writes output/plan-<layout>.json for each of `LAYOUTS` and prints what it finds on the way."""
    console.rule("1. generate")
    device = "cuda" if generate() else "cpu"
    executor = get_executor(device)
    config = _config(device)

    console.rule("2. tune")
    problems = [MoEProblem(config, Parallel.parse(layout)) for layout in LAYOUTS]
    # Both regimes hold the same experts, so one set of weights serves both.
    weights = random_weights(problems[0], device=device)
    plans = [
        tune_into(
            output / f"plan-{problem.parallel}.json",
            problem, weights, executor, MAX_TOKENS[device], "balanced", 0, console,
        )
        for problem in problems
    ]  # fmt: skip
    console.print(f"Tactics by tokens per rank, median microseconds on {executor.device_name}:")
    console.print(regimes_table(plans))
    differ = differing(plans)
    places = f"{len(differ)} places: {', '.join(differ)}" if differ else "no place"
    console.print(f"{LAYOUTS[0]} and {LAYOUTS[1]} chose differently in {places}")
    for problem, plan in zip(problems, plans, strict=True):
        for entry in plan.entries:
            for gemm, choice in choices(entry):
                for tactic, reason in choice.rejected.items():
                    if executor.can_implement(problem, gemm, tactic) is None:  # else it was never a candidate
                        place = f"{problem.parallel}, {entry.bucket} tokens, {gemm}"
                        console.print(f"{place}: rejected {tactic}: {reason}", markup=False)

    console.rule("3. run")
    for problem, plan in zip(problems, plans, strict=True):
        result = run_once(problem, weights, plan, RUN_TOKENS)
        console.print(
            f"{problem.parallel}, {RUN_TOKENS} tokens a rank: {result.rows} rows in {result.us:.0f} us; relative error "
            f"{result.error:.1e} against float64 that quantises where the kernels do, {result.format_error:.1e} "
            "against float64 on unrounded activations"
        )
    console.print("wrote " + " and ".join(str(output / f"plan-{layout}.json") for layout in LAYOUTS))


def generate() -> bool:
    """Writes every variant's source and, where a GPU has kernels, builds them. True when layers can run on the GPU."""
    commands, errors = machine.generator("__main__"), machine.generator("errors")
    try:
        commands.emit()
        arch = _gpu_arch()
        if arch is None:
            return False
        try:
            commands.build([arch])
        except errors.ToolchainMissing as error:
            if library_path(arch) is None:
                raise
            console.print(f"using {library_path(arch)} as it is: {error}", markup=False)
    except errors.BuildError as error:
        raise Unsupported(str(error)) from error
    return True


def _gpu_arch() -> str | None:
    """The arch of the GPU, if there is one for which a library is linked."""
    if not torch.cuda.is_available():
        console.print("no GPU here: the CPU executor runs the layer, its tactics are timed for real")
        return None
    capability = ".".join(map(str, torch.cuda.get_device_capability()))
    for arch in machine.generator("arch").ARCHES.values():
        if arch.links and arch.capability == capability:
            return str(arch.name)
    console.print(f"the GPU has compute capability {capability}, for which there are no kernels yet: the CPU runs it")
    return None


def _config(device: str) -> MoEConfig:
    real = MoEConfig.preset(MODEL)
    console.print(f"{MODEL}: {machine.shape_text(real)}")
    if device == "cuda":
        return real
    config = machine.scaled_to_cpu(real)
    console.print(f"scaled down for this machine's CPU: {machine.shape_text(config)}")
    return config


if __name__ == "__main__":
    main()
