"""What a GPU was measured to reach at best, for the roofline."""

from __future__ import annotations

from typing import NamedTuple


class Roofs(NamedTuple):
    """read_tbps: TB/s of a kernel that only reads. tflops: cuBLAS' dense FP8 GEMM, without block scales."""

    read_tbps: float
    tflops: float


MEASURED = {"NVIDIA H200": Roofs(4.45, 1514.4)}
"""By the GPU's name; from benchmarks/results, which an installed package does not carry."""
