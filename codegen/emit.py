"""Variants and templates -> CUDA sources. The same tree gives the same bytes."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import jinja2

from .arch import Arch
from .catalogue import Entry, validate
from .errors import BuildError
from .files import TEMPLATES, write_if_different


@dataclass(frozen=True)
class Unit:
    """One source that nvcc compiles to one object, and the variants in it."""

    name: str
    kind: Literal["collective", "direct", "mixed", "op", "registry"]
    source: Path
    entries: tuple[Entry, ...] = ()


@dataclass(frozen=True)
class Emission:
    """What emit() left in a folder: the sources to compile, and the files it changed."""

    units: tuple[Unit, ...]
    written: tuple[Path, ...]
    removed: tuple[Path, ...]


def include_folders() -> tuple[Path, ...]:
    """Where our own headers are, for nvcc's -I."""
    return (TEMPLATES, TEMPLATES / "ops")


def _environment() -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        undefined=jinja2.StrictUndefined,
        keep_trailing_newline=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def by_source(entries: Sequence[Entry]) -> dict[str, tuple[Entry, ...]]:
    """Entries by the name of the source that they share, in the order of the first of each."""
    sources: dict[str, tuple[Entry, ...]] = {}
    for entry in entries:
        sources[entry.variant.source] = (*sources.get(entry.variant.source, ()), entry)
    return sources


def render(arch: Arch, entries: Sequence[Entry]) -> dict[str, str]:
    """Text of each generated source of `arch` by file name. Raises BuildError for an unsound entry or template."""
    validate(entries)
    environment = _environment()
    sources = {}
    try:
        for name, shared in by_source(entries).items():
            variants = [entry.variant for entry in shared]
            v = variants[0]
            sources[f"{name}.cu"] = environment.get_template(v.template).render(v=v, tag=v.tags, variants=variants)
        if arch.links:
            variants = [entry.variant for entry in entries]
            sources["registry.cu"] = environment.get_template("registry.cu.j2").render(arch=arch, variants=variants)
    except jinja2.TemplateNotFound as error:
        raise BuildError(f"templates/{error.name} does not exist; it is needed for {arch.name}") from error
    except jinja2.TemplateError as error:
        raise BuildError(f"templates: {error}") from error
    return sources


def emit(arch: Arch, entries: Sequence[Entry], out: Path) -> Emission:
    """Write the sources of `entries` to out/<arch>/ and remove those of variants that are gone.

    An unchanged file keeps its time stamp. Plain CUDA in templates/ops is compiled where it is.
    """
    folder = out / arch.name
    sources = render(arch, entries)
    written = [path for name, text in sources.items() if write_if_different(path := folder / name, text)]
    removed = [path for path in sorted(folder.glob("*.cu")) if path.name not in sources]
    for path in removed:
        path.unlink()

    units = []
    for name, shared in by_source(entries).items():
        units.append(Unit(name, shared[0].variant.family, folder / f"{name}.cu", shared))
    units += [Unit(path.stem, "op", path) for path in sorted((TEMPLATES / "ops").glob("*.cu"))]
    if arch.links:
        units.append(Unit("registry", "registry", folder / "registry.cu"))
    absolute = tuple(dataclasses.replace(unit, source=unit.source.absolute()) for unit in units)
    return Emission(absolute, tuple(written), tuple(removed))
