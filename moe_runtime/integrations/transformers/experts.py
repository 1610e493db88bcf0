"""What transformers calls in place of an experts module's forward."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.integrations.finegrained_fp8 import ALL_FP8_EXPERTS_FUNCTIONS, FP8Experts
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.utils import is_kernels_available

from ... import machine
from ...errors import Unsupported
from .layers import release, run
from .reading import RELEASED, Parameters, Recipe, read

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Settings:
    """What `register` was told."""

    format: str
    plan_dir: str
    keep_parameters: bool


settings = Settings("bf16", str(machine.plan_folder()), True)


def use(new: Settings) -> None:
    global settings
    settings = new


class Reading(NamedTuple):
    """What was found out about an experts module: kept in it, where torch.compile guards it.

    dtype: of the weights that were read. recipe: the text of one; None where the stock implementation is to run, for
    the reason given.
    """

    dtype: torch.dtype
    recipe: str | None
    reason: str = ""


def experts_forward(self: torch.nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """hidden_states [T, H], top_k_index [T, k], ids of the module's experts, top_k_weights [T, k] -> [T, H].

    Under expert parallelism the id past the last expert stands for those of other ranks, which add nothing.
    Raises Unsupported where only the stock implementation could serve the call, and cannot.
    """
    experts: Any = self
    parameters, top_k = Parameters.of(self), top_k_index.shape[1]
    has_norm = getattr(experts, "has_post_expert_norm", False)
    reading: Reading | None = getattr(self, _READING, None)
    if reading is None or reading.dtype != parameters.first.dtype:
        reading = _read(self, 1 if has_norm else top_k)
    recipe, reason = reading.recipe, reading.reason
    if hidden_states.dtype != torch.bfloat16:
        recipe, reason = None, f"its tokens are {hidden_states.dtype}"
    elif torch.is_grad_enabled() and _needs_grad(parameters, hidden_states, top_k_weights):
        recipe, reason = None, "gradients must pass through it; torch.no_grad() would spare them"
    if recipe is None:
        return _stock(self, reason)(self, hidden_states, top_k_index, top_k_weights)
    ids = top_k_index.to(torch.int32).contiguous()
    if ids.device.type == "cpu" and getattr(experts, "_is_expert_parallel", True):
        ids = ids.masked_fill(ids >= experts.num_experts, -1)  # on a GPU such ids add nothing as they are
    x = hidden_states.contiguous()
    if not has_norm:
        return run(recipe, parameters, x, ids, top_k_weights.float().contiguous())
    # The norm is of each expert's row alone, so every slot is a token of its own, and they are added up out here.
    slots = ids.view(-1, 1)
    rows = run(recipe, parameters, x.repeat_interleave(top_k, 0), slots, torch.ones_like(slots, dtype=torch.float32))
    normed = experts.post_expert_norm(rows).unflatten(0, (-1, top_k))
    return (normed * top_k_weights.unsqueeze(-1)).sum(1).to(hidden_states.dtype)


_READING = "_moe_runtime_reading"


@torch.compiler.disable(reason="moe_runtime looks at the values of experts once: call the model before compiling it")
def _read(module: torch.nn.Module, top_k: int) -> Reading:
    parameters = Parameters.of(module)
    found = read(module, settings.format, settings.plan_dir)
    if isinstance(found, Recipe):
        reading = Reading(parameters.first.dtype, found.text)
        if not settings.keep_parameters and release(found, parameters, top_k):
            module.register_state_dict_pre_hook(_refuse_to_save)
    else:
        reading = Reading(parameters.first.dtype, None, found)
    setattr(module, _READING, reading)
    return reading


def _needs_grad(parameters: Parameters, hidden_states: Tensor, top_k_weights: Tensor) -> bool:
    first = parameters.first
    trains = first.requires_grad and first.dtype.itemsize > 1  # quantised weights ask for gradients, and never get any
    return trains or hidden_states.requires_grad or top_k_weights.requires_grad


def _refuse_to_save(module: torch.nn.Module, prefix: str, keep_vars: bool) -> None:
    raise Unsupported(f"{prefix or type(module).__name__} cannot be saved: {RELEASED}")


def _stock(module: torch.nn.Module, reason: str) -> Callable[..., Tensor]:
    """The implementation that transformers takes by default, or its plain loop where that does not serve the module."""
    experts: Any = module
    name = type(module).__name__
    if Parameters.of(module).are_released:
        raise Unsupported(f"{name}: {reason}; {RELEASED}")
    if not torch.compiler.is_compiling():
        _warn(f"moe_runtime leaves {name} to transformers' own implementation: {reason}")
    if not isinstance(module, FP8Experts):
        return ALL_EXPERTS_FUNCTIONS["grouped_mm"]
    if not is_kernels_available():
        raise Unsupported(f"{name}: {reason}; transformers' own implementation needs the package kernels")
    if experts.activation_scheme == "static":
        return type(module).forward.__wrapped__
    return ALL_FP8_EXPERTS_FUNCTIONS["grouped_mm"]


@functools.cache
def _warn(message: str) -> None:
    _logger.warning(message)
