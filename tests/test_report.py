"""Reports of plans: the page is whole by itself and says what the plans say; the picture is a picture."""

import importlib.util
import json
import re
import sys
import warnings
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from moe_runtime import cli, report
from moe_runtime.config import MoEConfig
from moe_runtime.errors import InvalidArgument, Unsupported
from moe_runtime.executors.base import GEMMS, MoEProblem
from moe_runtime.parallel import Parallel
from moe_runtime.report import facts, style
from moe_runtime.roofs import ROOFS
from moe_runtime.tuning import GemmChoice, Plan, PlanEntry, PlanKey, Timing
from moe_runtime.tuning.cost import gemm_bytes

from .plans import choice, entry, make_plan, rekeyed

sections = pytest.importorskip("moe_runtime.report.sections", reason="matplotlib is not installed")

MEASURED = json.loads((Path(__file__).parent.parent / "benchmarks/results/h200/gemm.json").read_text())
DEFAULT = "sm90a_fp8_block_64x128x128_1x1x1_warpspecialized_pingpong"
TOKENS_A_ROW = {"dep8": 4, "ep8": 32}
"""DeepSeek-R1 on 8 ranks has 32 local experts of 256 and top 8: m balanced rows per expert come from so many tokens."""


def h200_plan(layout: str) -> Plan:
    """DeepSeek-R1 as an H200 measured it, with intervals of 1 % to either side."""
    problem = MoEProblem(MoEConfig.preset("deepseek-r1"), Parallel.parse(layout))
    measured = {gemm: MEASURED["results"][f"DSR1-EP8 g{gemm[-1]}"]["by_rows_per_expert"] for gemm in GEMMS}

    def fastest(gemm: str, rows: str) -> GemmChoice:
        times = measured[gemm][rows]["interleaved_us"]
        timings = {tactic: Timing(us, 0.99 * us, 1.01 * us) for tactic, us in times.items()}
        return GemmChoice(tactic=min(times, key=times.__getitem__), default_tactic=DEFAULT, timings=timings)

    entries = tuple(
        PlanEntry(TOKENS_A_ROW[layout] * int(rows), 32 * int(rows), *(fastest(gemm, rows) for gemm in GEMMS))
        for rows in measured["gemm1"]
    )
    buckets = tuple(each.bucket for each in entries)
    key = PlanKey.of(problem, "balanced", buckets[-1], "NVIDIA H200", "0123456789abcdef")
    return Plan(
        key=key, seed=0, samples=1, margin=0.02, confidence=0.95, complete=True, buckets=buckets, entries=entries
    )


