"""What the GPU tests share: shapes, workloads with given group sizes, float64 references."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from moe_runtime import FP8BlockWeights, MoEConfig, Parallel
from moe_runtime.executors import get_executor
from moe_runtime.executors.base import GEMMS, LayerInputs, MoEProblem, able_tactics
from moe_runtime.executors.cuda import CudaExecutor
from moe_runtime.kernels import Stage
from moe_runtime.workload import Workload

RAGGED = (0, 1, 3, 17, 128, 200, 513)
PROBLEMS = {
    "qwen3-235b-dep2": MoEProblem(MoEConfig.preset("qwen3-235b"), Parallel.parse("dep2", rank=1)),
    "deepseek-r1-dep8": MoEProblem(MoEConfig.preset("deepseek-r1"), Parallel.parse("dep8", rank=3)),
}


@functools.cache
def executor() -> CudaExecutor:
    found = get_executor("cuda")
    assert isinstance(found, CudaExecutor)
    return found


@functools.lru_cache(maxsize=1)
def weights(problem: MoEProblem) -> FP8BlockWeights:
    return FP8BlockWeights.random(problem.config, problem.num_local_experts, seed=1, device="cuda")


def default_tactics(problem: MoEProblem, tokens: int) -> tuple[str, str]:
    return executor().default_tactic(problem, "gemm1", tokens), executor().default_tactic(problem, "gemm2", tokens)


def unfused(problem: MoEProblem, tokens: int) -> tuple[str, str]:
    """Tactics that leave either GEMM's own result, for tests that read it."""
    plain = executor().leaving_rows(executor().default_tactic(problem, "gemm2", tokens))
    return plain, plain


def fused(problem: MoEProblem) -> tuple[str, str]:
    """Tactics that gather and combine."""
    found = executor()
    able = {gemm: [found.variants[name] for name in able_tactics(found, problem, gemm)] for gemm in GEMMS}
    gathers = next(variant.name for variant in able["gemm1"] if variant.gathers)
    return gathers, next(variant.name for variant in able["gemm2"] if variant.combines)


class Call:
    """One layer call whose stages can be run and whose regions can be read one by one."""

    def __init__(
        self,
        problem: MoEProblem,
        weights: FP8BlockWeights,
        inputs: LayerInputs,
        tactics: tuple[str, str] | None = None,
    ) -> None:
        self.problem, self.executor = problem, executor()
        self.tokens, self.config = inputs.hidden_states.shape[0], problem.config
        self.inputs, self.weights = inputs, weights
        self.output = torch.full((self.tokens, self.config.hidden_size), torch.nan, dtype=torch.bfloat16, device="cuda")
        size = self.executor.workspace_bytes(problem, self.tokens)
        self.workspace = torch.full((size,), 0xFF, dtype=torch.uint8, device="cuda")
        gemm1, gemm2 = tactics or default_tactics(problem, self.tokens)
        self.arguments = self.executor.arguments(
            problem, self.weights, inputs, (gemm1, gemm2), self.output, self.workspace
        )

    def run(self, stages: Stage) -> Call:
        self.executor.launch(self.arguments, stages)
        return self

    def region(self, name: str, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return self.executor.view(self.problem, self.workspace, self.tokens, name, shape, dtype)

    @property
    def permuted_row(self) -> Tensor:
        return self.region("permuted_row", self.tokens, self.config.top_k, dtype=torch.int32)


def ragged_workload(problem: MoEProblem, sizes: tuple[int, ...] = RAGGED) -> Workload:
    """Local expert e gets sizes[e % len(sizes)] rows, scattered over the tokens; spare slots are absent (-1)."""
    first, k = problem.local_expert_offset, problem.config.top_k
    counts = torch.tensor([sizes[e % len(sizes)] for e in range(problem.num_local_experts)])
    ids = torch.repeat_interleave(torch.arange(first, first + problem.num_local_experts), counts)
    tokens = -(-len(ids) // k) + 1
    ids = torch.cat([ids, torch.full((tokens * k - len(ids),), -1)])
    ids = ids[torch.randperm(len(ids), generator=torch.Generator().manual_seed(0))]
    return Workload(problem.config, problem.parallel, tokens, "ragged", 0, ids.view(tokens, k).to(torch.int32))


def dequantise(values: Tensor, scale: Tensor, block_rows: int) -> Tensor:
    """e4m3 [N, K] times its scale, spelt out by repetition, in float64."""
    expanded = scale.double().repeat_interleave(block_rows, 0).repeat_interleave(128, 1)
    return values.double() * expanded


def grouped_reference(rows: Tensor, row_scales: Tensor, weight: Tensor, weight_scale: Tensor, counts: Tensor) -> Tensor:
    """float64 [rows, N]: each group's rows times its expert's weights."""
    out = torch.empty(rows.shape[0], weight.shape[1], dtype=torch.float64, device=rows.device)
    first = 0
    for expert, count in enumerate(counts.tolist()):
        if count:
            group = slice(first, first + count)
            out[group] = (
                dequantise(rows[group], row_scales[group], 1) @ dequantise(weight[expert], weight_scale[expert], 128).T
            )
            first += count
    return out
