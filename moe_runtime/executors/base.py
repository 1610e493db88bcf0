"""The interface behind which the executors stand, and the types that cross it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, Protocol

import torch
from torch import Tensor

from ..config import FP8_BLOCK, MoEConfig, RoutingMethod
from ..errors import InvalidArgument
from ..parallel import Parallel

if TYPE_CHECKING:
    from ..weights import FP8BlockWeights
    from ..workload import Workload

Gemm = Literal["gemm1", "gemm2"]
GEMMS: tuple[Gemm, ...] = ("gemm1", "gemm2")

_FLOATS = (torch.bfloat16, torch.float32)


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


@dataclass(frozen=True, slots=True)
class LayerInputs:
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

    def check(self, problem: MoEProblem) -> None:
        """Raises InvalidArgument for a wrong dtype, shape, device or layout. Reads no tensor's values."""
        config, x = problem.config, self.hidden_states
        hidden, experts, k = config.hidden_size, config.num_experts, config.top_k
        if x.ndim != 2 or x.shape[1] != hidden:
            raise InvalidArgument("hidden_states", f"shape {list(x.shape)}", f"[num_tokens, {hidden}]")
        tokens, device = x.shape[0], x.device
        if self.hidden_states_scale is None:
            if x.dtype != torch.bfloat16:
                accepted = "bfloat16, or float8_e4m3fn with hidden_states_scale"
                raise InvalidArgument("hidden_states", x.dtype, accepted)
        else:
            if x.dtype != torch.float8_e4m3fn:
                raise InvalidArgument("hidden_states", x.dtype, "float8_e4m3fn when hidden_states_scale is given")
            blocks = (tokens, hidden // FP8_BLOCK)
            check_tensor("hidden_states_scale", self.hidden_states_scale, blocks, (torch.float32,), device, False)
        check_contiguous("hidden_states", x)

        if self.routing_logits is not None:
            if self.topk_ids is not None or self.topk_weights is not None:
                raise InvalidArgument("topk_ids", "ids beside routing_logits", "either routing_logits or ready ids")
            check_tensor("routing_logits", self.routing_logits, (tokens, experts), _FLOATS, device)
            if self.routing_bias is not None:
                check_tensor("routing_bias", self.routing_bias, (experts,), _FLOATS, device)
                check_bias_is_read(config)
            return
        if self.topk_ids is None or self.topk_weights is None:
            missing = "topk_weights" if self.topk_ids is not None else "topk_ids"
            raise InvalidArgument(missing, None, "topk_ids and topk_weights, or routing_logits")
        if self.routing_bias is not None:
            raise InvalidArgument("routing_bias", "a bias beside topk_ids", "None with ready ids")
        check_tensor("topk_ids", self.topk_ids, (tokens, k), (torch.int32,), device)
        check_tensor("topk_weights", self.topk_weights, (tokens, k), (torch.float32,), device)


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
    if contiguous:
        check_contiguous(name, tensor)


def check_contiguous(name: str, tensor: Tensor) -> None:
    if not tensor.is_contiguous():
        raise InvalidArgument(name, f"strides {tensor.stride()}", "a contiguous tensor", "Call .contiguous() first.")


class GemmTrial(Protocol):
    """One grouped GEMM at one workload, with fixed random inputs: what the tuner checks and times."""

    def run(self, tactic: str) -> Tensor:
        """[rows, N] bf16, rows grouped by local expert. The tensor may be reused by the next call."""
        ...

    def reference(self) -> tuple[Tensor, Tensor]:
        """(row_index [S] int64, values [S, N] f32): the exact result of those rows, computed by no tactic."""
        ...

    def time(self, tactics: Sequence[str], repeats: int) -> dict[str, list[float]]:
        """Microseconds of each repeat by tactic; the tactics take turns within a repeat, so drift meets all alike."""
        ...


class Executor(Protocol):
    """Runs layers on one kind of device. Tactics are names; which exist depends on the executor.

    name: "cpu" or "cuda". device_name: the GPU's name, or "cpu". library_hash: of the compiled kernels, or torch's
    version. The last two go into a plan's key.
    """

    name: str
    device_name: str
    library_hash: str

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
