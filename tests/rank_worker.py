"""One rank of tests/test_ranks.py, in a process of its own, with the fault that the test asks for."""

import os
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.distributed as dist

from moe_runtime.config import MoEConfig
from moe_runtime.errors import Unsupported
from moe_runtime.executors.base import Gemm, MoEProblem
from moe_runtime.executors.cpu import CpuExecutor
from moe_runtime.parallel import Parallel
from moe_runtime.tuning import Plan
from moe_runtime.tuning.meeting import RankError
from moe_runtime.tuning.ranks import tune_over_ranks
from moe_runtime.weights import FP8BlockWeights
from moe_runtime.workload import Workload

CONFIG = MoEConfig("test", 256, 128, 8, 2)
PROBLEM = MoEProblem(CONFIG, Parallel.parse("dep2"))
MAX_TOKENS = 32


def die() -> None:
    os._exit(9)


def stall() -> None:
    time.sleep(600)


def freeze() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def fail() -> None:
    raise Unsupported("no tactic of gemm1 works")


def interrupt() -> None:
    raise KeyboardInterrupt


@dataclass(frozen=True)
class Rank:
    """What a rank does. in_bucket: called halfway through its first bucket. late: seconds before it joins.

    faulty: a tactic that its check finds to crash.
    gloo: is in a process group, whose store serves; else it meets the others by the environment's variables.
    """

    rank: int
    size: int
    port: int
    timeout: float
    in_bucket: Callable[[], None] | None = None
    late: float = 0
    library_hash: str = "one"
    seed: int = 0
    digest: str | None = None
    gloo: bool = True
    max_tokens: int = MAX_TOKENS
    resume: Plan | None = None
    faulty: str | None = None

    def vet(self, workload: Workload, gemm: Gemm, tactics: Sequence[str]) -> dict[str, str]:
        return {tactic: "crashed" for tactic in tactics if tactic == self.faulty}


@dataclass(frozen=True)
class Outcome:
    """error: None, or (type, message). buckets: those that this rank tuned. saved: on_bucket's numbers of entries."""

    error: tuple[str, str] | None
    seconds: float
    plan: Plan | None
    buckets: list[int]
    saved: list[int]


class RankExecutor(CpuExecutor):
    def __init__(self, rank: Rank) -> None:
        super().__init__()
        self._rank = rank
        self.library_hash = rank.library_hash
        self.buckets: list[int] = []

    def gemm_trial(
        self, problem: MoEProblem, weights: FP8BlockWeights, workload: Workload, gemm: Gemm, seed: int
    ) -> Any:
        if workload.num_tokens not in self.buckets:
            self.buckets.append(workload.num_tokens)
        if gemm == "gemm2" and self._rank.in_bucket is not None:
            self._rank.in_bucket()
        return super().gemm_trial(problem, weights, workload, gemm, seed)


def run_rank(rank: Rank, answer: Connection) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank.rank), "WORLD_SIZE": str(rank.size)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(rank.port)}
    if rank.gloo:
        dist.init_process_group("gloo", timeout=timedelta(seconds=20))
    time.sleep(rank.late)
    if rank.digest is not None:
        Plan.digest = lambda _: rank.digest  # type: ignore[assignment, method-assign, return-value]
    executor, saved = RankExecutor(rank), list[int]()
    weights = FP8BlockWeights.random(CONFIG, PROBLEM.num_local_experts)
    start = time.monotonic()
    try:
        plan = tune_over_ranks(
            PROBLEM, weights, executor, rank.max_tokens, "balanced", rank.seed,
            resume=rank.resume,
            on_bucket=lambda so_far: saved.append(len(so_far.entries)),
            vet=rank.vet,
            timeout_seconds=rank.timeout,
        )  # fmt: skip
    except BaseException as failure:
        kind = "RankError" if isinstance(failure, RankError) else type(failure).__name__
        answer.send(Outcome((kind, str(failure)), time.monotonic() - start, None, executor.buckets, saved))
    else:
        if rank.gloo:
            digests: list[Any] = [None] * rank.size
            dist.all_gather_object(digests, plan.digest())
            assert digests == [plan.digest()] * rank.size
        answer.send(Outcome(None, time.monotonic() - start, plan, executor.buckets, saved))
    answer.close()
    os._exit(0)  # gloo's threads may still wait for a rank that is no more
