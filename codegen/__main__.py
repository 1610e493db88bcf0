"""python -m codegen list | emit | build."""

import json
import signal
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from .arch import ARCHES, ARCHS_VARIABLE, Arch, find_arch, wanted_archs
from .build import build as build_arch
from .catalogue import Entry, default_entries, markdown, select
from .emit import emit as emit_arch
from .errors import BuildError
from .files import cache_folder, generated_folder, write_if_different

app = typer.Typer(add_completion=False, no_args_is_help=True, help=__doc__)
console = Console()
errors = Console(stderr=True)

ArchOption = Annotated[str | None, typer.Option(help="One arch, such as sm_90a.")]
ArchsOption = Annotated[
    list[str] | None, typer.Option(help=f"May be repeated. Default: {ARCHS_VARIABLE}, or the GPUs present.")
]
OnlyOption = Annotated[
    str | None, typer.Option(help="Only variants whose name contains this glob pattern; the library holds no others.")
]
YardsticksOption = Annotated[
    bool, typer.Option("--yardsticks", help="Also CUTLASS' collectives that ours are compared with: minutes more.")
]
JobsOption = Annotated[
    int | None, typer.Option("-j", "--jobs", min=1, help="Compiles at once; memory (4 GB each) may allow fewer.")
]
OutOption = Annotated[Path | None, typer.Option(help="Where generated sources, libraries and manifest.json go.")]


def _selected(arch: str | None, format: str | None = None, only: str | None = None) -> tuple[Entry, ...]:
    entries = select(find_arch(arch).name if arch else None, format, only)
    if not entries:
        given = {"arch": arch, "format": format, "only": only}
        wanted = ", ".join(f"{key} {value!r}" for key, value in given.items() if value)
        raise BuildError(f"no variant has {wanted}: `python -m codegen list` shows what exists")
    return entries


@app.command("list")
def list_(
    arch: ArchOption = None,
    format: Annotated[str | None, typer.Option(help="One number format, such as fp8_block.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON array on stdout.")] = False,
) -> None:
    """List the variants of the catalogue and why each exists."""
    entries = _selected(arch, format)
    if as_json:
        print(json.dumps([entry.variant.record() for entry in entries], indent=1))
        return
    for entry in entries:
        console.print(f"[bold]{entry.variant.name}[/]\n    {entry.why}", highlight=False, soft_wrap=True)


@app.command()
def emit(out: OutOption = None) -> None:
    """Render every variant's source, and the catalogue as CATALOGUE.md; files that would not change are left alone."""
    folder = out or generated_folder()
    for arch in ARCHES.values():
        entries = select(arch.name)
        emission = emit_arch(arch, entries, folder)
        changes = f"{len(emission.written)} files written, {len(emission.removed)} removed"
        console.print(f"{arch.name}: {len(entries)} variants, {changes}", highlight=False)
    write_if_different(folder / "CATALOGUE.md", markdown())
    console.print(f"in {folder}", soft_wrap=True)


@app.command()
def build(
    arch: ArchsOption = None,
    only: OnlyOption = None,
    yardsticks: YardsticksOption = False,
    jobs: JobsOption = None,
    out: OutOption = None,
) -> None:
    """Compile what the object cache lacks and link one library an arch."""
    archs: tuple[Arch, ...] = tuple(find_arch(name) for name in arch) if arch else wanted_archs()
    if not archs:
        raise BuildError(f"no GPU found and {ARCHS_VARIABLE} is not set: name an arch, such as --arch sm_90a")
    folder = out or generated_folder()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        for target in archs:
            chosen = only or yardsticks
            entries = _selected(target.name, only=only) if chosen else default_entries(target.name)
            result = build_arch(target, entries, folder, jobs=jobs, console=console)
            made = result.library or "compiled; this arch is not linked"
            console.print(f"{target.name}: {made}", soft_wrap=True, highlight=False)
    except KeyboardInterrupt:
        kept = f"stopped. Objects finished so far are kept in {cache_folder()}: the same command goes on from there."
        errors.print(kept, soft_wrap=True, highlight=False)
        raise typer.Exit(130) from None


def main() -> None:
    """Run the command line; exit status 1 with the reason when a build fails, 130 when it is stopped."""
    try:
        app()
    except BuildError as error:
        errors.print(f"error: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        raise SystemExit(1) from None


if __name__ == "__main__":
    main()
