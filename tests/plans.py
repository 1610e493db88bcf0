"""Small plans for tests: one layer on this machine's CPU executor, and the times of two of its tactics."""

from typing import Any

import msgspec

from moe_runtime.config import MoEConfig
from moe_runtime.executors import get_executor
from moe_runtime.executors.base import MoEProblem
from moe_runtime.parallel import Parallel
from moe_runtime.tuning import GemmChoice, Plan, PlanEntry, PlanKey, Timing

MODEL = "qwen3-30b"
CONFIG = MoEConfig.preset(MODEL)
CPU = get_executor("cpu")
LAYER = MoEProblem(CONFIG, Parallel.parse("dep2"))
DEFAULT, OTHER, *_ = CPU.tactics(LAYER, "gemm1")


def timing(us: float, width: float = 0.1) -> Timing:
    """A time whose confidence interval is `width` of it wide, half of that on either side."""
    return Timing(us, us * (1 - width / 2), us * (1 + width / 2))


def choice(tactic: str = DEFAULT, width: float = 0.1, *, default: float = 100.0, other: float = 50.0) -> GemmChoice:
    """`tactic` chosen among DEFAULT and OTHER, which took `default` and `other` microseconds."""
    timings = {DEFAULT: timing(default, width), OTHER: timing(other, width)}
    return GemmChoice(tactic=tactic, default_tactic=DEFAULT, timings=timings)


def entry(bucket: int, gemm1: GemmChoice | None = None, gemm2: GemmChoice | None = None) -> PlanEntry:
    return PlanEntry(bucket=bucket, rows=8 * bucket, gemm1=gemm1 or choice(), gemm2=gemm2 or choice())


def make_plan(
    *entries: PlanEntry, buckets: tuple[int, ...] | None = None, layout: str = "dep2", **changes: Any
) -> Plan:
    """A plan for LAYER, or for another layout, on this machine's CPU executor."""
    problem = MoEProblem(CONFIG, Parallel.parse(layout))
    wanted = buckets or tuple(each.bucket for each in entries)
    fields: dict[str, Any] = {
        "key": PlanKey.of(problem, "balanced", 64, CPU.device_name, CPU.library_hash),
        "seed": 0,
        "samples": 2,
        "margin": 0.02,
        "confidence": 0.95,
        "complete": len(entries) == len(wanted),
        "buckets": wanted,
        "entries": entries,
    }
    return Plan(**fields | changes)


def rekeyed(plan: Plan, **changes: Any) -> Plan:
    return msgspec.structs.replace(plan, key=msgspec.structs.replace(plan.key, **changes))
