"""Where experts lie: tables for dispatch, what ranks load, the file, and layers of slots that add up to the model's."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from moe_runtime import FP8BlockWeights, FusedMoE, InvalidArgument, MoEConfig, Parallel, load_experts
from moe_runtime.balancing import place, place_layer
from moe_runtime.config import RoutingMethod
from moe_runtime.placement import Placement, Placements, physical_config
from moe_runtime.routing import route
from tests import reference
from tests.test_checkpoints import CHECKPOINTS, LAYER, PREFIX, write
from tests.test_format_layers import make_config

HAND = Placement(2, (0, 1, 2, 0, 1, 3), (8, 4, 2, 2))
"""Experts 0 and 1 on both ranks."""


@st.composite
def tables(draw: st.DrawFn) -> Placement:
    """Any placement, as odd as it may be."""
    experts, ranks = draw(st.integers(1, 12)), draw(st.integers(1, 4))
    count = -(-experts // ranks) * ranks + ranks * draw(st.integers(0, 3))
    more = st.lists(st.integers(0, experts - 1), min_size=count - experts, max_size=count - experts)
    slots = draw(st.permutations([*range(experts), *draw(more)]))
    return Placement(ranks, tuple(slots), (1.0,) * experts)


@given(tables(), st.integers(0, 40), st.integers(0, 100), st.sampled_from([torch.int32, torch.int64]))
def test_ids_become_replicas_of_their_expert(layer: Placement, tokens: int, start: int, dtype: torch.dtype) -> None:
    k = min(3, layer.num_experts)
    scores = torch.rand(tokens, layer.num_experts, generator=torch.Generator().manual_seed(start))
    ids = scores.topk(k, 1).indices.to(dtype)
    physical = layer.to_physical(ids, start)
    assert physical.dtype == torch.int32 and physical.shape == ids.shape and physical.is_contiguous()
    assert [[layer.physical_to_logical[slot] for slot in row] for row in physical.tolist()] == ids.tolist()
    assert torch.equal(layer.to_physical(ids, start), physical)
    if tokens:
        assert torch.equal(layer.to_physical(ids[-1:], start + tokens - 1), physical[-1:])


@given(tables(), st.integers(1, 50), st.integers(0, 100))
def test_replicas_share_tokens_that_choose_alike(layer: Placement, tokens: int, start: int) -> None:
    ids = torch.arange(layer.num_experts).expand(tokens, -1)
    counts = layer.to_physical(ids, start).flatten().bincount(minlength=layer.num_physical_experts).tolist()
    for slots in layer.logical_to_physical:
        shares = [counts[slot] for slot in slots]
        assert sum(shares) == tokens and max(shares) - min(shares) <= 1


def test_replicas_share_tokens_of_chance() -> None:
    layer = place_layer([100.0] + [1.0] * 15, 4, 4)
    ids = torch.rand(4000, 16, generator=torch.Generator().manual_seed(0)).topk(2, 1).indices
    counts = layer.to_physical(ids).flatten().bincount(minlength=20)
    shares = counts[list(layer.logical_to_physical[0])].float()
    assert len(shares) == 4 and (shares / shares.mean() - 1).abs().max() < 0.15


def test_by_hand() -> None:
    ids = torch.tensor([[0, 1], [0, 2], [3, 0]], dtype=torch.int32)
    assert HAND.to_physical(ids).tolist() == [[0, 1], [3, 2], [5, 0]]
    assert HAND.to_physical(ids, start=1).tolist() == [[3, 4], [0, 2], [5, 3]]
    assert HAND.local_experts(0) == (0, 1, 2) and HAND.local_experts(1) == (0, 1, 3)
    assert HAND.replica_counts == (2, 2, 1, 1) and HAND.rank_loads == (8, 8)


def test_no_slot_stays_none() -> None:
    ids = torch.tensor([[-1, 1], [3, -1], [-7, -1]])
    assert HAND.to_physical(ids).tolist() == [[-1, 1], [5, -1], [-1, -1]]
    assert HAND.to_physical(torch.empty(0, 2, dtype=torch.int32)).shape == (0, 2)


@pytest.mark.parametrize(
    ("ids", "reason"),
    [
        (torch.tensor([[0, 4]]), "got 4; accepted: ids below num_experts = 4"),
        (torch.tensor([0, 1]), r"got torch.int64 of shape \[2\]"),
        (torch.zeros(2, 2), "got torch.float32"),
    ],
)
def test_ids_that_are_none(ids: Tensor, reason: str) -> None:
    with pytest.raises(InvalidArgument, match=f"^topk_ids: {reason}"):
        HAND.to_physical(ids)


def test_under_compile_it_is_one_graph() -> None:
    ids = torch.tensor([[0, 1], [0, 2], [3, 0]], dtype=torch.int32)
    wanted = HAND.to_physical(ids)  # makes the tables
    assert torch.equal(torch.compile(lambda x: HAND.to_physical(x), backend="eager", fullgraph=True)(ids), wanted)


ROUTED = MoEConfig("routed", 256, 128, 8, 2)
GROUPED = MoEConfig("grouped", 256, 128, 8, 3, RoutingMethod.DeepSeekV3, 4, 2, 2.5)
SHARED = MoEConfig("shared", 256, 128, 10, 5, RoutingMethod.DeepSeekV3, 4, 2, 2.5, num_fused_shared_experts=2)
BY_INPUT = MoEConfig("by input", 256, 128, 8, 1, RoutingMethod.Llama4)


@pytest.mark.parametrize("text", ["ep2", "dep4", "ep3", "ep1"])
@pytest.mark.parametrize("config", [ROUTED, GROUPED, SHARED, BY_INPUT], ids=lambda config: config.name)
def test_slots_of_all_ranks_add_up_to_the_layer(config: MoEConfig, text: str) -> None:
    size, tokens = Parallel.parse(text).size, 24
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(tokens, 256, generator=generator).bfloat16()
    logits = torch.randn(tokens, config.num_routed_experts, generator=generator)
    whole = FP8BlockWeights.random(config, config.num_experts, seed=1)
    ids, weights = route(config, logits)
    redundant = -config.num_experts % size + (size > 1) * size
    recorded = {"layer": ids[:, : config.routed_top_k].flatten().bincount(minlength=config.num_routed_experts)}
    (layer,) = place(config, recorded, size, redundant).layers.values()
    assert size == 1 or max(layer.replica_counts) > 1
    physical, total = layer.to_physical(ids), torch.zeros(tokens, 256, dtype=torch.float64)
    parts = whole.gate_up, whole.gate_up_scale, whole.down, whole.down_scale
    for rank in range(size):
        mine = list(layer.local_experts(rank))
        rank_layer = FusedMoE(
            physical_config(config, layer),
            Parallel.parse(text, rank),
            FP8BlockWeights(*(part.view(torch.uint8)[mine].view(part.dtype) for part in parts)),
        )
        total += rank_layer(x, topk_ids=physical, topk_weights=weights).double()
    expected = FusedMoE(config, Parallel.parse("ep1"), whole)(x, logits)
    # Each slot's product is the same; partial sums are rounded to bf16 once a rank.
    assert reference.relative_error(total, expected.double()) < 5e-3


@pytest.mark.parametrize("compiled", [False, True])
def test_logits_of_experts_are_no_logits_of_slots(compiled: bool) -> None:
    """As many slots as experts, but in another order: nothing in the tensors' shapes tells."""
    layer = place(ROUTED, {"a": torch.arange(8).flip(0)}, 1, 0).layers["a"]
    assert layer.num_physical_experts == ROUTED.num_experts
    physical = physical_config(ROUTED, layer)
    called = FusedMoE(physical, Parallel.parse("ep1"), FP8BlockWeights.random(physical, 8, seed=1))
    x, logits = torch.ones(2, 256, dtype=torch.bfloat16), torch.zeros(2, 8)
    run = torch.compile(called, backend="eager", fullgraph=True) if compiled else called
    with pytest.raises(
        InvalidArgument, match=r"routing_logits: .* slots; accepted: topk_ids and topk_weights.*to_physical"
    ):
        run(x, logits)
    ids, weights = route(ROUTED, logits)
    assert run(x, topk_ids=layer.to_physical(ids), topk_weights=weights).shape == (2, 256)


