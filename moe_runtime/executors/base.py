"""The interface behind which the executors stand, and the types that cross it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from ..config import FP8_BLOCK, MoEConfig, RoutingMethod
from ..errors import InvalidArgument
from ..parallel import Parallel

if TYPE_CHECKING:
    from ..kernels import KernelVariant
    from ..weights import FP8BlockWeights
    from ..workload import Workload

Gemm = Literal["gemm1", "gemm2"]
GEMMS: tuple[Gemm, ...] = ("gemm1", "gemm2")
TacticPair = tuple[str, str]
"""Tactics of (gemm1, gemm2)."""

_FLOATS = (torch.bfloat16, torch.float32)

SPREAD = 1.5
"""How many standard deviations of a Poisson law a tile of tokens should reach beyond an expert's mean rows: one that
holds the mean alone overflows at half of the experts, each of which then reads its weights twice. On random routing
over benchmarks/results/h200/grid.json, the mean alone made defaults 5.5 % slower than the fastest on average, against
1.3 % with the spread; 2 gives the same as 1.5."""


@dataclass(frozen=True)
class MoEProblem:
    """A layer as one rank sees it. Raises InvalidArgument when the ranks do not divide experts or intermediate size.

    local_intermediate_size: the rank's part of each expert under tensor parallelism, where its output is a partial sum.
    """

    config: MoEConfig
    parallel: Parallel
    num_local_experts: int = field(init=False)
    local_expert_offset: int = field(init=False)
    local_intermediate_size: int = field(init=False)
    _hash: int = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        experts, intermediate = self.config.num_experts, self.config.intermediate_size
        self.parallel.validate_experts(experts)
        object.__setattr__(self, "num_local_experts", self.parallel.num_local_experts(experts))
        object.__setattr__(self, "local_expert_offset", self.parallel.local_expert_offset(experts))
        object.__setattr__(self, "local_intermediate_size", self.parallel.local_intermediate_size(intermediate))
        object.__setattr__(self, "_hash", hash((self.config, self.parallel)))

    def __hash__(self) -> int:
        # Kept: executors look cached facts up by problem on every call, and hashing all fields takes microseconds.
        return self._hash

    def gemm_shape(self, gemm: Gemm) -> tuple[int, int]:
        """(N, K) of a GEMM: rows [M, K] x weights [N, K] -> [M, N]."""
        hidden, intermediate = self.config.hidden_size, self.local_intermediate_size
        return (2 * intermediate, hidden) if gemm == "gemm1" else (hidden, intermediate)

    def mean_rows(self, num_rows: int) -> float:
        """GEMM rows of an expert in a call with num_rows rows, on average."""
        return num_rows * self.config.top_k / self.config.num_experts


# Made on every call, which takes a frozen dataclass 0.5 us and a NamedTuple 0.2.
class LayerInputs(NamedTuple):
    """What one call of a layer reads. Either routing_logits, or topk_ids and topk_weights.

    hidden_states: [T, H] bf16, or e4m3 with hidden_states_scale; contiguous.
    hidden_states_scale: [T, H/128] f32, any strides.
    routing_logits: [T, E] bf16 or f32, contiguous.
    routing_bias: [E] bf16 or f32, contiguous; DeepSeekV3 only.
    topk_ids: [T, k] int32 global ids, contiguous; -1 and ids of other ranks' experts mean no work here.
    topk_weights: [T, k] f32, contiguous.
    """

    hidden_states: Tensor
    hidden_states_scale: Tensor | None = None
    routing_logits: Tensor | None = None
    routing_bias: Tensor | None = None
    topk_ids: Tensor | None = None
    topk_weights: Tensor | None = None

    def check(self, problem: MoEProblem, device: torch.device) -> int:
        """The number of tokens. Reads no tensor's values.

        Raises InvalidArgument for a wrong dtype, shape or layout, or another device than the weights'.
        """
        # Every tensor is looked at on every call: to find shape, dtype, device and layout of two tensors in a table of
        # what was accepted before takes 0.55 us, to compare them here 0.65.
        config = problem.config
        hidden = config.hidden_size
        x, scale, logits, bias, topk_ids, topk_weights = self
        shape = x.shape
        if len(shape) != 2 or shape[1] != hidden:
            raise InvalidArgument("hidden_states", f"shape {list(shape)}", f"[num_tokens, {hidden}]")
        tokens = shape[0]
        if scale is None:
            if x.dtype is not torch.bfloat16:
                accepted = "bfloat16, or float8_e4m3fn with hidden_states_scale"
                raise InvalidArgument("hidden_states", x.dtype, accepted)
        elif x.dtype is not torch.float8_e4m3fn:
            raise InvalidArgument("hidden_states", x.dtype, "float8_e4m3fn when hidden_states_scale is given")
        if not x.is_contiguous():
            raise not_contiguous("hidden_states", x)
        if x.device != device:
            raise InvalidArgument("hidden_states", f"a tensor on {x.device}", f"one on {device} like the weights")
        if scale is not None:
            check_tensor("hidden_states_scale", scale, (tokens, hidden // FP8_BLOCK), (torch.float32,), device, False)

        if logits is not None:
            if topk_ids is not None or topk_weights is not None:
                raise InvalidArgument("topk_ids", "ids beside routing_logits", "either routing_logits or ready ids")
            check_tensor("routing_logits", logits, (tokens, config.num_experts), _FLOATS, device)
            if bias is not None:
                check_tensor("routing_bias", bias, (config.num_experts,), _FLOATS, device)
                check_bias_is_read(config)
            return tokens
        if topk_ids is None or topk_weights is None:
            missing = "topk_weights" if topk_ids is not None else "topk_ids"
            raise InvalidArgument(missing, None, "topk_ids and topk_weights, or routing_logits")
        if bias is not None:
            raise InvalidArgument("routing_bias", "a bias beside topk_ids", "None with ready ids")
        check_tensor("topk_ids", topk_ids, (tokens, config.top_k), (torch.int32,), device)
        check_tensor("topk_weights", topk_weights, (tokens, config.top_k), (torch.float32,), device)
        return tokens


def check_bias_is_read(config: MoEConfig) -> None:
    if config.routing_method != RoutingMethod.DeepSeekV3:
        method = RoutingMethod(config.routing_method).name
        raise InvalidArgument("routing_bias", "a tensor", f"None under {method} routing", "Only DeepSeekV3 reads it.")


def check_tensor(
    name: str,
    tensor: Tensor,
    shape: tuple[int, ...],
    dtypes: tuple[torch.dtype, ...],
    device: torch.device,
    contiguous: bool = True,
) -> None:
    """Raises InvalidArgument unless the tensor is what its name promises."""
    if tensor.shape != shape:
        raise InvalidArgument(name, f"shape {list(tensor.shape)}", f"shape {list(shape)}")
    if tensor.dtype not in dtypes:
        raise InvalidArgument(name, tensor.dtype, " or ".join(str(dtype) for dtype in dtypes))
    if tensor.device != device:
        raise InvalidArgument(name, f"a tensor on {tensor.device}", f"a tensor on {device}")
    if contiguous and not tensor.is_contiguous():
        raise not_contiguous(name, tensor)


def not_contiguous(name: str, tensor: Tensor) -> InvalidArgument:
    return InvalidArgument(name, f"strides {tensor.stride()}", "a contiguous tensor", "Call .contiguous() first.")


def random_inputs(problem: MoEProblem, workload: Workload, seed: int, device: torch.device) -> LayerInputs:
    """Random rows with the workload's ids and equal weights: what a trial runs a layer on."""
    generator = torch.Generator(device).manual_seed(seed)
    shape, ids = (workload.num_rows, problem.config.hidden_size), workload.topk_ids.to(device)
    return LayerInputs(
        torch.randn(shape, generator=generator, device=device, dtype=torch.bfloat16),
        topk_ids=ids,
        topk_weights=torch.full(ids.shape, 1 / problem.config.top_k, device=device),
    )


