"""A CPU executor with tactics that fail in every way a kernel can; worker processes import it by name."""

import dataclasses
import os
import signal
import time
from collections.abc import Sequence

from torch import Tensor

from moe_runtime.executors.base import Gemm, GemmTrial, MoEProblem
from moe_runtime.executors.cpu import CpuExecutor
from moe_runtime.weights import FP8BlockWeights
from moe_runtime.workload import Workload

FAULTS = ("segfault", "exit", "hang", "wrong")
SOUND = "per_expert_loop"


@dataclasses.dataclass
class FaultyTrial:
    """Fails for every tactic once the process has seen a fault, as a CUDA context does."""

    trial: GemmTrial
    spoiled: bool = False

    def run(self, tactic: str) -> Tensor:
        if self.spoiled:
            raise RuntimeError("this process has seen a fault")
        self.spoiled = tactic in FAULTS
        match tactic:
            case "segfault":
                os.kill(os.getpid(), signal.SIGSEGV)
            case "exit":
                os._exit(3)
            case "hang":
                time.sleep(600)
        result = self.trial.run(SOUND if tactic in FAULTS else tactic)
        if tactic == "wrong":
            result[-1] = 0
        return result

    def reference(self) -> tuple[Tensor, Tensor]:
        return self.trial.reference()

    def error(self, tactic: str, rows: Tensor, expected: Tensor) -> float:
        return self.trial.error(tactic, rows, expected)

    def time(self, tactics: Sequence[str], repeats: int) -> dict[str, list[float]]:
        assert not set(tactics) & set(FAULTS), "a faulty tactic was timed"
        return self.trial.time(tactics, repeats)


class FaultyExecutor(CpuExecutor):
    def tactics(self, problem: MoEProblem, gemm: Gemm) -> tuple[str, ...]:
        return (*FAULTS, *super().tactics(problem, gemm))

    def can_implement(self, problem: MoEProblem, gemm: Gemm, tactic: str) -> str | None:
        return None if tactic in FAULTS else super().can_implement(problem, gemm, tactic)

    def gemm_trial(  # type: ignore[override]
        self, problem: MoEProblem, weights: FP8BlockWeights, workload: Workload, gemm: Gemm, seed: int
    ) -> FaultyTrial:
        return FaultyTrial(super().gemm_trial(problem, weights, workload, gemm, seed))


def make_faulty(device: str) -> FaultyExecutor:
    return FaultyExecutor()


def make_nothing(device: str) -> FaultyExecutor:
    raise RuntimeError("no such device")


def make_crash(device: str) -> FaultyExecutor:
    os.kill(os.getpid(), signal.SIGKILL)
    return FaultyExecutor()
