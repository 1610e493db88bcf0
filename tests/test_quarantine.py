"""Candidates that crash, hang or are wrong are found in a worker process, by name, and the rest go on."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from moe_runtime.config import MoEConfig
from moe_runtime.errors import InvalidArgument, Unsupported
from moe_runtime.executors import get_executor
from moe_runtime.executors.base import MoEProblem
from moe_runtime.parallel import Parallel
from moe_runtime.tuning.quarantine import vetting
from moe_runtime.workload import Workload, make_workload

from .faulty_executor import make_crash, make_faulty, make_nothing

CONFIG = MoEConfig("test", 256, 128, 8, 2)
PROBLEM = MoEProblem(CONFIG, Parallel.parse("dep2"))
TIMEOUT = 2.0


def workload(tokens: int = 16) -> Workload:
    return make_workload(CONFIG, PROBLEM.parallel, tokens, "balanced", 0)


def children() -> list[int | None]:
    return [process.pid for process in multiprocessing.active_children()]


def test_each_fault_gets_its_reason_and_the_rest_go_on() -> None:
    tactics = ["padded_batch", "segfault", "hang", "grouped_mm", "wrong", "per_expert_loop", "exit"]
    with vetting(PROBLEM, "cpu", timeout_seconds=TIMEOUT, make_executor=make_faulty) as vet:
        reasons = vet(workload(), "gemm1", tactics)
        # Not the sound ones, which would say that their process has seen a fault.
        assert list(reasons) == ["segfault", "hang", "wrong", "exit"]
        assert reasons["segfault"] == "crashed: its process was ended by SIGSEGV"
        assert reasons["hang"] == "hung: no result in 2 s"
        assert reasons["wrong"].startswith("wrong result: relative error")
        assert reasons["exit"] == "crashed: its process exited with status 3"
        assert not children()


def test_one_worker_serves_many_questions() -> None:
    tactics = get_executor("cpu").tactics(PROBLEM, "gemm1")
    with vetting(PROBLEM, "cpu") as vet:
        assert vet(workload(1), "gemm1", tactics) == {}
        (first,) = children()
        assert vet(workload(4096), "gemm1", tactics) == {}  # ids larger than a pipe's buffer
        assert vet(workload(8), "gemm2", tactics) == {}
        assert vet(workload(8), "gemm2", []) == {}
        assert children() == [first]
    assert not children()


def test_an_unknown_tactic_is_a_fault_of_its_own() -> None:
    with vetting(PROBLEM, "cpu", timeout_seconds=TIMEOUT) as vet:
        assert vet(workload(), "gemm2", ["per_expert_loop", "no such tactic"]) == {
            "no such tactic": "raised KeyError: 'no such tactic'"
        }
    assert not children()


@pytest.mark.parametrize(
    "make,reason", [(make_nothing, "RuntimeError: no such device"), (make_crash, "it was ended by SIGKILL")]
)
def test_a_worker_that_cannot_start_blames_no_tactic(make: object, reason: str) -> None:
    with (
        vetting(PROBLEM, "cpu", make_executor=make) as vet,  # type: ignore[arg-type]
        pytest.raises(Unsupported, match=f"failed before it ran one: {reason}"),
    ):
        vet(workload(), "gemm1", ["per_expert_loop"])
    assert not children()


def test_bad_timeout() -> None:
    with pytest.raises(InvalidArgument, match=r"^timeout_seconds: got 0"), vetting(PROBLEM, "cpu", timeout_seconds=0):
        pass


HANGING = """
import os
import signal

def report(device):
    from tests.faulty_executor import make_faulty
    print(os.getpid(), flush=True)
    return make_faulty(device)

if __name__ == "__main__":
    # As a terminal's foreground job; a background shell starts its jobs with Ctrl-C ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    from moe_runtime import MoEConfig, Parallel
    from moe_runtime.executors.base import MoEProblem
    from moe_runtime.tuning.quarantine import vetting
    from moe_runtime.workload import make_workload
    problem = MoEProblem(MoEConfig("test", 256, 128, 8, 2), Parallel.parse("dep2"))
    workload = make_workload(problem.config, problem.parallel, 16, "balanced", 0)
    with vetting(problem, "cpu", timeout_seconds=600, make_executor=report) as vet:
        vet(workload, "gemm1", ["hang"])
"""


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGKILL])
def test_no_orphan(sent: signal.Signals, tmp_path: Path) -> None:
    """Ctrl-C goes to the whole foreground group; a kill to the parent alone."""
    script = tmp_path / "hanging.py"
    script.write_text(HANGING)
    root = Path(__file__).parents[1]
    parent = subprocess.Popen(
        [sys.executable, str(script)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True, env=os.environ | {"PYTHONPATH": str(root)},
    )  # fmt: skip
    assert parent.stdout is not None
    worker = int(parent.stdout.readline())
    time.sleep(0.5)
    if sent == signal.SIGINT:
        os.killpg(parent.pid, sent)
    else:
        parent.send_signal(sent)
    _, err = parent.communicate(timeout=20)
    assert parent.returncode == -sent
    if sent == signal.SIGINT:
        assert err.count("Traceback") == 1 and err.strip().endswith("KeyboardInterrupt")
    deadline = time.monotonic() + 10
    while _runs(worker):
        assert time.monotonic() < deadline, "the worker outlived its parent"
        time.sleep(0.05)


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False