class GemmTrial(Protocol):
    """One grouped GEMM at one workload, with fixed random inputs: what the tuner checks and times."""

    def run(self, tactic: str) -> Tensor:
        """[rows, N] bf16, rows grouped by local expert. The tensor may be reused by the next call.

        Of a gemm1 tactic that fuses the activation, what it leaves: [rows, N/2], dequantised to f32.
        """
        ...

    def reference(self) -> tuple[Tensor, Tensor]:
        """(row_index [S] int64, values [S, N] f32): the exact result of those rows, computed by no tactic."""
        ...

    def error(self, tactic: str, rows: Tensor, expected: Tensor) -> float:
        """||rows - expected|| / ||expected|| for rows [S, ...] of `run` and values [S, N] of `reference`.

        Of a tactic that quantises its result: what goes beyond half a unit in the last place of the quantised values.
        """
        ...

    def time(self, tactics: Sequence[str], repeats: int) -> dict[str, list[float]]:
        """Microseconds of each repeat by tactic; the tactics take turns within a repeat, so drift meets all alike.

        Where some gemm1 tactics fuse the activation, the time of the others includes the activation's own kernel.
        """
        ...


class LayerTrial(Protocol):
    """A whole layer at one workload, every stage after routing, with fixed random inputs."""

    def time(self, pairs: Sequence[TacticPair], repeats: int) -> dict[TacticPair, list[float]]:
        """Microseconds of each repeat by (gemm1, gemm2) tactics; the pairs take turns, as in `GemmTrial.time`."""
        ...


