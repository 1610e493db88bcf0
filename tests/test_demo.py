"""The demo end to end on a layer small enough for a test."""

from pathlib import Path

import pytest

from moe_runtime import demo, machine
from moe_runtime.tuning import Plan


def test_demo_tunes_both_regimes_and_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    generated = []
    monkeypatch.setattr(demo, "generate", lambda: bool(generated.append("emitted")))
    monkeypatch.setattr(demo, "MAX_TOKENS", {"cpu": 4})
    monkeypatch.setattr(machine, "CORE_WEIGHTS", 1 << 14)
    demo.demo(tmp_path)

    plans = [Plan.load(tmp_path / f"plan-{layout}.json") for layout in ("dep2", "ep2")]
    assert [plan.key.regime for plan in plans] == ["dep", "ep"] and all(plan.complete for plan in plans)
    out = capsys.readouterr().out
    scaled = plans[0].key
    assert generated == ["emitted"]
    assert "H 4096, I 1536, 128 experts" in out
    assert f"H {scaled.hidden_size}, I {scaled.intermediate_size}, {scaled.num_experts} experts" in out
    for plan in plans:
        assert all(entry.gemm1.tactic in out and entry.gemm2.tactic in out for entry in plan.entries)
    assert "chose differently in" in out
    assert "dep2, 64 tokens a rank: 128 rows" in out and "ep2, 64 tokens a rank: 64 rows" in out


def test_generate_writes_every_variant(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "_gpu_arch", lambda: None)
    assert demo.generate() is False
    files = machine.generator("files").generated_folder()
    for entry in machine.generator("catalogue").CATALOGUE:
        assert (files / entry.variant.arch / f"{entry.variant.source}.cu").is_file()
    assert "variants" in capsys.readouterr().out
