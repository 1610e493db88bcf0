"""One rank of tests/test_parallel_layers.py: a process that runs layers on demand, in a group with the others."""

from __future__ import annotations

import functools
import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from benchmarks.common import pinned
from moe_runtime.config import MoEConfig, RoutingMethod
from moe_runtime.executors import get_executor
from moe_runtime.executors.base import GEMMS, MoEProblem
from moe_runtime.layer import FusedMoE
from moe_runtime.parallel import Parallel, ParallelMoE
from moe_runtime.parallel.dispatch import Arrived
from moe_runtime.reference import relative_error
from moe_runtime.tuning import Plan
from moe_runtime.weights import ExpertWeights, FP8BlockWeights, PackedWeights

HIDDEN, INTER, EXPERTS, TOP_K = 256, 512, 8, 3
_device = "cpu"


def config(format: str = "fp8_block", method: RoutingMethod = RoutingMethod.Renormalize) -> MoEConfig:
    top_k = 1 if method == RoutingMethod.Llama4 else TOP_K
    return MoEConfig("test", HIDDEN, INTER, EXPERTS, top_k, method, format=format)


@functools.cache
def _experts() -> tuple[Tensor, Tensor]:
    """All experts' [gate; up] and down, bf16."""
    generator = torch.Generator().manual_seed(1)
    gate_up = torch.randn(EXPERTS, 2 * INTER, HIDDEN, generator=generator) / HIDDEN**0.5
    return gate_up.bfloat16(), (torch.randn(EXPERTS, HIDDEN, INTER, generator=generator) / INTER**0.5).bfloat16()


@functools.cache
def share(format: str, parallel: Parallel) -> ExpertWeights:
    """A rank's experts, and of them its slices."""
    gate_up, down = (weights[list(parallel.shard(EXPERTS))] for weights in _experts())
    gate, up = (half.chunk(parallel.tp_size, 1)[parallel.tp_rank] for half in gate_up.chunk(2, 1))
    part = torch.cat([gate, up], 1), down.chunk(parallel.tp_size, 2)[parallel.tp_rank].contiguous()
    if format == "fp8_block":
        return FP8BlockWeights.quantise_bf16(*part).to(_device)
    return PackedWeights.quantise_bf16(format, *part).to(_device)