class Executor(Protocol):
    """Runs layers on one kind of device. Tactics are names; which exist depends on the executor.

    name: "cpu" or "cuda". device_name: the GPU's name, or "cpu". library_hash: of the compiled kernels, or torch's
    version. The last two go into a plan's key.
    sm_count: the GPU's multiprocessors; 0 on a CPU.
    """

    name: str
    device_name: str
    library_hash: str
    sm_count: int

    @property
    def variants(self) -> Mapping[str, KernelVariant]:
        """What the tactics that are compiled kernels are, by name; empty where tactics are no kernels."""
        ...

    def free_bytes(self) -> int | None:
        """Memory that trials may take now; None where nothing limits it."""
        ...

    def tactics(self, problem: MoEProblem, gemm: Gemm) -> tuple[str, ...]:
        """Every candidate that exists for the GEMM, those that can_implement refuses included."""
        ...

    def default_tactic(self, problem: MoEProblem, gemm: Gemm, num_rows: int) -> str:
        """The tactic of a call with num_rows tokens when there is no plan."""
        ...

    def can_implement(self, problem: MoEProblem, gemm: Gemm, tactic: str) -> str | None:
        """None when the tactic can run here, else the reason why not."""
        ...

    def workspace_bytes(self, problem: MoEProblem, num_tokens: int) -> int:
        """Bytes of workspace that a call with num_tokens tokens needs; 0 for none."""
        ...

    def run(
        self,
        problem: MoEProblem,
        weights: FP8BlockWeights,
        inputs: LayerInputs,
        tactics: tuple[str, str],
        output: Tensor,
        workspace: Tensor | None,
        finalize: bool = True,
    ) -> tuple[Tensor, Tensor, Tensor] | None:
        """Runs one layer with (gemm1, gemm2) tactics on inputs that passed LayerInputs.check.

        Writes output, [T, H] bf16, and returns None. With finalize=False leaves output alone and returns
        (gemm2_output [rows, H] bf16, topk_weights [T, k] f32, permuted_row [T, k] int32): slot (t, j) is row
        permuted_row[t, j] of gemm2_output, -1 where its expert is remote; rows >= the slots that are local.
        """
        ...

    def gemm_trial(
        self, problem: MoEProblem, weights: FP8BlockWeights, workload: Workload, gemm: Gemm, seed: int
    ) -> GemmTrial:
        """A trial with random inputs of the workload's rows per expert."""
        ...

    def layer_trial(self, problem: MoEProblem, weights: FP8BlockWeights, workload: Workload, seed: int) -> LayerTrial:
        """A trial of the layer on the workload's ids."""
        ...


def rows_to_hold(mean_rows: float) -> float:
    """Rows that a tile of tokens should hold where experts get mean_rows on average, and unequal ones."""
    return mean_rows + SPREAD * math.sqrt(mean_rows)


def able_tactics(executor: Executor, problem: MoEProblem, gemm: Gemm) -> list[str]:
    """The tactics of a GEMM that can run here."""
    tactics = executor.tactics(problem, gemm)
    return [tactic for tactic in tactics if executor.can_implement(problem, gemm, tactic) is None]
