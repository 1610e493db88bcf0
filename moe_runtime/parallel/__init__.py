"""Layers over several ranks: the layout of experts, and layers that exchange tokens through torch.distributed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .layout import REGIMES, Parallel, Regime

if TYPE_CHECKING:
    from .dispatch import DISPATCHERS, Arrived, Dispatcher, DispatcherFactory
    from .layer import ParallelMoE

__all__ = ["DISPATCHERS", "REGIMES", "Arrived", "Dispatcher", "DispatcherFactory", "Parallel", "ParallelMoE", "Regime"]


def __getattr__(name: str) -> Any:
    # On first use: the layers stand on the executors, which themselves read the layout from here.
    if name in ("DISPATCHERS", "Arrived", "Dispatcher", "DispatcherFactory"):
        from . import dispatch

        return getattr(dispatch, name)
    if name == "ParallelMoE":
        from .layer import ParallelMoE

        return ParallelMoE
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
