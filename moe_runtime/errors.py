"""Exceptions. Everything that moe_runtime raises on purpose is a `MoEError`."""

from __future__ import annotations


class MoEError(Exception):
    """Base of all errors raised by moe_runtime."""


class InvalidArgument(MoEError, ValueError):
    """A bad argument: its name, what it was, what is accepted and, where there is one, what to do next."""

    def __init__(self, argument: str, got: object, accepted: str, hint: str = "") -> None:
        super().__init__(f"{argument}: got {got}; accepted: {accepted}." + (f" {hint}" if hint else ""))
        self.argument = argument


class PlanRefused(MoEError, ValueError):
    """A plan file that is damaged, or that was tuned for something else; the message says which."""


class Unsupported(MoEError, RuntimeError):
    """A valid request that this machine or this build cannot serve; the message says what is missing."""


class RankError(MoEError, RuntimeError):
    """Ranks that work together are not all there, or not alike; the message says which and how."""


class KernelError(MoEError, RuntimeError):
    """A failure reported by a compiled kernel.

    variant: name of the kernel variant, or of the call where no variant was chosen yet.
    stage: what the call was doing (routing, gemm1, ...).
    code: cudaError_t (> 0) or MoeError (< 0).
    """

    def __init__(self, variant: str, stage: str, code: int, message: str) -> None:
        super().__init__(f"{variant}: {stage} failed with code {code}: {message}")
        self.variant = variant
        self.stage = stage
        self.code = code
