"""Routing in plain torch: router logits to expert ids and weights."""

from __future__ import annotations

import torch
from torch import Tensor

from .config import MoEConfig, RoutingMethod


def route(config: MoEConfig, logits: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """logits [T, E] and bias [E], bf16 or f32 -> (topk_ids [T, k] int32, topk_weights [T, k] f32).

    Default: the top_k of the softmax. Renormalize, RenormalizeNaive: the softmax of the top_k logits, which is the
    softmax of all, normalised. SigmoidRenorm: the top_k sigmoids, normalised. MiniMax2: the same, chosen on sigmoid +
    bias. DeepSeekV3: the same within the topk_group best groups (score: the sum of a group's two best), times
    routed_scaling_factor. Llama4: the sigmoid of the largest logit.

    E counts the experts that are not shared; shared ones follow in the last slots, with weight 1. Computed in fp32.
    Slots come best first; of equal scores the lower expert id wins. bias counts as zeros when None, and only methods
    that read it get one.
    """
    scores = logits.float()
    match config.routing_method:
        case RoutingMethod.Default:
            # Chosen on logits, for probabilities may tie where logits do not.
            ids = _top(scores, config.routed_top_k)
            weights = scores.softmax(-1).gather(-1, ids)
        case RoutingMethod.Renormalize | RoutingMethod.RenormalizeNaive:
            ids = _top(scores, config.routed_top_k)
            weights = scores.gather(-1, ids).softmax(-1)
        case RoutingMethod.Llama4:
            ids = _top(scores, config.routed_top_k)
            weights = scores.gather(-1, ids).sigmoid()
        case RoutingMethod.DeepSeekV3 | RoutingMethod.SigmoidRenorm | RoutingMethod.MiniMax2:
            ids, weights = _normalised_sigmoids(config, scores, bias)
    if shared := config.num_fused_shared_experts:
        experts = torch.arange(config.num_routed_experts, config.num_experts, device=ids.device)
        ids = torch.cat([ids, experts.expand(len(ids), shared)], -1)
        weights = torch.cat([weights, weights.new_ones(len(ids), shared)], -1)
    return ids.to(torch.int32), weights


def _normalised_sigmoids(config: MoEConfig, logits: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """Chooses on sigmoid + bias within the best groups; the weights are the unbiased sigmoids, normalised."""
    scores = logits.sigmoid()
    choice = scores if bias is None else scores + bias.float()
    if config.n_group > 1:
        grouped = choice.unflatten(-1, (config.n_group, -1))
        kept = _top(grouped.topk(2, -1).values.sum(-1), config.topk_group)
        is_kept = torch.zeros(grouped.shape[:-1], dtype=torch.bool, device=logits.device).scatter_(-1, kept, True)
        choice = grouped.masked_fill(~is_kept.unsqueeze(-1), -torch.inf).flatten(-2)
    ids = _top(choice, config.routed_top_k)
    weights = scores.gather(-1, ids)
    return ids, weights / (weights.sum(-1, keepdim=True) + 1e-20) * config.routed_scaling_factor


def _top(scores: Tensor, k: int) -> Tensor:
    # A stable sort, because torch.topk leaves the order of ties open.
    return scores.sort(dim=-1, descending=True, stable=True).indices[..., :k]
