"""What the benchmarks over several ranks share: the group, a rank's share of weights, and times of the slowest rank."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.common import capture
from benchmarks.tuner import environment
from moe_runtime import FP8BlockWeights, MoEConfig
from moe_runtime.executors import get_executor
from moe_runtime.executors.base import MoEProblem
from moe_runtime.tuning.ranks import use_local_gpu

Mark = torch.cuda.Event | float


def join(small: bool) -> torch.device:
    """This rank's device, in the group that the launcher asks for: NCCL on GPUs, gloo on the CPU in the small form."""
    if not small:
        use_local_gpu()
    if not dist.is_initialized():
        dist.init_process_group("gloo" if small else "nccl")
    return torch.device("cpu") if small else torch.device("cuda", torch.cuda.current_device())


def provenance(device: torch.device) -> dict[str, Any]:
    found = environment(get_executor(device)) | {"ranks": dist.get_world_size(), "backend": dist.get_backend()}
    return found if device.type == "cpu" else found | {"nccl": ".".join(map(str, torch.cuda.nccl.version()))}


def small_config(model: str) -> MoEConfig:
    """What a CPU runs in milliseconds."""
    return MoEConfig.preset(model).scaled(hidden_size=256, intermediate_size=256, num_experts=32)


def share(whole: FP8BlockWeights, problem: MoEProblem) -> FP8BlockWeights:
    """A rank's experts of all, and of them its slices."""
    first, parallel = problem.local_expert_offset, problem.parallel
    experts = slice(first, first + problem.num_local_experts)

    def rows(tensor: torch.Tensor) -> torch.Tensor:
        halves = tensor[experts].chunk(2, 1)
        return torch.cat([half.chunk(parallel.tp_size, 1)[parallel.tp_rank] for half in halves], 1)

    def columns(tensor: torch.Tensor) -> torch.Tensor:
        return tensor[experts].chunk(parallel.tp_size, 2)[parallel.tp_rank].contiguous()

    values = rows(whole.gate_up.view(torch.uint8)).view(torch.float8_e4m3fn)
    return FP8BlockWeights(values, rows(whole.gate_up_scale), columns(whole.down), columns(whole.down_scale))


def mark(device: torch.device) -> Mark:
    if device.type == "cpu":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def us_between(begin: Mark, end: Mark) -> float:
    if isinstance(begin, torch.cuda.Event):
        assert isinstance(end, torch.cuda.Event)
        end.synchronize()
        return 1000 * begin.elapsed_time(end)
    assert not isinstance(end, torch.cuda.Event)
    return 1e6 * (end - begin)


def time_parts(
    device: torch.device, call: Callable[[Callable[[], None]], object], names: Sequence[str], repeats: int
) -> dict[str, float]:
    """Median microseconds of the parts of an eager call, which ends each of them by the function that it is given.

    The ranks start each repeat together. Where the host is slower than the GPU, its time counts.
    """
    samples: dict[str, list[float]] = {name: [] for name in names}
    for warm in range(repeats + 2):
        dist.barrier()
        marks = [mark(device)]
        call(lambda marks=marks: marks.append(mark(device)))  # type: ignore[misc]
        assert len(marks) == len(names) + 1
        if warm >= 2:
            for name, begin, end in zip(names, marks, marks[1:], strict=False):
                samples[name].append(us_between(begin, end))
    return of_slowest(device, {name: statistics.median(us) for name, us in samples.items()})


def time_captured(
    device: torch.device, calls: Mapping[str, Callable[[], object]], launches: int, repeats: int
) -> dict[str, float]:
    """Median microseconds of calls that wait for nothing: from CUDA graphs of some launches each, which take turns.

    The number of launches is the same on all ranks, so that their collectives meet. On the CPU the calls are made.
    """
    replays: dict[str, Callable[[], object]] = dict(calls)
    if device.type == "cuda":
        replays = {name: capture(call, launches).replay for name, call in calls.items()}
    else:
        launches = 1
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, replay in replays.items():
            dist.barrier()
            begin = mark(device)
            replay()
            samples[name].append(us_between(begin, mark(device)) / launches)
    return of_slowest(device, {name: statistics.median(us) for name, us in samples.items()})


def of_slowest(device: torch.device, values: Mapping[str, float]) -> dict[str, float]:
    """By name the largest of any rank's values."""
    tensor = torch.tensor(list(values.values()), dtype=torch.float64, device=device)
    dist.all_reduce(tensor, dist.ReduceOp.MAX)
    return dict(zip(values, tensor.tolist(), strict=True))
