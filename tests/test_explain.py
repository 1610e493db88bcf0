"""Why a plan runs what it runs."""

import re
from pathlib import Path
from typing import Any

import pytest

from moe_runtime.errors import PlanRefused
from moe_runtime.roofs import ROOFS
from moe_runtime.tuning import GemmChoice
from moe_runtime.tuning.explain import RowsPerExpert, explain

from .plans import DEFAULT, OTHER, choice, entry, make_plan, rekeyed, timing


@pytest.mark.parametrize(
    "changes", [{"routing": "Softer"}, {"routing": "DeepSeekV3:x"}, {"top_k": 0}, {"format": "int3"}]
)
def test_a_tampered_key_names_no_layer(changes: dict[str, Any]) -> None:
    plan = rekeyed(make_plan(entry(1)), **changes)
    with pytest.raises(PlanRefused, match="its key names no layer"):
        explain(plan, 1)


def test_explain_tells_bucket_workload_and_candidates() -> None:
    """dep2 with n = 32 rows of 8 slots over 64 local experts: 4 rows each, by the balanced formula."""
    chosen = GemmChoice(
        OTHER, DEFAULT, {DEFAULT: timing(100), "slower": timing(70), OTHER: timing(50), "lucky": timing(49)},
        {"bad": "wrong result"}, {OTHER: 40.0, "wide": 300.0, "wider": 200.0},
    )  # fmt: skip
    plan = make_plan(entry(8), entry(32, chosen), entry(64), quarantined={"hot": "illegal access"})
    found = explain(plan, 40)
    assert (found.bucket, found.rows) == (32, 256) and "between two buckets, 32 and 64" in found.rounding
    assert found.rows_per_expert == RowsPerExpert(experts=64, smallest=4, mean=4.0, largest=4)
    gemm1, gemm2 = found.gemms
    assert [one.tactic for one in gemm1.candidates] == [
        "lucky",
        OTHER,
        "slower",
        DEFAULT,
        "wider",
        "wide",
        "bad",
        "hot",
    ]
    assert [one.note for one in gemm1.candidates[:4]] == ["not surely faster", "chosen", "", "default"]
    assert gemm1.candidates[1].predicted == 40 and "cost model" in gemm1.candidates[4].note
    assert [one.note for one in gemm1.candidates[6:]] == ["wrong result", "quarantined: illegal access"]
    assert "50.0% less time than the default" in gemm1.decision and gemm2.tactic == DEFAULT


def test_explain_draws_the_roofs() -> None:
    """Two ranks of Qwen3-30B at 32 tokens: 64 experts of 4 rows each, on a device whose roofs were measured."""
    plan = rekeyed(make_plan(entry(32)), device="NVIDIA H200")
    gemm1, gemm2 = (gemm.roof for gemm in explain(plan, 32).gemms)
    roofs = ROOFS["NVIDIA H200"]
    assert gemm1 is not None and gemm2 is not None
    flops = 2 * 256 * (2 * 768) * 2048
    assert gemm1.flops_us == pytest.approx(flops / roofs.block_scaled_tflops / 1e6)
    assert gemm2.flops_us == gemm1.flops_us / 2
    weights = 64 * (2 * 768) * 2048
    assert weights < gemm1.memory_us * roofs.read_tbps * 1e6 < 1.02 * weights
    assert explain(make_plan(entry(32)), 32).gemms[0].roof is None


@pytest.mark.parametrize(
    "tokens,bucket,rounding", [(4, 8, "fewer than"), (8, 8, "of its own"), (9, 8, "8 and 32"), (99, 32, "more than")]
)
def test_explain_states_the_rounding(tokens: int, bucket: int, rounding: str) -> None:
    found = explain(make_plan(entry(8), entry(32)), tokens)
    assert found.bucket == bucket and rounding in found.rounding


@pytest.mark.parametrize(
    "made,sentence",
    [
        (choice(DEFAULT, other=99.0), "the default stays: .* took 1.0% less time.*margin of 2.0% over the whole 95%"),
        (choice(DEFAULT, other=120.0), "the default is the fastest of 2"),
        (GemmChoice(DEFAULT, DEFAULT), r"nothing was timed \(no row reaches"),
        (GemmChoice(DEFAULT, DEFAULT, rejected={OTHER: "no memory: 9 GiB"}), r"nothing was timed \(no memory: 9 GiB"),
        (
            GemmChoice(DEFAULT, DEFAULT, choice().timings, {OTHER: "hangs"}),
            f"{OTHER} faulted after the race: the default runs",
        ),
        (GemmChoice(OTHER, DEFAULT, {OTHER: timing(9)}, {DEFAULT: "NaN"}), r"the default, .*, is out \(NaN\)"),
    ],
)
def test_explain_names_the_rule(made: GemmChoice, sentence: str) -> None:
    assert re.search(sentence, explain(make_plan(entry(8, made)), 8).gemms[0].decision)


def test_explain_without_the_recorded_file(tmp_path: Path) -> None:
    plan = rekeyed(make_plan(entry(1)), distribution=f"recorded:{tmp_path / 'gone.npy'}")
    found = explain(plan, 1)
    assert isinstance(found.rows_per_expert, str) and "unknown here" in found.rows_per_expert and found.gemms
