"""What one MoE layer is: its shapes, its routing and its number format."""

from __future__ import annotations

import dataclasses
import enum
from dataclasses import dataclass

from .errors import InvalidArgument
from .formats.registry import ACTIVATIONS, Format, find_format


class RoutingMethod(enum.IntEnum):
    """How router logits become ids and weights; the numbers are those of FlashInfer's RoutingMethodType.

    `routing.route` defines each.
    """

    Default = 0
    Renormalize = 1
    DeepSeekV3 = 2
    Llama4 = 3
    RenormalizeNaive = 4
    SigmoidRenorm = 6
    MiniMax2 = 7

    @property
    def reads_bias(self) -> bool:
        return self in (RoutingMethod.DeepSeekV3, RoutingMethod.MiniMax2)

    @property
    def weighs_input(self) -> bool:
        """Whether topk_weights multiply what experts read, before it is encoded, and not what they give."""
        return self is RoutingMethod.Llama4


@dataclass(frozen=True)
class MoEConfig:
    """One MoE layer as the model defines it, before it is split over ranks.

    n_group, topk_group and routed_scaling_factor belong to DeepSeekV3 routing; other methods keep them at 1.
    format: a name of `formats.FORMATS`.
    clamp_limit: with c, SwiGLU takes min(gate, c) and clip(up, -c, c); weights may hold one for each expert instead.
    num_fused_shared_experts: of num_experts the last, which every token has beside those that the router chooses: in
        the last of its top_k slots, with weight 1. num_experts and top_k count them, router logits do not.
    activation: between the GEMMs: "swiglu" on rows [gate; up] of W1, or "relu2", relu(x)^2 on a W1 of half the rows.
    experts_are_slots: of a placement, as `physical_config` makes them; the layer then takes no router logits, which are
        of the model's experts.
    Raises InvalidArgument for a combination that no kernel of the format serves.
    """

    name: str
    hidden_size: int
    intermediate_size: int
    num_experts: int
    top_k: int
    routing_method: RoutingMethod = RoutingMethod.Renormalize
    n_group: int = 1
    topk_group: int = 1
    routed_scaling_factor: float = 1.0
    format: str = "fp8_block"
    clamp_limit: float | None = None
    activation: str = "swiglu"
    num_fused_shared_experts: int = 0
    experts_are_slots: bool = False

    def __post_init__(self) -> None:
        for field in ("hidden_size", "intermediate_size", "num_experts", "top_k", "n_group", "topk_group"):
            value = getattr(self, field)
            if not isinstance(value, int) or value < 1:
                raise InvalidArgument(field, repr(value), "a positive integer")
        self._check_format()
        if self.top_k > self.num_experts:
            raise InvalidArgument("top_k", self.top_k, f"at most num_experts = {self.num_experts}")
        if not 0 <= self.num_fused_shared_experts < self.top_k:
            accepted = f"0 to {self.top_k - 1}, less than top_k, which counts them"
            raise InvalidArgument("num_fused_shared_experts", self.num_fused_shared_experts, accepted)
        if self.clamp_limit is not None and not self.clamp_limit > 0:
            raise InvalidArgument("clamp_limit", self.clamp_limit, "None or a positive number")
        self._check_routing()

    def _check_format(self) -> None:
        found = find_format(self.format)
        for field in ("hidden_size", "intermediate_size"):
            if getattr(self, field) % found.multiple:
                accepted = f"a multiple of {found.multiple} for {found.name}"
                raise InvalidArgument(field, getattr(self, field), accepted, "Blocks of scales are not cut.")
        if self.activation not in found.activations:
            known = found.activations if self.activation in ACTIVATIONS else ACTIVATIONS
            raise InvalidArgument("activation", repr(self.activation), f"{' or '.join(known)} for {found.name}")
        if self.clamp_limit is not None and not self.is_gated:
            raise InvalidArgument("clamp_limit", self.clamp_limit, "None", f"{self.activation} has nothing to clamp.")

    def _check_routing(self) -> None:
        try:
            object.__setattr__(self, "routing_method", RoutingMethod(self.routing_method))
        except ValueError:
            names = ", ".join(f"{method.name} = {method.value}" for method in RoutingMethod)
            raise InvalidArgument("routing_method", repr(self.routing_method), names) from None
        if self.routing_method != RoutingMethod.DeepSeekV3:
            for field in ("n_group", "topk_group", "routed_scaling_factor"):
                if getattr(self, field) != 1:
                    raise InvalidArgument(field, getattr(self, field), "1", "Only DeepSeekV3 routing reads it.")
            if self.routing_method == RoutingMethod.Llama4 and self.top_k != 1:
                raise InvalidArgument("top_k", self.top_k, "1", "Llama4 routing gives a token's weight to its one row.")
            return
        if self.num_routed_experts % self.n_group:
            raise InvalidArgument("n_group", self.n_group, f"a divisor of the {self.num_routed_experts} routed experts")
        group_size = self.num_routed_experts // self.n_group
        if group_size < 2:
            raise InvalidArgument(
                "n_group", self.n_group, "groups of 2 experts or more", "A group's score is the sum of its top 2."
            )
        if self.topk_group > self.n_group:
            raise InvalidArgument("topk_group", self.topk_group, f"at most n_group = {self.n_group}")
        if self.routed_top_k > self.topk_group * group_size:
            raise InvalidArgument(
                "top_k", self.routed_top_k, f"at most {self.topk_group * group_size}, the experts in topk_group groups"
            )

    @property
    def number_format(self) -> Format:
        return find_format(self.format)

    @property
    def num_routed_experts(self) -> int:
        """Those that the router chooses from."""
        return self.num_experts - self.num_fused_shared_experts

    @property
    def routed_top_k(self) -> int:
        """How many of them a token gets."""
        return self.top_k - self.num_fused_shared_experts

    @property
    def is_gated(self) -> bool:
        """W1 holds a gate and an up projection: twice the intermediate size of rows."""
        return self.activation == "swiglu"

    @classmethod
    def preset(cls, name: str) -> MoEConfig:
        """The MoE layer of a known model. Raises InvalidArgument with the known names."""
        try:
            return PRESETS[name]
        except KeyError:
            raise InvalidArgument("preset", repr(name), ", ".join(PRESETS)) from None

    def scaled(
        self,
        hidden_size: int | None = None,
        intermediate_size: int | None = None,
        num_experts: int | None = None,
    ) -> MoEConfig:
        """The same layer with smaller shapes, for machines that cannot hold or time the real ones."""
        return dataclasses.replace(
            self,
            name=f"{self.name}-scaled",
            hidden_size=hidden_size or self.hidden_size,
            intermediate_size=intermediate_size or self.intermediate_size,
            num_experts=num_experts or self.num_experts,
        )


_DEEPSEEK_R1 = MoEConfig("deepseek-r1", 7168, 2048, 256, 8, RoutingMethod.DeepSeekV3, 8, 4, 2.5)

PRESETS: dict[str, MoEConfig] = {
    "qwen3-235b": MoEConfig("qwen3-235b", 4096, 1536, 128, 8),
    "qwen3-30b": MoEConfig("qwen3-30b", 2048, 768, 128, 8),
    "deepseek-r1": _DEEPSEEK_R1,
    "deepseek-v3": _DEEPSEEK_R1,
    "kimi-k2": MoEConfig("kimi-k2", 7168, 2048, 384, 8, RoutingMethod.DeepSeekV3, 1, 1, 2.827),
    "mixtral-8x7b": MoEConfig("mixtral-8x7b", 4096, 14336, 8, 2),
    "gpt-oss-120b": MoEConfig("gpt-oss-120b", 2880, 2880, 128, 4, format="bf16_mxfp4"),
    "gpt-oss-20b": MoEConfig("gpt-oss-20b", 2880, 2880, 32, 4, format="bf16_mxfp4"),
}
