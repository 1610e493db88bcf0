"""The vLLM plug-in: offers our experts for the layers that vLLM has in FP8 with 128x128 blocks.

vLLM calls `register` in each of its processes, by the entry point group `vllm.general_plugins`. It does nothing unless
MOE_RUNTIME_VLLM=1: an installed package should not change which kernels a server runs.
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable
from typing import Any

ENABLE_VARIABLE = "MOE_RUNTIME_VLLM"
PLAN_VARIABLE = "MOE_RUNTIME_VLLM_PLAN"
"""A file of `moe-runtime tune`, for the layers that it fits; others run default tactics."""

VERSION = "0.33."
"""Of vLLM, whose classes the plug-in derives from and whose selection it wraps: neither is stable between versions."""

# A child of vLLM's own logger, which alone has a handler in a server.
logger = logging.getLogger("vllm.moe_runtime")


def register() -> str | None:
    """Offers the experts to vLLM. None where it did, else the reason why not, which is logged; raises nothing.

    vLLM does not guard the call, and a plug-in that fails must not take a server down with it. Calling again is fine.
    """
    enabled = os.environ.get(ENABLE_VARIABLE, "0")
    if enabled == "0":
        return f"{ENABLE_VARIABLE} is not set to 1"
    try:
        reason = _offer() if enabled == "1" else f"{ENABLE_VARIABLE} is {enabled!r}; accepted: 0 or 1"
    except Exception as error:
        logger.debug("moe_runtime's plug-in failed", exc_info=True)
        reason = f"{type(error).__name__}: {error}"
    if reason is not None:
        logger.warning("moe_runtime offers no experts: %s", reason)
    return reason


def _offer() -> str | None:
    try:
        import vllm
    except ImportError as error:
        return f"vLLM cannot be imported ({error})"
    if not vllm.__version__.startswith(VERSION):
        return f"vLLM is {vllm.__version__}; the plug-in is for {VERSION}x"
    from vllm.model_executor.layers.fused_moe.oracle import fp8

    if not hasattr(fp8.backend_to_kernel_cls, "__wrapped__"):
        _wrap_selection(fp8)
    return None


def _wrap_selection(fp8: Any) -> None:
    """Puts our experts before vLLM's in fp8, the module that chooses kernels of FP8 layers.

    vLLM 0.33 has an enumeration of backends and no way to add one, so ours stands within TRITON's: the one that leaves
    weights and scales as they are, which is how our kernels read them. For layers that ours serve, TRITON comes first;
    for all others nothing changes.
    """
    from .experts import MoeRuntimeExperts

    classes_of, priorities_of = fp8.backend_to_kernel_cls, fp8._get_priority_backends
    triton = fp8.Fp8MoeBackend.TRITON

    @functools.wraps(classes_of)
    def backend_to_kernel_cls(backend: Any) -> list[type]:
        classes: list[type] = classes_of(backend)
        return [MoeRuntimeExperts, *classes] if backend is triton else classes

    @functools.wraps(priorities_of)
    def get_priority_backends(moe_config: Any, weight_key: Any, activation_key: Any) -> list[Any]:
        backends: list[Any] = priorities_of(moe_config, weight_key, activation_key)
        supported, reason = MoeRuntimeExperts.is_supported_config(
            MoeRuntimeExperts, moe_config, weight_key, activation_key, MoeRuntimeExperts.activation_format()
        )
        if supported:
            backends.sort(key=lambda backend: backend is not triton)
        else:
            _log_once(logger.info, f"moe_runtime leaves FP8 layers to vLLM: {reason}")
        return backends

    fp8.backend_to_kernel_cls, fp8._get_priority_backends = backend_to_kernel_cls, get_priority_backends


@functools.cache
def _log_once(log: Callable[[str], None], message: str) -> None:
    """A model has a layer's message some sixty times."""
    log(message)
