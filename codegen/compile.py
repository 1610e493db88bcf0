"""Runs nvcc on several sources at once, with progress, and puts finished objects into the cache."""

import contextlib
import os
import re
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from . import ptxas
from .emit import Unit
from .errors import BuildError
from .objects import ObjectCache, Record

MEMORY_PER_COMPILE = 4 << 30  # a CUTLASS collective needs this much
# Where this machine has no record yet.
EXPECTED_SECONDS = {"collective": 110.0, "direct": 10.0, "mixed": 10.0, "op": 10.0, "registry": 4.0}
ERROR_LINE = re.compile(r"\b(error|fatal|killed|undefined reference)\b", re.IGNORECASE)
POLL_SECONDS = 0.1


@dataclass(frozen=True)
class Job:
    """One compile: `command` lacks only the output's name."""

    unit: Unit
    key: str
    command: tuple[str, ...]
    log: Path


@dataclass(frozen=True)
class Running:
    job: Job
    process: subprocess.Popen[bytes]
    folder: Path
    started: float


def available_memory() -> int:
    """Bytes that can still be allocated: the system's, or the control group's where that is less."""
    meminfo = Path("/proc/meminfo").read_text()
    found = re.search(r"MemAvailable:\s+(\d+) kB", meminfo)
    available = int(found[1]) * 1024 if found else MEMORY_PER_COMPILE
    group = Path("/sys/fs/cgroup")
    try:
        limit = int((group / "memory.max").read_text())
        return min(available, limit - int((group / "memory.current").read_text()))
    except (OSError, ValueError):
        return available


def parallel_compiles(requested: int | None = None) -> int:
    """Compiles to run at once: `requested` or the cores, as far as memory allows at 4 GB each, at least one."""
    cores = len(os.sched_getaffinity(0))
    return max(1, min(requested or cores, available_memory() // MEMORY_PER_COMPILE))


def error_lines(log: str, count: int = 5) -> str:
    """The first lines of a compiler's log that name an error, or its last lines where none does."""
    lines = [line[:300] for line in log.splitlines() if line.strip()]
    named = [line for line in lines if ERROR_LINE.search(line)]
    return "\n".join(f"  {line}" for line in (named[:count] or lines[-count:]))


def clock(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


def describe(record: Record) -> str:
    """A compiled unit's figures in a few words."""
    if not record.functions:
        return f"{record.seconds:.0f} s"
    registers = max(function.registers for function in record.functions)
    return f"{record.seconds:.0f} s, {registers} registers, {ptxas.spill_bytes(record.functions)} B spilled"


def compile_all(jobs: Sequence[Job], cache: ObjectCache, parallel: int, console: Console) -> None:
    """Compile `jobs`, longest first, into `cache`.

    After a failure nothing new starts, what runs is finished, and BuildError names each failure. On an exception,
    Ctrl-C included, the children are killed; objects finished before that stay in the cache.
    """
    left = TextColumn("{task.fields[left]} left")
    columns = ("{task.description}", BarColumn(), "{task.completed}/{task.total}", TimeElapsedColumn(), left)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        _Batch(jobs, cache, parallel, progress).run()


class _Batch:
    """The state of one compile_all()."""

    def __init__(self, jobs: Sequence[Job], cache: ObjectCache, parallel: int, progress: Progress) -> None:
        known = cache.seconds()
        self.expected = {job.unit.name: known.get(job.unit.name, EXPECTED_SECONDS[job.unit.kind]) for job in jobs}
        self.waiting = sorted(jobs, key=lambda job: self.expected[job.unit.name])
        self.running: list[Running] = []
        self.failures: list[str] = []
        self.seconds_spent = self.seconds_planned = 0.0
        self.cache, self.parallel, self.progress = cache, parallel, progress
        self.task = progress.add_task("compiling", total=len(jobs), left=clock(self.seconds_left()))

    def run(self) -> None:
        self.cache.folder.mkdir(parents=True, exist_ok=True)
        # Around all of them, so that nothing is left behind where Ctrl-C comes while a compile starts or finishes.
        scratch = tempfile.TemporaryDirectory(dir=self.cache.folder, prefix="compiling-", ignore_cleanup_errors=True)
        with scratch as folder:
            self.run_in(Path(folder))
        if self.failures:
            raise BuildError("\n".join(self.failures))

    def run_in(self, scratch: Path) -> None:
        try:
            while self.running or (self.waiting and not self.failures):
                while self.waiting and not self.failures and len(self.running) < self.parallel:
                    self.running.append(_start(self.waiting.pop(), scratch))
                for item in [item for item in self.running if item.process.poll() is not None]:
                    self.running.remove(item)
                    self.finish(item)
                self.progress.update(self.task, left=clock(self.seconds_left()))
                time.sleep(POLL_SECONDS)
        finally:
            for item in self.running:
                _kill(item)

    def seconds_left(self) -> float:
        """Expected seconds of what is not done, corrected by how the done ones compared with theirs."""
        now = time.monotonic()
        pace = self.seconds_spent / self.seconds_planned if self.seconds_planned else 1.0
        rest = pace * sum(self.expected[job.unit.name] for job in self.waiting)
        rest += sum(max(pace * self.expected[item.job.unit.name] - (now - item.started), 1.0) for item in self.running)
        return rest / min(self.parallel, max(1, len(self.waiting) + len(self.running)))

    def finish(self, item: Running) -> None:
        job = item.job
        log = job.log.read_text(encoding="utf-8", errors="replace")
        if item.process.returncode == 0:
            seconds = round(time.monotonic() - item.started, 1)
            record = Record(job.unit.name, seconds, ptxas.parse(log), ptxas.serialises_wgmma(log))
            self.cache.store(job.key, item.folder / "object.o", record)
            self.seconds_spent += seconds
            self.seconds_planned += self.expected[job.unit.name]
            self.progress.advance(self.task)
            self.report(f"{job.unit.name}: {describe(record)}")
        else:
            what = f"{job.unit.name}: nvcc failed ({item.process.returncode})\n{error_lines(log)}"
            self.failures.append(f"{what}\n  whole log: {job.log}\n  source: {job.unit.source}")
            self.progress.console.print(f"[red]{escape(self.failures[-1])}", highlight=False, soft_wrap=True)
        shutil.rmtree(item.folder, ignore_errors=True)

    def report(self, what: str) -> None:
        """One line for a finished unit; without a terminal, and so without a bar, it carries the time left."""
        task = self.progress.tasks[self.task]
        left = "" if self.progress.console.is_terminal else f", {clock(self.seconds_left())} left"
        line = f"  {task.completed:.0f}/{task.total:.0f} {what}{left}"
        self.progress.console.print(line, highlight=False, soft_wrap=True)


def _start(job: Job, scratch: Path) -> Running:
    job.log.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(dir=scratch))
    # Its own session: Ctrl-C reaches this process alone, which then ends nvcc together with nvcc's children.
    with job.log.open("wb") as log:
        process = subprocess.Popen(
            [*job.command, "-o", str(folder / "object.o")],
            stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
            env=os.environ | {"TMPDIR": str(folder)}, start_new_session=True,
        )  # fmt: skip
    return Running(job, process, folder, time.monotonic())


def _kill(item: Running) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(item.process.pid, signal.SIGKILL)
    item.process.wait()
