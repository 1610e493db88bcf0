from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moe_runtime.config import MoEConfig
from moe_runtime.errors import InvalidArgument
from moe_runtime.executors import cpu_tactics, get_executor
from moe_runtime.executors.base import LayerInputs, MoEProblem
from moe_runtime.executors.cpu import CpuExecutor
from moe_runtime.executors.cpu_tactics import TACTICS
from moe_runtime.parallel import Parallel
from moe_runtime.weights import FP8BlockWeights
from moe_runtime.workload import Workload, make_workload
from tests import reference

CONFIG = MoEConfig("small", 256, 128, 8, 2)
PROBLEM = MoEProblem(CONFIG, Parallel("ep", 2, 1))
WEIGHTS = FP8BlockWeights.random(CONFIG, 4, seed=0)
RAGGED = [0, 1, 3, 17, 128, 200, 0, 33]


def operands(counts: list[int], n: int = 64, k: int = 32) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(len(counts))
    rows = torch.randn(sum(counts), k, generator=generator)
    return rows, torch.randn(len(counts), n, k, generator=generator)


def check_matmul(tactic: str, counts: list[int]) -> None:
    rows, weights = operands(counts)
    out = TACTICS[tactic](rows, counts, weights, torch.bfloat16)
    assert (out.dtype, out.shape) == (torch.bfloat16, (sum(counts), 64))
    expert_of_row = [expert for expert, count in enumerate(counts) for _ in range(count)]
    expected = [weights[expert].double() @ rows[row].double() for row, expert in enumerate(expert_of_row)]
    want = torch.stack(expected) if expected else torch.empty(0, 64, dtype=torch.float64)
    torch.testing.assert_close(out.double(), want, rtol=2**-8, atol=1e-4)


def test_there_are_four_tactics() -> None:
    executor = get_executor("cpu")
    assert executor.tactics(PROBLEM, "gemm1") == ("per_expert_loop", "padded_batch", "sorted_segments", "grouped_mm")
    assert executor.default_tactic(PROBLEM, "gemm1", 64) in TACTICS
    assert get_executor(torch.device("cpu")) is executor


def test_other_devices_have_no_executor() -> None:
    with pytest.raises(InvalidArgument, match="device: got meta"):
        get_executor("meta")


@pytest.mark.parametrize("tactic", TACTICS)
@pytest.mark.parametrize("counts", [RAGGED, [0] * 4, [5] * 4, [1], [0, 0, 9]], ids=str)
def test_matmul(tactic: str, counts: list[int]) -> None:
    check_matmul(tactic, counts)


@given(st.sampled_from(sorted(TACTICS)), st.lists(st.integers(0, 9), min_size=1, max_size=6))
def test_matmul_of_any_counts(tactic: str, counts: list[int]) -> None:
    check_matmul(tactic, counts)


@pytest.mark.parametrize("tactic", ["padded_batch", "sorted_segments"])
def test_matmul_in_little_memory(tactic: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_tactics, "_PADDED_BYTES", 20_000)
    check_matmul(tactic, RAGGED)


@given(st.lists(st.integers(0, 40), max_size=20), st.integers(1, 200))
def test_segments_cover_each_busy_expert_once_and_pad_little(counts: list[int], max_rows: int) -> None:
    covered = []
    for first, last in cpu_tactics._segments(counts, max_rows):
        segment = counts[first:last]
        padded = max(segment) * len(segment)
        assert min(segment) > 0
        assert padded <= 1.25 * sum(segment)
        assert padded <= max_rows or len(segment) == 1
        covered += range(first, last)
    assert covered == [expert for expert, count in enumerate(counts) if count]


def test_grouped_mm_gives_its_reason_where_torch_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch, "_grouped_mm", raising=False)
    executor = CpuExecutor()
    reason = executor.can_implement(PROBLEM, "gemm1", "grouped_mm")
    assert reason is not None and "_grouped_mm" in reason
    assert executor.can_implement(PROBLEM, "gemm1", "padded_batch") is None
    with pytest.raises(InvalidArgument, match="grouped_mm for gemm2"):
        run(executor, "grouped_mm")


def test_unknown_tactic_is_refused() -> None:
    reason = CpuExecutor().can_implement(PROBLEM, "gemm2", "sm90a_fp8_block")
    assert reason is not None and "no such tactic" in reason


def inputs(num_tokens: int = 20, seed: int = 0) -> LayerInputs:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(num_tokens, 256, generator=generator).bfloat16()
    return LayerInputs(x, routing_logits=torch.randn(num_tokens, 8, generator=generator))


def run(
    executor: CpuExecutor,
    gemm2: str = "per_expert_loop",
    weights: FP8BlockWeights = WEIGHTS,
    gemm1: str = "per_expert_loop",
) -> torch.Tensor:
    output = torch.full((20, 256), torch.nan, dtype=torch.bfloat16)
    assert executor.run(PROBLEM, weights, inputs(), (gemm1, gemm2), output, None) is None
    return output


@pytest.mark.parametrize("gemm2", TACTICS)
@pytest.mark.parametrize("gemm1", TACTICS)
def test_tactics_agree(gemm1: str, gemm2: str) -> None:
    plain = run(CpuExecutor())
    assert reference.relative_error(run(CpuExecutor(), gemm2, gemm1=gemm1), plain) < 5e-3


