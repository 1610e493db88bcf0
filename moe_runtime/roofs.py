"""What a GPU was measured to reach at best, by its name: for cost model, explanations, reports and benchmarks."""

from __future__ import annotations

from dataclasses import dataclass

from .formats import WeightLayout


@dataclass(frozen=True)
class Roofs:
    """Rates of one GPU, from benchmarks/results, which an installed package does not carry.

    read_tbps: TB/s of a kernel that only reads memory. l2_tbps, block_scaled_tflops: the most that any variant reached
    where L2, or the tensor cores under block scales, were its limit. dense_tflops: cuBLAS' dense FP8 GEMM, without
    block scales. bf16_tflops: of the data sheet, which is above whatever a kernel on bf16 rows may reach.
    block_scaled_tflops is of an earlier record; in that of today's kernels the fastest reaches 1,324.
    """

    read_tbps: float
    l2_tbps: float
    block_scaled_tflops: float
    dense_tflops: float
    bf16_tflops: float

    def tflops(self, layout: WeightLayout) -> float:
        """What kernels that read such weights may reach at best."""
        return self.block_scaled_tflops if layout.multiplies_e4m3 else self.bf16_tflops


ROOFS = {
    "NVIDIA H200": Roofs(
        read_tbps=4.45, l2_tbps=15.3, block_scaled_tflops=1340.0, dense_tflops=1497.7, bf16_tflops=989.0
    )
}
