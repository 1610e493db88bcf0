"""Mixture-of-experts layers for inference: generated kernels, tuned for what one rank sees.

>>> layer = FusedMoE(MoEConfig.preset("deepseek-r1"), Parallel.parse("dep8", rank=0), weights, plan=Plan.load(path))
>>> y = layer(x, router_logits)
"""

from .checkpoints import load_experts
from .config import MoEConfig, RoutingMethod
from .errors import InvalidArgument, KernelError, MoEError, PlanRefused, RankError, Unsupported
from .graphs import GraphedMoE
from .layer import FusedMoE, fused_moe
from .parallel import Parallel
from .parallel.layer import ParallelMoE
from .placement import Placement, Placements, physical_config
from .tuning.plan import Plan
from .weights import FP8BlockWeights, PackedWeights

__all__ = [
    "FP8BlockWeights",
    "FusedMoE",
    "GraphedMoE",
    "InvalidArgument",
    "KernelError",
    "MoEConfig",
    "MoEError",
    "PackedWeights",
    "Parallel",
    "ParallelMoE",
    "Placement",
    "Placements",
    "Plan",
    "PlanRefused",
    "RankError",
    "RoutingMethod",
    "Unsupported",
    "fused_moe",
    "load_experts",
    "physical_config",
]
