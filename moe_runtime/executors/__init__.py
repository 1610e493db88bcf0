"""Executors: `cpu` runs plain torch, `cuda` the compiled kernels."""

from __future__ import annotations

import functools

import torch

from ..errors import InvalidArgument
from .base import Executor


def get_executor(device: torch.device | str) -> Executor:
    """The executor of a device. Raises InvalidArgument for a device type that has none."""
    device = torch.device(device)
    if device.type == "cpu":
        return _cpu()
    if device.type == "cuda":
        return _cuda(torch.cuda.current_device() if device.index is None else device.index)
    raise InvalidArgument("device", device, "cpu or cuda")


@functools.cache
def _cpu() -> Executor:
    from .cpu import CpuExecutor

    return CpuExecutor()


@functools.cache
def _cuda(index: int) -> Executor:
    # Loading it opens the compiled library, which a machine without a GPU does not have.
    from .cuda import CudaExecutor

    return CudaExecutor(torch.device("cuda", index))