def test_without_finalize_the_parts_combine_to_the_output() -> None:
    executor = CpuExecutor()
    output = torch.full((20, 256), torch.nan, dtype=torch.bfloat16)
    tactics = ("per_expert_loop", "per_expert_loop")
    parts = executor.run(PROBLEM, WEIGHTS, inputs(), tactics, output, None, finalize=False)
    assert parts is not None and output.isnan().all()
    rows, weights, permuted_row = parts
    assert (rows.dtype, weights.dtype, permuted_row.dtype) == (torch.bfloat16, torch.float32, torch.int32)
    local = permuted_row[permuted_row >= 0]
    assert sorted(local.tolist()) == list(range(len(local)))
    assert len(rows) >= len(local)
    total = torch.zeros(20, 256, dtype=torch.float64)
    for token, slot in (permuted_row >= 0).nonzero().tolist():
        total[token] += weights[token, slot].double() * rows[permuted_row[token, slot]].double()
    torch.testing.assert_close(run(executor).double(), total, rtol=2**-8, atol=1e-6)


def test_dense_weights_follow_changes_and_are_not_kept() -> None:
    executor = CpuExecutor()
    weights = FP8BlockWeights.random(CONFIG, 4, seed=5)
    first = run(executor, weights=weights)
    cached = len(executor._dense)
    assert torch.equal(run(executor, weights=weights), first) and len(executor._dense) == cached
    weights.down_scale.mul_(2)
    torch.testing.assert_close(run(executor, weights=weights).float(), 2 * first.float(), rtol=2**-7, atol=1e-6)
    gone = weakref.ref(weights.down)
    del weights
    gc.collect()
    assert gone() is None and len(executor._dense) == 0


@pytest.mark.parametrize("gemm", ["gemm1", "gemm2"])
@pytest.mark.parametrize("num_tokens", [1, 300])
def test_trial(gemm: str, num_tokens: int) -> None:
    executor = CpuExecutor()
    workload = make_workload(CONFIG, PROBLEM.parallel, num_tokens, "random", 0)
    trial = executor.gemm_trial(PROBLEM, WEIGHTS, workload, gemm, seed=1)  # type: ignore[arg-type]
    index, expected = trial.reference()
    n, _ = PROBLEM.gemm_shape(gemm)  # type: ignore[arg-type]
    assert (expected.shape, expected.dtype) == ((len(index), n), torch.float32)
    assert len(index.unique()) == len(index) == min(workload.local_slots, 128)
    for tactic in TACTICS:
        out = trial.run(tactic)
        assert out.shape == (workload.local_slots, n)
        if len(index):
            assert reference.relative_error(out[index], expected) < 3e-3


def test_trial_without_rows() -> None:
    ids = torch.zeros(3, 2, dtype=torch.int32)
    workload = Workload(CONFIG, PROBLEM.parallel, 3, "remote", 0, ids)
    trial = CpuExecutor().gemm_trial(PROBLEM, WEIGHTS, workload, "gemm1", seed=0)
    index, expected = trial.reference()
    assert len(index) == 0 and expected.shape == (0, 256)
    assert all(trial.run(tactic).shape == (0, 256) for tactic in TACTICS)


def test_layer_trial_times_pairs_in_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    executor, workload = CpuExecutor(), make_workload(CONFIG, PROBLEM.parallel, 5, "random", 0, "alltoall")
    ran: list[tuple[tuple[str, str], LayerInputs, torch.Tensor]] = []
    run = executor.run

    def watched(problem: MoEProblem, weights: FP8BlockWeights, inputs: LayerInputs, *rest: Any) -> None:
        run(problem, weights, inputs, *rest)
        ran.append((rest[0], inputs, rest[1]))

    monkeypatch.setattr(executor, "run", watched)
    pairs = [("padded_batch", "grouped_mm"), ("per_expert_loop", "per_expert_loop")]
    times = executor.layer_trial(PROBLEM, WEIGHTS, workload, seed=0).time(pairs, 2)
    assert [pair for pair, *_ in ran] == pairs * 3
    assert {pair: len(us) for pair, us in times.items()} == {pair: 2 for pair in pairs}
    _, inputs, output = ran[0]
    assert inputs.topk_ids is not None and inputs.topk_ids.equal(workload.topk_ids)
    assert output.shape == (workload.num_rows, CONFIG.hidden_size) and output.isfinite().all() and output.any()


def test_time_takes_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    workload = make_workload(CONFIG, PROBLEM.parallel, 4, "balanced", 0)
    trial = CpuExecutor().gemm_trial(PROBLEM, WEIGHTS, workload, "gemm1", seed=0)
    order: list[str] = []
    original = trial.run
    monkeypatch.setattr(trial, "run", lambda tactic: (order.append(tactic), original(tactic))[1])
    times = trial.time(["padded_batch", "grouped_mm"], 3)
    assert {tactic: len(us) for tactic, us in times.items()} == {"padded_batch": 3, "grouped_mm": 3}
    assert all(us > 0 for series in times.values() for us in series)
    assert order == ["padded_batch", "grouped_mm"] * 4
