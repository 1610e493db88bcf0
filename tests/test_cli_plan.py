"""The commands `plan show | diff | check | merge` and `explain`: what they print, and how they fail."""

import json
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest

from moe_runtime import cli, machine
from moe_runtime.tuning import PairTiming, Plan

from .plans import DEFAULT, MODEL, OTHER, choice, entry, make_plan, timing


@pytest.fixture
def moe_runtime(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Runs a command line; returns (exit status, stdout, stderr)."""

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["moe-runtime", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit_:
            cli.main()
        return int(exit_.value.code or 0), *capsys.readouterr()

    return call


def test_diff_command(moe_runtime: Any, tmp_path: Path) -> None:
    paths = [tmp_path / "a.json", tmp_path / "b.json"]
    make_plan(entry(1, choice(OTHER))).save(paths[0])
    make_plan(entry(1), layout="ep2").save(paths[1])
    code, out, _ = moe_runtime("plan", "diff", *paths)
    assert code == 1 and "regime: dep | ep" in out and "+100.0% (clear)" in out and "-50.0% (clear)" in out
    code, out, _ = moe_runtime("plan", "diff", *paths, "--json")
    assert code == 1 and json.loads(out)["tactics"][0]["verdict"] == "matters"
    code, out, _ = moe_runtime("plan", "diff", paths[0], paths[0])
    assert code == 0 and "the same" in out


def test_check_command(moe_runtime: Any, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    make_plan(entry(1)).save(path)
    assert moe_runtime("plan", "check", path, "--device", "cpu")[0] == 0
    assert moe_runtime("plan", "check", path, "--model", MODEL, "--parallel", "dep2", "--device", "cpu")[0] == 0
    code, out, _ = moe_runtime("plan", "check", path, "--model", MODEL, "--parallel", "ep4", "--device", "cpu")
    assert code == 1 and "refused: tuned for dep2, asked for ep4" in out
    code, out, _ = moe_runtime("plan", "check", path, "--model", MODEL, "--parallel", "dep2", "--scale", "8", "--json")
    fields = [finding["what"].split()[2] for finding in json.loads(out)["findings"]]
    assert code == 1 and {"hidden_size", "intermediate_size"} <= set(fields)
    code, _, error = moe_runtime("plan", "check", path, "--model", MODEL)
    assert code == 2 and "--parallel: got nothing" in error
    path.write_bytes(path.read_bytes()[:-40])
    code, out, _ = moe_runtime("plan", "check", path, "--device", "cpu")
    assert code == 1 and "damaged, not JSON" in out


@pytest.mark.parametrize("damage", ["truncated", "tampered", "foreign", "other key"])
def test_a_refused_merge_leaves_the_output_alone(moe_runtime: Any, tmp_path: Path, damage: str) -> None:
    source, output = tmp_path / "a.json", tmp_path / "out.json"
    make_plan(entry(1)).save(source)
    make_plan(entry(2), layout="ep2" if damage == "other key" else "dep2").save(output)
    content = {
        "truncated": output.read_bytes()[:100],
        "tampered": output.read_bytes().replace(b'"us": 100.0', b'"us": -1.0'),
        "foreign": b'{"my": "notes"}',
        "other key": output.read_bytes(),
    }[damage]
    output.write_bytes(content)
    code, _, error = moe_runtime("plan", "merge", source, "-o", output)
    assert code == 2 and str(output) in error and output.read_bytes() == content


def test_merge_command(moe_runtime: Any, tmp_path: Path) -> None:
    a, b, output = tmp_path / "a.json", tmp_path / "b.json", tmp_path / "new" / "out.json"
    make_plan(entry(1), buckets=(1, 2)).save(a)
    make_plan(entry(2), buckets=(1, 2)).save(b)
    code, out, error = moe_runtime("plan", "merge", a, b, "-o", output)
    assert code == 0 and f"{a}: buckets 1" in out and "2 of 2 buckets" in error
    assert Plan.load(output).complete


def test_show_a_plan(moe_runtime: Any, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    plan = make_plan(entry(1, choice(OTHER)), buckets=(1, 8), quarantined={"bad": "hangs [gpu]"})
    plan.save(path)
    code, out, _ = moe_runtime("plan", "show", path)
    assert code == 0 and "dep2, H 2048, I 768, 128 experts, top 8" in out and "1 of 2 buckets" in out
    assert OTHER in out and "quarantined bad: hangs [gpu]" in out and plan.digest()[:12] in out
    assert json.loads(moe_runtime("plan", "show", path, "--json")[1]) == json.loads(path.read_text())


def test_show_lists_the_plan_folder(moe_runtime: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(machine.PLAN_FOLDER_VARIABLE, str(tmp_path / "plans"))
    assert "no plans in" in moe_runtime("plan", "show")[1]
    make_plan(entry(1)).save(tmp_path / "plans" / "good.json")
    (tmp_path / "plans" / "bad.json").write_text("{")
    code, out, _ = moe_runtime("plan", "show")
    assert code == 0 and "good.json" in out and "refused: plan" in out and "bad.json: damaged" in out
    listed = json.loads(moe_runtime("plan", "show", "--json")[1])
    assert [Path(row["path"]).name for row in listed] == ["good.json", "bad.json"] and listed[0]["key"]["size"] == 2


def test_show_of_a_folder_that_is_none(moe_runtime: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(machine.PLAN_FOLDER_VARIABLE, str(tmp_path / "file"))
    (tmp_path / "file").write_text("")
    code, _, error = moe_runtime("plan", "show")
    assert code == 2 and "MOE_RUNTIME_PLAN_DIR: got" in error


@pytest.mark.parametrize("command", [("plan", "show"), ("explain", "--tokens", "4"), ("plan", "diff")])
@pytest.mark.parametrize("content", [b"", b"[1", b"\xff\xfe", b"[" * 100_000, b'{"schema_version": 1}', None])
def test_damaged_plans_are_refused_with_the_reason(
    moe_runtime: Any, tmp_path: Path, command: tuple[str, ...], content: bytes | None
) -> None:
    path = tmp_path / "plan.json"
    if content is not None:
        path.write_bytes(content)
    code, out, error = moe_runtime(*command, path, *([path] if "diff" in command else []))
    assert code == 2 and not out and str(path) in error and "moe-runtime tune" in error and "Traceback" not in error


def test_explain_a_bucket_that_was_not_tuned(moe_runtime: Any, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    make_plan(entry(1), buckets=(1, 8)).save(path)
    code, out, _ = moe_runtime("explain", path, "--tokens", "8")
    assert code == 0 and "bucket 8 was not tuned: the default tactics run" in out


def test_explain_command(moe_runtime: Any, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    make_plan(entry(8, choice(OTHER)), entry(32)).save(path)
    code, out, _ = moe_runtime("explain", path, "--tokens", "16")
    assert code == 0 and "16 tokens per rank (32 kernel rows)" in out and "over 64 experts" in out
    assert "95% interval" in out and "48.8 to 51.2" not in out and "47.5 to 52.5" in out
    found = json.loads(moe_runtime("explain", path, "--tokens", "16", "--json")[1])
    assert found["bucket"] == 8 and found["gemms"][0]["candidates"][0]["timing"]["us"] == 50 and found["layer"] is None


def test_explain_command_tells_of_the_race_on_the_layer(moe_runtime: Any, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    pairs = (PairTiming(DEFAULT, DEFAULT, timing(300)), PairTiming(OTHER, DEFAULT, timing(240)))
    raced = msgspec.structs.replace(entry(8, choice(OTHER)), layer=pairs)
    make_plan(raced).save(path)
    code, out, _ = moe_runtime("explain", path, "--tokens", "8")
    assert code == 0 and "the whole layer\n  the fastest of 2 pairs, 20.0% below the default pair" in out
    assert "228.0 to 252.0" in out and out.index("240.0") < out.index("300.0")
    found = json.loads(moe_runtime("explain", path, "--tokens", "8", "--json")[1])
    assert found["layer"]["pairs"][0] == {"gemm1": OTHER, "gemm2": DEFAULT} | {
        "timing": {"us": 240, "low": 228, "high": 252}
    }
