"""Layers over four processes give what one rank with all experts gives, or an error in time."""

from __future__ import annotations

import functools
import logging
import multiprocessing
import socket
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from moe_runtime import FusedMoE, InvalidArgument, MoEConfig, Parallel, ParallelMoE, RankError
from moe_runtime.config import RoutingMethod
from moe_runtime.executors.base import LayerInputs, MoEProblem
from moe_runtime.parallel import groups
from moe_runtime.parallel.dispatch import Arrived, make_dispatcher
from moe_runtime.parallel.groups import RankGroup, RankGroups
from moe_runtime.parallel.packing import Packing, TorchPacking
from moe_runtime.reference import relative_error
from moe_runtime.weights import FP8BlockWeights

from .parallel_worker import EXPERTS, TOP_K, Answer, Case, Fault, Seen, alone, freeze, run, serve

SIZE = 4
BOUND = 5e-3
"""Partial sums are rounded to bf16 on their way; beside that the ranks compute the same."""

# Forked from a process that has imported torch and not used it: starts at once.
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["tests.parallel_worker"])


class Ranks:
    """Processes in one group, which run what they are told. device: "cpu" with gloo, or "cuda" with NCCL."""

    def __init__(self, size: int = SIZE, device: str = "cpu") -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.connections, self.processes, self.patience = [], [], 25 if device == "cpu" else 120
        for rank in range(size):
            ours, theirs = _context.Pipe()
            process = _context.Process(target=serve, args=(rank, size, port, theirs, device), daemon=True)
            process.start()
            theirs.close()
            self.connections.append(ours)
            self.processes.append(process)

    def __call__(self, task: Callable[[int], Any], never: int | None = None) -> list[Answer]:
        """Each rank's answer, except of one that gives none."""
        for connection in self.connections:
            connection.send(task)
        deadline = time.monotonic() + self.patience
        asked = [connection for rank, connection in enumerate(self.connections) if rank != never]
        for connection in asked:
            assert connection.poll(max(0, deadline - time.monotonic())), "a rank hangs"
        return [connection.recv() for connection in asked]

    def run(self, case: Case) -> list[Seen]:
        answers = self(functools.partial(run, case))
        assert not any(error for _, error in answers), answers
        return [seen for seen, _ in answers]

    def stop(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    started = Ranks()
    yield started
    started.stop()


def hits(case: Case, layout: Parallel) -> list[list[int]]:
    """[source][destination]: tokens with a slot there, counted one by one."""
    found = []
    for source in range(layout.size):
        _, logits = case.tokens(Parallel("dep", layout.size, source * layout.tp_size, layout.tp_size))
        ids = case.ready(logits)["topk_ids"] if case.ids else logits.argsort(1, descending=True)[:, :TOP_K]
        owners = [{expert * layout.size // EXPERTS for expert in row if expert >= 0} for row in ids.tolist()]
        found.append([sum(rank in of_row for of_row in owners) for rank in range(layout.size)])
    return found


UNEQUAL = (5, 0, 1, 12)
CASES = {
    "dep4": Case("dep4", (6, 6, 6, 6)),
    "dep4, unequal and none": Case("dep4", UNEQUAL),
    "dep4, one token in all": Case("dep4", (0, 0, 1, 0)),
    "dep4, no token at all": Case("dep4", (0, 0, 0, 0)),
    "dep4, all to one rank": Case("dep4", UNEQUAL, only_first=True),
    "dep4, ready ids": Case("dep4", UNEQUAL, ids=True),
    "dep4, bf16": Case("dep4", UNEQUAL, format="bf16"),
    "dep4, inference mode": Case("dep4", (9, 0, 2, 5), max_num_tokens=2, inference_mode=True),
    "dep4, weighs the input": Case("dep4", UNEQUAL, method=RoutingMethod.Llama4),
    "dep4, fixed": Case("dep4", UNEQUAL, capacity=16),
    "dep4, fixed and exact": Case("dep4", (3, 3, 3, 3), capacity=3, ids=True),
    "dep4, chunks": Case("dep4", UNEQUAL, max_num_tokens=4),
    "dep4, fixed chunks": Case("dep4", UNEQUAL, max_num_tokens=5, capacity=12),
    "dep4, all-gather": Case("dep4", UNEQUAL, "allgather"),
    "dep4, all-gather of none": Case("dep4", (0, 0, 0, 0), "allgather"),
    "dep4, all-gather, ready ids": Case("dep4", UNEQUAL, "allgather", ids=True),
    "dep4, all-gather, fixed": Case("dep4", UNEQUAL, "allgather", capacity=16),
    "dep4, all-gather, chunks": Case("dep4", UNEQUAL, "allgather", max_num_tokens=4),
    "dep4, all-gather, bf16": Case("dep4", UNEQUAL, "allgather", format="bf16"),
    "ep4": Case("ep4", (7,)),
    "ep4, by name, chunks": Case("ep4", (11,), "allreduce", max_num_tokens=4),
    "ep4, no token": Case("ep4", (0,)),
    "ep4, capacity": Case("ep4", (7,), capacity=8, ids=True),
    "tp4": Case("tp4", (7,)),
    "ep2tp2": Case("ep2tp2", (7,)),
    "dep1tp4": Case("dep1tp4", (7,)),
    "dep2tp2": Case("dep2tp2", (3, 8)),
    "dep2tp2, none and chunks": Case("dep2tp2", (0, 9), max_num_tokens=4),
    "dep2tp2, all-gather": Case("dep2tp2", (3, 8), "allgather"),
    "dep2tp2, fixed": Case("dep2tp2", (3, 8), capacity=8),
}


@pytest.mark.parametrize("name", CASES)
def test_equals_one_rank(ranks: Ranks, name: str) -> None:
    case = CASES[name]
    for rank, seen in enumerate(ranks.run(case)):
        expected = alone(case, rank)
        assert seen.output.shape == expected.shape
        assert relative_error(torch.from_numpy(seen.output), torch.from_numpy(expected)) <= BOUND
        assert seen.again  # two calls give equal bits
    travels = (
        "torch.float8_e4m3fn" if case.format == "fp8_block" and case.layout in ("dep4", "dep2tp2") else "torch.bfloat16"
    )
    assert seen.dtype == travels


@pytest.mark.parametrize(
    "name", ["dep4", "dep4, unequal and none", "dep4, all to one rank", "dep4, ready ids", "dep2tp2"]
)
def test_a_row_goes_once_to_a_rank(ranks: Ranks, name: str) -> None:
    """However many of its slots are there."""
    layout = Parallel.parse(CASES[name].layout)
    expected = hits(CASES[name], layout)
    for rank, seen in enumerate(ranks.run(CASES[name])):
        destination = rank // layout.tp_size
        assert seen.received == [[expected[source][destination] for source in range(layout.size)]]


@pytest.mark.parametrize(
    ("name", "rows"),
    [
        ("dep4, unequal and none", [18]),
        ("dep4, chunks", [9, 5, 4]),
        ("dep4, fixed", [64]),
        ("dep4, fixed chunks", [20, 20, 8]),
        ("dep4, all-gather", [48]),
        ("dep4, all-gather, chunks", [16, 16, 16]),
        ("dep2tp2", [11]),
        ("ep4", [7]),
        ("ep4, by name, chunks", [4, 4, 3]),
    ],
)
def test_rows_that_a_plan_is_looked_up_by(ranks: Ranks, name: str, rows: list[int]) -> None:
    """All ranks' tokens after an all-to-all, R times the most of any rank after an all-gather or of fixed size."""
    for seen in ranks.run(CASES[name]):
        assert seen.kernel_rows == rows


def differing_layers(rank: int) -> None:
    Case("dep4", (1, 1, 1, 1)).layer(rank, max_num_tokens=8 << (rank == 2))


def layer_seen_from_another_rank(rank: int) -> None:
    Case("dep4", (1, 1, 1, 1)).layer((rank + 1) % SIZE)


def layer_of_fewer_ranks(rank: int) -> None:
    Case("dep2", (1, 1)).layer(rank % 2)


def more_tokens_than_capacity(rank: int) -> None:
    layer = Case("dep4", (3, 3, 3, 3), capacity=2)
    layer.call(layer.layer(rank))


def an_id_of_no_expert(rank: int) -> None:
    layer = Case("dep4", (1, 1, 1, 1)).layer(rank)
    ids = torch.full((1, TOP_K), EXPERTS, dtype=torch.int32)
    layer(torch.zeros(1, 256, dtype=torch.bfloat16), topk_ids=ids, topk_weights=torch.ones(1, TOP_K))


@pytest.mark.parametrize(
    ("task", "kind", "message"),
    [
        (differing_layers, "RankError", "dep4: the ranks' layers differ: rank 2 has max_num_tokens 16 (rank 0: 8)"),
        (layer_of_fewer_ranks, "InvalidArgument", "parallel: got dep2, of 2 ranks; accepted: a layout of 4 ranks."),
        (layer_seen_from_another_rank, "InvalidArgument", "parallel: got dep4 seen from rank 1; accepted: rank 0."),
        (more_tokens_than_capacity, "InvalidArgument", "capacity: got 2; accepted: 1 or more, at least this rank's 3"),
        (an_id_of_no_expert, "InvalidArgument", "topk_ids: got an id of 8; accepted: -1 to 7"),
    ],
)
def test_bad_input_is_an_error_on_every_rank(
    ranks: Ranks, task: Callable[[int], None], kind: str, message: str
) -> None:
    """And the group goes on afterwards."""
    answers = ranks(task)
    assert all(error is not None and error[0] == kind for _, error in answers), answers
    assert answers[0][1] is not None and answers[0][1][1].startswith(message)
    assert len(ranks.run(CASES["dep4"])) == SIZE


@pytest.mark.parametrize(
    ("case", "collective"),
    [
        (Case("dep4", (4, 4, 4, 4)), "all-to-all of dep4"),
        (Case("dep4", (9, 9, 9, 9), max_num_tokens=2), "all-to-all of dep4"),
        (Case("dep4", (4, 4, 4, 4), "allgather"), "reduce-scatter of dep4"),
        (Case("ep4", (4,)), "all-reduce of ep4"),
        (Case("dep2tp2", (4, 4)), "of dep2tp2"),
    ],
    ids=lambda value: value.layout if isinstance(value, Case) else value,
)
def test_a_killed_rank_is_an_error_on_the_others(case: Case, collective: str) -> None:
    timeout = 2.0
    started = Ranks()
    try:
        check_errors(started(Fault(case, faulty=2, timeout_seconds=timeout), never=2), collective, timeout)
    finally:
        started.stop()


def test_a_frozen_rank_is_an_error_on_the_others() -> None:
    """Its connections stay open, so that only the time-out tells."""
    started, timeout = Ranks(), 2.0
    try:
        fault = Fault(Case("dep4", (4, 4, 4, 4)), 1, timeout, freeze)
        check_errors(started(fault, never=1), "all-to-all of dep4", timeout)
    finally:
        started.stop()


def check_errors(answers: list[Answer], collective: str, timeout: float) -> None:
    assert len(answers) == SIZE - 1
    for _, error in answers:
        assert error is not None
        kind, message, (seconds,) = error
        assert kind == "RankError" and collective in message and "another rank is missing, dead or stuck" in message
        # Beyond the time-out: a machine that runs other things too.
        assert float(seconds) < timeout + 5


# What needs no other process.

SMALL = MoEConfig("small", 256, 128, 8, 2)


def test_one_rank_needs_no_group() -> None:
    for text in ("dep1", "ep1", "tp1"):
        layout, weights = Parallel.parse(text), FP8BlockWeights.random(SMALL, 8)
        x, logits = torch.randn(5, 256).bfloat16(), torch.randn(5, 8)
        expected = FusedMoE(SMALL, layout, weights)(x, logits)
        assert torch.equal(ParallelMoE(SMALL, layout, weights)(x, logits), expected)
        assert torch.equal(ParallelMoE(SMALL, layout, weights, max_num_tokens=2)(x, logits), expected)


class Backwards:
    """An exchange of somebody else's: hands the experts the tokens in reverse."""

    needs_ids = True

    def __init__(self, problem: MoEProblem, groups: RankGroups, packing: Packing) -> None:
        assert groups.all is None and problem.config is SMALL

    def dispatch(self, inputs: LayerInputs, later: int, capacity: int | None) -> Arrived:
        x, _, _, _, ids, weights = inputs
        assert ids is not None and weights is not None
        return Arrived(LayerInputs(x.flip(0), topk_ids=ids.flip(0), topk_weights=weights.flip(0)), later, "reverse")

    def combine(self, partial: Tensor, handle: str) -> Tensor:
        assert handle == "reverse"
        return partial.flip(0)


def test_a_dispatcher_of_ones_own(caplog: pytest.LogCaptureFixture) -> None:
    layout, weights = Parallel.parse("dep1"), FP8BlockWeights.random(SMALL, 8)
    x, logits = torch.randn(7, 256).bfloat16(), torch.randn(7, 8)
    with caplog.at_level(logging.INFO, "moe_runtime.parallel"):
        layer = ParallelMoE(SMALL, layout, weights, dispatch=Backwards, max_num_tokens=3)
    assert [record.message for record in caplog.records] == ["dep1: dispatch by the given Backwards"]
    assert torch.equal(layer(x, logits), FusedMoE(SMALL, layout, weights)(x, logits))


def problem_and_groups(text: str) -> tuple[MoEProblem, RankGroups]:
    layout = Parallel.parse(text)
    group = RankGroup(SimpleNamespace(), layout.world_size, text)  # type: ignore[arg-type]
    return MoEProblem(MoEConfig("small", 256, 256, 8, 2), layout), RankGroups(group, group, group)


@pytest.mark.parametrize(
    ("text", "name", "logged"),
    [
        ("dep4", None, "dep4: dispatch by alltoall, because each rank has tokens of its own"),
        ("dep4", "allgather", "dep4: dispatch by allgather, as asked for"),
        ("ep4", None, "ep4: dispatch by allreduce, because all ranks have the same tokens"),
        ("dep1tp2", None, "dep1tp2: dispatch by allreduce, because all ranks have the same tokens"),
    ],
)
def test_the_choice_is_logged(text: str, name: str | None, logged: str, caplog: pytest.LogCaptureFixture) -> None:
    problem, groups = problem_and_groups(text)
    with caplog.at_level(logging.INFO, "moe_runtime.parallel"):
        make_dispatcher(problem, groups, TorchPacking(problem), name)
    assert [record.message.startswith(logged) for record in caplog.records] == [True]


@pytest.mark.parametrize(("text", "name"), [("dep4", "allreduce"), ("ep4", "alltoall"), ("dep4", "deepest")])
def test_a_dispatch_that_does_not_do(text: str, name: str) -> None:
    accepted = "alltoall or allgather or deepep under dep4" if text == "dep4" else "allreduce under ep4"
    problem, groups = problem_and_groups(text)
    with pytest.raises(InvalidArgument, match=f"^dispatch: got '{name}'; accepted: {accepted}, or None"):
        make_dispatcher(problem, groups, TorchPacking(problem), name)


def test_bad_arguments_of_one_process() -> None:
    weights = FP8BlockWeights.random(SMALL, 4)
    dep2 = Parallel.parse("dep2")
    with pytest.raises(InvalidArgument, match=r"^group: got no process group; accepted: one of 2 ranks for dep2"):
        ParallelMoE(SMALL, dep2, weights)
    with pytest.raises(InvalidArgument, match=r"^timeout_seconds: got 0"):
        ParallelMoE(SMALL, dep2, weights, timeout_seconds=0)
    with pytest.raises(InvalidArgument, match=r"^max_num_tokens: got 0"):
        ParallelMoE(SMALL, dep2, weights, max_num_tokens=0)
    layer = ParallelMoE(SMALL, Parallel.parse("ep1"), FP8BlockWeights.random(SMALL, 8))
    with pytest.raises(InvalidArgument, match=r"^x: got torch.float8_e4m3fn; accepted: torch.bfloat16"):
        layer(torch.zeros(1, 256).to(torch.float8_e4m3fn), torch.zeros(1, 8))
    with pytest.raises(InvalidArgument, match=r"^capacity: got 0; accepted: 1 or more"):
        layer(torch.zeros(0, 256).bfloat16(), torch.zeros(0, 8), capacity=0)


@pytest.mark.parametrize(
    ("device", "backends", "accepted"), [("cuda:0", "cpu:gloo,cuda:gloo", "nccl"), ("cpu", "cuda:nccl", "gloo")]
)
def test_a_group_that_does_not_serve_the_device(
    device: str, backends: str, accepted: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dist, "get_backend_config", lambda _: backends)
    with pytest.raises(InvalidArgument, match=f"group: got a group with {backends}; accepted: one with {accepted}"):
        groups._check_backend(SimpleNamespace(), torch.device(device))  # type: ignore[arg-type]


def test_a_failed_collective_is_a_rank_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def lost(*_: object, **__: object) -> None:
        raise RuntimeError("Connection closed by peer\nwith a trace")

    monkeypatch.setattr(dist, "all_reduce", lost)
    monkeypatch.setattr(dist, "get_rank", lambda _: 1)
    ranks = RankGroup(SimpleNamespace(), 2, "ep2")  # type: ignore[arg-type]
    with pytest.raises(
        RankError, match=r"^all-reduce of ep2 on its rank 1 of 2 failed: .*\(Connection closed by peer\)$"
    ):
        ranks.all_reduce(torch.zeros(1))