@dataclass(frozen=True)
class Case:
    """A layer and one call of it. counts: tokens of each shard under dep, of all ranks else.

    ids: ready ids and weights instead of router logits, some of them -1. only_first: all tokens go to rank 0's experts.
    """

    layout: str
    counts: tuple[int, ...]
    dispatch: str | None = None
    max_num_tokens: int = 64
    capacity: int | None = None
    format: str = "fp8_block"
    method: RoutingMethod = RoutingMethod.Renormalize
    ids: bool = False
    only_first: bool = False
    inference_mode: bool = False

    def tokens(self, parallel: Parallel) -> tuple[Tensor, Tensor]:
        """A rank's x and router logits."""
        group = parallel.ep_rank if parallel.use_dp else 0
        generator, count = torch.Generator().manual_seed(10 + group), self.counts[group]
        x = torch.randn(count, HIDDEN, generator=generator).bfloat16()
        logits = torch.randn(count, EXPERTS, generator=generator)
        if self.only_first:
            logits[:, : EXPERTS // parallel.size] += 100
        return x.to(_device), logits.to(_device)

    def ready(self, logits: Tensor) -> dict[str, Tensor]:
        """Distinct ids and weights; those of -1 have weights that must not count."""
        ids = logits.argsort(1, descending=True)[:, :TOP_K].to(torch.int32).contiguous()
        weights = logits.softmax(1)[:, :TOP_K].contiguous()
        return {"topk_ids": ids.masked_fill(weights < 0.1, -1), "topk_weights": weights}

    def layer(self, rank: int, **settings: Any) -> ParallelMoE:
        parallel = Parallel.parse(self.layout, rank)
        given = {"dispatch": self.dispatch, "max_num_tokens": self.max_num_tokens, "plan": self.plan(parallel)}
        given |= settings
        return ParallelMoE(config(self.format, self.method), parallel, share(self.format, parallel), **given)

    def plan(self, parallel: Parallel) -> Plan | None:
        """On a GPU the same kernels for a rank as for all experts on one: some round between gate_up and down."""
        if _device == "cpu":
            return None
        made, executor = config(self.format, self.method), get_executor(_device)
        whole = MoEProblem(made, Parallel.parse("ep1"))
        gemm1, gemm2 = (executor.default_tactic(whole, gemm, 64) for gemm in GEMMS)
        return pinned(MoEProblem(made, parallel), executor, (gemm1, gemm2))

    def call(self, layer: ParallelMoE) -> Tensor:
        x, logits = self.tokens(layer.problem.parallel)
        if self.ids:
            return layer(x, **self.ready(logits), capacity=self.capacity)
        return layer(x, logits, capacity=self.capacity)


@dataclass
class Seen:
    """What one rank saw. output: [n, H]. kernel_rows: of each call of the experts. dtype: of the rows that they got.

    received: rows of each all-to-all by source.
    """

    output: NDArray[np.float32]
    again: bool
    kernel_rows: list[int] = field(default_factory=list)
    dtype: str = ""
    received: list[list[int]] = field(default_factory=list)


def run(case: Case, rank: int) -> Seen:
    layer = case.layer(rank, deterministic=True)
    seen = Seen(np.empty(0, np.float32), False)
    experts, dispatch = layer.experts, layer.dispatcher.dispatch

    def watched(x: Tensor, *given: Any, **named: Any) -> Tensor:
        seen.kernel_rows.append(len(x))
        seen.dtype = str(x.dtype)
        return experts(x, *given, **named)

    def watched_dispatch(*given: Any) -> Arrived:
        arrived = dispatch(*given)
        seen.received.append(getattr(arrived.handle, "received", []))
        return arrived

    with torch.inference_mode(case.inference_mode):
        first = case.call(layer)
        layer.experts, layer.dispatcher.dispatch = watched, watched_dispatch  # type: ignore[assignment,method-assign]
        output = case.call(layer)
    assert output.dtype == torch.bfloat16
    seen.output, seen.again = output.float().cpu().numpy(), torch.equal(first, output)
    return seen


def alone(case: Case, rank: int) -> NDArray[np.float32]:
    """What a single rank with all experts gives for that rank's tokens."""
    whole = Parallel.parse("ep1")
    x, logits = case.tokens(Parallel.parse(case.layout, rank))
    weights, plan = share(case.format, whole), case.plan(whole)
    layer = FusedMoE(config(case.format, case.method), whole, weights, plan, deterministic=True)
    output = layer(x, **case.ready(logits)) if case.ids else layer(x, logits)
    return output.float().cpu().numpy()


def captured(case: Case, rank: int) -> list[float]:
    """Captures a call of the capacity, replays it for fewer tokens, and compares each with an eager call of those."""
    assert case.capacity is not None
    layer, capacity = case.layer(rank, deterministic=True), case.capacity
    x, logits = case.tokens(layer.problem.parallel)
    ready = case.ready(logits)
    static = {name: tensor.clone() for name, tensor in ready.items()}
    layer(x, **static, capacity=capacity)  # NCCL connects on its first call, which a graph cannot hold
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # NCCL's watchdog asks for its events meanwhile
        output = layer(x, **static, capacity=capacity)
    differences = []
    for count in (capacity, 1 + 16 * rank, 0, 7):
        static["topk_ids"].fill_(-1)
        static["topk_ids"][:count] = ready["topk_ids"][:count]
        output.fill_(torch.nan)
        graph.replay()
        expected = layer(x[:count], **{name: tensor[:count] for name, tensor in ready.items()})
        differences.append(relative_error(output[:count], expected))
    return differences


def die() -> None:
    os._exit(9)


def freeze() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


@dataclass(frozen=True)
class Fault:
    """One rank ends, or stops, while its experts work in the second call."""

    case: Case
    faulty: int
    timeout_seconds: float
    fault: Callable[[], None] = die

    def __call__(self, rank: int) -> float:
        """Never returns on a rank that is well: it raises, and says after how many seconds."""
        layer = self.case.layer(rank, timeout_seconds=self.timeout_seconds)
        self.case.call(layer)
        experts = layer.experts

        def faulty(*given: Any, **named: Any) -> Tensor:
            self.fault()
            return experts(*given, **named)

        if rank == self.faulty:
            layer.experts = faulty  # type: ignore[assignment]
        begin = time.monotonic()
        try:
            self.case.call(layer)
        except Exception as error:
            error.add_note(str(time.monotonic() - begin))
            raise
        raise AssertionError("no error")


Answer = tuple[Any, tuple[str, str, list[str]] | None]
"""What a task returned, or the type, message and notes of what it raised."""


def serve(rank: int, size: int, port: int, connection: Connection, device: str) -> None:
    """Runs the tasks that come, each a function of the rank, until None does."""
    global _device
    if device == "cuda":
        torch.cuda.set_device(rank)
    _device = device
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo" if device == "cpu" else "nccl", timeout=timedelta(seconds=15))
    while (task := connection.recv()) is not None:
        answer: Answer
        try:
            answer = task(rank), None
        except Exception as error:
            answer = None, (type(error).__name__, str(error), getattr(error, "__notes__", []))
        connection.send(answer)
    os._exit(0)  # gloo's threads may still wait for a rank that is no more
