"""Candidates are checked in a process of their own, because what a faulty kernel breaks is its process.

An illegal access is sticky: every later CUDA call of that process fails. A hang cannot be ended from inside, and a
wrong result may come with stray writes. So whatever the reason a candidate is rejected for, the worker that ran it is
thrown away, and a new one goes on with the next candidate.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess

import torch

from ..config import MoEConfig
from ..errors import InvalidArgument, Unsupported
from ..executors import get_executor
from ..executors.base import Executor, Gemm, MoEProblem
from ..parallel import Parallel
from ..weights import ExpertWeights, random_weights
from ..workload import Workload
from .profiler import NO_MEMORY, check
from .tuner import TOLERANCE

Vet = Callable[[Workload, Gemm, Sequence[str]], dict[str, str]]
"""(workload, gemm, tactics) -> reason by tactic for those that must not run."""

TACTIC_SECONDS = 30.0
"""Default time for one candidate's check, which takes milliseconds; the first launch of a kernel also loads it."""
SETUP_SECONDS = 300.0
"""For a worker to start and make weights, and again to compute a reference: far more than it takes, but no hang."""
END_SECONDS = 5.0
"""For a process that closed its connection to be gone."""


@contextmanager
def vetting(
    problem: MoEProblem,
    device: str,
    seed: int = 0,
    timeout_seconds: float = TACTIC_SECONDS,
    make_executor: Callable[[str], Executor] = get_executor,
) -> Iterator[Vet]:
    """A `Vet` that runs each tactic once in a worker process and compares its result with the trial's reference.

    One worker serves all calls until a tactic fails in it; none is left when the context ends, however it ends.
    The worker holds one layer's weights, which it makes from `seed`, and one trial at a time. Ctrl-C reaches only this
    process: the worker ends with the context, or with this process where that was killed.

    timeout_seconds: how long one tactic may take before it counts as hung.
    make_executor: of `device`, "cpu", "cuda" or "cuda:<i>"; called in the worker, so it must be importable there.

    Raises InvalidArgument for a time-out that is not positive. The `Vet` raises Unsupported where a worker fails
    before it runs a tactic.
    """
    if not timeout_seconds > 0:
        raise InvalidArgument("timeout_seconds", timeout_seconds, "more than 0")
    recipe = _Recipe(problem.config, problem.parallel, device, seed, make_executor)
    worker: _Worker | None = None

    def vet(workload: Workload, gemm: Gemm, tactics: Sequence[str]) -> dict[str, str]:
        nonlocal worker
        torch.cuda.empty_cache()  # what this process keeps for later, the worker needs now
        reasons: dict[str, str] = {}
        waiting = list(tactics)
        while waiting:
            worker = worker or _Worker.start(recipe)
            worker.ask(workload, gemm, waiting)
            while waiting:
                tactic = waiting.pop(0)
                reason = worker.verdict(timeout_seconds)
                if reason is not None:
                    reasons[tactic] = reason
                    worker.kill()
                    worker = None
                    break
        return reasons

    try:
        yield vet
    finally:
        if worker is not None:
            worker.kill()


@dataclass(frozen=True)
class _Recipe:
    """What a worker makes its problem, executor and weights from: small enough to send, unlike the weights."""

    config: MoEConfig
    parallel: Parallel
    device: str
    seed: int
    make_executor: Callable[[str], Executor]


@dataclass(frozen=True)
class _Worker:
    process: BaseProcess
    connection: Connection

    @classmethod
    def start(cls, recipe: _Recipe) -> _Worker:
        # Spawned, because a forked process cannot use CUDA.
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        process = context.Process(target=_serve, args=(recipe, theirs), daemon=True, name="moe_runtime-check")
        with _interrupt_held():
            process.start()
        theirs.close()  # so that the worker's end closes with the worker
        worker = cls(process, ours)
        worker._expect_ready()
        return worker

    def ask(self, workload: Workload, gemm: Gemm, tactics: Sequence[str]) -> None:
        """Returns when the worker is about to run the first tactic. Raises Unsupported where it does not get there."""
        # Plain pickle: multiprocessing's own would send the ids by shared memory, of which containers have little.
        with suppress(OSError):  # from a worker that is gone, of which more below
            self.connection.send_bytes(pickle.dumps((workload, gemm, tactics)))
        self._expect_ready()

    def verdict(self, timeout_seconds: float) -> str | None:
        """None when the tactic that runs now gave the right result, else the reason why it is rejected."""
        try:
            if not self.connection.poll(timeout_seconds):
                return f"hung: no result in {timeout_seconds:g} s"
            reason: str | None = self.connection.recv()
            return reason
        except (EOFError, OSError):
            return f"crashed: its process {self._end()}"

    def kill(self) -> None:
        self.process.kill()
        self.process.join()
        self.connection.close()

    def _expect_ready(self) -> None:
        try:
            answered = self.connection.poll(SETUP_SECONDS)
            failure = self.connection.recv() if answered else f"it was not ready in {SETUP_SECONDS:g} s"
        except (EOFError, OSError):
            failure = f"it {self._end()}"
        if failure is not None:
            self.kill()
            raise Unsupported(f"the worker process that checks candidates failed before it ran one: {failure}")

    def _end(self) -> str:
        self.process.join(END_SECONDS)
        code = self.process.exitcode
        if code is None:
            return "stopped answering"
        return f"was ended by {signal.Signals(-code).name}" if code < 0 else f"exited with status {code}"


@contextmanager
def _interrupt_held() -> Iterator[None]:
    """Ctrl-C waits until the context ends; a process started inside inherits that and never gets it."""
    resource_tracker.ensure_running()  # else started inside, where it would undo this
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _serve(recipe: _Recipe, connection: Connection) -> None:
    """The worker: answers None when it is made, and for each question None when that is set up, then the verdicts.

    Where making or setting up fails, the answer is the failure, and the worker ends.
    """
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        problem = MoEProblem(recipe.config, recipe.parallel)
        executor = recipe.make_executor(recipe.device)
        weights = random_weights(problem, recipe.seed, recipe.device)
        connection.send(None)
        while True:
            for answer in _answers(problem, weights, executor, recipe.seed, *connection.recv()):
                connection.send(answer)
            torch.cuda.empty_cache()
    except EOFError:
        return
    except Exception as failure:
        connection.send(f"{type(failure).__name__}: {failure}")


def _answers(
    problem: MoEProblem,
    weights: ExpertWeights,
    executor: Executor,
    seed: int,
    workload: Workload,
    gemm: Gemm,
    tactics: Sequence[str],
) -> Iterator[str | None]:
    trial = executor.gemm_trial(problem, weights, workload, gemm, seed)
    reference = trial.reference()
    yield None
    for tactic in tactics:
        reason = check(trial, tactic, reference, TOLERANCE[executor.name])
        # Two processes share the memory here, so that a lack of it says nothing of the tactic.
        yield None if reason is not None and reason.startswith(NO_MEMORY) else reason


def _end_with_parent() -> None:
    """A worker that hangs in a kernel must not outlive a parent that was killed."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
