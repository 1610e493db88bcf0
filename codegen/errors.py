"""Errors of the generator and the build; each message says what to do next."""


class BuildError(Exception):
    """A variant, a template or a compile is wrong."""


class ToolchainMissing(BuildError):
    """No usable nvcc, host compiler or CUTLASS headers: an install without kernels is still possible."""