def test_the_physical_layer_is_an_ordinary_one() -> None:
    placements = place(SHARED, {"a": torch.ones(8)}, 2, 4)
    physical = physical_config(SHARED, placements)
    assert physical == physical_config(SHARED, placements.layers["a"])
    assert (physical.num_experts, physical.top_k, physical.num_fused_shared_experts) == (14, 5, 0)
    assert (physical.n_group, physical.topk_group, physical.routed_scaling_factor) == (1, 1, 1)
    assert dataclasses.replace(placements.logical_config(physical), routed_scaling_factor=2.5) == SHARED
    with pytest.raises(InvalidArgument, match="placement: got one of 10 experts; accepted: num_experts = 8"):
        physical_config(ROUTED, placements)
    with pytest.raises(InvalidArgument, match="config: got num_experts = 10; accepted: 14"):
        placements.logical_config(SHARED)
    with pytest.raises(InvalidArgument, match="placement: got one over 2 ranks; accepted: one over those of dep7"):
        placements.check_problem(physical, Parallel.parse("dep7"))


@pytest.mark.parametrize(
    ("slots", "load", "ranks", "named"),
    [
        ((0, 1, 2), (1, 1, 1), 2, "physical_to_logical: got 3 slots; accepted: a multiple of 2 ranks"),
        ((0, 1, 1, 0), (1, 1, 1), 2, r"physical_to_logical: got \[2\] missing or unknown"),
        ((0, 1, 2, 3), (1, 1, 1), 2, r"physical_to_logical: got \[3\] missing or unknown"),
        ((0, 1), (1, 1), 0, "ep_size: got 0"),
        ((0, 1), (1, float("inf")), 1, "load: "),
    ],
)
def test_a_placement_that_is_none(slots: Any, load: Any, ranks: int, named: str) -> None:
    with pytest.raises(InvalidArgument, match=f"^{named}"):
        Placement(ranks, slots, load)


