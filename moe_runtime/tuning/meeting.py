"""Where ranks that work together exchange what they have, and notice who is not there.

The ranks meet in torch.distributed's store. Its collectives would not do: ranks work apart for minutes, in which a
collective cannot tell slow from dead, and afterwards only some ranks learn who was missing. Here every rank leaves
signs of life in the store as it works, every other sees which rank stopped doing so, and the first failure ends all.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from itertools import count
from typing import TypeVar

import torch.distributed as dist

from ..errors import InvalidArgument, RankError

POLL_SECONDS = 0.05
LINGER_SECONDS = 2.0
"""How long a rank that is done waits for the others to read what they need: the store may live in its process."""

T = TypeVar("T")
_meetings = count()


@contextmanager
def meeting(timeout_seconds: float) -> Iterator[Meeting]:
    """All ranks of torch.distributed where it is initialised, else of RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT.

    An exception that leaves the context reaches the others as a RankError, at their next sign or exchange.
    Raises InvalidArgument for a time-out that is not positive, RankError for a missing variable or store.
    """
    if not timeout_seconds > 0:
        raise InvalidArgument("timeout_seconds", timeout_seconds, "more than 0")
    ranks = _join(timeout_seconds)
    try:
        yield ranks
    except _StoreGone:
        raise
    except BaseException as failure:
        ranks.fail(str(failure) or type(failure).__name__)
        raise
    else:
        ranks.leave()


class _StoreGone(RankError):
    pass


@dataclass(frozen=True)
class Meeting:
    """One rank's place. timeout_seconds: how long another may give no sign, or the store no answer.

    Every method raises RankError where another rank failed, or the store is gone.
    """

    store: dist.Store
    rank: int
    size: int
    timeout_seconds: float

    def sign(self) -> None:
        """Says that this rank is alive; due more often than the time-out while it works."""
        self._call(self._sign)

    def put(self, name: str, message: str) -> None:
        """Leaves a message for `latest`, in place of the one before."""
        self._call(lambda: self.store.set(f"{name}/{self.rank}", message))

    def latest(self, name: str) -> list[str | None]:
        """The ranks' messages of that name, None for a rank that has left none so far."""
        keys = [f"{name}/{rank}" for rank in range(self.size)]
        return self._call(lambda: [self._get(key) if self.store.check([key]) else None for key in keys])

    def exchange(self, stage: str, message: str, on_sign: Callable[[], None] = lambda: None) -> list[str]:
        """Every rank's message of the stage, once all have come; each stage's name serves once.

        on_sign: called when a rank that is still waited for gave a sign.
        Raises RankError, naming them, for ranks that give no sign within the time-out.
        """
        self.put(stage, message)
        signs: dict[int, int] = {}
        heard = dict.fromkeys(range(self.size), time.monotonic())
        while waiting := self._call(lambda: self._look(stage)):
            now = time.monotonic()
            heard |= {rank: now for rank, given in waiting.items() if given != signs.get(rank, 0)}
            silent = [rank for rank in waiting if now - heard[rank] > self.timeout_seconds]
            if silent:
                who = f"rank {silent[0]}" if len(silent) == 1 else f"ranks {', '.join(map(str, silent))}"
                raise RankError(
                    f"{stage}: {who} of {self.size} gave no sign for {self.timeout_seconds:g} s: missing, dead or "
                    "stuck; look at its output, and start all ranks again"
                )
            if waiting != signs:
                signs = waiting
                on_sign()
            time.sleep(POLL_SECONDS)
        return self._call(lambda: [self._get(f"{stage}/{rank}") for rank in range(self.size)])

    def fail(self, reason: str) -> None:
        """Ends the others with the reason, unless a failure before this one does so already."""
        try:
            self._call(lambda: self.store.compare_set("failed", "", f"rank {self.rank} failed: {reason}"))
            self.leave()
        except RankError:
            return  # without a store there is no one to tell

    def leave(self) -> None:
        """Returns when all ranks have left, or after `LINGER_SECONDS`."""
        deadline = time.monotonic() + LINGER_SECONDS
        try:
            self._call(lambda: self.store.add("left", 1))
            while self._call(lambda: self.store.add("left", 0)) < self.size and time.monotonic() < deadline:
                time.sleep(POLL_SECONDS)
        except _StoreGone:
            return  # with the rank that holds it
        if self.rank == 0:
            time.sleep(2 * POLL_SECONDS)  # in which the others look once more

    def _sign(self) -> None:
        self._check_failure()
        self.store.add(f"signs/{self.rank}", 1)

    def _look(self, stage: str) -> dict[int, int]:
        """Signs given by each rank that has left no message of the stage."""
        self._check_failure()
        missing = [rank for rank in range(self.size) if not self.store.check([f"{stage}/{rank}"])]
        return {rank: self.store.add(f"signs/{rank}", 0) for rank in missing}

    def _check_failure(self) -> None:
        if self.store.check(["failed"]):
            raise RankError(self._get("failed"))

    def _get(self, key: str) -> str:
        return self.store.get(key).decode()

    def _call(self, call: Callable[[], T]) -> T:
        """On a thread, because a store whose host is frozen or cut off never answers."""
        return _within(self.timeout_seconds, call)


def _within(seconds: float, call: Callable[[], T]) -> T:
    answer: Future[T] = Future()

    def run() -> None:
        try:
            answer.set_result(call())
        except Exception as error:
            answer.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    try:
        return answer.result(seconds)
    except (dist.DistError, TimeoutError) as error:
        reason = str(error).partition("\n")[0] or f"no answer in {seconds:g} s"
        raise _StoreGone(
            f"the store that the ranks meet in cannot be reached ({reason}): rank 0 or the launcher, which holds it, "
            "is missing, dead or stuck; look at its output, and start all ranks again"
        ) from error


def _join(timeout_seconds: float) -> Meeting:
    if dist.is_initialized():
        store, rank, size = dist.distributed_c10d._get_default_store(), dist.get_rank(), dist.get_world_size()
    else:
        try:
            rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
            host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        except (KeyError, ValueError) as error:
            raise RankError(f"no ranks to meet: the environment's {error}; start with torchrun") from None
        # torchrun's own process holds a store there already, which outlives every rank.
        holds = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
        limit = timedelta(seconds=timeout_seconds)

        def reach() -> dist.Store:
            return dist.TCPStore(host, port, is_master=holds, timeout=limit, wait_for_workers=False, multi_tenant=True)

        store = _within(2 * timeout_seconds, reach)  # it keeps to its own limit only roughly
    return Meeting(dist.PrefixStore(f"moe_runtime/{next(_meetings)}", store), rank, size, timeout_seconds)
