"""The report's figures, by matplotlib: each is a panel that draws itself on one pair of axes."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.textpath import TextPath
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, PercentFormatter
from matplotlib.transforms import Affine2D

from ..errors import InvalidArgument
from ..executors.base import GEMMS, Gemm
from ..roofs import Roofs
from ..tuning.plan import Timing
from .facts import Tuned, cost_of_other, gain
from .style import COLOURS, DASHES, HATCHES, INK, MARKERS, ON_COLOUR, PAGE, RC, SERIES, SOFT

SLOWEST_SHOWN = 2.0
"""A tactic this many times slower than the chosen one leaves the close view: what decides happens below."""


@dataclass(frozen=True)
class Panel:
    """One figure. name: unique in the page. alt: what a person who cannot see it should know. wide: a full row."""

    name: str
    title: str
    alt: str
    draw: Callable[[Axes], None]
    wide: bool = False
    height: float = 3.6


Style = dict[str, Any]
Letters = Mapping[str, str]
"""Letter by tactic that some plan chose."""


def series(index: int) -> str:
    return SERIES[index % len(SERIES)].light


def tactic_colour(letters: Letters, tactic: str) -> str:
    return series(list(letters).index(tactic))


def times(one: Tuned, gemm: Gemm, letters: Letters, close: bool) -> Callable[[Axes], None]:
    """Time against tokens per tactic: in microseconds, or `close`, over the chosen tactic's time."""

    def draw(axes: Axes) -> None:
        timed = [(bucket, choice) for bucket, choice in one.choices(gemm) if choice.us is not None]
        tokens = [bucket for bucket, _ in timed]
        scale = {bucket: choice.us if close and choice.us else 1.0 for bucket, choice in timed}
        others = dict.fromkeys(tactic for _, choice in timed for tactic in choice.timings if tactic not in letters)
        for index, tactic in enumerate([*others, *letters]):
            points = [_over(choice.timings.get(tactic), scale[bucket]) for bucket, choice in timed]
            if all(math.isnan(us) for us, _, _ in points):
                continue
            us, low, high = zip(*points, strict=True)
            if tactic in letters:
                colour = tactic_colour(letters, tactic)
                axes.fill_between(tokens, low, high, color=colour, alpha=0.25, linewidth=0)
                axes.plot(tokens, us, color=colour, linewidth=1.1, zorder=3)
                axes.plot(tokens, us, "o", color=PAGE.light, markersize=7, zorder=4)
                axes.plot(tokens, us, **_letter(letters[tactic], colour), zorder=5)
            else:
                label = f"{len(others)} never chosen" if index == 0 else None
                axes.plot(tokens, us, color=SOFT.light, linewidth=0.6, marker=".", markersize=2.5, label=label)
        chosen = [_over(choice.timings[choice.tactic], scale[bucket])[0] for bucket, choice in timed]
        axes.plot(tokens, chosen, color=INK.light, linewidth=7, alpha=0.16, label="envelope of the chosen", zorder=2)
        for (bucket, choice), height in zip(timed, chosen, strict=True):
            axes.plot(bucket, height, "o", color=tactic_colour(letters, choice.tactic), markersize=10, zorder=6)
            axes.plot(bucket, height, **_letter(letters[choice.tactic], ON_COLOUR.light), zorder=7)
        default = [(at, choice.default_us / scale[at]) for at, choice in timed if choice.default_us]
        if default:
            axes.plot(*zip(*default, strict=True), color=INK.light, linewidth=1.2, linestyle="--", label="default")
        _token_axis(axes, tokens)
        if close:
            axes.set_ylim(0.95, SLOWEST_SHOWN)
            axes.set_ylabel("time / time of the chosen")
        else:
            axes.set_yscale("log")
            axes.set_ylabel("microseconds")
            _log_ticks(axes.yaxis, *axes.get_ylim())
            axes.legend(loc="upper left")

    return draw


def _over(timing: Timing | None, scale: float) -> tuple[float, float, float]:
    """(us, low, high) / scale; not-a-numbers, which leave a gap in a line, where nothing was timed."""
    return (math.nan,) * 3 if timing is None else (timing.us / scale, timing.low / scale, timing.high / scale)


