"""Other libraries beside ours: who runs is checked, who does not is named, and what they are handed is what they take.

No peer is installed where these run, so stand-ins do in plain torch what the libraries' interfaces promise.
"""

import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import typer
from rich.console import Console
from torch import Tensor

from benchmarks import peer_kernels, peers
from benchmarks.peer_kernels import GemmCase, GemmPeer
from moe_runtime import MoEConfig, Parallel
from moe_runtime.executors.base import MoEProblem
from moe_runtime.formats.fp8_block import dequantise_blocks, dequantise_rows, quantise_rows
from moe_runtime.weights import random_weights

SHAPE = MoEProblem(MoEConfig("small", 256, 128, 4, 2), Parallel.parse("tp1"))
EACH = 6


@pytest.fixture(scope="module")
def case() -> GemmCase:
    weights = random_weights(SHAPE)
    x = torch.randn(4 * EACH, 256, generator=torch.Generator().manual_seed(0))
    x = x * torch.linspace(1, 9, 256)  # so that a row's two blocks have unlike scales
    return GemmCase(SHAPE, EACH, *quantise_rows(x), weights.gate_up, weights.gate_up_scale)


def exact(rows: Tensor, scales: Tensor, weights: Tensor, weight_scales: Tensor) -> Tensor:
    """[experts, each, N] of rows [experts, each, K]."""
    return dequantise_rows(rows, scales) @ dequantise_blocks(weights, weight_scales).mT


class Right(GemmPeer):
    name = "right"

    def prepare(self, case: GemmCase) -> Callable[[], Tensor]:
        return lambda: exact(*case.padded(1), case.weights, case.weight_scales).bfloat16()


class Wrong(Right):
    """Takes the weights' scales for transposed ones."""

    name = "wrong"

    def prepare(self, case: GemmCase) -> Callable[[], Tensor]:
        return lambda: exact(*case.padded(1), case.weights, case.weight_scales.mT)


class Unfinished(Right):
    name = "unfinished"

    def prepare(self, case: GemmCase) -> Callable[[], Tensor]:
        return lambda: torch.full((4, EACH, 256), torch.nan)


class Raises(Right):
    name = "raises"

    def prepare(self, case: GemmCase) -> Callable[[], Tensor]:
        raise RuntimeError("needs another GPU\nand a long explanation")


class Missing(Right):
    name, module = "missing", "no_such_library"


def fake_time(calls: Mapping[str, Callable[[], object]], **_: object) -> dict[str, float]:
    return {name: 10.0 * (index + 1) for index, name in enumerate(calls)}


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "time_graphs", fake_time)
    monkeypatch.setattr(peers, "capture", lambda call, launches: call())
    monkeypatch.setattr(peers, "REST_SECONDS", 0)


@pytest.mark.usefixtures("timed")
def test_a_race_times_who_is_right_and_names_the_others(case: GemmCase) -> None:
    raced = peers.race({"ours": lambda: None}, [Raises(), Wrong(), Right(), Unfinished()], case)
    assert raced.us == {"ours": 10.0, "right": 20.0}
    assert 0 < raced.errors["right"] < 0.005
    assert raced.failures["raises"] == "RuntimeError: needs another GPU"
    assert raced.failures["wrong"].startswith("implausible result: relative error 0.")
    assert raced.failures["unfinished"].startswith("implausible result: relative error nan")


def test_who_can_run_here() -> None:
    able, reasons = peers.split([Right(), Missing(), Wrong()], [])
    assert [peer.name for peer in able] == ["right", "wrong"]
    assert reasons == {"missing": "cannot use no_such_library: ModuleNotFoundError: No module named 'no_such_library'"}
    able, reasons = peers.split([Right(), Missing(), Wrong()], ["right", "missing"])
    assert [peer.name for peer in able] == ["right"]
    assert reasons["wrong"] == "left out by --only" and "No module" in reasons["missing"]


