"""The site of docs/ builds without a warning, and what it shows is what the code and the results say."""

from __future__ import annotations

import os
import re
import runpy
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import typer

import moe_runtime
from benchmarks.doc_tables import SECTIONS, with_sections
from codegen.__main__ import app as codegen
from moe_runtime import cli
from moe_runtime.formats import FORMATS

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
pages = pytest.mark.parametrize("page", PAGES, ids=lambda path: path.relative_to(DOCS).as_posix())


@pytest.mark.skipif(find_spec("mkdocs") is None, reason="needs mkdocs")
def test_the_site_builds_without_warnings(tmp_path: Path) -> None:
    # What mkdocs-material says of mkdocs' future is no warning about these pages.
    run = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")],
        cwd=ROOT, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"}, text=True, capture_output=True,
    )  # fmt: skip
    printed = run.stdout + run.stderr
    assert run.returncode == 0 and not re.search("WARNING|ERROR", printed), printed
    for page in PAGES:
        path = page.relative_to(DOCS).with_suffix("")
        built = tmp_path / "site" / ("" if path.name == "index" else path) / "index.html"
        assert built.is_file() and "--8&lt;--" not in built.read_text(), page


def test_docs_tools_are_those_of_dev() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert set(extras["docs"]) <= set(extras["dev"]), "CI installs dev"


@pages
def test_tables_are_rendered_from_the_results(page: Path) -> None:
    assert with_sections(page.read_text()) == page.read_text(), "run `python -m benchmarks.doc_tables`"


def test_every_table_is_on_a_page() -> None:
    named = re.findall(r"<!-- table: (\w+) -->\n", "".join(page.read_text() for page in PAGES))
    assert sorted(named) == sorted(SECTIONS)


def test_pictures_are_those_that_the_script_draws() -> None:
    folder = DOCS / "pictures"
    drawn = runpy.run_path(str(folder / "draw.py"))["PICTURES"]
    for name, draw in drawn.items():
        assert (folder / name).read_text() == draw(), "run `python docs/pictures/draw.py`"
    assert {path.name for path in folder.glob("*.svg")} == drawn.keys()


def test_the_api_page_has_every_public_name() -> None:
    on_page = set(re.findall(r"^::: (\S+)$", (DOCS / "api.md").read_text(), re.MULTILINE))
    public = {f"moe_runtime.{name}" for name in moe_runtime.__all__}
    functions = {f"moe_runtime.flashinfer.{format.operator}" for format in FORMATS.values() if format.operator}
    assert public | functions <= on_page


def commands(page: Path) -> Iterator[list[str]]:
    """The words of what a reader would type: indented lines, and those behind a prompt."""
    for line in re.findall(r"^(?:    |\$ |>   )((?:moe-runtime|python|torchrun|make|pip) .*)$", page.read_text(), re.M):
        yield shlex.split(line.partition(" | ")[0], comments=True)


def assert_exists(app: typer.Typer, words: list[str]) -> None:
    """The command that the words name, below its groups, and every option among them."""
    command: Any = typer.main.get_command(app)
    rest = list(words)
    while hasattr(command, "commands"):
        assert rest and rest[0] in command.commands, words
        command = command.commands[rest.pop(0)]
    options = {name for parameter in command.params for name in parameter.opts}
    assert {word.partition("=")[0] for word in rest if word.startswith("-")} <= options, words


@pages
def test_commands_and_their_options_exist(page: Path) -> None:
    makefile, apps = (ROOT / "Makefile").read_text(), {"moe_runtime": cli.app, "codegen": codegen}
    for words in commands(page):
        program, *rest = words[words.index("-m") + 1 :] if "-m" in words else words
        if program in ("moe-runtime", *apps):
            assert_exists(apps.get(program, cli.app), rest)
        elif program == "make":
            assert all(f"\n{target}:" in makefile for target in rest), words
        elif program == "python":
            assert (ROOT / rest[0]).is_file(), words
        elif program != "pip":
            assert (ROOT / program.replace(".", "/")).with_suffix(".py").is_file(), words
