"""A stand-in for nvcc: g++ compiles the sources, which carry directives for what nvcc would say or do.

// log: TEXT            a line on stderr
// wait while: PATH     does not finish as long as PATH exists
// fail                 ends with status 2
"""

import re
import subprocess
import sys
import time
from pathlib import Path

VERSION = "13.0.88"


def install(folder: Path) -> Path:
    """Put the stand-in into `folder` as an executable named nvcc, and return its path."""
    path = folder / "nvcc"
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(f'#!/bin/sh\nexec {sys.executable} {__file__} "$@"\n')
    path.chmod(0o755)
    return path


def main(arguments: list[str]) -> int:
    if "--version" in arguments:
        print(f"Cuda compilation tools, release 13.0, V{VERSION}")
        return 0
    output = arguments[arguments.index("-o") + 1]
    if "-shared" in arguments:
        objects = [argument for argument in arguments if argument.endswith(".o")]
        return subprocess.call(["g++", "-shared", "-Wl,--no-undefined", "-o", output, *objects])
    source = Path(arguments[arguments.index("-c") + 1])
    text = source.read_text()
    for line in re.findall(r"^// log: (.*)", text, re.MULTILINE):
        print(line, file=sys.stderr)
    for blocker in re.findall(r"^// wait while: (.*)", text, re.MULTILINE):
        while Path(blocker).exists():
            time.sleep(0.02)
    if re.search(r"^// fail$", text, re.MULTILINE):
        return 2
    known = [a for a in arguments if a.startswith(("-I", "-D"))]
    return subprocess.call(["g++", "-x", "c++", "-std=c++17", "-fPIC", *known, "-c", str(source), "-o", output])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