def test_a_library_that_breaks_on_import_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "broken_library.py").write_text("raise OSError('undefined symbol: _ZN2at')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(Missing, "module", "broken_library")
    assert Missing().available() == "cannot use broken_library: OSError: undefined symbol: _ZN2at"


def test_every_peer_has_a_name_of_its_own_and_says_why_it_is_not_here() -> None:
    everyone = [*peers.GEMM_PEERS, *peers.LAYER_PEERS]
    assert len({peer.name for peer in everyone}) == len(everyone)
    for peer in everyone:
        reason = peer.available()
        assert (reason is None) == (peer.module == "torch") or (reason and peer.module in reason), peer.name


def test_row_wise_scales_are_judged_by_themselves(case: GemmCase) -> None:
    peer = peer_kernels.TorchGrouped()
    columns = torch.stack([peer.exact_weight(case, expert) for expert in range(4)])
    rows = peer.exact_rows(case, torch.arange(4 * EACH)).view(4, EACH, -1)
    assert peer.error(case, rows @ columns.mT) < 1e-5
    assert peer.error(case, exact(*case.padded(1), case.weights, case.weight_scales)) > peer.tolerance


def test_the_dense_roof_multiplies_with_one_expert(case: GemmCase) -> None:
    peer = peer_kernels.CublasDense()
    dense = case.rows.float() @ case.weights[0].float().T
    assert peer.error(case, dense.view(4, EACH, -1)) < 1e-5


@pytest.mark.parametrize("alignment, height", [(1, 6), (4, 8), (128, 128)])
def test_padding(case: GemmCase, alignment: int, height: int) -> None:
    rows, scales = case.padded(alignment)
    assert rows.shape == (4, height, 256) and scales.shape == (4, height, 2)
    assert torch.equal(rows[2, :EACH].float(), case.rows[2 * EACH : 3 * EACH].float())
    assert torch.equal(scales[3, :EACH], case.row_scales[3 * EACH :])
    assert not rows[:, EACH:].float().any() and not scales[:, EACH:].any()


def library(monkeypatch: pytest.MonkeyPatch, name: str, **members: Any) -> None:
    """A module of that name, and its parents."""
    parts = name.split(".")
    for depth in range(1, len(parts) + 1):
        monkeypatch.setitem(sys.modules, ".".join(parts[:depth]), ModuleType(".".join(parts[:depth])))
    vars(sys.modules[name]).update(members)


def contiguous(left: tuple[Tensor, Tensor], right: tuple[Tensor, Tensor], output: Tensor, owner: Tensor) -> None:
    """Of 4 rows of a tile, all belong to one expert, or to none."""
    assert output.is_contiguous() and owner.dtype == torch.int32 and owner.shape == (len(left[0]),)
    for start in range(0, len(owner), 4):
        tile = slice(start, start + 4)
        (expert,) = set(owner[tile].tolist()) - {-1}
        output[tile] = exact(left[0][tile], left[1][tile], right[0][expert], right[1][expert]).bfloat16()


def masked(
    left: tuple[Tensor, Tensor], right: tuple[Tensor, Tensor], output: Tensor, filled: Tensor, expected: int
) -> None:
    assert filled.dtype == torch.int32 and expected == EACH and output.shape[1] % 128 == 0
    result = exact(*left, *right).bfloat16()
    for expert, count in enumerate(filled.tolist()):
        output[expert, :count] = result[expert, :count]


@pytest.mark.parametrize("peer", [peer_kernels.DeepGemmContiguous(), peer_kernels.DeepGemmMasked()])
def test_deepgemm_is_handed_what_it_takes(peer: GemmPeer, case: GemmCase, monkeypatch: pytest.MonkeyPatch) -> None:
    aligned: list[int] = []
    layout = SimpleNamespace(
        get_theoretical_mk_alignment_for_contiguous_layout=lambda expected: 4,
        set_mk_alignment_for_contiguous_layout=aligned.append,
        get_mn_major_tma_aligned_tensor=lambda scales: scales.mT.contiguous().mT,
    )
    library(
        monkeypatch,
        "deep_gemm",
        utils=SimpleNamespace(layout=layout),
        m_grouped_fp8_gemm_nt_contiguous=contiguous,
        m_grouped_fp8_gemm_nt_masked=masked,
    )
    assert peer.available() is None
    assert peer.error(case, peer.prepare(case)()) < 0.005
    assert aligned == ([4] if isinstance(peer, peer_kernels.DeepGemmContiguous) else [])


def test_vllm_is_handed_what_it_takes(case: GemmCase, monkeypatch: pytest.MonkeyPatch) -> None:
    def config(gate_up: object, down: object, top_k: int, dtype: str, tokens: int, block_shape: list[int]) -> object:
        assert (gate_up, down) == ((4, 256, 256), (4, 256, 128))
        assert (top_k, dtype, tokens, block_shape) == (2, "fp8_w8a8", 12, [128, 128])
        return {"BLOCK_SIZE_M": 4}

    def invoke(rows: Tensor, weights: Tensor, output: Tensor, scales: Tensor, weight_scales: Tensor, *rest: Any,
               **flags: Any) -> None:  # fmt: skip
        topk_weights, ids, expert_of_tile, padded, multiply, top_k, config = rest
        assert (topk_weights, multiply, top_k, config) == (None, False, 1, {"BLOCK_SIZE_M": 4})
        assert flags["use_fp8_w8a8"] and flags["block_shape"] == [128, 128] and int(padded) == len(ids) == 4 * 8
        for tile, expert in enumerate(expert_of_tile.tolist()):
            real = ids[4 * tile : 4 * tile + 4]
            real = real[real < len(rows)].long()
            taken = rows.view(torch.uint8)[real].view(torch.float8_e4m3fn)
            output[real, 0] = exact(taken, scales[real], weights[expert], weight_scales[expert]).bfloat16()

    name = "vllm.model_executor.layers.fused_moe.fused_moe"
    members = {"try_get_optimal_moe_config": config, "invoke_fused_moe_triton_kernel": invoke}
    library(monkeypatch, name, tl=SimpleNamespace(bfloat16="bf16"), **members)
    peer = peer_kernels.VllmTriton()
    assert peer.error(case, peer.prepare(case)()) < 0.005


def row(each: int, **us: float) -> peers.Row:
    raced = peers.Raced({"ours": 20.0, **us}, dict.fromkeys(us, 0.001), {"raises": "RuntimeError: no"})
    return peers.Row("case g1", each, "ours", 20.0, None, 1000.0, 2.0, raced)


def test_tables_name_every_peer() -> None:
    rows = [row(1, quick=10.0), row(2, quick=40.0, other=20.0)]
    assert rows[1].ratios == {"quick": 0.5, "other": 1.0}
    console = Console(width=200, record=True)
    console.print(peers.results_table(rows), peers.failures_table({"missing": "not installed"}, rows))
    text = console.export_text()
    assert "10.0 (2.00)" in text and "40.0 (0.50)" in text and "20.0 (1.00)" in text
    assert "not installed" in text and "case g1 1, case g1 2" in text and "RuntimeError: no" in text


def test_the_file_has_every_row_and_every_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "cuda_executor", lambda: None)
    monkeypatch.setattr(peers, "provenance", lambda _: {"gpu": "none"})
    monkeypatch.setattr(peers, "measured_roofs", lambda: {})
    monkeypatch.setattr(peers, "GEMM_PEERS", (Right(), Missing()))
    monkeypatch.setattr(peers, "rows_of", lambda executor, each, *_: [row(count, right=40.0) for count in each])
    path = tmp_path / "peers.json"
    peers.main(json=path, rows="1,64", only="")
    written = json.loads(path.read_text())
    assert [one["rows_per_expert"] for one in written["results"]] == [1, 64]
    assert written["results"][0]["ratios"] == {"right": 0.5}
    assert "no_such_library" in written["unavailable"]["missing"] and "flashinfer-layer" in written["unavailable"]
    with pytest.raises(typer.BadParameter, match="nobody"):
        peers.main(json=None, rows="1", only="nobody")
