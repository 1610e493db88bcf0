"""What ptxas -v says about each function of an object."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

PROPERTIES = re.compile(r"Function properties for (\S+)")
STACK = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
USED = re.compile(r"Used (\d+) registers")
SHARED = re.compile(r"(\d+) bytes smem")


@dataclass(frozen=True)
class Function:
    """A compiled kernel, or a device function that was not inlined (whose registers count with its caller)."""

    function: str
    registers: int
    spill_bytes: int
    stack_bytes: int
    static_shared_memory: int


def parse(log: str) -> tuple[Function, ...]:
    """Functions of an `nvcc -Xptxas -v` log, in its order."""
    functions = []
    name = ""
    stack = spill = 0
    for line in log.splitlines():
        if found := PROPERTIES.search(line):
            name = found[1]
            functions.append(Function(name, 0, 0, 0, 0))
        elif (found := STACK.search(line)) and functions:
            stack, spill = int(found[1]), int(found[2]) + int(found[3])
            functions[-1] = Function(name, 0, spill, stack, 0)
        elif (found := USED.search(line)) and functions:
            shared = SHARED.search(line)
            functions[-1] = Function(name, int(found[1]), spill, stack, int(shared[1]) if shared else 0)
    return tuple(functions)


def serialises_wgmma(log: str) -> bool:
    """Whether ptxas gave up overlapping wgmma (its message C7510 and its like), which costs most of the speed."""
    return "wgmma.mma_async instructions are serialized" in log


def spill_bytes(functions: Sequence[Function]) -> int:
    return sum(function.spill_bytes for function in functions)