def _letter(letter: str, colour: str) -> Style:
    """A letter as the marker of a line that is not drawn."""
    outline = TextPath((0, 0), letter, prop=FontProperties(weight="bold"))
    middle = outline.get_extents().get_points().mean(axis=0)
    centred = outline.transformed(Affine2D().translate(*-middle))
    return {
        "marker": centred,
        "color": colour,
        "linestyle": "",
        "markersize": 4.5 * len(letter) + 1,
        "markeredgewidth": 0,
    }


def tactic_map(tuned: Sequence[Tuned], letters: Letters) -> Callable[[Axes], None]:
    """A bar a plan and GEMM along the tokens per rank; a call is served by the tactic whose piece it lies in."""
    bars = [(one, gemm) for one in tuned for gemm in GEMMS]

    def draw(axes: Axes) -> None:
        buckets = sorted({bucket for one in tuned for bucket in one.plan.buckets})
        start, end = buckets[0], 1.4 * buckets[-1]
        for place, (one, gemm) in enumerate(bars):
            pieces: list[tuple[float, str]] = []
            for bucket in one.plan.buckets:
                choice = one.choice_at(bucket, gemm)
                tactic = "" if choice is None else choice.tactic
                if not pieces or pieces[-1][1] != tactic:
                    pieces.append((bucket if pieces else start, tactic))
            for (left, tactic), (right, _) in pairwise([*pieces, (end, "")]):
                if not tactic:
                    continue
                colour = tactic_colour(letters, tactic)
                axes.barh(place, right - left, 0.78, left=left, color=colour, edgecolor=PAGE.light, linewidth=1)
                middle = math.sqrt(left * right)
                text: Style = {"color": ON_COLOUR.light, "ha": "center", "va": "center", "weight": "bold"}
                axes.text(middle, place, letters[tactic], **text)
        _token_axis(axes, buckets, most=18)
        axes.set_xlim(start, end)
        axes.set_yticks(range(len(bars)), [f"{one.label} {gemm}" for one, gemm in bars])
        axes.invert_yaxis()
        axes.grid(False)

    return draw


def roofline(tuned: Sequence[Tuned], gemm: Gemm, roofs: Roofs | None) -> Callable[[Axes], None]:
    """Achieved TFLOP/s of the chosen tactics against FLOP per byte, under the measured roofs where they are known."""

    def draw(axes: Axes) -> None:
        highest = 0.0
        for index, one in enumerate(tuned):
            points = one.roofline(gemm)
            if not points:
                continue
            intensity, tflops = [at.intensity for at in points], [at.tflops for at in points]
            style: Style = {"linestyle": DASHES[index % len(DASHES)], "marker": MARKERS[index % len(MARKERS)]}
            size = 7.5 - 1.5 * min(index, 2)  # plans that coincide stay visible
            axes.plot(intensity, tflops, color=series(index), markersize=size, linewidth=1, label=one.label, **style)
            highest = max(highest, *intensity)
        axes.set_xscale("log")
        axes.set_yscale("log")
        if roofs is not None:
            low, high = axes.get_xlim()
            ridge = roofs.dense_tflops / roofs.read_tbps
            corner = min(max(ridge, low), high)
            line = [low, corner, max(high, ridge)]
            roof = [min(at * roofs.read_tbps, roofs.dense_tflops) for at in line]
            axes.plot(line, roof, color=INK.light, linewidth=1.6)
            axes.annotate(
                f"{roofs.dense_tflops:,.0f} TFLOP/s, {roofs.read_tbps} TB/s",
                (line[-1], roofs.dense_tflops), textcoords="offset points", xytext=(0, 5), ha="right", fontsize=9,
            )  # fmt: skip
        axes.set_xlabel("FLOP per byte moved")
        axes.set_ylabel("TFLOP/s achieved")
        _log_ticks(axes.xaxis, *axes.get_xlim())
        _log_ticks(axes.yaxis, *axes.get_ylim())
        axes.legend(loc="lower right")

    return draw


