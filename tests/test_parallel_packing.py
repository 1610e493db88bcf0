"""What a dispatcher does with a rank's own tokens: pure functions, and the same in the kernels of a layer."""

from __future__ import annotations

import ctypes
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from moe_runtime.config import MoEConfig, RoutingMethod
from moe_runtime.executors.base import MoEProblem
from moe_runtime.formats.fp8_block import quantise_rows
from moe_runtime.kernels import LayerArguments, MoeUnpack, Stage, WorkspaceLayout
from moe_runtime.parallel import Parallel
from moe_runtime.parallel.messages import MessageLayout
from moe_runtime.parallel.native import NativePacking
from moe_runtime.parallel.packing import TorchPacking
from moe_runtime.parallel.sends import add_up, reached_ranks, send_order
from moe_runtime.routing import route

from .test_cuda_arguments import NotingLibrary, executor_of

CPU = torch.device("cpu")


@st.composite
def routed(draw: st.DrawFn) -> tuple[Tensor, int, int]:
    """(topk_ids [n, k] with distinct experts and -1, experts of a rank, ranks)."""
    num_ranks, num_local = draw(st.integers(1, 6)), draw(st.integers(1, 4))
    experts = num_ranks * num_local
    top_k = draw(st.integers(1, min(experts, 5)))
    rows = draw(
        st.lists(
            st.permutations(range(experts)).flatmap(
                lambda ids: st.lists(st.booleans(), min_size=top_k, max_size=top_k).map(
                    lambda absent: [-1 if gone else expert for expert, gone in zip(ids[:top_k], absent, strict=True)]
                )
            ),
            max_size=12,
        )
    )
    return torch.tensor(rows, dtype=torch.int32).reshape(-1, top_k), num_local, num_ranks


