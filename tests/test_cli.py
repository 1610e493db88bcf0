"""The command line as a user meets it: what it prints, what it writes, and how it fails."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from moe_runtime import cli, machine
from moe_runtime.cli_options import parse_seconds
from moe_runtime.config import MoEConfig
from moe_runtime.errors import InvalidArgument
from moe_runtime.formats import FORMATS
from moe_runtime.tuning import Plan

SMALL = ["--model", "qwen3-30b", "--scale", "8", "--device", "cpu"]


class Result:
    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err


@pytest.fixture
def moe_runtime(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    def call(*arguments: str) -> Result:
        monkeypatch.setattr(sys, "argv", ["moe-runtime", *arguments])
        with pytest.raises(SystemExit) as exit_:
            cli.main()
        captured = capsys.readouterr()
        return Result(int(exit_.value.code or 0), captured.out, captured.err)

    return call


@pytest.fixture(scope="module")
def plan_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("plans") / "dep2.json"
    command = ["moe-runtime", "tune", *SMALL, "--parallel", "dep2", "--max-tokens", "4", "-o", str(path)]
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as exit_:
        patch.setattr(sys, "argv", command)
        cli.main()
    assert not exit_.value.code
    return path


def test_tune_writes_a_plan(plan_path: Path) -> None:
    plan = Plan.load(plan_path)
    assert plan.complete and [entry.bucket for entry in plan.entries] == [1, 2, 4]
    assert (plan.key.regime, plan.key.size, plan.key.hidden_size, plan.key.device) == ("dep", 2, 256, "cpu")


@pytest.mark.parametrize("format", FORMATS)
def test_tune_and_run_in_a_format(moe_runtime: Any, tmp_path: Path, format: str) -> None:
    path, layout = tmp_path / "plan.json", ["--parallel", "ep4", "--format", format]
    assert moe_runtime("tune", *SMALL, *layout, "--max-tokens", "1", "-o", str(path)).code == 0
    assert Plan.load(path).key.format == format
    result = moe_runtime("run", *SMALL, *layout, "--tokens", "2", "--plan", str(path), "--json")
    assert result.code == 0 and json.loads(result.out)["error"] <= 1e-2
    other = "bf16" if format != "bf16" else "nvfp4"
    result = moe_runtime("run", *SMALL, "--parallel", "ep4", "--format", other, "--tokens", "2", "--plan", str(path))
    assert result.code == 2 and f"format {format}" in result.err


def test_a_preset_has_its_format(moe_runtime: Any) -> None:
    scaled = ["--model", "gpt-oss-20b", "--scale", "16", "--device", "cpu", "--parallel", "ep4", "--tokens", "1"]
    assert "bf16_mxfp4" in moe_runtime("run", *scaled).out
    result = moe_runtime("run", "--model", "gpt-oss-20b", "--format", "fp8_block", *scaled[2:])
    assert result.code == 2 and "hidden_size: got 2880; accepted: a multiple of 128 for fp8_block" in result.err


def test_tune_prints_the_plan_as_json(moe_runtime: Any, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    arguments = ["--parallel", "ep2", "--max-tokens", "1", "--distribution", "random", "-o", str(path), "--json"]
    result = moe_runtime("tune", *SMALL, *arguments)
    assert result.code == 0
    assert json.loads(result.out) == json.loads(path.read_text())
    assert "H 256, I 128, 128 experts" in result.err and str(path) in result.err


def test_tune_without_output_uses_the_plan_folder(
    moe_runtime: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(machine.PLAN_FOLDER_VARIABLE, str(tmp_path / "plans"))
    result = moe_runtime("tune", *SMALL, "--parallel", "ep2", "--max-tokens", "1")
    (path,) = (tmp_path / "plans").glob("*.json")
    assert path.name == "qwen3-30b-scaled-ep2-balanced-1-cpu.json" and str(path) in result.err
    assert "per_expert_loop" in result.out


def test_tune_options_reach_the_plan(moe_runtime: Any, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    how = ["--dispatch", "alltoall", "--objective", "p95", "--samples", "2", "--margin", "0.1", "--confidence", "0.8"]
    arguments = ["--parallel", "dep2", "--max-tokens", "1", "--distribution", "zipf:1.0", "--budget", "2m"]
    assert moe_runtime("tune", *SMALL, *arguments, *how, "-o", str(path)).code == 0
    plan = Plan.load(path)
    assert (plan.key.dispatch, plan.key.objective, plan.key.distribution) == ("alltoall", "p95", "zipf:1.0")
    assert (plan.samples, plan.margin, plan.confidence) == (2, 0.1, 0.8)


@pytest.mark.parametrize(
    "text,seconds", [("120s", 120), ("120", 120), ("1.5m", 90), ("1h", 3600), (".5s", 0.5), (" 2m ", 120)]
)
def test_seconds(text: str, seconds: float) -> None:
    assert parse_seconds(text) == seconds


@pytest.mark.parametrize("text", ["", "s", "-1", "2 weeks", "1e3", "2min"])
def test_seconds_refused(text: str) -> None:
    with pytest.raises(InvalidArgument, match=r"^--budget: got .*such as 120s"):
        parse_seconds(text)


def test_interrupted_tune_keeps_its_buckets(moe_runtime: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object, **__: object) -> Plan:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "tune_into", interrupted)
    result = moe_runtime("tune", *SMALL, "--parallel", "ep2", "-o", str(tmp_path / "plan.json"))
    assert result.code == 130 and "goes on from there" in result.err


def test_run_with_a_plan(moe_runtime: Any, plan_path: Path) -> None:
    result = moe_runtime("run", *SMALL, "--parallel", "dep2", "--tokens", "3", "--plan", str(plan_path), "--json")
    assert result.code == 0
    found = json.loads(result.out)
    second = Plan.load(plan_path).entries[1]
    assert (found["rows"], found["tactics"]) == (6, [second.gemm1.tactic, second.gemm2.tactic])
    assert found["us"] > 0
    assert 0 < found["error"] < 1e-2 < found["format_error"] < 0.1


def test_run_without_a_plan(moe_runtime: Any) -> None:
    result = moe_runtime("run", *SMALL, "--parallel", "ep4", "--rank", "3", "--tokens", "5")
    assert result.code == 0
    assert "5 tokens a rank: 5 rows" in result.out and "per_expert_loop (default)" in result.out


@pytest.mark.parametrize(
    "arguments,message",
    [
        (["tune", "--model", "gpt-5", "--parallel", "dep2"], "preset: got 'gpt-5'; accepted: qwen3-235b"),
        (["tune", "--model", "qwen3-30b", "--parallel", "dep0"], "parallel: got 'dep0'"),
        (["tune", "--model", "qwen3-30b", "--parallel", "ep3"], "parallel: got ep3"),
        (["tune", "--model", "qwen3-30b", "--parallel", "ep2", "--rank", "2"], "rank: got 2"),
        (["tune", *SMALL, "--parallel", "ep2", "--distribution", "even"], "distribution: got 'even'"),
        (["tune", *SMALL, "--parallel", "ep2", "--max-tokens", "0"], "tune_max_num_tokens: got 0"),
        (["tune", *SMALL, "--parallel", "ep2", "--budget", "soon"], "--budget: got 'soon'"),
        (["tune", *SMALL, "--parallel", "ep2", "--budget", "0"], "budget: got 0 s"),
        (["tune", *SMALL, "--parallel", "ep2", "--objective", "max"], "objective: got 'max'; accepted: mean or p95"),
        (["tune", *SMALL, "--parallel", "ep2", "--margin", "2"], "margin: got 2.0"),
        (["tune", *SMALL, "--parallel", "ep2", "--confidence", "1"], "confidence: got 1.0"),
        (["tune", *SMALL, "--parallel", "ep2", "--samples", "0"], "samples: got 0"),
        (["tune", *SMALL, "--parallel", "ep2", "--dispatch", "mail"], "dispatch: got 'mail'"),
        (["tune", *SMALL, "--parallel", "ep2", "-o", "/proc/plan.json"], "output: got /proc/plan.json"),
        (["tune", *SMALL, "--parallel", "ep2", "--small"], "--small: got with --scale 8"),
        (["tune", *SMALL[:-1], "tpu", "--parallel", "ep2"], "--device: got 'tpu'; accepted: cuda or cpu"),
        (["run", *SMALL, "--parallel", "ep2", "--tokens", "1", "--plan", "none"], "plan none: cannot be read"),
        (["variants", "--arch", "sm_42"], "arch: got 'sm_42'"),
    ],
)
def test_errors_are_one_line_and_no_traceback(moe_runtime: Any, arguments: list[str], message: str) -> None:
    result = moe_runtime(*arguments)
    assert result.code == 2
    last = result.err.strip().splitlines()[-1]
    assert last.startswith("error: ") and message in last
    assert "Traceback" not in result.err


def test_a_plan_of_the_other_regime_is_refused(moe_runtime: Any, plan_path: Path) -> None:
    result = moe_runtime("run", *SMALL, "--parallel", "ep2", "--tokens", "3", "--plan", str(plan_path))
    assert result.code == 2 and "tuned for regime dep (here ep)" in result.err


def test_info(moe_runtime: Any) -> None:
    facts = {fact["name"]: fact for fact in json.loads(moe_runtime("info", "--json").out)}
    assert {"python", "nvcc", "CUTLASS", "archs", "library sm_90a", "plan folder"} <= set(facts)
    assert all(fact["found"] or fact["todo"] for fact in facts.values())
    text = moe_runtime("info").out
    assert all(name in text for name in facts)


def test_info_says_what_is_missing(moe_runtime: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MOE_RUNTIME_NVCC", str(tmp_path / "nvcc"))
    monkeypatch.setenv("MOE_RUNTIME_LIBRARY", str(tmp_path / "lib.so"))
    monkeypatch.setenv("MOE_RUNTIME_CUDA_ARCHS", "sm_42")
    facts = {fact["name"]: fact for fact in json.loads(moe_runtime("info", "--json").out)}
    for name, todo in (("nvcc", "MOE_RUNTIME_NVCC"), ("archs", "sm_42")):
        assert facts[name]["found"] is None and todo in facts[name]["todo"]


def test_variants_join_catalogue_and_build(moe_runtime: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    names = [row["name"] for row in json.loads(moe_runtime("variants", "--arch", "sm_90a", "--json").out)]
    assert names and len(set(names)) == len(names)
    kernel = {
        "name": names[0], "compile_seconds": 91.7, "registers": 168, "spill_bytes": 0,
        "static_shared_memory": 1024, "dynamic_shared_memory": 230400,
    }  # fmt: skip
    library = tmp_path / "libmoe_runtime_sm_90a.so"
    manifest = {"schema_version": 1, "archs": {"sm_90a": {"kernels": [kernel]}}}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    monkeypatch.setenv("MOE_RUNTIME_LIBRARY", str(library))
    rows = {row["name"]: row for row in json.loads(moe_runtime("variants", "--json").out)}
    assert rows[names[0]]["build"] == kernel and rows[names[1]]["build"] is None
    assert {row["arch"] for row in rows.values()} == {"sm_90a", "sm_100a", "sm_120a"}
    line = next(line for line in moe_runtime("variants").out.splitlines() if names[0] in line)
    assert line.split()[-4:] == ["92", "168", "0", "226"]


@pytest.mark.parametrize("preset", ["qwen3-235b", "deepseek-r1", "kimi-k2", "mixtral-8x7b", "qwen3-30b"])
def test_scaled_layers_fit_the_cpu(preset: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine.os, "cpu_count", lambda: 2)
    real = MoEConfig.preset(preset)
    small = machine.scaled_to_cpu(real)
    assert small.hidden_size * small.intermediate_size <= 2 * 2 * machine.CORE_WEIGHTS
    assert (small.top_k, small.routing_method, small.topk_group) == (real.top_k, real.routing_method, real.topk_group)
    assert small.num_experts >= 4 * small.top_k and machine.scaled_to_cpu(small).num_experts == small.num_experts
