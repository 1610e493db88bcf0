"""The interface behind which the executors stand, and the types that cross it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from ..config import MoEConfig, RoutingMethod
from ..errors import InvalidArgument
from ..formats import Tokens, fp8_block, mxfp8, nvfp4
from ..parallel import Parallel

if TYPE_CHECKING:
    from ..kernels import KernelVariant
    from ..weights import ExpertWeights, LayerWeights, Operands
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


class QuantisedTokens(NamedTuple):
    """Tokens that come to a layer quantised: values [T, columns] of a dtype, or none that do where it is None.

    scales: of hidden_states_scale [T, scales], None where tokens have none. contiguous: whether both must be.
    """

    dtype: torch.dtype | None
    columns: int
    scales: int | None
    scale_dtypes: tuple[torch.dtype, ...] = ()
    contiguous: bool = True


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
    quantised_tokens: QuantisedTokens = field(init=False, repr=False, compare=False)
    _hash: int = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        experts, intermediate = self.config.num_experts, self.config.intermediate_size
        self.parallel.validate_experts(experts)
        object.__setattr__(self, "num_local_experts", self.parallel.num_local_experts(experts))
        object.__setattr__(self, "local_expert_offset", self.parallel.local_expert_offset(experts))
        object.__setattr__(
            self,
            "local_intermediate_size",
            self.parallel.local_intermediate_size(intermediate, self.config.number_format.multiple),
        )
        object.__setattr__(self, "quantised_tokens", _quantised_tokens(self.config))
        object.__setattr__(self, "_hash", hash((self.config, self.parallel)))

    def __hash__(self) -> int:
        # Kept: executors look cached facts up by problem on every call, and hashing all fields takes microseconds.
        return self._hash

    def gemm_shape(self, gemm: Gemm) -> tuple[int, int]:
        """(N, K) of a GEMM: rows [M, K] x weights [N, K] -> [M, N]."""
        hidden, intermediate = self.config.hidden_size, self.local_intermediate_size
        if gemm == "gemm2":
            return hidden, intermediate
        return (2 if self.config.is_gated else 1) * intermediate, hidden

    def mean_rows(self, num_rows: int) -> float:
        """GEMM rows of a routed expert in a call with num_rows rows, on average."""
        return num_rows * self.config.routed_top_k / self.config.num_routed_experts


# Made on every call, which takes a frozen dataclass 0.5 us and a NamedTuple 0.2.
class LayerInputs(NamedTuple):
    """What one call of a layer reads. Either routing_logits, or topk_ids and topk_weights.

    hidden_states: [T, H] bf16, or quantised in the format's encoding of tokens: e4m3 [T, H], or packed e2m1 uint8
        [T, H/2] for nvfp4. Contiguous, but rows of bf16 and of fp8_block may lie any multiple of 16 bytes apart.
    hidden_states_scale: of quantised tokens: f32 [T, H/128], any strides, for fp8_block; ue8m0 as uint8 [T, H/32] for
        mxfp8; e4m3 [T, H/16] for nvfp4; None for fp8, whose one scale is the weights' input_scale.
    routing_logits: [T, E] bf16 or f32, contiguous.
    routing_bias: [E] bf16 or f32, contiguous; where RoutingMethod.reads_bias.
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
        x, scale, logits, bias, topk_ids, topk_weights = self
        shape, quantised = x.shape, scale is not None or x.dtype is not torch.bfloat16
        hidden, accepted = config.hidden_size, problem.quantised_tokens
        if quantised:
            if x.dtype is not accepted.dtype or (scale is None) is not (accepted.scales is None):
                raise _not_quantised_so(config, accepted, x, scale)
            hidden = accepted.columns
        if len(shape) != 2 or shape[1] != hidden:
            raise InvalidArgument("hidden_states", f"shape {list(shape)}", f"[num_tokens, {hidden}]")
        tokens = shape[0]
        if not x.is_contiguous() and ((quantised and accepted.contiguous) or not _has_aligned_rows(x)):
            raise not_contiguous("hidden_states", x)
        if x.device != device:
            raise InvalidArgument("hidden_states", f"a tensor on {x.device}", f"one on {device} like the weights")
        if scale is not None:
            scales = (tokens, accepted.scales or 0)
            check_tensor("hidden_states_scale", scale, scales, accepted.scale_dtypes, device, accepted.contiguous)

        if logits is not None:
            if topk_ids is not None or topk_weights is not None:
                raise InvalidArgument("topk_ids", "ids beside routing_logits", "either routing_logits or ready ids")
            if config.experts_are_slots:
                given, hint = "logits for a layer whose experts are slots", "Use `route` and `Placement.to_physical`."
                raise InvalidArgument("routing_logits", given, "topk_ids and topk_weights", hint)
            check_tensor("routing_logits", logits, (tokens, config.num_routed_experts), _FLOATS, device)
            if bias is not None:
                check_tensor("routing_bias", bias, (config.num_routed_experts,), _FLOATS, device)
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


