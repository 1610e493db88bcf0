"""Makes the package's docstrings, which are plain text, into Markdown for the API page.

A line `name: what it is` begins an item of a list, and the lines below it belong to it. All else is paragraphs.
"""

from __future__ import annotations

import importlib
import re
from typing import Any

import griffe

FIELD = re.compile(r"(\*{0,2}\w+(?:, \*{0,2}\w+)*): (\S.*)")
CODE = re.compile(r"(`+[^`]*`+)")
MADE = "flashinfer"
"""A module whose functions are made at import: their signatures and docstrings are in no source."""


class PlainDocstrings(griffe.Extension):
    def on_package(self, *, pkg: griffe.Module, **_: Any) -> None:
        """Puts functions in the place of names that reading the source found to be mere assignments."""
        module = pkg[MADE]
        importlib.import_module(module.path)  # griffe's own import would look for torch in this folder alone
        made = griffe.inspect(MADE, filepath=module.filepath, parent=pkg)
        for name, found in made.functions.items():
            if module[name].is_attribute:
                module.set_member(name, found)

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = as_markdown(obj.docstring.value)


def as_markdown(docstring: str) -> str:
    lines: list[str] = []
    in_list = False
    for line in docstring.splitlines():
        field = None if line.startswith(" ") else FIELD.fullmatch(line)
        if field:
            lines += [""] * (not in_list) + [f"- **{_literal(field[1])}**: {_literal(field[2])}"]
            in_list = True
        elif in_list and line.strip() and not line.startswith(("Raises ", "Returns ", "All else ")):
            lines.append(f"    {_literal(line.strip())}")
        else:
            lines += [""] * in_list + [_literal(line.strip())]
            in_list = False
    return "\n".join(lines)


def _literal(text: str) -> str:
    """With what Markdown would read as emphasis, links or tags escaped, outside of `code`."""
    parts = CODE.split(text)
    return "".join(
        part if part.startswith("`") else re.sub(r"([*_\[\]])", r"\\\1", part).replace("<", "&lt;") for part in parts
    )
