"""Objects by the content they were compiled from, so that the same kernel is compiled once a machine."""

import dataclasses
import hashlib
import json
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from .files import write_atomically
from .ptxas import Function

INCLUDE = re.compile(r'^\s*#\s*include\s*"([^"]+)"', re.MULTILINE)


@dataclass(frozen=True)
class Record:
    """What is known of a cached object: its unit's name, the seconds it took, and ptxas' figures."""

    name: str
    seconds: float
    functions: tuple[Function, ...]
    serialised: bool


def own_headers(source: Path, folders: Iterable[Path]) -> tuple[Path, ...]:
    """Headers that `source` includes from `folders` or from beside the including file, at any depth.

    Conditions are ignored, which can only add a header. Anything found elsewhere belongs to the toolchain.
    """
    folders = tuple(folders)
    seen: dict[Path, None] = {}
    queue = [source]
    while queue:
        file = queue.pop()
        for name in INCLUDE.findall(file.read_text(encoding="utf-8")):
            header = next((path for folder in (file.parent, *folders) if (path := folder / name).is_file()), None)
            if header and header.resolve() not in seen:
                seen[header.resolve()] = None
                queue.append(header)
    return tuple(sorted(seen))


def content_key(source: Path, headers: Iterable[Path], inputs: Iterable[str]) -> str:
    """sha256 over a source, its headers and the other inputs of a compile, independent of where the tree lies."""
    files = [(path.name, path.read_text(encoding="utf-8")) for path in (source, *headers)]
    return hashlib.sha256(json.dumps([files, list(inputs)]).encode()).hexdigest()


class ObjectCache:
    """A folder of objects. Entries are only ever added whole, so any number of builds may share it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._seconds = folder / "seconds.json"

    def object(self, key: str) -> Path:
        return self.folder / "objects" / key[:2] / f"{key}.o"

    def find(self, key: str) -> Record | None:
        path = self.object(key)
        try:
            fields = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
            functions = tuple(Function(**function) for function in fields.pop("functions"))
            return Record(**fields, functions=functions) if path.exists() else None
        except (OSError, ValueError, TypeError, KeyError):
            return None

    def store(self, key: str, built: Path, record: Record) -> None:
        """Move the object `built`, which must lie in this cache's file system, into the cache."""
        path = self.object(key)
        write_atomically(path.with_suffix(".json"), json.dumps(dataclasses.asdict(record)))
        os.replace(built, path)
        write_atomically(self._seconds, json.dumps(self.seconds() | {record.name: record.seconds}, indent=1))

    def seconds(self) -> dict[str, float]:
        """How long the last compile of each name took on this machine."""
        try:
            known = json.loads(self._seconds.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return known if isinstance(known, dict) else {}
