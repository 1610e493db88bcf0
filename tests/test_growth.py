"""Growth of a layer's time: what explains it, and what counts as a cliff."""

import json
from pathlib import Path

import pytest
import torch
from typer import BadParameter

from benchmarks import growth
from moe_runtime import MoEConfig, Parallel
from moe_runtime.executors.base import MoEProblem
from moe_runtime.kernels import KernelVariant
from moe_runtime.roofs import ROOFS
from moe_runtime.tuning.cost import cost
from moe_runtime.weights import FP8BlockWeights, random_weights
from moe_runtime.workload import Workload, make_workload

from .test_tuner import FakeExecutor, FakeLayerTrial

PLAIN = KernelVariant(0, "plain", (128, 128, 128), (1, 1), False, 0, 0, False)
FUSED = KernelVariant(1, "fused", (128, 128, 128), (1, 1), False, 0, 0, True)
SMALL = MoEProblem(MoEConfig("small", 256, 128, 16, 2), Parallel.parse("tp1"))


class H200Stand(FakeExecutor):
    """Layers take 20 us and one more for each eight tokens; more at some numbers of tokens."""

    device_name, sm_count = "NVIDIA H200", 132

    def __init__(self, extra: dict[int, float] | None = None) -> None:
        super().__init__({"plain": 10, "fused": 9})
        self.variants, self.extra = {"plain": PLAIN, "fused": FUSED}, extra or {}

    def layer_trial(
        self, problem: MoEProblem, weights: FP8BlockWeights, workload: Workload, seed: int
    ) -> FakeLayerTrial:
        assert len(weights.gate_up) == problem.num_local_experts
        us = 20 + workload.num_tokens / 8 + self.extra.get(workload.num_tokens, 0)
        pairs = [(one, other) for one in self.us for other in self.us]
        return FakeLayerTrial(self.us, dict.fromkeys(pairs, us) | {("plain", "plain"): us + 5})


def point(size: int, us: float, explained: float, default: float | None = None) -> growth.Point:
    return growth.Point(size, us, default or us, explained, ("plain", "plain"))


def test_sizes() -> None:
    assert growth.sizes(1, 16) == [1, 2, 3, 4, 6, 8, 12, 16]
    assert growth.sizes(8, 32) == [8, 12, 16, 24, 32]
    assert growth.sizes(1, 16384)[-2:] == [12288, 16384]


def test_growth_that_is_explained_is_no_cliff() -> None:
    points = [point(1, 100, 90), point(2, 190, 180), point(4, 230, 185), point(8, 120, 95)]
    assert growth.cliffs("s", points) == []
    assert len(growth.cliffs("s", points, factor=1.1)) == 2  # from 2 to 4, of either tactics


def test_cliffs_in_both_directions() -> None:
    points = [point(1, 100, 100), point(2, 160, 110), point(4, 170, 115, default=400), point(8, 120, 115, default=400)]
    found = growth.cliffs("s", points)
    assert [(cliff.which, cliff.sizes) for cliff in found] == [
        ("best", (1, 2)), ("default", (1, 2)), ("default", (2, 4)), ("best", (4, 8)),
    ]  # fmt: skip
    assert found[0].excess == pytest.approx(1.6 / 1.1) and found[3].excess == pytest.approx(120 / 170)


def test_what_explains_a_layer_by_hand() -> None:
    """Two experts a token, 16 experts: 64 tokens make 8 rows each, which one tile of 128 holds."""
    workload = make_workload(SMALL.config, SMALL.parallel, 64, "balanced")
    rows, roofs = workload.rows_per_expert.tolist(), ROOFS["NVIDIA H200"]
    assert rows == [8] * 16
    gemm1, gemm2 = (cost(PLAIN, rows, SMALL.gemm_shape(gemm), 132, roofs).us for gemm in growth.GEMMS)
    fused = cost(FUSED, rows, SMALL.gemm_shape("gemm1"), 132, roofs).us
    scaled, per_us = 1 + 4 / 128, roofs.read_tbps * 1e6
    gather = int(64 * 256 * 2 + 128 * 256 * scaled)
    activation = int(128 * 2 * 128 * 2 + 128 * 128 * scaled)
    expected = growth.LAYER_US + gather / per_us + min(gemm1 + activation / per_us, fused) + gemm2
    assert growth.explained_us(H200Stand(), SMALL, workload) == pytest.approx(expected)
    alone = H200Stand()
    alone.us = {"plain": 10}
    assert growth.explained_us(alone, SMALL, workload) > expected


def test_tile_quantisation_is_explained() -> None:
    """A 129th row of each expert takes a tile of its own, which doubles the time where tiles decide it."""
    shape = MoEProblem(MoEConfig("wide", 4096, 2048, 128, 8), Parallel.parse("tp1"))
    full, over = (
        growth.explained_us(H200Stand(), shape, make_workload(shape.config, shape.parallel, tokens, "balanced"))
        for tokens in (128 * 16, 129 * 16)
    )
    assert 1.6 < over / full < 2.1


def test_layers_share_the_weights_of_the_largest() -> None:
    weights = random_weights(SMALL)
    few = growth.first_experts(weights, 4)
    assert few.gate_up.data_ptr() == weights.gate_up.data_ptr() and few.gate_up.is_contiguous()
    few.check(SMALL.config, 4)
    assert torch.equal(few.down_scale, weights.down_scale[:4])


def test_series() -> None:
    found = growth.all_series(growth.KINDS)
    assert [series.kind for series in found] == ["tokens"] * 2 + ["experts"] * 2 + ["ranks"] * 4
    assert len({series.name for series in found}) == len(found)
    by_experts = next(series for series in found if series.kind == "experts")
    assert [step.shape.num_local_experts for step in by_experts.steps] == [step.size for step in by_experts.steps]
    by_ranks = next(series for series in found if series.kind == "ranks")
    assert [step.shape.num_local_experts for step in by_ranks.steps] == [256, 128, 64, 32, 16, 8, 4]
    assert {step.tokens for step in by_ranks.steps} == {64}
    assert {series.kind for series in growth.all_series(["experts"])} == {"experts"}


def test_cliffs_are_found_written_and_drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    steps = tuple(growth.Step(tokens, SMALL, tokens) for tokens in (1, 2, 4, 8))
    monkeypatch.setattr(growth, "all_series", lambda _: [growth.Series("tokens", "small", steps)])
    monkeypatch.setattr(growth, "cuda_executor", lambda: H200Stand(extra={4: 20}))
    monkeypatch.setattr(growth, "provenance", lambda _: {})
    monkeypatch.setattr(growth, "random_weights", lambda shape, device: random_weights(shape))
    path = tmp_path / "growth.json"
    growth.main(json=path, png=tmp_path, series="tokens")
    written = json.loads(path.read_text())
    assert [cliff["sizes"] for cliff in written["cliffs"] if cliff["which"] == "best"] == [[2, 4], [4, 8]]
    (series,) = written["series"]
    assert [one["size"] for one in series["points"]] == [1, 2, 4, 8]
    assert all(one["default_us"] == pytest.approx(one["best_us"] + 5) for one in series["points"])
    drawn = (tmp_path / "growth-tokens.png").read_bytes()
    assert len(drawn) > 10_000 and "Cliffs beyond" in capsys.readouterr().out

    growth.main(read=path, png=tmp_path / "again")
    assert (tmp_path / "again" / "growth-tokens.png").read_bytes() == drawn
    with pytest.raises(BadParameter, match="name a folder by --png"):
        growth.main(read=path)
