"""Four processes tune one plan together; each fault ends all of them with an error, in time."""

import dataclasses
import json
import multiprocessing
import re
import socket
import subprocess
import sys
import time
from multiprocessing.connection import Connection
from pathlib import Path

import msgspec
import pytest
import torch

from moe_runtime.errors import InvalidArgument, Unsupported
from moe_runtime.tuning import Plan
from moe_runtime.tuning.meeting import RankError, meeting
from moe_runtime.tuning.ranks import use_local_gpu
from moe_runtime.workload import buckets

from .rank_worker import MAX_TOKENS, Outcome, Rank, die, fail, freeze, interrupt, run_rank, stall

SIZE = 4
TIMEOUT = 5.0  # four processes that import torch on two cores are silent for a second or two
SLACK = 9.0
"""Beyond the time-out, for machines that run other things too; a test that waits for ever is what counts."""

# Forked from a process that has imported torch and not used it: starts at once.
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["tests.rank_worker"])


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def ranks(timeout: float = TIMEOUT, gloo: bool = True) -> list[Rank]:
    port = free_port()
    return [Rank(rank, SIZE, port, timeout, gloo=gloo) for rank in range(SIZE)]


def run(started: list[Rank], never: tuple[int, ...] = ()) -> list[Outcome | None]:
    """Outcomes by rank; None for one that gave none, because it died or never ends (`never`)."""
    running, answers = [], []
    for rank in started:
        ours, theirs = _context.Pipe(duplex=False)
        process = _context.Process(target=run_rank, args=(rank, theirs), daemon=True)
        process.start()
        theirs.close()
        running.append(process)
        answers.append(ours)
    try:
        deadline = time.monotonic() + 20
        return [
            None if rank.rank in never else _receive(answer, deadline)
            for rank, answer in zip(started, answers, strict=True)
        ]
    finally:
        for process in running:
            process.kill()
            process.join()


def _receive(answer: Connection, deadline: float) -> Outcome | None:
    assert answer.poll(max(0, deadline - time.monotonic())), "a rank hangs"
    try:
        outcome: Outcome = answer.recv()
        return outcome
    except EOFError:
        return None


def errors(outcomes: list[Outcome | None], within: float) -> list[str]:
    """The messages of ranks that all ended with a RankError, in time."""
    messages = []
    for outcome in outcomes:
        assert outcome is not None and outcome.error is not None and outcome.error[0] == "RankError", outcome
        assert outcome.seconds < within
        messages.append(outcome.error[1])
    return messages


@pytest.mark.parametrize("gloo,max_tokens", [(True, MAX_TOKENS), (False, 2)])
def test_all_ranks_end_with_one_plan(gloo: bool, max_tokens: int) -> None:
    """Also where there are more ranks than buckets."""
    outcomes = run([dataclasses.replace(rank, max_tokens=max_tokens) for rank in ranks(30, gloo)])
    plans = [outcome.plan for outcome in outcomes if outcome is not None and outcome.error is None]
    assert plans[0] is not None and plans == [plans[0]] * SIZE
    assert plans[0].complete and [entry.bucket for entry in plans[0].entries] == buckets(max_tokens)
    tuned = [outcome.buckets for outcome in outcomes if outcome is not None]
    assert sorted(bucket for share in tuned for bucket in share) == buckets(max_tokens)
    assert sum(map(bool, tuned)) == min(SIZE, len(buckets(max_tokens)))
    saved = [outcome.saved for outcome in outcomes if outcome is not None]
    assert saved[0] == sorted(set(saved[0])) and saved[0] and not any(saved[1:])


def test_resumes_from_what_rank_0_has() -> None:
    first = run(ranks(30))[0]
    assert first is not None and first.plan is not None
    half = msgspec.structs.replace(first.plan, entries=first.plan.entries[::2], complete=False)
    started = ranks(30)
    started[0] = dataclasses.replace(started[0], resume=half)
    started[1] = dataclasses.replace(started[1], resume=first.plan)
    outcomes = run(started)
    plan = outcomes[0].plan if outcomes[0] is not None else None
    assert plan is not None and plan.complete
    assert plan.entries[::2] == half.entries
    assert outcomes[0] is not None and min(outcomes[0].saved, default=SIZE) > len(half.entries)
    tuned = sorted(bucket for outcome in outcomes if outcome is not None for bucket in outcome.buckets)
    assert tuned == buckets(MAX_TOKENS)[1::2]


def test_what_one_rank_found_faulty_no_bucket_runs() -> None:
    """Each rank but one finds the default sound, and some keep it."""
    started = ranks(30)
    started[1] = dataclasses.replace(started[1], faulty="per_expert_loop")
    plans = [outcome.plan for outcome in run(started) if outcome is not None]
    assert plans[0] is not None and plans == [plans[0]] * SIZE
    assert plans[0].complete and plans[0].quarantined == {"per_expert_loop": "crashed"}
    for entry in plans[0].entries:
        assert "per_expert_loop" not in (entry.gemm1.tactic, entry.gemm2.tactic)


