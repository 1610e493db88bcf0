"""The benchmark of models of transformers, on the CPU and on times that are known."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("transformers")

from benchmarks import transformers_model as benchmark

TINY = replace(benchmark.SMALL, decode=(2,), prefill=(16,), repeats=1)


def test_small_form_on_the_cpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(benchmark, "SMALL", TINY)
    path = tmp_path / "model.json"
    benchmark.main(json=path, layers=1, small=True)
    written = json.loads(path.read_text())
    assert written["environment"]["device"] == "cpu" and written["environment"]["transformers"]
    assert set(written["absent"]) >= {"bf16 deepgemm", "fp8 deepgemm"} and all(written["absent"].values())
    ran = {"bf16 moe_runtime", "bf16 grouped_mm", "bf16 batched_mm", "fp8 moe_runtime"}
    for what, tokens in (("decode", 2), ("prefill", 16)):
        times = written[what][str(tokens)]["eager"]
        assert set(times) == ran and written[what].keys() == {str(tokens)}
        for found in times.values():
            assert found["tokens_per_s"] == pytest.approx(tokens / found["us"] * 1e6, rel=1e-2)
        fastest = min(times[name]["us"] for name in ("bf16 grouped_mm", "bf16 batched_mm"))
        for name in ("bf16 moe_runtime", "fp8 moe_runtime"):
            assert times[name]["ratio"] == pytest.approx(fastest / times[name]["us"], abs=1e-3)
    printed = capsys.readouterr().out
    assert "decode, eager" in printed and "bf16 deepgemm does not run here" in printed


def test_an_arm_is_compared_with_the_fastest_of_its_own_format() -> None:
    times = {"bf16 grouped_mm": 10.0, "bf16 batched_mm": 8.0, "fp8 grouped_mm": 6.0}
    rates = benchmark._rates(times | {"bf16 moe_runtime": 4.0, "fp8 moe_runtime": 3.0}, tokens=4)
    assert rates["bf16 moe_runtime"] == {"us": 4.0, "tokens_per_s": 1e6, "to": "bf16 batched_mm", "ratio": 2.0}
    assert (rates["fp8 moe_runtime"]["to"], rates["fp8 moe_runtime"]["ratio"]) == ("fp8 grouped_mm", 2.0)
    assert "ratio" not in rates["bf16 grouped_mm"]
    del times["fp8 grouped_mm"]
    assert benchmark._rates(times | {"fp8 moe_runtime": 3.0}, 4)["fp8 moe_runtime"]["to"] == "bf16 batched_mm"


def test_a_decode_step_leaves_the_cache_as_it_was() -> None:
    benchmark.register()
    with benchmark.torch.no_grad():
        model = benchmark.make_model(TINY, 1, "cpu", fp8=False)
        step = benchmark.decode_step(model, TINY, 2)
        assert benchmark.torch.equal(step(), step())
