"""What a placement makes of the workload, and of the plans, commands and reports that rest on it."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from moe_runtime import cli, report
from moe_runtime.balancing import place
from moe_runtime.config import MoEConfig, RoutingMethod
from moe_runtime.distributions import draw, parse
from moe_runtime.errors import InvalidArgument
from moe_runtime.executors.base import MoEProblem
from moe_runtime.machine import PLAN_FOLDER_VARIABLE
from moe_runtime.parallel import Parallel
from moe_runtime.placement import Placements, physical_config
from moe_runtime.recording import read_layers
from moe_runtime.tuning import Plan, PlanKey, tune
from moe_runtime.tuning.buckets import served_range
from moe_runtime.tuning.draws import DRAWS_OF_FEW_ROWS, number_of_draws
from moe_runtime.tuning.explain import RowsPerExpert, explain
from moe_runtime.tuning.plan_tools import placements_of, timed_workloads, with_placement
from moe_runtime.weights import FP8BlockWeights
from moe_runtime.workload import DISPATCHES, Workload, make_workload

from .plans import CPU, entry, make_plan, rekeyed
from .test_tuner import FakeExecutor

CONFIG = MoEConfig("test", 256, 128, 16, 2)
GROUPED = MoEConfig("grouped", 256, 128, 17, 5, RoutingMethod.DeepSeekV3, 4, 2, 2.5, num_fused_shared_experts=1)
SKEWED = "zipf:1.0"
SIZE, TOKENS = 4, 96


def counts_of(config: MoEConfig, seed: int = 0, tokens: int = 4000) -> Tensor:
    ids = draw(parse(SKEWED), config, tokens, seed)[:, : config.routed_top_k]
    return ids.flatten().bincount(minlength=config.num_routed_experts)


def placed(config: MoEConfig = CONFIG, layers: int = 1, size: int = SIZE) -> Placements:
    """For what SKEWED draws with seeds 0, 1, ... by layer."""
    loads = {f"layer{seed}": counts_of(config, seed) for seed in range(layers)}
    return place(config, loads, size, -config.num_experts % size + size)


def workloads(dispatch: str, regime: str, config: MoEConfig = CONFIG, law: str = SKEWED) -> list[Workload]:
    layer = placed(config).layers["layer0"]
    ranks = [Parallel.parse(f"{regime}{SIZE}", rank) for rank in range(SIZE)]
    return [make_workload(config, rank, TOKENS, law, 0, dispatch, layer) for rank in ranks]


@pytest.mark.parametrize("config", [CONFIG, GROUPED], ids=lambda config: config.name)
@pytest.mark.parametrize("law", ["balanced", "random", SKEWED])
@pytest.mark.parametrize("regime", ["dep", "ep"])
@pytest.mark.parametrize("dispatch", DISPATCHES)
def test_ranks_share_the_slots_of_the_same_tokens(dispatch: str, regime: str, law: str, config: MoEConfig) -> None:
    layer, total = placed(config).layers["layer0"], TOKENS * (SIZE if regime == "dep" else 1)
    shares = workloads(dispatch, regime, config, law)
    drawn = draw(parse(law), config, total, 0)
    by_expert = torch.zeros(config.num_experts, dtype=torch.int64)
    for share in shares:
        assert share.config == physical_config(config, layer) and share.dispatch == dispatch
        ids = share.topk_ids
        assert all(len(set(row)) == len(row) for row in ([i for i in row if i >= 0] for row in ids.tolist()))
        rows = share.rows_per_expert.long()
        by_expert.index_add_(0, torch.tensor(layer.local_experts(share.parallel.ep_rank)), rows)
    assert by_expert.tolist() == drawn.flatten().bincount(minlength=config.num_experts).tolist()
    # Replicas take turns token by token, counted over all ranks.
    physical = [
        [layer.logical_to_physical[e][t % layer.replica_counts[e]] for e in row] for t, row in enumerate(drawn.tolist())
    ]
    counted = torch.tensor(physical).flatten().bincount(minlength=layer.num_physical_experts).tolist()
    assert [int(count) for share in shares for count in share.rows_per_expert] == counted
    if dispatch == "allgather":
        assert shares[0].topk_ids.tolist() == physical


@pytest.mark.parametrize("dispatch", DISPATCHES)
def test_rank_loads_come_out_even(dispatch: str) -> None:
    """On the law and seed that the placement was made for; without it the busiest rank has twice the mean."""
    plain = [make_workload(CONFIG, Parallel("dep", SIZE, rank), 4096, SKEWED, 0, dispatch) for rank in range(SIZE)]
    layer = placed().layers["layer0"]
    even = [
        make_workload(CONFIG, Parallel("dep", SIZE, rank), 4096, SKEWED, 0, dispatch, layer) for rank in range(SIZE)
    ]
    before, after = ([share.local_slots for share in shares] for shares in (plain, even))
    assert sum(before) == sum(after) and layer.balance.before > 1.3
    assert max(before) * SIZE / sum(before) == pytest.approx(layer.balance.before, rel=0.03)
    assert max(after) * SIZE / sum(after) == pytest.approx(layer.balance.after, rel=0.03)


def test_of_another_layout() -> None:
    layer = placed().layers["layer0"]
    with pytest.raises(InvalidArgument, match="placement: got one over 4 ranks; accepted: one over those of dep2"):
        make_workload(CONFIG, Parallel.parse("dep2"), 4, SKEWED, placement=layer)
    with pytest.raises(InvalidArgument, match="placement: got one of 16 experts"):
        make_workload(GROUPED, Parallel.parse("dep4"), 4, SKEWED, placement=layer)


def saved(folder: Path, placements: Placements) -> Path:
    placements.save(folder / "placement.json")
    return folder / "placement.json"


def tuned(path: Path, seed: int = 0, law: str = SKEWED, resume: Plan | None = None) -> Plan:
    problem = MoEProblem(physical_config(GROUPED, Placements.load(path)), Parallel.parse("dep4"))
    weights = FP8BlockWeights.random(problem.config, problem.num_local_experts)  # the stand-in reads none
    executor = FakeExecutor({"plain": 9.0, "other": 5.0})
    return tune(problem, weights, executor, 64, law, seed, buckets=(4, 64), placement=str(path), resume=resume)


def test_a_plan_is_of_its_placement(tmp_path: Path) -> None:
    placements = placed(GROUPED, layers=3)
    path = saved(tmp_path, placements)
    plan, first = tuned(path, seed=4), placements.layers["layer1"]
    assert (plan.key.placement, plan.key.placement_digest) == (str(path), placements.digest())
    assert plan.key.num_experts == 24 and plan.key.routing == "DeepSeekV3"
    # The seed chooses the layer, and tokens choose experts by the model's own routing, groups and shared one included.
    expected = make_workload(GROUPED, Parallel.parse("dep4"), 64, SKEWED, 4, placement=first)
    assert plan.entries[1].rows == expected.local_slots
    assert torch.equal(timed_workloads(plan, 64)[0].topk_ids, expected.topk_ids)
    problem = MoEProblem(expected.config, Parallel.parse("dep4"))
    assert plan.fits(problem, "cpu", "fake") is None and "num_experts" in str(
        plan.fits(MoEProblem(MoEConfig("plain", 256, 128, 16, 5), Parallel.parse("dep4")), "cpu", "fake")
    )
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan
    (tmp_path / "other").mkdir()
    other = tuned(saved(tmp_path / "other", placed(GROUPED, layers=2)), seed=4)
    assert other.key.placement_digest != plan.key.placement_digest and other.digest() != plan.digest()


def test_a_plan_without_one_reads_as_before(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    make_plan(entry(1)).save(path)
    content = json.loads(path.read_text())
    assert content["key"].pop("placement") == content["key"].pop("placement_digest") == ""
    path.write_text(json.dumps(content))
    assert Plan.load(path).key == make_plan(entry(1)).key


def test_even_routing_is_smeared_by_replicas(tmp_path: Path) -> None:
    plan = tuned(saved(tmp_path, placed(GROUPED)), law="balanced")
    problem = MoEProblem(physical_config(GROUPED, placed(GROUPED)), Parallel.parse("dep4"))
    assert served_range(4, (4, 64), "balanced", placed=True) == (4, 63)
    assert number_of_draws(problem, 1, "balanced", placed=True) == DRAWS_OF_FEW_ROWS
    counted = {len({work.num_tokens for work in timed_workloads(plan, bucket)}) for bucket in plan.buckets}
    assert counted == {1, 2}


def test_a_problem_without_slots_is_refused(tmp_path: Path) -> None:
    path = saved(tmp_path, placed())
    problem = MoEProblem(CONFIG, Parallel.parse("dep4"))
    weights = FP8BlockWeights.random(CONFIG, 4)
    with pytest.raises(InvalidArgument, match=r"config: got num_experts = 16; accepted: 20.*physical_config"):
        tune(problem, weights, FakeExecutor({"plain": 1.0}), 4, placement=str(path))


def test_a_placement_that_moved_or_changed(tmp_path: Path) -> None:
    path = saved(tmp_path, placed(GROUPED))
    plan = tuned(path)
    known = explain(plan, 64).rows_per_expert
    assert isinstance(known, RowsPerExpert) and known.experts == 6 and known.largest > known.smallest
    moved = path.rename(tmp_path / "moved.json")
    assert "unknown here: placement: got" in str(explain(plan, 64).rows_per_expert)
    (found,) = with_placement([plan], [moved])
    assert explain(found, 64).rows_per_expert == known
    assert with_placement([plan], []) == [plan]
    saved(tmp_path, placed(GROUPED, layers=2))
    with pytest.raises(InvalidArgument, match="that the plan was tuned under, with digest"):
        placements_of(plan.key)
    with pytest.raises(InvalidArgument, match=f"what a plan was tuned under: {plan.key.placement_digest}"):
        with_placement([plan], [path])
    with pytest.raises(InvalidArgument, match="what a plan was tuned under: none"):
        with_placement([make_plan(entry(1))], [moved])


class Result:
    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err


@pytest.fixture
def moe_runtime(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    def call(*arguments: object) -> Result:
        monkeypatch.setattr(sys, "argv", ["moe-runtime", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit_:
            cli.main()
        captured = capsys.readouterr()
        return Result(int(exit_.value.code or 0), captured.out, captured.err)

    return call


MODEL = ["--model", "mixtral-8x7b"]


@pytest.fixture
def recorded(tmp_path: Path) -> Path:
    """Two routers of Mixtral: expert 0 has half of the load, or all have the same."""
    first, second = torch.tensor([70, 10, 10, 10, 10, 10, 10, 10]), torch.full((8,), 5)
    save_file({"layers.2.gate": first, "layers.10.gate": second}, tmp_path / "load.safetensors")
    return tmp_path / "load.safetensors"


def test_place(moe_runtime: Any, recorded: Path, tmp_path: Path) -> None:
    path, how = tmp_path / "placement.json", ["--load", recorded, "--parallel", "dep2", "--redundant", "2"]
    table = moe_runtime("place", *MODEL, *how, "-o", path)
    assert table.code == 0 and f"wrote {path}" in table.err
    # 100 of 140 on the first of two ranks; 35 of expert 0 on either, and the others share 70.
    assert "layers.2.gate" in table.out and "1.429" in table.out and "over the mean of 2, 5 slots each" in table.out
    result = moe_runtime("place", *MODEL, *how, "-o", path, "--json")
    content, found = Placements.load(path), json.loads(result.out)
    assert found["digest"] == content.digest() and list(found["layers"]) == ["layers.2.gate", "layers.10.gate"]
    assert found["layers"]["layers.2.gate"]["before"] == pytest.approx(100 / 70)
    assert found["layers"]["layers.2.gate"]["after"] == pytest.approx(1.0)
    assert found["layers"]["layers.2.gate"]["most_replicas"] == 2
    assert found["layers"]["layers.10.gate"]["before"] == 1.0


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        (["--redundant", "1"], "num_redundant_experts: got 1"),
        (["--model", "qwen3-30b"], r"load: got .*shape \[8\].*histograms \[num_experts = 128\]"),
        (["--load", "gone.npy"], r"load: got gone.npy \(No such file"),
        (["--parallel", "dep0"], "parallel: got 'dep0'"),
        (["--nodes", "2"], "num_nodes: got 2"),
    ],
)
def test_place_says_what_is_wrong(
    moe_runtime: Any, recorded: Path, tmp_path: Path, changed: list[str], reason: str
) -> None:
    how = ["--load", recorded, "--parallel", "dep2", "--redundant", "2", "-o", tmp_path / "new.json"]
    result = moe_runtime("place", *MODEL, *how, *changed)
    text = " ".join(result.err.split())
    assert result.code == 2 and re.search(f"error: {reason}", text)
    assert not (tmp_path / "new.json").exists()


def test_layers_by_name(tmp_path: Path) -> None:
    ids, config = torch.tensor([[0, 1], [2, 3]]), MoEConfig.preset("mixtral-8x7b")
    save_file({"b.10": ids, "b.9": torch.stack([ids, 7 - ids])}, tmp_path / "a.safetensors")
    torch.save(torch.ones(2, 8), tmp_path / "a.pt")
    assert list(read_layers(tmp_path / "a.safetensors", config)) == ["b.9.0", "b.9.1", "b.10"]
    assert list(read_layers(tmp_path / "a.pt", config)) == ["0", "1"]


@pytest.fixture
def placement_path(recorded: Path) -> Path:
    config = MoEConfig.preset("mixtral-8x7b")
    return saved(recorded.parent, place(config, read_layers(recorded, config), 2, 2))


SMALL = [*MODEL, "--scale", "64", "--device", "cpu", "--parallel", "dep2"]


def test_commands_under_a_placement(moe_runtime: Any, placement_path: Path, tmp_path: Path) -> None:
    plan, page = tmp_path / "plan.json", tmp_path / "page.html"
    how = ["--max-tokens", "2", "--distribution", f"recorded:{tmp_path / 'load.safetensors'}"]
    tuned = moe_runtime("tune", *SMALL, *how, "--placement", placement_path, "-o", plan)
    assert tuned.code == 0, tuned.err
    key, digest = Plan.load(plan).key, Placements.load(placement_path).digest()
    assert (key.num_experts, key.placement, key.placement_digest) == (10, str(placement_path), digest)
    assert f"placed by {placement_path}" in moe_runtime("plan", "show", plan).out.replace("\n", "")
    assert moe_runtime("plan", "check", plan, *SMALL, "--placement", placement_path).code == 0
    run = ["run", *SMALL, "--tokens", "2", "--plan", plan, "--json"]
    result = json.loads(moe_runtime(*run, "--placement", placement_path).out)
    assert result["error"] < 1e-2 and result["tactics"] == list(Plan.load(plan).lookup(result["rows"]) or ())
    assert "num_experts 10" in moe_runtime(*run).err
    refused = moe_runtime("plan", "check", plan, *SMALL)
    assert refused.code == 1 and "num_experts 10; the layer asked for has 8" in refused.out

    moved = placement_path.rename(tmp_path / "moved.json")
    assert "unknown here" in moe_runtime("explain", plan, "--tokens", "2").out
    told = moe_runtime("explain", plan, "--tokens", "2", "--placement", moved).out
    assert "over 5 experts" in told and str(moved) in told.replace("\n", "")
    assert moe_runtime("report", plan, "-o", page, "--placement", moved).code == 0
    text = page.read_text(encoding="utf-8")
    assert "1.429" in text and "cannot be drawn" not in text and digest in text
    assert moe_runtime("report", plan, "-o", page).code == 0
    assert "dep2 cannot be drawn: placement: got" in page.read_text(encoding="utf-8")


def test_a_placement_of_another_layout(moe_runtime: Any, placement_path: Path, tmp_path: Path) -> None:
    how = ["--placement", placement_path, "-o", tmp_path / "plan.json"]
    result = moe_runtime("tune", *SMALL[:-1], "dep4", *how)
    assert result.code == 2 and "placement: got one over 2 ranks" in result.err
    result = moe_runtime("tune", "--model", "qwen3-30b", "--parallel", "dep2", "--device", "cpu", *how)
    assert result.code == 2 and "placement: got one of 8 experts" in result.err


def test_the_plan_folder_tells_placements_apart(
    moe_runtime: Any, placement_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(PLAN_FOLDER_VARIABLE, str(tmp_path / "plans"))
    assert moe_runtime("tune", *SMALL, "--max-tokens", "1", "--placement", placement_path).code == 0
    (path,) = (tmp_path / "plans").glob("*.json")
    assert f"-placed-{Placements.load(placement_path).digest()}-1-cpu" in path.name


def reported(*plans: Plan) -> Any:
    sections = pytest.importorskip("moe_runtime.report.sections", reason="matplotlib is not installed")
    return {each.name: each for each in sections.Report.of(plans).sections}


def placed_plan(path: Path, layout: str = "dep2") -> Plan:
    physical = physical_config(MoEConfig.preset("mixtral-8x7b"), Placements.load(path))
    problem = MoEProblem(physical, Parallel.parse(layout))
    key = PlanKey.of(problem, "random", 64, CPU.device_name, CPU.library_hash, placement=str(path))
    return make_plan(entry(1), entry(8), key=key)


def test_a_report_shows_loads_before_and_after(placement_path: Path, tmp_path: Path) -> None:
    plan = placed_plan(placement_path)
    section = reported(plan)["placement"]
    assert section.tables[0].cells == [
        ["layers.2.gate", "1.429", "1.000", "2", "2"],
        ["layers.10.gate", "1.000", "1.000", "2", "2"],
    ]
    (panel,) = section.panels
    assert "layers.2.gate" in panel.title and "1.43 before, 1.00 after" in panel.alt
    report.write_page([plan, make_plan(entry(1))], tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert 'aria-label="Load over the mean of each rank' in text
    report.write_png([plan], tmp_path / "page.png")
    assert (tmp_path / "page.png").read_bytes().startswith(b"\x89PNG")


def test_the_figure_s_bars_are_the_ranks_loads(placement_path: Path) -> None:
    figure = pytest.importorskip("matplotlib.figure").Figure()
    reported(placed_plan(placement_path))["placement"].panels[0].draw(axes := figure.add_subplot())
    heights = [patch.get_height() for patch in axes.patches]
    assert heights == pytest.approx([100 / 70, 40 / 70, 1, 1])


def test_a_report_without_placements_says_nothing_of_them() -> None:
    assert "placement" not in reported(make_plan(entry(1)))


def test_plans_of_two_placements_are_told_apart(placement_path: Path) -> None:
    plan = placed_plan(placement_path)
    plain, digest = rekeyed(plan, placement="", placement_digest=""), plan.key.placement_digest
    (table,) = reported(plan, plain)["plans"].tables
    assert [column.heading for column in table.columns][1:] == [f"dep2 placed {digest[:8]}", "dep2 unplaced"]
    assert ["placement", f"{placement_path} ({digest})", "none"] in table.cells
