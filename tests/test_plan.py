"""Plans: what is written comes back, and anything else is refused with a reason."""

import dataclasses
import io
import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from moe_runtime.config import MoEConfig
from moe_runtime.errors import InvalidArgument, PlanRefused
from moe_runtime.executors.base import MoEProblem
from moe_runtime.parallel import Parallel
from moe_runtime.tables import differing, regimes_table
from moe_runtime.tuning import GemmChoice, Plan, PlanEntry, PlanKey, Timing, plan_lock
from moe_runtime.workload import buckets, tokens_per_rank

DEVICE, LIBRARY = "NVIDIA H200", "abc123"
QWEN = MoEConfig.preset("qwen3-235b")


def problem(text: str = "dep2", config: MoEConfig = QWEN, rank: int = 0) -> MoEProblem:
    return MoEProblem(config, Parallel.parse(text, rank))


def make_plan(
    text: str = "dep2", tune_max: int = 512, tuned: list[int] | None = None, starts: list[int] | None = None
) -> Plan:
    def choice(gemm: str, size: int) -> GemmChoice:
        timings = {f"{gemm}_{size}": Timing(1.5, 1.4, 1.6), "plain": Timing(2.0, 2.0, 2.0)}
        return GemmChoice(f"{gemm}_{size}", default_tactic="plain", timings=timings, rejected={"bad": "NaN"})

    starts = buckets(tune_max) if starts is None else starts
    chosen = starts if tuned is None else tuned
    return Plan(
        key=PlanKey.of(problem(text), "balanced", tune_max, DEVICE, LIBRARY),
        seed=0,
        samples=1,
        margin=0.02,
        confidence=0.95,
        complete=chosen == starts,
        buckets=tuple(starts),
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


@given(st.sampled_from(["dep4", "ep4"]), st.integers(0, 40_000), st.sets(st.integers(1, 9000), min_size=1))
def test_lookup_takes_the_largest_bucket_that_is_not_above(text: str, rows: int, starts: set[int]) -> None:
    plan = make_plan(text, 9000, starts=sorted(starts))
    tokens = tokens_per_rank(rows, Parallel.parse(text))
    expected = max((start for start in starts if start <= tokens), default=min(starts))
    assert plan.lookup(rows) == (f"a_{expected}", f"b_{expected}")


def test_lookup_of_a_bucket_that_was_not_tuned() -> None:
    plan = make_plan("ep2", 512, tuned=[1, 2, 4])
    assert plan.lookup(5) == ("a_4", "b_4")
    assert plan.lookup(8) is None


def test_plans_with_other_buckets_side_by_side() -> None:
    dep, ep = make_plan("dep2", 8, starts=[1, 3, 8]), make_plan("ep2", 8, starts=[1, 4], tuned=[1])
    assert differing([dep, ep]) == [f"{tokens} {gemm}" for tokens in (3, 4, 8) for gemm in ("gemm1", "gemm2")]
    console = Console(file=io.StringIO(), width=200)
    console.print(regimes_table([dep, ep]))
    lines = [line.split() for line in console.file.getvalue().splitlines()]  # type: ignore[attr-defined]
    assert ["1", "gemm1", "a_1", "1.5", "2.0", "a_1", "1.5", "2.0"] in lines
    assert ["3", "gemm2", "b_3", "1.5", "2.0", "b_1", "*"] in lines  # ep2 has no times of its own for 3
    assert ["4", "gemm1", "a_3", "(default)", "*"] in lines


def test_times_of_a_choice() -> None:
    choice = make_plan().entries[0].gemm1
    assert (choice.us, choice.default_us) == (1.5, 2.0)
    assert GemmChoice("plain", default_tactic="plain").us is None


def test_digest_is_of_the_content_and_not_of_the_date() -> None:
    plan = make_plan()
    later = msgspec.structs.replace(plan, created="2001-01-01T00:00:00+00:00")
    assert later != plan and later.digest() == plan.digest() and len(plan.digest()) == 64
    assert msgspec.structs.replace(plan, quarantined={"x": "hung"}).digest() != plan.digest()
    reordered = msgspec.structs.replace(plan, quarantined={"b": "1", "a": "2"})
    assert reordered.digest() == msgspec.structs.replace(plan, quarantined={"a": "2", "b": "1"}).digest()


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


PAIR = {"gemm1": "a_1", "gemm2": "b_1", "timing": {"us": 3.0, "low": 2.0, "high": 4.0}}


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
        (edited(schema_version=2), "schema version 2, this moe_runtime reads 3"),
        (b'{"schema_version": 3}', "damaged (Object missing required field"),
        (edited(unknown=1), "unknown field `unknown`"),
        (edited(key__regime="xp"), "damaged (Invalid enum value 'xp'"),
        (edited(key__size=3), "damaged (parallel: got dep3"),
        (edited(key__size=0), "damaged (size: got 0"),
        (edited(entries__0__bucket=3), "are not an ascending choice of"),
        (edited(entries__0__bucket=2), "are not an ascending choice of"),
        (edited(buckets=[2, 1]), "damaged (buckets: got [2, 1]"),
        (edited(buckets=[1, 1024]), "damaged (buckets: got [1, 1024]"),
        (edited(buckets=[]), "damaged (buckets: got []"),
        (edited(complete=False), "complete is False, with entries for 10 of 10"),
        (edited(entries__0__gemm1__timings__a_1__us=0), "a time of 0"),
        (edited(entries__0__gemm1__timings__a_1__low=1.7), "a time of 1.5"),
        (edited(entries__0__gemm1__timings__a_1__us="fast"), "damaged (Expected `float`, got `str`"),
        (edited(entries__0__gemm1__tactic="bad"), "chose bad, which was rejected"),
        (edited(quarantined={"a_4": "hung"}), "chose a_4, which was rejected"),
        (edited(entries=[]), "complete is True, with entries for 0 of 10"),
        (edited(entries__0__layer=[PAIR | {"gemm1": "b_1"}]), "chose a_1 + b_1, which did not race on the layer"),
        (edited(entries__0__layer=[PAIR | {"timing": dict.fromkeys(("us", "low", "high"), 0)}]), "us for a_1 + b_1"),
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
