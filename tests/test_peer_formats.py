"""Layers of MXFP4 weights of other libraries beside ours: what they are handed is what they take, and what is written.

As in test_peers.py, stand-ins do in plain torch what the libraries' interfaces promise.
"""

import functools
import itertools
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import typer
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from torch import Tensor

from benchmarks import formats_peers, peer_formats, peers
from benchmarks.peer_formats import Marlin, PackedCase, PackedPeer, TritonKernels, TritonKernelsRouted
from moe_runtime import MoEConfig, Parallel
from moe_runtime.executors import get_executor
from moe_runtime.executors.base import MoEProblem
from moe_runtime.reference import reference_layer
from moe_runtime.workload import make_workload
from tests.test_peers import fake_time, library

E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])


def layer(hidden: int, inter: int, tokens: int) -> PackedCase:
    config = MoEConfig("small", hidden, inter, 4, 2, format="bf16_mxfp4")
    shape = MoEProblem(config, Parallel.parse("tp1"))
    weights = formats_peers.our_weights(shape, "cpu")["bf16_mxfp4"]
    return formats_peers.packed_case(shape, weights, make_workload(config, shape.parallel, tokens, "balanced"))


@pytest.fixture(scope="module", params=[(256, 128, 6), (96, 160, 1)], ids=["whole", "padded"])
def case(request: pytest.FixtureRequest) -> PackedCase:
    return layer(*request.param)


def dequantised(codes: Tensor, factors: Tensor) -> Tensor:
    """Codes [N, K] and factors [N, K/32] -> [N, K]."""
    return E2M1[codes.long()] * torch.exp2(factors.float() - 127).repeat_interleave(32, 1)


def unpacked(values: Tensor) -> Tensor:
    return torch.stack([values & 15, values >> 4], -1).flatten(-2)


# Marlin: fragments of mma.m16n8k16, whose B holds in thread 4 column + row the K 2 row + {0, 1}, and 8 beyond.