@given(routed())
def test_every_pair_of_token_and_rank_with_a_slot_is_sent_once(case: tuple[Tensor, int, int]) -> None:
    ids, num_local, num_ranks = case
    order = send_order(reached_ranks(ids, num_local, num_ranks))
    pairs = [
        (rank, token)
        for rank in range(num_ranks)
        for token, row in enumerate(ids.tolist())
        if any(expert >= 0 and expert // num_local == rank for expert in row)
    ]
    counts = order.counts.tolist()
    assert counts == [sum(rank == to for to, _ in pairs) for rank in range(num_ranks)]
    destinations = [rank for rank, count in enumerate(counts) for _ in range(count)]
    assert list(zip(destinations, order.tokens[: sum(counts)].tolist(), strict=True)) == pairs
    assert order.rows.shape == (len(ids), num_ranks)
    for rank in range(num_ranks):
        for token in range(len(ids)):
            row = int(order.rows[token, rank])
            assert row == (pairs.index((rank, token)) if (rank, token) in pairs else -1)


@given(routed(), st.booleans(), st.integers(0, 1 << 30))
def test_what_is_sent_comes_unchanged_and_combine_inverts(
    case: tuple[Tensor, int, int], quantised: bool, seed: int
) -> None:
    """Rows that come back as they went add up to each token times the ranks that it went to."""
    ids, num_local, num_ranks = case
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(-8, 9, (len(ids), 128), generator=generator).bfloat16()
    experts, format = num_local * num_ranks, "fp8_block" if quantised else "bf16"
    config = MoEConfig("test", 128, 128, experts, ids.shape[1], format=format)
    packing = TorchPacking(MoEProblem(config, Parallel.parse(f"dep{num_ranks}")))
    reached = reached_ranks(ids, num_local, num_ranks)
    weights = torch.rand(ids.shape, generator=generator)
    packed = packing.pack(x, ids, weights, 5)
    assert packed.notices[0].tolist() == [[count, len(ids), 5] for count in reached.sum(0).tolist()]
    total = int(reached.sum())
    tokens = torch.tensor(
        [t for to in reached.T.tolist() for t, is_sent in enumerate(to) if is_sent], dtype=torch.int64
    )
    came = torch.cat([packed.messages(total), packing.layout.empty(2, CPU)])
    values, scale, _, _, sent_ids, sent_weights = packing.unpack(came, total)
    assert sent_ids is not None and sent_ids[total:].eq(-1).all() and len(sent_ids) == total + 2
    values, scale, sent_ids = values[:total], None if scale is None else scale[:total], sent_ids[:total]
    sent_weights = None if sent_weights is None else sent_weights[:total]
    assert torch.equal(sent_ids, ids[tokens])
    assert sent_weights is not None and torch.equal(sent_weights, weights[tokens])
    if quantised:
        expected, expected_scale = quantise_rows(x[tokens])
        assert torch.equal(values.view(torch.uint8), expected.view(torch.uint8))
        assert scale is not None and torch.equal(scale, expected_scale)
    else:
        assert torch.equal(values, x[tokens]) and scale is None
    packed.returned(total).copy_(x[tokens])
    assert torch.equal(packed.add_up(), x * reached.sum(1, keepdim=True).bfloat16())


def test_sums_are_taken_in_f32() -> None:
    """In bf16 each 1 would be lost beside 256."""
    returned = torch.tensor([[256.0], [1.0], [1.0], [0.0]]).bfloat16()
    assert add_up(returned, torch.tensor([[0, 1, 2]], dtype=torch.int32)).item() == 258


class EmulatedLibrary(NotingLibrary):
    """Does in torch what abi.h says of the stages that read no weights, on the addresses that it is given.

    config: of the layer, for the routing.
    """

    def __init__(self, config: MoEConfig) -> None:
        super().__init__()
        self._config = config
        self.stages: list[Stage] = []

    def workspace_layout(self, args: LayerArguments) -> WorkspaceLayout:
        slots, hidden, layout, used = args.num_tokens * args.top_k, args.hidden_size, WorkspaceLayout(), 0
        sizes = {
            "topk_ids": 4 * slots,
            "topk_weights": 4 * slots,
            "expert_offsets": 4 * (args.num_local_experts + 1),
            "permuted_row": 4 * slots,
            "row_origins": 8 * slots,
            "gemm2_output": 2 * slots * hidden,
        }
        for region, size in sizes.items():
            setattr(layout, region, used)
            used += (size + 255) // 256 * 256
        layout.total_bytes = used
        return layout

    def layer(self, args: LayerArguments) -> int:
        stages = Stage(args.stages)
        self.stages.append(stages)
        if Stage.ROUTE in stages:
            self._route(args)
        if Stage.PERMUTE in stages:
            self._reach(args)
            self._permute_and_gather(args)
        if Stage.COMBINE in stages:
            self._combine(args)
        return 0

    def unpack(self, args: MoeUnpack) -> int:
        shape, size = (args.num_rows, args.slots), 4 * args.slots
        messages = _at(args.messages, args.num_rows, args.pitch, dtype=torch.uint8)[:, args.offset :]
        ids = _at(args.ids, *shape, dtype=torch.int32).copy_(messages[:, :size].view(torch.int32))
        ids[args.num_came :] = -1
        weights = messages[:, size : 2 * size].view(torch.float32)
        _at(args.weights, *shape, dtype=torch.float32).copy_(weights)
        return 0

    def _reach(self, args: LayerArguments) -> None:
        sent, ranks = args.messages, args.top_k
        reached = torch.ones(args.num_tokens, ranks, dtype=torch.bool)
        if sent.experts_per_rank:
            ids = _at(sent.ids, args.num_tokens, sent.slots, dtype=torch.int32)
            reached = reached_ranks(ids, sent.experts_per_rank, ranks)
        to = self._region(args, "topk_ids", *reached.shape, dtype=torch.int32)
        to.copy_(torch.where(reached, torch.arange(ranks), -1))
        self._region(args, "topk_weights", *reached.shape, dtype=torch.float32).fill_(1)
        if sent.notice:
            told = [[count, args.num_tokens, sent.later] for count in reached.sum(0).tolist()]
            _at(sent.notice, ranks, 3, dtype=torch.int64).copy_(torch.tensor(told))

    def _region(self, args: LayerArguments, region: str, *shape: int, dtype: torch.dtype) -> Tensor:
        return _at(args.workspace + getattr(self.workspace_layout(args), region), *shape, dtype=dtype)

    def _route(self, args: LayerArguments) -> None:
        slots = args.num_tokens, args.top_k
        logits = _at(args.routing_logits, args.num_tokens, self._config.num_routed_experts, dtype=torch.float32)
        bias = None
        if args.routing_bias:
            bias = _at(args.routing_bias, self._config.num_routed_experts, dtype=torch.float32)
        ids, weights = route(self._config, logits, bias)
        _at(args.topk_ids, *slots, dtype=torch.int32).copy_(ids)
        _at(args.topk_weights, *slots, dtype=torch.float32).copy_(weights)

    def _permute_and_gather(self, args: LayerArguments) -> None:
        slots, hidden = args.num_tokens * args.top_k, args.hidden_size
        to = self._region(args, "topk_ids", slots, dtype=torch.int32).tolist()
        order = [slot for expert in range(args.num_local_experts) for slot in range(slots) if to[slot] == expert]
        offsets = [sum(0 <= expert < end for expert in to) for end in range(args.num_local_experts + 1)]
        self._region(args, "expert_offsets", len(offsets), dtype=torch.int32).copy_(torch.tensor(offsets))
        permuted = self._region(args, "permuted_row", slots, dtype=torch.int32).fill_(-1)
        origins = self._region(args, "row_origins", slots, 2, dtype=torch.int32)
        x = _at(args.hidden_states, args.num_tokens, hidden, dtype=torch.bfloat16)
        sent = args.messages
        messages = _at(sent.rows, slots, sent.pitch, dtype=torch.uint8)
        ids = _at(sent.ids, args.num_tokens, sent.slots, dtype=torch.int32)
        weights = _at(sent.weights, args.num_tokens, sent.slots, dtype=torch.float32)
        for row, slot in enumerate(order):
            token = slot // args.top_k
            permuted[slot], origins[row, 0] = row, token
            parts = [*(quantise_rows(x[token]) if args.tokens == 0 else [x[token]]), ids[token], weights[token]]
            message = torch.cat([part.contiguous().view(torch.uint8) for part in parts])
            messages[row, : len(message)] = message

    def _combine(self, args: LayerArguments) -> None:
        slots, hidden = args.num_tokens * args.top_k, args.hidden_size
        weights = self._region(args, "topk_weights", slots, dtype=torch.float32)
        permuted = self._region(args, "permuted_row", slots, dtype=torch.int32).tolist()
        rows = self._region(args, "gemm2_output", slots, hidden, dtype=torch.bfloat16)
        output = torch.zeros(args.num_tokens, hidden)
        for slot, row in enumerate(permuted):
            if row >= 0:
                output[slot // args.top_k] += weights[slot] * rows[row].float()
        _at(args.output, args.num_tokens, hidden, dtype=torch.bfloat16).copy_(output)


def _at(address: int, *shape: int, dtype: torch.dtype) -> Tensor:
    size = dtype.itemsize
    for extent in shape:
        size *= extent
    return torch.frombuffer((ctypes.c_char * size).from_address(address), dtype=dtype).view(shape)


def native(config: MoEConfig, monkeypatch: pytest.MonkeyPatch) -> tuple[NativePacking, EmulatedLibrary]:
    library = EmulatedLibrary(config)
    problem = MoEProblem(config, Parallel.parse("dep4"))
    return NativePacking(problem, executor_of(library, monkeypatch), CPU), library


def tokens(count: int, *shape: int, seed: int = 0) -> Tensor:
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(seed))


def content(layout: MessageLayout, messages: Tensor) -> Tensor:
    """Without what fills a message up, which is arbitrary."""
    return messages[:, : layout.slots_offset + 8 * layout.top_k]


@pytest.mark.parametrize("format", ["fp8_block", "bf16", "nvfp4"])
@pytest.mark.parametrize("count", [0, 1, 9])
def test_native_packing_is_that_of_torch(format: str, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    config = MoEConfig("test", 256, 128, 12, 4, format=format)
    packing, library = native(config, monkeypatch)
    plain, x = TorchPacking(MoEProblem(config, Parallel.parse("dep4"))), tokens(count, 256).bfloat16()
    ids, weights = tokens(count, 12).argsort(1)[:, :4].to(torch.int32).contiguous(), tokens(count, 4, seed=2)
    mine, theirs = packing.pack(x, ids, weights, 7), plain.pack(x, ids, weights, 7)
    assert mine.notices[0].tolist() == theirs.notices[0].tolist()
    total, layout = int(reached_ranks(ids, 3, 4).sum()), packing.layout
    assert torch.equal(content(layout, mine.messages(total)), content(layout, theirs.messages(total)))
    results = tokens(total, 256, seed=1).bfloat16()
    for packed in (mine, theirs):
        packed.returned(total).copy_(results)
    assert torch.equal(mine.add_up(), theirs.add_up())
    assert library.stages == ([Stage.PERMUTE | Stage.GATHER, Stage.COMBINE] if count else [])

    for capacity in (count, count + 3):
        encoded = packing.encode(x, ids, weights, capacity)
        assert torch.equal(content(layout, encoded), content(layout, plain.encode(x, ids, weights, capacity)))
        assert (layout.slots(encoded[count:])[0] == -1).all()
        came, expected = packing.unpack(encoded, count), plain.unpack(encoded, count)
        assert came.topk_ids is not None and expected.topk_ids is not None
        assert torch.equal(came.topk_ids, expected.topk_ids) and came.topk_ids[count:].eq(-1).all()
        assert came.topk_weights is not None and torch.equal(came.topk_weights[:count], weights)


@pytest.mark.parametrize("method", [RoutingMethod.Renormalize, RoutingMethod.DeepSeekV3])
@pytest.mark.parametrize("count", [0, 5])
def test_native_routing_is_that_of_torch(method: RoutingMethod, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    groups: dict[str, Any] = {"n_group": 4, "topk_group": 2, "routed_scaling_factor": 2.5}
    config = MoEConfig("test", 256, 128, 16, 4, method, **(groups if method.reads_bias else {}))
    packing, library = native(config, monkeypatch)
    logits, bias = tokens(count, 16), tokens(16) if method.reads_bias else None
    ids, weights = packing.route(logits, bias)
    expected_ids, expected_weights = route(config, logits, bias)
    assert torch.equal(ids, expected_ids) and torch.equal(weights, expected_weights)
    assert ids.dtype == torch.int32 and library.stages == [Stage.ROUTE] * bool(count)
