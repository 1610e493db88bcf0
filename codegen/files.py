"""Where things are, and writing them whole or not at all."""

import os
import tempfile
from pathlib import Path

import platformdirs

PACKAGE = Path(__file__).resolve().parent
TEMPLATES = PACKAGE.parent / "templates"


def generated_folder() -> Path:
    """generated/ of a checkout; for an installed package, whose folder may be read-only, one in the cache folder."""
    checkout = PACKAGE.parent
    return checkout / "generated" if (checkout / "pyproject.toml").exists() else cache_folder() / "generated"


def cache_folder() -> Path:
    """MOE_RUNTIME_CACHE_DIR, or the user's cache folder."""
    named = os.environ.get("MOE_RUNTIME_CACHE_DIR")
    return Path(named).absolute() if named else Path(platformdirs.user_cache_dir("moe_runtime", appauthor=False))


def write_atomically(path: Path, text: str) -> None:
    """Replace `path` by a file holding `text`; a reader sees the old file or the new one, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".tmp")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def write_if_different(path: Path, text: str) -> bool:
    """Write `text` unless the file holds it already. Returns whether it wrote."""
    if path.exists() and path.read_text(encoding="utf-8") == text:
        return False
    write_atomically(path, text)
    return True