@functools.cache
def marlin_places(n: int, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of each code [n, k]: row and word, and the nibble in it."""
    places = []
    for row, column in itertools.product(range(n), range(k)):
        thread = 4 * (row % 8) + column % 8 // 2
        word = row // 64 * 128 + 4 * thread + row % 64 // 16
        nibble = 4 * (column % 2) + 2 * (row % 16 // 8) + column % 16 // 8
        places.append((column // 16, word, nibble))
    tiles, words, nibbles = torch.tensor(places).view(n, k, 3).unbind(-1)
    return tiles, words, nibbles


def marlin_codes(words: Tensor, n: int, k: int) -> Tensor:
    """int32 [k/16, 2n] -> codes [n, k]."""
    tiles, word, nibble = marlin_places(n, k)
    return words[tiles, word] >> 4 * nibble & 15


def marlin_factors(factors: Tensor) -> Tensor:
    """[K/32, N] -> [N, K/32]: of each 64, 8 columns' 8 factors each, the middle two of four exchanged."""
    order = [64 * (n // 64) + 8 * (n % 8) + [0, 2, 1, 3, 4, 6, 5, 7][n % 64 // 8] for n in range(factors.shape[1])]
    return factors.view(torch.uint8)[:, order].T


@settings(deadline=None, max_examples=20)
@given(experts=st.integers(1, 3), tiles=st.integers(1, 2), depth=st.integers(1, 4), seed=st.integers(0, 99))
def test_marlin_finds_every_code_and_factor(experts: int, tiles: int, depth: int, seed: int) -> None:
    n, k, generator = 64 * tiles, 32 * depth, torch.Generator().manual_seed(seed)
    codes = torch.randint(256, (experts, n, k // 2), dtype=torch.uint8, generator=generator)
    factors = torch.randint(255, (experts, n, k // 32), dtype=torch.uint8, generator=generator)
    words, scales = peer_formats.marlin_values(codes), peer_formats.marlin_factors(factors)
    assert words.shape == (experts, k // 16, 2 * n) and words.dtype == torch.int32
    assert scales.shape == (experts, k // 32, n) and scales.dtype == torch.float8_e8m0fnu
    for expert in range(experts):
        assert torch.equal(marlin_codes(words[expert], n, k), unpacked(codes[expert]).int())
        assert torch.equal(marlin_factors(scales[expert]), factors[expert])


@pytest.mark.parametrize("rows, tile", [(0.1, 8), (7.1, 8), (7.2, 16), (28.7, 32), (44, 64), (9999, 64)])
def test_marlin_takes_the_tile_that_experts_do_not_fill(rows: float, tile: int) -> None:
    assert peer_formats.marlin_tile(rows) == tile


def align(ids: Tensor, experts: int, tile: int, order: Tensor, expert_of_tile: Tensor, padded: Tensor, _: None) -> None:
    filled: list[int] = []
    for expert in range(experts):
        slots = (ids.flatten() == expert).nonzero().flatten().tolist()
        slots += [ids.numel()] * (-len(slots) % tile)
        expert_of_tile[len(filled) // tile : (len(filled) + len(slots)) // tile] = expert
        filled += slots
    order[: len(filled)] = torch.tensor(filled, dtype=torch.int32)
    padded.fill_(len(filled))


def marlin_gemm(x: Tensor, result: Tensor, values: Tensor, *rest: Any) -> None:
    bias, factors, token_scales, global_scale, zeros, locks, order, experts, padded, weights, *sizes, a, b, c = rest
    tile, each, multiply, kind, m, n, k, *choices = sizes
    assert bias is token_scales is global_scale is zeros is None and not locks.any() and locks.numel() >= 4 * 132
    assert (kind, choices, (a, b, c)) == (562949953487106, [False, True, False], (-1, -1, -1))
    assert x.shape == (m, k) and result.shape == (m * each, n) and n % 64 == 0 and k % 64 == 0
    for start in range(0, int(padded), tile):
        slots = order[start : start + tile].long()
        slots, expert = slots[slots < m * each], int(experts[start // tile])
        matrix = dequantised(marlin_codes(values[expert], n, k), marlin_factors(factors[expert]))
        rows = x[slots // each].float() @ matrix.T
        result[slots] = (rows * weights.flatten()[slots, None] if multiply else rows).bfloat16()


def test_marlin_is_handed_what_it_takes(case: PackedCase, monkeypatch: pytest.MonkeyPatch) -> None:
    ops = SimpleNamespace(
        moe_align_block_size=align,
        moe_wna16_marlin_gemm=marlin_gemm,
        moe_sum=lambda rows, output: output.copy_(rows.float().sum(1)),
    )
    monkeypatch.setattr(Marlin, "library", lambda _: ops)
    monkeypatch.setattr(torch, "compile", lambda function, dynamic: function)
    peer = Marlin()
    result = peer.prepare(case)()
    assert result.shape == case.inputs.hidden_states.shape
    assert peer.error(case, result) < 0.005


# triton_kernels


def route(logits: Tensor, k: int, expt_indx: Tensor) -> tuple[Any, Tensor, Tensor]:
    assert expt_indx.dtype == torch.int16 and logits.shape[0] == len(expt_indx)
    weights = torch.take_along_dim(logits.float(), expt_indx.long(), 1).softmax(1).flatten()
    experts, order = expt_indx.flatten().sort(stable=True)
    return SimpleNamespace(gate_scal=weights[order], experts=experts, k=k), order, order


def matmul(
    x: Tensor,
    values: Tensor,
    bias: None,
    routing: Any,
    *,
    precision_config: Any,
    gather_indx: Tensor | None = None,
    scatter_indx: Tensor | None = None,
    gammas: Tensor | None = None,
    fused_activation: Any = None,
) -> Tensor:
    factors = precision_config.weight_scale
    assert factors.shape[1] % 4 == 0 and values.shape[1] % 16 == 0
    rows = (x if gather_indx is None else x[gather_indx // routing.k]).float()
    groups = values.shape[1] // 16
    matrices = [dequantised(unpacked(v.T), f[:groups].T) for v, f in zip(values, factors, strict=True)]
    result = torch.stack([row @ matrices[expert].T for row, expert in zip(rows, routing.experts, strict=True)])
    if fused_activation is not None:
        (name, function, arguments), values_of, reduction = fused_activation
        assert (name, arguments, reduction) == ("swiglu", ("alpha", "limit"), 2)
        result = function(result, *values_of)
    if gammas is not None:
        result = result * gammas[:, None]
    if scatter_indx is None:
        return result.bfloat16()
    tokens = len(result) // routing.k
    return torch.zeros(tokens, result.shape[1]).index_add(0, scatter_indx // routing.k, result).bfloat16()


def swiglu(rows: Tensor, alpha: float, limit: float) -> Tensor:
    gate, up = rows[:, ::2].clamp(max=limit), rows[:, 1::2].clamp(-limit, limit)
    return gate * torch.sigmoid(alpha * gate) * (up + 1)


@pytest.mark.parametrize("peer", [TritonKernels(), TritonKernelsRouted(), peer_formats.TritonKernelsSplit()])
def test_triton_kernels_is_handed_what_it_takes(
    peer: TritonKernels, case: PackedCase, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits: list[dict[str, int | None]] = []
    swizzles: list[tuple[str, dict[str, int]]] = []

    def convert(tensor: Tensor, layout: str, **options: int) -> Tensor:
        swizzles.append((layout, options))
        return tensor

    names: dict[str, dict[str, Any]] = {
        "matmul_ogs": {
            "matmul_ogs": matmul,
            "FusedActivation": lambda *parts: parts,
            "FnSpecs": lambda *parts: parts,
            "PrecisionConfig": SimpleNamespace,
        },
        "routing": {"routing": route},
        "swiglu": {"swiglu_fn": swiglu},
        "tensor": {"FP4": "e2m1", "wrap_torch_tensor": lambda t, dtype=None: t, "convert_layout": convert},
        "tensor_details.layout": {
            "make_default_matmul_mxfp4_w_layout": lambda mx_axis: ("values", {"mx_axis": mx_axis}),
            "make_default_matmul_mxfp4_w_scale_layout": lambda mx_axis, num_warps: ("factors", {"mx_axis": mx_axis}),
        },
        "matmul_ogs_details.opt_flags": {"update_opt_flags_constraints": limits.append},
    }
    for name, members in names.items():
        library(monkeypatch, f"triton_kernels.{name}", **members)
    peer_formats.swizzled.cache_clear()
    assert peer.available() is None
    result = peer.prepare(case)()
    assert peer.error(case, result) < 0.005
    assert swizzles == [("values", {"mx_axis": 1}), ("factors", {"mx_axis": 1})] * 2
    assert limits == [{"split_k": peer.split_k}]


# The benchmark


class Right(PackedPeer):
    name = "right"

    def prepare(self, case: PackedCase) -> Callable[[], Tensor]:
        weights = case.inputs.topk_weights
        assert weights is not None
        rows = case.inputs.hidden_states
        return lambda: reference_layer(case.shape, case.weights, rows, case.ids, weights, quantise=False)


class Raises(Right):
    name = "raises"

    def prepare(self, case: PackedCase) -> Callable[[], Tensor]:
        raise RuntimeError("needs another GPU")


def test_every_peer_has_a_name_of_its_own_and_says_why_it_is_not_here() -> None:
    assert len({peer.name for peer in peer_formats.PEERS}) == len(peer_formats.PEERS)
    for peer in peer_formats.PEERS:
        reason = peer.available()
        assert reason is not None and peer.module in reason and "ModuleNotFoundError" in reason


def test_our_formats_share_codes_and_differ_in_tokens() -> None:
    shape = MoEProblem(MoEConfig("small", 64, 32, 4, 2, format="bf16_mxfp4"), Parallel.parse("tp1"))
    first, second = formats_peers.our_weights(shape, "cpu").values()
    assert (first.format, second.format) == formats_peers.FORMATS
    assert first.gate_up is second.gate_up and first.down_scale is second.down_scale
    assert first.alpha is not None and first.alpha.tolist() == pytest.approx([1.702] * 4)
    first.check(shape.config, 4)


def test_a_check_runs_each_peer_and_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "capture", lambda call, launches: call())
    monkeypatch.setattr(formats_peers, "CHECKED", ((64, 32), (96, 96)))
    monkeypatch.setattr(formats_peers, "CHECKED_TOKENS", (4,))
    found = list(formats_peers.check([Raises(), Right()], "cpu"))
    assert [(peer, layer) for peer, layer, *_ in found] == [
        (peer, f"{size}, 4 tokens") for size in ("64 x 32", "96 x 96") for peer in ("raises", "right")
    ]
    assert found[0][2] == "RuntimeError: needs another GPU" and found[1][2].startswith("error ")


def point(tokens: int, **us: float) -> formats_peers.Point:
    pairs = dict.fromkeys(formats_peers.FORMATS, ("one", "two"))
    ours: Mapping[str, float] = {"bf16_mxfp4": 20.0, "fp8_mxfp4": 10.0}
    named = {name.replace("_", "-"): time for name, time in us.items()}
    raced = peers.Raced({**ours, **named}, dict.fromkeys(named, 0.001), {"raises": "RuntimeError: no"})
    return formats_peers.Point("gpt-oss-120b:tp1", tokens, pairs, dict.fromkeys(pairs, 0.002), raced)


def test_a_point_is_judged_by_the_fastest_peer_that_does_all() -> None:
    one = point(8, marlin=40.0, triton_kernels=16.0, triton_kernels_routed=5.0)
    assert one.ratios["bf16_mxfp4"] == {"marlin": 0.5, "triton-kernels": 1.25, "triton-kernels-routed": 4.0}
    assert (one.worst("bf16_mxfp4"), one.worst("fp8_mxfp4")) == (1.25, 0.625)
    assert point(8).worst("bf16_mxfp4") is None


def test_tables_name_every_peer() -> None:
    done = [point(1, marlin=40.0), point(8, triton_kernels=16.0)]
    console = Console(width=200, record=True)
    console.print(formats_peers.results_table(done), peers.failures_table({"missing": "not installed"}, done))
    text = console.export_text()
    assert "40.0" in text and "0.50" in text and "0.25" in text and "1.25" in text
    assert "not installed" in text and "gpt-oss-120b:tp1 1, gpt-oss-120b:tp1 8" in text


def test_the_file_has_every_point_and_every_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(formats_peers, "cuda_executor", lambda: None)
    monkeypatch.setattr(formats_peers, "provenance", lambda _: {"gpu": "none"})
    monkeypatch.setattr(
        formats_peers, "points", lambda _, cases, tokens, peers: [point(n, marlin=40.0) for n in tokens]
    )
    path = tmp_path / "peers.json"
    formats_peers.main(json=path, cases="gpt-oss-120b:tp1", tokens="1,64", only="marlin", only_check=False)
    written = json.loads(path.read_text())
    assert [one["tokens"] for one in written["points"]] == [1, 64]
    first = written["points"][0]
    assert first["us"] == {"bf16_mxfp4": 20.0, "fp8_mxfp4": 10.0, "marlin": 40.0}
    assert first["ratios"] == {"bf16_mxfp4": {"marlin": 0.5}, "fp8_mxfp4": {"marlin": 0.25}}
    assert first["errors"] == {"bf16_mxfp4": 0.002, "fp8_mxfp4": 0.002, "marlin": 0.001}
    assert first["tactics"]["fp8_mxfp4"] == ["one", "two"] and first["failures"] == {"raises": "RuntimeError: no"}
    assert "vllm" in written["unavailable"]["marlin"]
    assert written["unavailable"]["triton-kernels"] == "left out by --only"
    with pytest.raises(typer.BadParameter, match="nobody"):
        formats_peers.main(json=None, cases="", tokens="1", only="nobody", only_check=False)


def test_a_measured_point_races_both_formats_on_the_same_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the CPU executor in place of the GPU's: everything but the times is real."""
    monkeypatch.setattr(peers, "time_graphs", fake_time)
    monkeypatch.setattr(peers, "capture", lambda call, launches: call())
    monkeypatch.setattr(peers, "REST_SECONDS", 0)

    def small(case: str, format: str) -> MoEProblem:
        return MoEProblem(MoEConfig(case, 64, 32, 4, 2, format=format), Parallel.parse("tp1"))

    monkeypatch.setattr(formats_peers, "problem_of", small)
    weights = formats_peers.our_weights(small("small", "bf16_mxfp4"), "cpu")
    executor = get_executor("cpu")
    found = formats_peers.measure(executor, weights, "small", 6, [Raises(), Right()])  # type: ignore[arg-type]
    assert list(found.raced.us) == ["bf16_mxfp4", "fp8_mxfp4", "right"] and set(found.raced.failures) == {"raises"}
    assert all(error < 0.01 for error in found.errors.values()) and found.raced.errors["right"] < 0.02
