"""Runs layers on the compiled kernels: one native call a layer, no allocation and no synchronisation inside."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import TypeVar

import torch
from torch import Tensor

from ..errors import InvalidArgument, KernelError, Unsupported
from ..formats import WeightLayout
from ..kernels import (
    DTYPE_BF16,
    DTYPE_E2M1,
    DTYPE_E4M3,
    DTYPE_F32,
    Activation,
    KernelLibrary,
    KernelVariant,
    LayerArguments,
    MoeUnpack,
    Stage,
    WorkspaceLayout,
    load_library,
)
from ..weights import ExpertWeights, LayerWeights, Operands
from ..workload import Workload
from .base import Gemm, GemmTrial, LayerInputs, LayerTrial, MoEProblem, TacticPair, able_tactics
from .default_tactic import default_variant, twin

Arguments = TypeVar("Arguments", LayerArguments, MoeUnpack)

ARCH_OF_CAPABILITY = {(9, 0): "sm_90a"}
_TUNE_AGAIN = "`moe-runtime variants` lists them; tune again after building other kernels."
# Plain integers: combining two flags of an enum takes 0.4 us.
_ROUTE, _COMBINE = int(Stage.ROUTE), int(Stage.COMBINE)
_FACTORS = (
    "gemm1_scale", "gemm1_bias", "alpha", "beta", "clamp", "activation_multiplier", "gemm2_scale", "gemm2_bias",
)  # fmt: skip
"""Fields of Operands and of LayerArguments alike."""
_AFTER_ROUTING = int(Stage.PERMUTE | Stage.GATHER | Stage.GEMM1 | Stage.ACTIVATION | Stage.GEMM2)


class CudaExecutor:
    """The executor of one GPU. Raises Unsupported for a GPU without kernels, or where none are built."""

    name = "cuda"

    def __init__(self, device: torch.device) -> None:
        capability = torch.cuda.get_device_capability(device)
        arch = ARCH_OF_CAPABILITY.get(capability)
        if arch is None:
            known = ", ".join(f"{major}.{minor}" for major, minor in ARCH_OF_CAPABILITY)
            raise Unsupported(f"compute capability {capability[0]}.{capability[1]}: layers run on {known} only.")
        self.device = torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
        self.device_name = torch.cuda.get_device_name(self.device)
        self.library: KernelLibrary = load_library(arch)
        self.library_hash = self.library.hash
        self._variants = self.library.variants
        self.sm_count = torch.cuda.get_device_properties(self.device).multi_processor_count
        # Looked up on every call, so each is worked out once.
        self._template = functools.lru_cache(maxsize=4096)(self._make_template)
        self._default = functools.lru_cache(maxsize=4096)(self._choose_default)
        self._bytes = functools.lru_cache(maxsize=4096)(self._count_bytes)

    @property
    def variants(self) -> Mapping[str, KernelVariant]:
        return self._variants

    def free_bytes(self) -> int:
        """What the driver has left, and what torch keeps for later."""
        free, _ = torch.cuda.mem_get_info(self.device)
        return free + torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device)

    def tactics(self, problem: MoEProblem, gemm: Gemm) -> tuple[str, ...]:
        """The variants that read the format's weights."""
        layout = problem.config.number_format.weight_layout
        return tuple(name for name, variant in self._variants.items() if variant.weights == layout)

    def default_tactic(self, problem: MoEProblem, gemm: Gemm, num_rows: int) -> str:
        return self._default(problem, gemm, num_rows)

    def _choose_default(self, problem: MoEProblem, gemm: Gemm, num_rows: int) -> str:
        able = [self._variants[name] for name in able_tactics(self, problem, gemm)]
        if not able:
            raise Unsupported(f"{self.library.path.name} has no kernel for {gemm} of {problem}. {_TUNE_AGAIN}")
        return default_variant(able, problem, gemm, num_rows, self.sm_count).name

    def leaving_rows(self, tactic: str) -> str:
        variant = self._variants.get(tactic)
        return tactic if variant is None else twin(variant, self._variants.values(), "combine", "").name

    def can_implement(self, problem: MoEProblem, gemm: Gemm, tactic: str) -> str | None:
        if tactic not in self._variants:
            return f"no variant {tactic} in {self.library.path.name}"
        variant, (n, _) = self._variants[tactic], problem.gemm_shape(gemm)
        if variant.weights != problem.config.number_format.weight_layout:
            return f"it reads {variant.weights.name.lower()} weights"
        if variant.swiglu and gemm == "gemm2":
            return "it applies the activation, which only gemm1 has"
        if variant.combines and gemm == "gemm1":
            return "it adds up the experts' results, which only gemm2 has"
        if variant.swiglu and not problem.config.is_gated:
            return f"it applies SwiGLU, not {problem.config.activation}"
        packed = variant.weights != WeightLayout.FP8_BLOCK
        if packed and gemm == "gemm1" and problem.config.is_gated and not variant.swiglu:
            return "gate and up are packed for kernels that activate"
        # Tiles of packed weights are padded to what a kernel takes at a time.
        if not packed and n % variant.weight_rows:
            return f"{n} rows of weights are no multiple of the {variant.weight_rows} that it takes at a time"
        if self._layout(problem, 1) is None:
            limits = "top_k <= 32, num_experts <= 1024, of them 512 local, n_group <= 32"
            return f"the shape is outside what the kernels implement ({limits})"
        return None

    def prepare(self, weights: LayerWeights) -> Operands:
        return weights.tiled_operands

    def workspace_bytes(self, problem: MoEProblem, num_tokens: int) -> int:
        return self._bytes(problem, num_tokens)

    def _count_bytes(self, problem: MoEProblem, num_tokens: int) -> int:
        layout = self._layout(problem, num_tokens)
        if layout is None:
            raise Unsupported(f"no kernel implements {problem} with {num_tokens} tokens.")
        return layout.total_bytes

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
        if workspace is None:
            needed = self.workspace_bytes(problem, inputs.hidden_states.shape[0])
            workspace = torch.empty(needed, dtype=torch.uint8, device=output.device)
        stages = _AFTER_ROUTING
        if inputs.routing_logits is not None:
            stages |= _ROUTE
        if finalize:
            stages |= _COMBINE
        self.launch(self.arguments(problem, weights, inputs, tactics, output, workspace), stages)
        return None if finalize else self._unfinalised(problem, inputs, workspace)

    def arguments(
        self,
        problem: MoEProblem,
        weights: LayerWeights,
        inputs: LayerInputs,
        tactics: tuple[str, str],
        output: Tensor | None,
        workspace: Tensor,
    ) -> LayerArguments:
        """The native call's arguments, without stages. They hold addresses, not tensors: keep those alive."""
        x, scale, logits, bias, topk_ids, topk_weights = inputs
        # A fresh copy, because the native call runs without the interpreter's lock.
        operands = weights.tiled_operands
        args = LayerArguments.from_buffer_copy(
            self._template(problem, x.shape[0], tactics, operands.gate_first, operands.input_scale)
        )
        args.hidden_states = x.data_ptr()
        if not x.is_contiguous():
            args.hidden_states_stride = x.stride(0)
        if x.dtype is not torch.bfloat16:
            args.hidden_states_dtype = DTYPE_E2M1 if x.dtype is torch.uint8 else DTYPE_E4M3
        if scale is not None:
            args.hidden_states_scale = scale.data_ptr()
            args.scale_token_stride, args.scale_block_stride = scale.stride()
        if logits is not None:
            args.routing_logits = logits.data_ptr()
            args.routing_logits_dtype = DTYPE_F32 if logits.dtype is torch.float32 else DTYPE_BF16
        if bias is not None:
            args.routing_bias = bias.data_ptr()
            args.routing_bias_dtype = DTYPE_F32 if bias.dtype is torch.float32 else DTYPE_BF16
        if topk_ids is not None and topk_weights is not None:
            args.topk_ids = topk_ids.data_ptr()
            args.topk_weights = topk_weights.data_ptr()
        # Asked for on every call, 0.3 us, because torch can move a tensor to other memory behind its owner's back.
        args.gemm1_weights = operands.gate_up.data_ptr()
        args.gemm2_weights = operands.down.data_ptr()
        if operands.gate_up_scale is not None and operands.down_scale is not None:
            args.gemm1_weights_scale = operands.gate_up_scale.data_ptr()
            args.gemm2_weights_scale = operands.down_scale.data_ptr()
        else:  # the tiles hold them, and only such layers have factors
            for name in _FACTORS:
                factor = getattr(operands, name)
                if factor is not None:
                    setattr(args, name, factor.data_ptr())
        if output is not None:
            args.output = output.data_ptr()
        args.workspace = workspace.data_ptr()
        args.workspace_bytes = workspace.nbytes
        return args

    def launch(self, args: LayerArguments, stages: Stage | int) -> None:
        """Runs the stages on the current stream. Raises KernelError."""
        args.stages = stages
        code = self._call(self.library.layer, args)
        if code:
            names = list(self._variants)
            used = f"{names[args.gemm1_variant]} + {names[args.gemm2_variant]}"
            raise KernelError(used, str(Stage(args.stages)), code, self.library.error_string(code))

    def unpack(self, args: MoeUnpack) -> None:
        """On the current stream. Raises KernelError."""
        code = self._call(self.library.unpack, args)
        if code:
            raise KernelError("messages", "unpack", code, self.library.error_string(code))

    def _call(self, function: Callable[[Arguments], int], args: Arguments) -> int:
        """What a native function returns, on this device and its current stream."""
        index = self.device.index
        # torch's raw accessors, which its own compiled code uses: the public ones build objects, 3 us of a 40 us call.
        if torch._C._cuda_getDevice() != index:
            with torch.cuda.device(self.device):
                return self._call(function, args)
        args.stream = torch._C._cuda_getCurrentRawStream(index)
        return function(args)

    def view(
        self,
        problem: MoEProblem,
        workspace: Tensor,
        num_tokens: int,
        region: str,
        shape: tuple[int, ...],
        dtype: torch.dtype,
    ) -> Tensor:
        """A region of a workspace (a field of WorkspaceLayout) as a tensor."""
        layout = self._layout(problem, num_tokens)
        assert layout is not None
        start = getattr(layout, region)
        count = dtype.itemsize
        for extent in shape:
            count *= extent
        return workspace[start : start + count].view(dtype).view(shape)

    def gemm_trial(
        self, problem: MoEProblem, weights: ExpertWeights, workload: Workload, gemm: Gemm, seed: int
    ) -> GemmTrial:
        from .cuda_trial import CudaGemmTrial

        return CudaGemmTrial(self, problem, weights, workload, gemm, seed)

    def layer_trial(self, problem: MoEProblem, weights: ExpertWeights, workload: Workload, seed: int) -> LayerTrial:
        from .cuda_trial import CudaLayerTrial

        return CudaLayerTrial(self, problem, weights, workload, seed)

    def _unfinalised(
        self, problem: MoEProblem, inputs: LayerInputs, workspace: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        tokens, k, hidden = inputs.hidden_states.shape[0], problem.config.top_k, problem.config.hidden_size
        view = functools.partial(self.view, problem, workspace, tokens)
        weights = inputs.topk_weights
        if weights is None:
            weights = view("topk_weights", (tokens, k), torch.float32)
        if problem.config.routing_method.weighs_input:
            weights = torch.ones_like(weights)
        rows = view("gemm2_output", (tokens * k, hidden), torch.bfloat16)
        return rows, weights, view("permuted_row", (tokens, k), torch.int32)

    def _make_template(
        self, problem: MoEProblem, num_tokens: int, tactics: TacticPair, gate_first: bool, input_scale: float
    ) -> LayerArguments:
        """What calls have in common that differ in their tensors only."""
        args = self._shape(problem, num_tokens)
        try:
            args.gemm1_variant = self._variants[tactics[0]].index
            args.gemm2_variant = self._variants[tactics[1]].index
        except KeyError as unknown:
            raise InvalidArgument("tactics", unknown, f"variants of {self.library.path.name}", _TUNE_AGAIN) from None
        args.gate_first = gate_first
        args.input_scale_inverse = 1 / input_scale
        return args

    def _shape(self, problem: MoEProblem, num_tokens: int) -> LayerArguments:
        config = problem.config
        return LayerArguments(
            num_tokens=num_tokens,
            hidden_size=config.hidden_size,
            hidden_states_stride=config.hidden_size,
            intermediate_size=problem.local_intermediate_size,
            num_experts=config.num_experts,
            top_k=config.top_k,
            local_expert_offset=problem.local_expert_offset,
            num_local_experts=problem.num_local_experts,
            weights=config.number_format.weight_layout,
            tokens=config.number_format.tokens,
            activation=Activation[config.activation.upper()],
            routing_method=config.routing_method,
            n_group=config.n_group,
            topk_group=config.topk_group,
            num_fused_shared_experts=config.num_fused_shared_experts,
            routed_scaling_factor=config.routed_scaling_factor,
            clamp_limit=config.clamp_limit or 0.0,
            hidden_states_dtype=DTYPE_BF16,
            input_scale_inverse=1.0,
            sm_count=self.sm_count,
        )

    def _layout(self, problem: MoEProblem, num_tokens: int) -> WorkspaceLayout | None:
        return self.library.workspace_layout(self._shape(problem, num_tokens))
