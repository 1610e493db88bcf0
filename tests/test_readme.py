"""The README's numbers are those of the committed results, and its commands exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from benchmarks.summary import RESULTS, with_tables
from moe_runtime import cli
from moe_runtime.formats import FORMATS

README = (Path(__file__).parent.parent / "README.md").read_text()


def test_measured_tables_are_rendered_from_the_results() -> None:
    assert with_tables(README) == README, "run `python -m benchmarks.summary`"


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*.json")), ids=lambda path: path.name)
def test_results_say_where_they_come_from(path: Path) -> None:
    text = path.read_text()
    for field in ("gpu", "driver", "cuda", "torch", "library_hash", "commit"):
        assert re.search(rf'"{field}": "(?!unknown)[^"]+"', text), f"{path.name} lacks {field}"


def test_commands_of_the_readme_exist() -> None:
    named = set(re.findall(r"^    moe-runtime (\w+)", README, re.MULTILINE))
    registered = {command.callback.__name__ for command in cli.app.registered_commands if command.callback}
    registered |= {str(group.name) for group in cli.app.registered_groups}
    assert named and named <= registered


def test_the_table_of_formats_is_the_registry_s() -> None:
    rows = re.findall(r"^\| `(\w+)` \|.*\| (?:`(\w+)`)? ?\|$", README, re.MULTILINE)
    table = {name: operator or None for name, operator in rows if name in FORMATS}
    assert table == {name: format.operator for name, format in FORMATS.items()}
