"""Routing in plain torch: router logits to expert ids and weights."""

from __future__ import annotations

import torch
from torch import Tensor

from .config import MoEConfig, RoutingMethod


def route(config: MoEConfig, logits: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """logits [T, E] and bias [E], bf16 or f32 -> (topk_ids [T, k] int32, topk_weights [T, k] f32).

    Computed in fp32. Slots come best first; of equal scores the lower expert id wins. bias counts as zeros when
    None, and only DeepSeekV3 reads it.
    """
    scores = logits.float()
    if config.routing_method == RoutingMethod.DeepSeekV3:
        ids, weights = _deepseek_v3(config, scores, bias)
    else:
        ids = _top(scores, config.top_k)
        weights = scores.gather(-1, ids).softmax(-1)
    return ids.to(torch.int32), weights


def _deepseek_v3(config: MoEConfig, logits: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """Chooses on sigmoid + bias within the best groups; the weights are the unbiased sigmoids, normalised."""
    scores = logits.sigmoid()
    choice = scores if bias is None else scores + bias.float()
    if config.n_group > 1:
        grouped = choice.unflatten(-1, (config.n_group, -1))
        kept = _top(grouped.topk(2, -1).values.sum(-1), config.topk_group)
        is_kept = torch.zeros(grouped.shape[:-1], dtype=torch.bool, device=logits.device).scatter_(-1, kept, True)
        choice = grouped.masked_fill(~is_kept.unsqueeze(-1), -torch.inf).flatten(-2)
    ids = _top(choice, config.top_k)
    weights = scores.gather(-1, ids)
    return ids, weights / (weights.sum(-1, keepdim=True) + 1e-20) * config.routed_scaling_factor


def _top(scores: Tensor, k: int) -> Tensor:
    # A stable sort, because torch.topk leaves the order of ties open.
    return scores.sort(dim=-1, descending=True, stable=True).indices[..., :k]