def _has_aligned_rows(x: Tensor) -> bool:
    row, element = x.stride()
    return element == 1 and row >= x.shape[1] and row * x.itemsize % 16 == 0 and x.data_ptr() % 16 == 0


def _quantised_tokens(config: MoEConfig) -> QuantisedTokens:
    hidden, e4m3, none = config.hidden_size, torch.float8_e4m3fn, None
    match config.number_format.tokens:
        case Tokens.FP8_BLOCK:
            return QuantisedTokens(e4m3, hidden, hidden // fp8_block.BLOCK, (torch.float32,), contiguous=False)
        case Tokens.FP8:
            return QuantisedTokens(e4m3, hidden, none)
        case Tokens.MXFP8:
            return QuantisedTokens(e4m3, hidden, hidden // mxfp8.BLOCK, (torch.uint8, torch.float8_e8m0fnu))
        case Tokens.NVFP4:
            return QuantisedTokens(torch.uint8, hidden // 2, hidden // nvfp4.BLOCK, (e4m3, torch.uint8))
        case Tokens.BF16:
            return QuantisedTokens(none, hidden, none)


def _not_quantised_so(config: MoEConfig, accepted: QuantisedTokens, x: Tensor, scale: Tensor | None) -> InvalidArgument:
    """What is wrong with tokens of another dtype, or with a scale that is not there or should not be."""
    if scale is not None and accepted.scales is None:
        why = "None with bf16 tokens" if accepted.dtype is None else "None: these tokens have the weights' input_scale"
        return InvalidArgument("hidden_states_scale", "a tensor", why)
    beside = "" if accepted.scales is None else " with hidden_states_scale"
    quantised = "" if accepted.dtype is None else f", or {accepted.dtype}{beside}"
    return InvalidArgument("hidden_states", x.dtype, f"torch.bfloat16{quantised} for {config.format}")


def check_bias_is_read(config: MoEConfig) -> None:
    method = RoutingMethod(config.routing_method)
    if not method.reads_bias:
        readers = " and ".join(other.name for other in RoutingMethod if other.reads_bias)
        raise InvalidArgument(
            "routing_bias", "a tensor", f"None under {method.name} routing", f"Only {readers} read it."
        )


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


def version(tensor: Tensor) -> int:
    """Grows when the tensor is written to in place; inference tensors do not count."""
    return 0 if tensor.is_inference() else tensor._version


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
        """(row_index [S] int64, values [S, N] f32): the exact result of those rows, computed by no tactic.

        Where all tactics of gemm1 fuse the activation, its result: [S, N/2].
        """
        ...

    def error(self, tactic: str, rows: Tensor, expected: Tensor) -> float:
        """||rows - expected|| / ||expected|| for rows [S, ...] of `run` and values [S, ...] of `reference`.

        Of a tactic that quantises its result: what goes beyond rounding to a neighbour of the exact value.
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

    def leaving_rows(self, tactic: str) -> str:
        """The gemm2 tactic, or its like that leaves every slot's row and adds them up in a fixed order."""
        ...

    def can_implement(self, problem: MoEProblem, gemm: Gemm, tactic: str) -> str | None:
        """None when the tactic can run here, else the reason why not."""
        ...

    def prepare(self, weights: LayerWeights) -> Operands:
        """What calls read of the weights, in the layout of this device's kernels. The first time this packs them."""
        ...

    def workspace_bytes(self, problem: MoEProblem, num_tokens: int) -> int:
        """Bytes of workspace that a call with num_tokens tokens needs; 0 for none."""
        ...

    def run(
        self,
        problem: MoEProblem,
        weights: LayerWeights,
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
        topk_weights are ones where routing weighs the experts' input.
        """
        ...

    def gemm_trial(
        self, problem: MoEProblem, weights: ExpertWeights, workload: Workload, gemm: Gemm, seed: int
    ) -> GemmTrial:
        """A trial with random inputs of the workload's rows per expert."""
        ...

    def layer_trial(self, problem: MoEProblem, weights: ExpertWeights, workload: Workload, seed: int) -> LayerTrial:
        """A trial of the layer on the workload's ids."""
        ...


def rows_to_hold(mean_rows: float) -> float:
    """Rows that a tile of tokens should hold where experts get mean_rows on average, and unequal ones."""
    return mean_rows + SPREAD * math.sqrt(mean_rows)


def able_tactics(executor: Executor, problem: MoEProblem, gemm: Gemm) -> list[str]:
    """The tactics of a GEMM that can run here."""
    tactics = executor.tactics(problem, gemm)
    return [tactic for tactic in tactics if executor.can_implement(problem, gemm, tactic) is None]