def rows_against_tokens(tuned: Sequence[Tuned]) -> Callable[[Axes], None]:
    """Mean rows per local expert against tokens per rank, with a band from the idlest expert to the busiest."""

    def draw(axes: Axes) -> None:
        for index, one in enumerate(tuned):
            counts = [(bucket, rows.float()) for bucket, rows in one.rows_per_expert.items()]
            tokens = [bucket for bucket, _ in counts]
            colour, dashes = series(index), DASHES[index % len(DASHES)]
            low, high = [int(rows.min()) for _, rows in counts], [int(rows.max()) for _, rows in counts]
            axes.fill_between(tokens, low, high, color=colour, alpha=0.2, linewidth=0)
            style: Style = {"marker": MARKERS[index % len(MARKERS)], "markersize": 4, "linestyle": dashes}
            axes.plot(tokens, [float(rows.mean()) for _, rows in counts], color=colour, label=one.label, **style)
        _token_axis(axes, sorted({bucket for one in tuned for bucket in one.rows_per_expert}))
        axes.set_yscale("symlog", linthresh=1)
        axes.set_ylim(0, 1.5 * max(int(rows.max()) for one in tuned for rows in one.rows_per_expert.values()) + 1)
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
        axes.set_ylabel("rows per expert")
        axes.legend(loc="upper left")

    return draw


def rows_by_expert(tuned: Sequence[Tuned], num_tokens: int) -> Callable[[Axes], None]:
    """Rows of each local expert in the bucket that serves num_tokens, the busiest first."""

    def draw(axes: Axes) -> None:
        for index, one in enumerate(tuned):
            rows = one.rows_per_expert[num_tokens].sort(descending=True).values.tolist()
            style: Style = {"linestyle": DASHES[index % len(DASHES)], "linewidth": 1.6, "baseline": None}
            axes.stairs(rows, [at + 0.5 for at in range(len(rows) + 1)], color=series(index), label=one.label, **style)
            marker: Style = {"linestyle": "", "marker": MARKERS[index % len(MARKERS)], "markersize": 4}
            every = range(0, len(rows), max(1, len(rows) // 8))
            axes.plot([at + 1 for at in every], [rows[at] for at in every], color=series(index), **marker)
        axes.set_ylim(bottom=0)
        axes.set_xlabel("local expert, the busiest first")
        axes.set_ylabel("rows")
        axes.legend(loc="best")

    return draw


def gains(one: Tuned) -> Callable[[Axes], None]:
    """Bars of each GEMM's gain over its default tactic by bucket, with the interval."""
    bars = [[gain(choice) for _, choice in one.choices(gemm)] for gemm in GEMMS]
    return _bars([bucket for bucket, _ in one.choices(GEMMS[0])], dict(zip(GEMMS, bars, strict=True)), "gain")


def foreign_costs(one: Tuned, others: Sequence[Tuned]) -> Callable[[Axes], None]:
    """Bars of what the other plans' tactics would cost this one's layer by bucket."""
    buckets = [entry.bucket for entry in one.plan.entries]
    found = {
        f"with the tactics of {other.label}": [cost_of_other(one, other, bucket) for bucket in buckets]
        for other in others
    }
    bars = {name: [None if cost is None else (cost, cost, cost) for cost in row] for name, row in found.items()}
    return _bars(buckets, bars, "slower by")


def _bars(
    buckets: Sequence[int], bars: Mapping[str, Sequence[tuple[float, float, float] | None]], quantity: str
) -> Callable[[Axes], None]:
    """(value, low, high) by name and bucket; a cross where a value is not known."""

    def draw(axes: Axes) -> None:
        width = 0.8 / len(bars)
        for index, (name, row) in enumerate(bars.items()):
            places = [at + (index - (len(bars) - 1) / 2) * width for at in range(len(row))]
            known = [(place, bar) for place, bar in zip(places, row, strict=True) if bar is not None]
            if known:
                style: Style = {"color": series(index), "hatch": HATCHES[index % len(HATCHES)], "label": name}
                axes.bar([place for place, _ in known], [bar[0] for _, bar in known], width * 0.92, **style)
            for place, (value, low, high) in known:
                if low < high:
                    axes.errorbar(
                        place, value, [[value - low], [high - value]], color=INK.light, linewidth=1, capsize=2
                    )
            unknown = [place for place, bar in zip(places, row, strict=True) if bar is None]
            axes.plot(unknown, [0.0] * len(unknown), "x", color=SOFT.light, markersize=4)
        axes.axhline(0, color=INK.light, linewidth=0.8)
        axes.set_xticks(range(len(buckets)), [_tokens(bucket) for bucket in buckets])
        axes.tick_params(axis="x", rotation=45 if len(buckets) > 9 else 0)
        axes.set_xlabel("tokens per rank")
        axes.set_ylabel(quantity)
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=None))
        axes.grid(axis="x", visible=False)
        low_end, high_end = axes.get_ylim()
        if high_end - low_end < 0.02:
            axes.set_ylim(min(low_end, -0.005), max(high_end, 0.015))
        if axes.containers:
            axes.legend(loc="best")

    return draw


