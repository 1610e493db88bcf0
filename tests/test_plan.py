"""Plans: what is written comes back, and anything else is refused with a reason."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_runtime.config import MoEConfig
from moe_runtime.errors import InvalidArgument, PlanRefused
from moe_runtime.executors.base import MoEProblem
from moe_runtime.parallel import Parallel
from moe_runtime.tuning import GemmChoice, Plan, PlanEntry, PlanKey, plan_lock
from moe_runtime.workload import bucket, buckets

DEVICE, LIBRARY = "NVIDIA H200", "abc123"
QWEN = MoEConfig.preset("qwen3-235b")


def problem(text: str = "dep2", config: MoEConfig = QWEN, rank: int = 0) -> MoEProblem:
    return MoEProblem(config, Parallel.parse(text, rank))


def make_plan(text: str = "dep2", tune_max: int = 512, tuned: list[int] | None = None) -> Plan:
    def choice(gemm: str, size: int) -> GemmChoice:
        return GemmChoice(f"{gemm}_{size}", us=1.5, default_tactic="plain", default_us=2.0, rejected={"bad": "NaN"})

    chosen = buckets(tune_max) if tuned is None else tuned
    return Plan(
        key=PlanKey.of(problem(text), "balanced", tune_max, DEVICE, LIBRARY),
        seed=0,
        complete=chosen == buckets(tune_max),
        entries=tuple(
            PlanEntry(bucket=size, rows=size * 8, gemm1=choice("a", size), gemm2=choice("b", size)) for size in chosen
        ),
    )


def test_save_and_load(tmp_path: Path) -> None:
    path = tmp_path / "new folder" / "plan.json"
    plan = make_plan()
    plan.save(path)
    assert Plan.load(path) == plan
    assert [file.name for file in path.parent.iterdir()] == ["plan.json"]
    assert json.loads(path.read_text())["key"]["regime"] == "dep"


def test_failed_save_keeps_the_old_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "plan.json"
    old = make_plan("dep2")
    old.save(path)

    def full_disk(self: Path, data: bytes) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full_disk)
    with pytest.raises(InvalidArgument, match=r"^output: got .*No space left"):
        make_plan("ep2").save(path)
    assert Plan.load(path) == old and len(list(tmp_path.iterdir())) == 1


@given(st.sampled_from(["dep4", "ep4"]), st.integers(0, 40_000), st.sampled_from([1, 512, 8192, 9000]))
def test_lookup_follows_the_bucket_rule(text: str, rows: int, tune_max: int) -> None:
    plan = make_plan(text, tune_max)
    expected = bucket(rows, Parallel.parse(text), tune_max)
    assert plan.lookup(rows) == (f"a_{expected}", f"b_{expected}")


def test_lookup_of_a_bucket_that_was_not_tuned() -> None:
    plan = make_plan("ep2", 512, tuned=[1, 2, 4])
    assert plan.lookup(5) == ("a_4", "b_4")
    assert plan.lookup(8) is None


def test_fits_its_own_problem_on_every_rank() -> None:
    for rank in (0, 1):
        assert make_plan("dep2").fits(problem("dep2", rank=rank), DEVICE, LIBRARY) is None
    assert make_plan("dep2").fits(problem("dep2"), DEVICE, LIBRARY, tune_max_num_tokens=512) is None


@pytest.mark.parametrize(
    "changes,reason",
    [
        ({"problem": problem("ep2")}, "regime dep (here ep)"),
        ({"problem": problem("dep4")}, "size 2 (here 4)"),
        ({"problem": problem(config=dataclasses.replace(QWEN, top_k=4))}, "top_k 8 (here 4)"),
        ({"problem": problem(config=dataclasses.replace(QWEN, hidden_size=2048))}, "hidden_size 4096 (here 2048)"),
        ({"problem": problem(config=MoEConfig.preset("deepseek-r1"))}, "routing Renormalize (here DeepSeekV3:4/8)"),
        ({"device": "cpu"}, "device NVIDIA H200 (here cpu)"),
        ({"library_hash": "f00"}, "library_hash abc123 (here f00)"),
        ({"tune_max_num_tokens": 8192}, "tune_max_num_tokens 512 (here 8192)"),
    ],
)
def test_refuses_what_it_was_not_tuned_for(changes: dict[str, Any], reason: str) -> None:
    arguments = {"problem": problem("dep2"), "device": DEVICE, "library_hash": LIBRARY} | changes
    found = make_plan("dep2").fits(**arguments)
    assert found is not None and reason in found and "moe-runtime tune" in found


def test_require_raises() -> None:
    with pytest.raises(PlanRefused, match=r"regime dep \(here ep\)"):
        make_plan("dep2").require(problem("ep2"), DEVICE, LIBRARY)


def edited(**changes: Any) -> bytes:
    data = msgspec.to_builtins(make_plan())
    for dotted, value in changes.items():
        *parents, last = [int(part) if part.isdigit() else part for part in dotted.split("__")]
        target: Any = data
        for part in parents:
            target = target[part]
        target[last] = value
    return json.dumps(data).encode()


@pytest.mark.parametrize(
    "content,reason",
    [
        (b"", "damaged, not JSON"),
        (b"\x80\x04pickle", "damaged, not JSON"),
        (edited()[:-100], "damaged, not JSON"),
        (b"[1, 2]", "not a plan"),
        (b'{"E": 128, "N": 768}', "not a plan"),
        (edited(schema_version=2), "schema version 2, this moe_runtime reads 1"),
        (b'{"schema_version": 1}', "damaged (Object missing required field"),
        (edited(unknown=1), "unknown field `unknown`"),
        (edited(key__regime="tp"), "damaged (Invalid enum value 'tp'"),
        (edited(key__size=3), "damaged (parallel: got dep3"),
        (edited(key__size=0), "damaged (size: got 0"),
        (edited(entries__0__bucket=3), "are not an ascending choice of"),
        (edited(entries__0__bucket=2), "are not an ascending choice of"),
        (edited(entries__0__gemm1__us=0), "a time of 0"),
        (edited(entries__0__gemm1__us="fast"), "damaged (Expected `float | null`, got `str`"),
        (edited(entries__0__gemm1__tactic="bad"), "chose bad, which it rejected"),
        (edited(entries=[]), "complete, but without entries"),
    ],
)
def test_load_refuses(tmp_path: Path, content: bytes, reason: str) -> None:
    path = tmp_path / "plan.json"
    path.write_bytes(content)
    with pytest.raises(PlanRefused) as refused:
        Plan.load(path)
    message = str(refused.value)
    assert str(path) in message and reason in message and "moe-runtime tune" in message


def test_load_of_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(PlanRefused, match="cannot be read"):
        Plan.load(tmp_path / "none.json")


def test_lock_is_exclusive(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    refused = pytest.raises(InvalidArgument, match=r"^output: got .*no other process")
    with plan_lock(path), refused, plan_lock(path):
        pass
    with plan_lock(path):
        pass
