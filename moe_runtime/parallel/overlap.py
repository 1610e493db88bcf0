"""Two things at the same time: the experts of one chunk, and the exchange of the chunks before and after it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

A = TypeVar("A")
B = TypeVar("B")


def overlap(device: torch.device, compute: Callable[[], A], communicate: Callable[[], B]) -> tuple[A, B]:
    """What both return, done when the caller's stream has come here. Both see all that was done before.

    On a GPU `communicate` runs on a side stream, and `compute`, which does not wait, is launched before it, so that a
    wait of the host for counts meets a busy GPU. On the CPU it runs on a thread.
    """
    if device.type == "cuda":
        here, side = torch.cuda.current_stream(device), _side_stream(device)
        side.wait_stream(here)
        computed = compute()
        with torch.cuda.stream(side):
            moved = communicate()
        # Both streams meet before anything is freed, so that torch's allocator may reuse it on either.
        here.wait_stream(side)
        return computed, moved
    with ThreadPoolExecutor(1) as thread:
        future = thread.submit(_as_here(communicate))
        return compute(), future.result()


@functools.cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def _as_here(call: Callable[[], B]) -> Callable[[], B]:
    """On another thread as on this one: without gradients, and in inference mode if this is."""
    inference = torch.is_inference_mode_enabled()

    def run() -> B:
        with torch.no_grad(), torch.inference_mode(inference):
            return call()

    return run