class Page(HTMLParser):
    """What a browser gets of a page: each element's attributes, and the text of table cells and of everything."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.cells: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag == "td":
            self.cells.append("")

    def handle_data(self, data: str) -> None:
        self.text += data
        if self.cells:
            self.cells[-1] += data

    def attributes(self, name: str) -> list[str]:
        return [value or "" for _, attributes in self.elements if (value := attributes.get(name)) is not None]


def told(*plans: Plan) -> str:
    """Every word and table cell of the report, figures aside."""
    found = sections.Report.of(plans).sections
    cells = [cell for each in found for table in each.tables for row in table.cells for cell in row]
    return "\n".join([*(sentence for each in found for sentence in each.words), *cells])


@pytest.fixture(scope="module")
def plans() -> list[Plan]:
    return [h200_plan(layout) for layout in TOKENS_A_ROW]


@pytest.fixture(scope="module")
def text(plans: list[Plan], tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("report") / "report.html"
    report.write_page(plans, path)
    assert [file.name for file in path.parent.iterdir()] == ["report.html"]
    return path.read_text(encoding="utf-8")


def test_page_refers_to_nothing_outside_itself(text: str) -> None:
    page = Page(text)
    assert not re.search(r"https?:|//\w|@import|<link|<script", text)
    assert not page.attributes("src") and not page.attributes("srcset")
    ids = page.attributes("id")
    references = [*page.attributes("href"), *re.findall(r"url\(([^)]*)\)", text)]
    assert references and all(reference.startswith("#") for reference in references)
    assert {reference[1:] for reference in references} <= set(ids)
    assert len(ids) == len(set(ids))


def test_page_shows_every_bucket_and_chosen_tactic(plans: list[Plan], text: str) -> None:
    cells = set(Page(text).cells)
    for plan in plans:
        for each in plan.entries:
            assert f"{each.bucket:,}" in {cell.strip() for cell in cells}
            assert {each.gemm1.tactic, each.gemm2.tactic} <= {cell.strip() for cell in cells}


def test_figures_have_words_for_who_cannot_see_them(text: str) -> None:
    page = Page(text)
    images = [attributes for _, attributes in page.elements if attributes.get("role") == "img"]
    assert len(images) == sum(tag == "svg" for tag, _ in page.elements) == 17
    assert all(len(attributes["aria-label"] or "") > 30 for attributes in images)
    assert sum(tag == "table" for tag, _ in page.elements) >= 10


def test_figures_take_the_themes_colours(text: str) -> None:
    figures = "".join(re.findall(r"<svg.*?</svg>", text, re.DOTALL))
    assert "var(--s0)" in figures and "var(--ink)" in figures
    assert not [colour for colour in style.COLOURS if colour.light in figures]
    # Black is matplotlib's own default: whatever was left in it would vanish on a dark page.
    assert "#000000" not in figures


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_letters_on_colours_are_legible(theme: str) -> None:
    def luminance(colour: style.Colour) -> float:
        value = getattr(colour, theme).lstrip("#")
        parts = [int(value[at : at + 2], 16) / 255 for at in (0, 2, 4)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    for colour in style.SERIES:
        for ground in (style.PAGE, style.ON_COLOUR):
            dim, bright = sorted((luminance(colour), luminance(ground)))
            assert (bright + 0.05) / (dim + 0.05) >= 4.5, (colour, ground)


def test_names_are_escaped(tmp_path: Path) -> None:
    evil = "<script>alert('&')</script> $\\frac$"
    timings = {evil: Timing(10.0, 9.0, 11.0), "tame": Timing(20.0, 19.0, 21.0)}
    chosen = GemmChoice(tactic=evil, default_tactic="tame", timings=timings, rejected={"<b>bold</b>": "<i>why</i>"})
    plan = make_plan(entry(1, chosen, chosen), quarantined={"<u>gone</u>": "hang & crash"})
    # Two of one layout, so that the figures' labels carry what tells them apart.
    report.write_page([plan, rekeyed(plan, device=evil)], tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert not re.search(r"<script|<b>|<i>|<u>", text)
    cells = {cell.strip() for cell in Page(text).cells}
    assert {evil, "<b>bold</b>", "<i>why</i>", "<u>gone</u>", "hang & crash"} <= cells


def test_png_is_a_picture_of_the_figures(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    report.write_png([make_plan(entry(1, width_choice()), entry(8))], tmp_path / "report.png")
    with image.open(tmp_path / "report.png") as picture:
        picture.load()
        assert picture.format == "PNG" and picture.width > 1000 and picture.height > 1000
        assert len(picture.convert("RGB").getcolors(1 << 24)) > 100


def width_choice() -> GemmChoice:
    return choice(width=0.3)


def test_a_gemm_that_was_never_timed_is_drawn_empty_without_complaint(tmp_path: Path) -> None:
    untimed = GemmChoice(tactic="tame", default_tactic="tame")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report.write_page([make_plan(entry(1, untimed, untimed), layout="ep2")], tmp_path / "report.html")
    assert "0 of 2 choices are not the default tactic." in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_words_of_an_incomplete_plan() -> None:
    words = told(make_plan(entry(1), buckets=(1, 8, 64)))
    assert "dep2 is not complete: calls in the buckets 8, 64 run the default tactics." in words
    assert "1 of 3 tuned" in words


def test_a_choice_slower_than_the_default_is_called_so() -> None:
    slow = choice("slow")
    slow = GemmChoice("slow", slow.default_tactic, slow.timings | {"slow": Timing(150.0, 140.0, 160.0)})
    assert "dep2: slower than the default beyond its interval at 8 tokens gemm2." in told(
        make_plan(entry(8, None, slow))
    )


def test_workload_that_cannot_be_made_again_is_left_out() -> None:
    plan = rekeyed(make_plan(entry(1)), distribution="recorded:/nowhere/ids.npy")
    found = {each.name: each for each in sections.Report.of([plan]).sections}
    assert not found["workload"].panels and "dep2 cannot be drawn" in " ".join(found["workload"].words)
    assert "dep2 is left out" in " ".join(found["roofline"].words)


def test_roofs_are_those_measured_and_only_drawn_for_their_gpu(plans: list[Plan]) -> None:
    found = ROOFS["NVIDIA H200"]
    assert found.read_tbps == pytest.approx(MEASURED["roofs"]["read_TBps"], rel=1e-3)
    assert found.dense_tflops == pytest.approx(MEASURED["roofs"]["cublas_fp8_TFLOPS"], rel=1e-3)
    assert "Roofs as measured on one NVIDIA H200: 4.45 TB/s" in told(plans[0])
    assert "No roofs are drawn: none were measured for cpu." in told(make_plan(entry(1)))
    assert "none were measured for NVIDIA H200 beside cpu." in told(plans[0], make_plan(entry(1)))


def test_roofline_points(plans: list[Plan]) -> None:
    (one,) = facts.named([plans[0]])
    best = MEASURED["results"]["DSR1-EP8 g1"]["by_rows_per_expert"]["128"]["interleaved_us"]
    points = {point.bucket: point for point in one.roofline("gemm1")}
    rows, n, k = 32 * 128, 4096, 7168
    assert points[512].tflops == pytest.approx(2 * rows * n * k / min(best.values()) / 1e6)
    weights, scales = 32 * n * k, 32 * (n // 128) * (k // 128) * 4
    activations = rows * (n // 2) + rows * (n // 2 // 128) * 4
    moved = weights + scales + rows * k + rows * (k // 128) * 4 + activations
    assert points[512].intensity == pytest.approx(2 * rows * n * k / moved)


def test_idle_experts_weights_are_not_read() -> None:
    busy = gemm_bytes([5, 0, 3], (256, 128)) - gemm_bytes([8], (256, 128))
    assert busy == 256 * 128 + 2 * 4


def test_gain_takes_the_worst_and_best_ends() -> None:
    timings = {"new": Timing(80.0, 75.0, 90.0), "old": Timing(100.0, 95.0, 120.0)}
    assert facts.gain(GemmChoice("new", "old", timings)) == pytest.approx((0.25, 95 / 90 - 1, 120 / 75 - 1))
    assert facts.gain(GemmChoice("old", "old", timings)) == (0.0, 0.0, 0.0)
    assert facts.gain(GemmChoice("new", "gone", timings)) is None


def test_regret_and_another_plans_cost() -> None:
    kept = choice(default=100.0, other=99.0)
    assert facts.regret(kept) == pytest.approx(1 / 99)
    here = make_plan(entry(1, choice(default=40.0, other=50.0)), entry(8, choice(default=40.0, other=60.0)))
    other = next(tactic for tactic in kept.timings if tactic != kept.default_tactic)
    there = make_plan(entry(4, choice(other)), layout="ep2")
    one, two = facts.named([here, there])
    # gemm2 is the same tactic in both, 100 us.
    assert facts.cost_of_other(one, two, 1) == pytest.approx(10 / 140)
    assert facts.cost_of_other(one, two, 8) == pytest.approx(20 / 140)
    unknown = make_plan(entry(1, choice("never timed here")), layout="ep2")
    assert facts.cost_of_other(one, facts.named([unknown])[0], 1) is None


def test_regime_matters_in_what_the_h200_measured(plans: list[Plan]) -> None:
    dep8, ep8 = facts.named(plans)
    assert facts.comparable(dep8, ep8)
    assert (facts.cost_of_other(dep8, ep8, 512) or 0) > 1.0


def test_plans_are_told_apart() -> None:
    plan = make_plan(entry(1))
    other = rekeyed(plan, distribution="random")
    labels = [one.label for one in facts.named([plan, other, make_plan(entry(1), layout="ep2")])]
    assert labels == ["dep2 balanced", "dep2 random", "ep2"]
    assert [one.label for one in facts.named([plan, plan])] == ["dep2 (1)", "dep2 (2)"]


def test_letters_in_order_of_use() -> None:
    entries = [entry(1 << at, choice(f"tactic{at}"), choice(f"tactic{at}")) for at in range(6)]
    tuned = facts.named([make_plan(*entries), make_plan(entry(1, choice("late"), choice("tactic0")), layout="ep2")])
    assert facts.letters(tuned)["tactic0"] == "A" and facts.letters(tuned)["late"] == "B"
    many = [entry(at + 1, choice(f"{at:02}"), choice(f"{at:02}")) for at in range(30)]
    assert list(facts.letters(facts.named([make_plan(*many)])).values())[25:28] == ["Z", "AA", "AB"]


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["moe-runtime", "report", *map(str, arguments)])
    with pytest.raises(SystemExit) as exit_:
        cli.main()
    return int(exit_.value.code or 0)


def test_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    make_plan(entry(1)).save(tmp_path / "plan.json")
    page, png = tmp_path / "page.html", tmp_path / "page.png"
    assert run(monkeypatch, tmp_path / "plan.json", "-o", page, "--png", png) == 0
    assert page.read_text(encoding="utf-8").startswith("<!doctype html>")
    assert png.read_bytes().startswith(b"\x89PNG")


def test_command_names_a_damaged_plan(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "plan.json").write_text("{")
    assert run(monkeypatch, tmp_path / "plan.json", "-o", tmp_path / "page.html") == 2
    assert "damaged" in capsys.readouterr().err and not (tmp_path / "page.html").exists()


def test_without_matplotlib_the_extra_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def find_spec(name: str, package: str | None = None) -> Any:
        return None if name == "matplotlib" else importlib.util.find_spec(name, package)

    monkeypatch.setattr(report, "find_spec", find_spec)
    with pytest.raises(Unsupported, match=r"pip install 'moe_runtime\[report\]'"):
        report.write_page([make_plan(entry(1))], tmp_path / "report.html")


@pytest.mark.parametrize("plans", [[], [make_plan(entry(1)), make_plan(buckets=(1,))]])
def test_nothing_to_report_on(plans: list[Plan], tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match="plans"):
        report.write_page(plans, tmp_path / "report.html")


def test_output_that_cannot_be_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("moe_runtime.report.page.render", lambda plans: "page")
    with pytest.raises(InvalidArgument, match="output"):
        report.write_page([make_plan(entry(1))], tmp_path / "missing" / "report.html")
