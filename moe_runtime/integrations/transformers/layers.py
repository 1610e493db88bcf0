"""The layers made of experts' parameters, kept beside them, and the op that runs one."""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import msgspec
import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from ...config import MoEConfig
from ...errors import PlanRefused
from ...executors import get_executor
from ...executors.base import MoEProblem, version
from ...layer import FusedMoE
from ...parallel import Parallel
from ...tuning.plan import Plan, routing_name
from .reading import Parameters, Recipe, expert_weights, parse_recipe

_logger = logging.getLogger(__name__)

_State = tuple[object, ...]


class _Made(NamedTuple):
    """state: of the parameters that the layer was made of, and what else it was made by.

    copied: names of the weights that the layer does not read where the module has them.
    """

    state: _State
    layer: FusedMoE
    copied: tuple[str, ...]


# By the first parameter, so that a layer goes when the module or its parameters go, nothing of it is in a state_dict,
# and copying or pickling the module takes no notice of it.
_made = WeakTensorKeyDictionary()


def layer_of(recipe: Recipe, parameters: Parameters, top_k: int) -> FusedMoE:
    """The layer of these parameters: made by the first call, and again after they are replaced or written in place.

    A write through `.data` leaves no trace that could be seen.
    """
    found: _Made | None = _made.get(parameters.first)
    if found is None or found.state != _state(recipe, parameters, top_k):
        found = _make(recipe, parameters, top_k)
    return found.layer


def release(recipe: Recipe, parameters: Parameters, top_k: int) -> bool:
    """Frees the memory of weights that the layer holds copies of. False where it reads all of them in place."""
    made = _make(recipe, parameters, top_k)
    for name in made.copied:
        weights: Tensor = getattr(parameters, name)
        weights.data = weights.data.new_empty(0)
    _made[parameters.first] = made._replace(state=_state(recipe, parameters, top_k))
    return bool(made.copied)


def _make(recipe: Recipe, parameters: Parameters, top_k: int) -> _Made:
    weights = expert_weights(recipe, parameters)
    config, parallel = recipe.config(parameters, top_k)
    layer = FusedMoE(config, parallel, weights, find_plan(config, parallel, weights.device, recipe.plan_dir))
    operands = get_executor(weights.device).prepare(weights)
    pairs = {"first": (parameters.first, operands.gate_up), "down": (parameters.down, operands.down)}
    copied = tuple(
        name
        for name, (own, read) in pairs.items()
        if own.untyped_storage().data_ptr() != read.untyped_storage().data_ptr()
    )
    _made[parameters.first] = made = _Made(_state(recipe, parameters, top_k), layer, copied)
    return made


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _state(recipe: Recipe, parameters: Parameters, top_k: int) -> _State:
    tensors = (None if tensor is None else (tensor.data_ptr(), version(tensor)) for tensor in parameters)
    return (recipe, top_k, parameters.first.device, *tensors)


@functools.lru_cache(maxsize=64)
def find_plan(config: MoEConfig, parallel: Parallel, device: torch.device, folder: str) -> Plan | None:
    """The plan in the folder that was tuned for such a layer here, up to the most tokens; None where there is none.

    Ids come ready, so that the routing that it was tuned with need not be the layer's. On one rank dep, ep and tp are
    the same.
    """
    executor, problem = get_executor(device), MoEProblem(config, parallel)
    fitting: list[Plan] = []
    for path in sorted(Path(folder).glob("*.json")):
        try:
            plan = Plan.load(path)
        except PlanRefused as error:
            _logger.info("%s", error)
            continue
        key = msgspec.structs.replace(plan.key, routing=routing_name(config))
        if key.parallel.world_size == 1:
            key = msgspec.structs.replace(key, regime=parallel.regime)
        plan = msgspec.structs.replace(plan, key=key)
        if plan.fits(problem, executor.device_name, executor.library_hash) is None:
            fitting.append(plan)
    return max(fitting, key=lambda plan: (plan.complete, plan.key.tune_max_num_tokens, plan.created), default=None)


# Parameters are the op's inputs, so that a compiled graph sees it when they are replaced or written, and packing them
# is none of its nodes.
_library = torch.library.Library("moe_runtime", "FRAGMENT")
_library.define(
    "transformers_experts(Tensor hidden_states, Tensor topk_ids, Tensor topk_weights, Tensor?[] parameters, "
    "str recipe) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides),
)


def _experts(
    hidden_states: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    parameters: Sequence[Tensor | None],
    recipe: str,
) -> Tensor:
    layer = layer_of(parse_recipe(recipe), Parameters(*parameters), topk_ids.shape[1])  # type: ignore[arg-type]
    return layer(hidden_states, topk_ids=topk_ids, topk_weights=topk_weights)


def _experts_fake(hidden_states: Tensor, *rest: object) -> Tensor:
    return torch.empty_like(hidden_states)


for _device in ("CPU", "CUDA"):
    _library.impl("transformers_experts", _experts, _device)
torch.library.register_fake("moe_runtime::transformers_experts", _experts_fake, lib=_library)


def run(recipe: str, parameters: Parameters, hidden_states: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> Tensor:
    """hidden_states [T, H] bf16, topk_ids [T, k] int32 of local experts, topk_weights [T, k] f32 -> [T, H] bf16.

    recipe: the text of one.
    """
    if torch.compiler.is_compiling():
        result: Tensor = torch.ops.moe_runtime.transformers_experts(
            hidden_states, topk_ids, topk_weights, list(parameters), recipe
        )
        return result
    return _experts(hidden_states, topk_ids, topk_weights, parameters, recipe)
