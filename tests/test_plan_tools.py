"""Plans compared, checked and merged."""

import multiprocessing
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_runtime.config import PRESETS, MoEConfig
from moe_runtime.errors import InvalidArgument, PlanRefused
from moe_runtime.executors.base import MoEProblem
from moe_runtime.parallel import Parallel
from moe_runtime.tuning import GemmChoice, Plan, PlanKey, plan_lock, plan_tools
from moe_runtime.tuning.plan_tools import Loss, check, config_of, diff, merge, merge_into, serving_bucket

from .plans import CPU, DEFAULT, LAYER, OTHER, choice, entry, make_plan, rekeyed, timing


@pytest.fixture
def read_only(tmp_path: Path) -> Iterator[Path]:
    """A folder that cannot be written, by this process, which stops being root for it where it is."""
    folder = tmp_path / "read-only"
    folder.mkdir()
    for parent in (folder, *folder.parents[:3]):
        parent.chmod(0o755)
    folder.chmod(0o555)
    if os.geteuid():
        yield folder
        return
    os.seteuid(65534)
    yield folder
    os.seteuid(0)


@given(st.lists(st.integers(1, 64), min_size=1, unique=True), st.integers(1, 100))
def test_serving_bucket_is_the_one_that_lookup_takes(buckets: list[int], tokens: int) -> None:
    ascending = tuple(sorted(buckets))
    entries = [entry(size, GemmChoice(f"t{size}", "d")) for size in ascending]
    plan = make_plan(*entries, layout="ep2")
    bucket = serving_bucket(plan, tokens)
    found = plan.lookup(tokens)
    assert found is not None and found[0] == f"t{bucket}"
    below = [size for size in buckets if size <= tokens]
    assert bucket == (max(below) if below else min(buckets))


@pytest.mark.parametrize("name", PRESETS)
def test_config_of_a_key_has_the_same_key(name: str) -> None:
    def key(config: MoEConfig) -> PlanKey:
        return PlanKey.of(MoEProblem(config, Parallel.parse("ep2")), "balanced", 64, "cpu", "hash")

    made = key(MoEConfig.preset(name))
    assert key(config_of(made)) == made


def test_equal_plans_do_not_differ() -> None:
    plan = make_plan(entry(1), entry(8))
    assert not diff(plan, plan).differ
    slower = make_plan(entry(1, choice(default=700.0, other=650.0)), entry(8), created="2020-01-01T00:00:00+00:00")
    assert not diff(plan, slower).differ


def test_diff_finds_key_settings_and_untuned_buckets() -> None:
    first = make_plan(entry(1), entry(8))
    second = rekeyed(make_plan(entry(1), buckets=(1, 8), seed=7, quarantined={"bad": "hangs"}), device="H200")
    found = diff(first, second)
    assert found.key == {"device": ("cpu", "H200")}
    assert found.settings == {"seed": (0, 7), "quarantined": ([], ["bad"])}
    assert found.untuned == ((), (8,)) and not found.tactics and found.differ


def test_diff_weighs_tactics_by_each_plans_own_times() -> None:
    """In the first plan OTHER takes half the time, far outside both intervals; in the second 4 % less, inside them."""
    first = make_plan(entry(1, choice(OTHER)), entry(8))
    second = make_plan(entry(1, choice(DEFAULT, other=96.0)), entry(8))
    (only,) = diff(first, second).tactics
    assert (only.tokens, only.gemm, only.tactics, only.verdict) == (1, "gemm1", (OTHER, DEFAULT), "matters")
    assert only.losses == (Loss(1.0, clear=True), Loss(pytest.approx(-0.04), clear=False))


@pytest.mark.parametrize("timed,verdict", [(True, "noise"), (False, "unknown")])
def test_diff_calls_overlapping_intervals_noise(timed: bool, verdict: str) -> None:
    def plan(tactic: str) -> Plan:
        timings = {DEFAULT: timing(100), OTHER: timing(96)} if timed else {tactic: timing(100)}
        return make_plan(entry(1, gemm2=GemmChoice(tactic, DEFAULT, timings)))

    (only,) = diff(plan(DEFAULT), plan(OTHER)).tactics
    assert (only.gemm, only.verdict) == ("gemm2", verdict)


def test_diff_compares_other_buckets_by_the_rounding_rule() -> None:
    """At 4 tokens the first plan answers with its bucket 1, the second with its bucket 4."""
    first = make_plan(entry(1), entry(8))
    second = make_plan(entry(1), entry(4, choice(OTHER)), entry(8))
    found = diff(first, second)
    assert found.settings == {"buckets": ((1, 8), (1, 4, 8))}
    assert [(one.tokens, one.gemm, one.buckets) for one in found.tactics] == [(4, "gemm1", (1, 4))]


def test_a_plan_fits_where_it_was_tuned() -> None:
    assert check(make_plan(entry(1)), CPU) == ()
    assert check(make_plan(entry(1)), CPU, LAYER) == ()


