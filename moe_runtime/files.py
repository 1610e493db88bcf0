"""Files that are whole or not there."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import InvalidArgument


@contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """A path beside target to write to, which takes its place once the context ends without an exception."""
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}")
    try:
        yield temporary
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def write_whole(path: str | os.PathLike[str], content: bytes) -> None:
    """Writes a file whole or not at all, and makes its folder. Raises InvalidArgument where that cannot be written."""
    target = Path(path)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with replacing(target) as temporary:
            temporary.write_bytes(content)
    except OSError as error:
        raise not_writable(target, error) from error


def not_writable(target: Path, error: OSError) -> InvalidArgument:
    return InvalidArgument("output", target, "a file in a folder that can be written", f"({error.strerror})")