def test_saved_and_loaded(tmp_path: Path) -> None:
    path = tmp_path / "new" / "placement.json"
    histograms = {f"model.layers.{at}.mlp.gate": torch.rand(8).double() for at in (3, 4, 10)}
    placements = place(GROUPED, histograms, 2, 4)
    placements.save(path)
    found = Placements.load(path)
    assert found == placements and list(found.layers) == list(histograms) and found.digest() == placements.digest()
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    assert found.layer(0) == found.layer(3) == found.layers["model.layers.3.mlp.gate"] != found.layer(2)
    backwards = dict(reversed(placements.layers.items()))
    assert msgspec.structs.replace(placements, layers=backwards).digest() != placements.digest()
    whole_numbers = place(GROUPED, {"a": torch.ones(8, dtype=torch.int64)}, 2, 4)
    whole_numbers.save(path)
    assert Placements.load(path).digest() == whole_numbers.digest()
    with pytest.raises(InvalidArgument, match=r"output: got .*a folder that can be written"):
        placements.save(path / "below a file.json")


def altered(change: Any) -> bytes:
    content = json.loads(msgspec.json.encode(place(ROUTED, {"a": torch.ones(8)}, 2, 2)))
    change(content)
    return json.dumps(content).encode()


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b'{"schema_version": 1, "layers', "damaged, not JSON"),
        (b"{}", "damaged, or no placement: .*`schema_version`"),
        (b'{"schema_version": 3, "key": {}}', "schema version 3, this moe_runtime reads 1"),
        (altered(lambda file: file.pop("n_group")), "no placement: .*`n_group`"),
        (altered(lambda file: file.update(more=1)), "no placement: .*`more`"),
        (altered(lambda file: file.update(layers={})), "no placement: layers: got 0 layers"),
        (altered(lambda file: file["layers"]["a"].update(ep_size=3)), "got 10 slots.*a multiple of 3"),
        (altered(lambda file: file["layers"]["a"]["physical_to_logical"].__setitem__(0, 99)), r"\[99\] missing or"),
        (altered(lambda file: file["layers"]["a"]["load"].__setitem__(0, "much")), "Expected `float`, got `str`"),
        (
            altered(lambda file: file["layers"].update(b={"ep_size": 1, "physical_to_logical": [0], "load": [1]})),
            "kind",
        ),
    ],
)
def test_a_file_that_is_no_placement(tmp_path: Path, content: bytes, reason: str) -> None:
    path = tmp_path / "placement.json"
    path.write_bytes(content)
    with pytest.raises(InvalidArgument, match=rf"^placement: got {path} \(.*{reason}.*; accepted: a file that"):
        Placements.load(path)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match="cannot be read: No such file"):
        Placements.load(tmp_path / "gone.json")


@pytest.mark.parametrize("naming", CHECKPOINTS)
def test_a_rank_loads_the_experts_of_its_slots(tmp_path: Path, naming: str) -> None:
    """In their order, one of them twice, and no other is read."""
    format, make = CHECKPOINTS[naming]
    config, tensors, slots = make_config(format), make(make_config(format)), (6, 1, 1, 4)
    (tmp_path / "all").mkdir()
    whole = load_experts(write(tmp_path / "all", tensors), LAYER, config, Parallel("ep", 1)).operands
    if naming != "gpt-oss":  # which has all experts in one tensor
        tensors = {name: t for name, t in tensors.items() if int(name.removeprefix(PREFIX).split(".")[0]) in slots}
    found = load_experts(write(tmp_path, tensors), LAYER, config, Parallel("ep", 2), experts=slots).operands
    for ours, all_of_them in ((found.gate_up, whole.gate_up), (found.down_scale, whole.down_scale)):
        if ours is not None and all_of_them is not None:
            assert torch.equal(ours.view(torch.uint8), all_of_them.view(torch.uint8)[list(slots)])


@pytest.mark.parametrize("experts", [(), (0, 8), (-1,)])
def test_experts_that_the_layer_does_not_have(tmp_path: Path, experts: tuple[int, ...]) -> None:
    with pytest.raises(InvalidArgument, match=r"^experts: got .*below 8"):
        load_experts(tmp_path, LAYER, make_config("bf16"), Parallel("ep", 1), experts=experts)