@pytest.mark.parametrize(
    "changes,what,todo",
    [
        ({"device": "NVIDIA H200"}, "tuned on NVIDIA H200; this device is cpu", "tune on this device"),
        ({"library_hash": "old"}, "tuned with kernel library old", "MOE_RUNTIME_LIBRARY"),
        ({"regime": "ep"}, "tuned for ep2, asked for dep2", "--parallel dep2"),
        ({"top_k": 4}, "tuned for top_k 4; the layer asked for has 8", "--model"),
    ],
)
def test_check_finds_what_does_not_fit(changes: dict[str, Any], what: str, todo: str) -> None:
    (finding,) = check(rekeyed(make_plan(entry(1)), **changes), CPU, LAYER)
    assert what in finding.what and todo in finding.todo and finding.refused


def test_check_finds_tactics_that_are_gone() -> None:
    (finding,) = check(make_plan(entry(1, GemmChoice("cutlass_5", DEFAULT))), CPU)
    assert finding.refused and "gemm1 names cutlass_5" in finding.what


def test_an_incomplete_plan_fits() -> None:
    (finding,) = check(make_plan(entry(1), buckets=(1, 2, 4)), CPU)
    assert not finding.refused and "2 of 3 buckets are not tuned: 2, 4" in finding.what and "goes on" in finding.todo


def test_merge_joins_buckets() -> None:
    merged = merge({"a": make_plan(entry(1), buckets=(1, 8)), "b": make_plan(entry(4), entry(8), buckets=(1, 4, 8))})
    assert merged.plan.buckets == (1, 4, 8) and merged.plan.complete
    assert merged.sources == {1: "a", 4: "b", 8: "b"} and not merged.dropped


def test_merge_takes_a_bucket_whole_from_the_surer_plan() -> None:
    """Bucket 1 is surer in a; in bucket 8 a's default was measured poorly, so b's whole entry is taken."""
    a = make_plan(entry(1, choice(OTHER, 0.05), choice(width=0.05)), entry(8, choice(OTHER, 0.01), choice(width=0.4)))
    b = make_plan(entry(1), entry(8))
    merged = merge({"a": a, "b": b})
    assert merged.sources == {1: "a", 8: "b"}
    assert merged.plan.entries == (a.entries[0], b.entries[1])


def test_merge_prefers_times_to_none_and_the_first_of_equals() -> None:
    untimed = make_plan(entry(1, GemmChoice(DEFAULT, DEFAULT), GemmChoice(DEFAULT, DEFAULT)))
    assert merge({"a": untimed, "b": make_plan(entry(1))}).sources == {1: "b"}
    half_timed = make_plan(entry(1, choice(width=0.01), GemmChoice(DEFAULT, DEFAULT)))
    assert merge({"a": half_timed, "b": make_plan(entry(1))}).sources == {1: "b"}
    assert merge({"a": make_plan(entry(1)), "b": make_plan(entry(1))}).sources == {1: "a"}


def test_merge_never_keeps_a_tactic_that_faulted_elsewhere() -> None:
    a = make_plan(entry(1, choice(OTHER, width=0.01)), entry(8, choice(OTHER)))
    b = make_plan(entry(1), buckets=(1, 8), quarantined={OTHER: "illegal access"})
    merged = merge({"a": a, "b": b})
    assert merged.sources == {1: "b"} and merged.plan.quarantined == {OTHER: "illegal access"}
    assert "illegal access" in merged.dropped[8] and not merged.plan.complete and merged.plan.buckets == (1, 8)


@pytest.mark.parametrize(
    "other,reason",
    [
        (make_plan(entry(1), layout="ep2"), "a and b differ in regime dep and ep"),
        (rekeyed(make_plan(entry(1)), device="H200"), "device cpu and H200"),
        (make_plan(entry(1), seed=3), "seed 0 and 3"),
        (make_plan(entry(1), confidence=0.99), "confidence 0.95 and 0.99"),
    ],
)
def test_merge_refuses_other_keys_and_ways_of_measuring(other: Plan, reason: str) -> None:
    with pytest.raises(PlanRefused, match=reason):
        merge({"a": make_plan(entry(1)), "b": other})


def test_merge_of_nothing() -> None:
    with pytest.raises(InvalidArgument, match="plans: got none"):
        merge({})


BUCKETS = tuple(range(1, 17))


def _merge_one_by_one(output: Path, sources: list[Path]) -> None:
    for source in sources:
        merge_into(output, [source])


def test_two_processes_merging_into_one_file_lose_nothing(tmp_path: Path) -> None:
    output, sources = tmp_path / "all.json", [tmp_path / f"{bucket}.json" for bucket in BUCKETS]
    for bucket, source in zip(BUCKETS, sources, strict=True):
        make_plan(entry(bucket), buckets=BUCKETS).save(source)
    # fork: the children need none of torch's threads, and start at once.
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=_merge_one_by_one, args=(output, sources[place::2])) for place in (0, 1)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(20)
    assert [writer.exitcode for writer in writers] == [0, 0]
    plan = Plan.load(output)
    assert plan.complete and [each.bucket for each in plan.entries] == list(BUCKETS)


def test_merge_waits_for_the_lock_only_so_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, output = tmp_path / "a.json", tmp_path / "out.json"
    make_plan(entry(1)).save(source)
    monkeypatch.setattr(plan_tools, "MERGE_WAIT_SECONDS", 0.1)
    with plan_lock(output), pytest.raises(InvalidArgument, match="no other process"):
        merge_into(output, [source])
    assert not output.exists()


def test_merge_into_a_read_only_folder(read_only: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match=r"^output: got .*a file in a folder that can be written"):
        merge_into(read_only / "out.json", [tmp_path / "a.json"])