def test_ranks_that_die_or_stall() -> None:
    started = ranks()
    started[1] = dataclasses.replace(started[1], in_bucket=die)
    started[3] = dataclasses.replace(started[3], in_bucket=stall)
    outcomes = run(started, never=(1, 3))
    for message in errors([outcomes[0], outcomes[2]], TIMEOUT + SLACK):
        # Both where their last signs were near each other, else the one that fell silent first.
        assert re.search(
            rf"tuning: ranks? (1|3|1, 3) of 4 gave no sign for {TIMEOUT:g} s: missing, dead or stuck", message
        )


@pytest.mark.parametrize("fault", [die, freeze])
def test_rank_0_takes_the_store_with_it(fault: object) -> None:
    started = ranks(gloo=False)
    started[0] = dataclasses.replace(started[0], in_bucket=fault)  # type: ignore[arg-type]
    messages = errors(run(started, never=(0,))[1:], TIMEOUT + SLACK)
    assert all("the store that the ranks meet in cannot be reached" in message for message in messages)


def test_a_rank_that_fails_ends_the_others_at_once() -> None:
    started = ranks(60)
    started[1] = dataclasses.replace(started[1], in_bucket=fail)
    outcomes = run(started)
    assert outcomes[1] is not None and outcomes[1].error == ("Unsupported", "no tactic of gemm1 works")
    messages = errors([outcomes[0], outcomes[2], outcomes[3]], SLACK)
    assert set(messages) == {"rank 1 failed: no tactic of gemm1 works"}


def test_ctrl_c_on_one_rank_ends_the_others() -> None:
    started = ranks(60)
    started[0] = dataclasses.replace(started[0], in_bucket=interrupt)
    outcomes = run(started)
    assert outcomes[0] is not None and outcomes[0].error == ("KeyboardInterrupt", "")
    assert set(errors(outcomes[1:], SLACK)) == {"rank 0 failed: KeyboardInterrupt"}


def test_a_late_rank() -> None:
    started = ranks(1)
    started[3] = dataclasses.replace(started[3], late=2.5)
    outcomes = run(started)
    messages = errors(outcomes[:3], 1 + SLACK)
    assert all("joining: rank 3 of 4 gave no sign for 1 s" in message for message in messages)
    errors(outcomes[3:], 2 + SLACK)


def test_a_missing_rank() -> None:
    messages = errors(run(ranks(1, gloo=False)[:3]), 1 + SLACK)
    assert all("joining: rank 3 of 4 gave no sign for 1 s" in message for message in messages)


def test_no_rank_0() -> None:
    messages = errors(run(ranks(1, gloo=False)[1:]), 2 + SLACK)
    assert all("the store that the ranks meet in cannot be reached" in message for message in messages)


def test_ranks_that_differ() -> None:
    started = ranks(60)
    started[1] = dataclasses.replace(started[1], library_hash="two")
    started[3] = dataclasses.replace(started[3], seed=5)
    outcomes = run(started)
    expected = (
        "joining: the ranks differ: rank 1 has library_hash two (rank 0: one); rank 3 has seed 5 (rank 0: 0); "
        "start one command on equal GPUs with one library"
    )
    for message in errors(outcomes, SLACK):
        assert expected in message
    assert not any(outcome.buckets for outcome in outcomes if outcome is not None)


def test_a_rank_that_ends_with_another_plan() -> None:
    started = ranks(60)
    started[2] = dataclasses.replace(started[2], digest="0123456789abcdef")
    for message in errors(run(started), 10 + SLACK):
        assert (
            "agreeing: rank 0 ended with plan " in message
            and "but rank 2 0123456789ab; start all ranks again" in message
        )


def test_no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(RankError, match=r"no ranks to meet: the environment's 'RANK'; start with torchrun"), meeting(1):
        pass
    with pytest.raises(InvalidArgument, match=r"^timeout_seconds: got 0"), meeting(0):
        pass


def test_more_ranks_than_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "2")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(Unsupported, match="LOCAL_RANK 2, but torch sees 2 GPUs: start one process a GPU"):
        use_local_gpu()


def test_torchrun_tunes_with_one_command(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node=2",
        f"--master-port={free_port()}",
    ]
    command += ["-m", "moe_runtime", "tune", "--model", "qwen3-30b", "--scale", "16", "--parallel", "dep8"]
    command += ["--device", "cpu", "--max-tokens", "8", "-o", str(path), "--json"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=Path(__file__).parents[1])
    assert ended.returncode == 0, ended.stderr
    plan = Plan.load(path)
    assert plan.complete and len(plan.entries) == 4
    assert json.loads(ended.stdout) == json.loads(path.read_text())  # rank 0's alone
    assert ended.stderr.count(f"wrote {path}") == 1