def _token_axis(axes: Axes, buckets: Sequence[int], most: int = 9) -> None:
    """Tokens per rank, with a tick on a bucket at most every factor of two, `most` in all."""
    axes.set_xscale("log", base=2)
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.tick_params(axis="x", which="minor", length=0)
    shown: list[int] = []
    for bucket in buckets:
        if not shown or bucket >= 1.9 * shown[-1]:
            shown.append(bucket)
    shown = shown[:: math.ceil(len(shown) / most)]
    axes.set_xticks(shown, [_tokens(bucket) for bucket in shown])
    axes.set_xlabel("tokens per rank")


def _log_ticks(axis: Axis, low: float, high: float) -> None:
    """Plain numbers at 1, 10, 100 ..., with 2 and 5 between where there would be too few."""
    subs = (1.0, 2.0, 5.0) if high < 50 * low else (1.0,)
    axis.set_major_locator(LogLocator(subs=subs))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    axis.set_minor_formatter(NullFormatter())


def _tokens(count: int) -> str:
    return f"{count // 1024}k" if count >= 1024 and count % 1024 == 0 else str(count)


def svg(panel: Panel) -> str:
    """The panel as an SVG element for the inside of an HTML page: no ids that another panel has, theme's colours."""
    buffer = io.StringIO()
    with rc_context(RC | {"svg.hashsalt": panel.name}):
        figure = Figure(figsize=(11 if panel.wide else 5.4, panel.height), layout="constrained")
        panel.draw(figure.add_subplot())
        bare = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(buffer, format="svg", transparent=True, metadata=bare)
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r'\s(?:xmlns(?::\w+)?|version)="[^"]*"', "", text).replace("xlink:href", "href")
    text = re.sub(r'\bid="|(?<=href=")#|url\(#', lambda found: f"{found[0]}{panel.name}-", text)
    for colour in COLOURS:
        text = text.replace(colour.light, f"var(--{colour.name})")
    return text


def png(panels: Sequence[Panel], key: Sequence[str], path: Path) -> None:
    """All panels on one white picture, two a row, and under them `key`, a line a letter.

    Raises InvalidArgument where the file cannot be written.
    """
    rows: list[list[Panel]] = []
    for panel in panels:
        beside = rows and len(rows[-1]) == 1 and not (panel.wide or rows[-1][0].wide)
        rows[-1].append(panel) if beside else rows.append([panel])
    key_height = 0.4 + 0.2 * len(key)
    heights = [max(panel.height for panel in row) + 0.3 for row in rows] + [key_height]
    with rc_context(RC):
        figure = Figure(figsize=(12, sum(heights)), layout="constrained")
        grid = figure.add_gridspec(len(heights), 2, height_ratios=heights)
        for place, row in enumerate(rows):
            for column, panel in enumerate(row):
                axes = figure.add_subplot(grid[place, :] if panel.wide else grid[place, column])
                axes.set_title(panel.title)
                panel.draw(axes)
        words = figure.add_subplot(grid[len(rows), :])
        words.set_axis_off()
        words.text(0, 1, "\n".join(key), va="top", family="monospace", fontsize=9)
        try:
            figure.savefig(path, format="png", dpi=110, facecolor="white")
        except OSError as error:
            raise InvalidArgument(
                "png", path, "a file in a folder that can be written", f"({error.strerror})"
            ) from error
