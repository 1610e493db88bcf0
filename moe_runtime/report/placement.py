"""The section on where experts lie: how even the ranks' loads are without the plan's placement and with it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from matplotlib.axes import Axes
from matplotlib.ticker import PercentFormatter

from ..placement import Placement, Placements, imbalance
from .facts import Tuned
from .figures import Panel, Style, series
from .parts import Column, Section, Table
from .style import HATCHES, INK

_WORDS = (
    "Load of the busiest rank over the mean of all: how much longer than needed the others wait for it. Before, each "
    "expert lies once and in order; after, as the placement has it, with a busy expert's load shared out among its "
    "replicas. Loads are those that the placement was made for, not this workload's."
)


def placement_section(tuned: Sequence[Tuned]) -> list[Section]:
    """Nothing where no plan was tuned under a placement."""
    words, panels, tables = [_WORDS], [], []
    for index, one in enumerate(tuned):
        if isinstance(one.placements, str):
            words.append(f"{one.label} cannot be drawn: {one.placements}")
        elif one.placements is not None:
            name, worst = max(one.placements.layers.items(), key=lambda layer: layer[1].balance.before)
            before, after, *_ = worst.balance
            title = f"{one.label}: load of each rank, {name}"
            alt = f"Load over the mean of each rank in layer {name}: at most {before:.2f} before, {after:.2f} after."
            panels.append(Panel(f"placement{index}", title, alt, rank_loads(worst)))
            tables.append(_table(one.label, one.placements))
    if len(words) == 1 and not panels:
        return []
    if panels:
        words.append("Each figure shows the layer that is least even before.")
    return [Section("placement", "Placement of experts", words, panels, tables)]


def _table(label: str, placements: Placements) -> Table:
    balances = {name: layer.balance for name, layer in placements.layers.items()}
    cells = [
        [name, f"{one.before:.3f}", f"{one.after:.3f}", str(one.replicated_experts), str(one.most_replicas)]
        for name, one in balances.items()
    ]
    headings = ("before", "after", "experts with replicas", "most replicas")
    caption = f"{label}: busiest rank over the mean, {placements.num_experts} experts in "
    caption += f"{placements.num_physical_experts} slots on {placements.ep_size} ranks"
    return Table(caption, [Column("layer", False), *map(Column, headings)], cells, folded=len(cells) > 8)


def rank_loads(layer: Placement) -> Callable[[Axes], None]:
    """Bars of each rank's load over the mean, before and after."""

    def draw(axes: Axes) -> None:
        for index, (name, loads) in enumerate((("before", layer.unplaced_rank_loads), ("after", layer.rank_loads))):
            mean = sum(loads) / len(loads)
            style: Style = {"color": series(index), "hatch": HATCHES[index], "label": f"{name}, {imbalance(loads):.2f}"}
            places = [rank + (index - 0.5) * 0.4 for rank in range(len(loads))]
            axes.bar(places, [load / mean for load in loads], 0.37, **style)
        axes.axhline(1, color=INK.light, linewidth=0.8, linestyle="--")
        step = -(-layer.ep_size // 16)
        axes.set_xticks(range(0, layer.ep_size, step))
        axes.set_xlabel("ep rank")
        axes.set_ylabel("load over the mean")
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=None))
        axes.grid(axis="x", visible=False)
        axes.margins(y=0.2)
        axes.legend(loc="upper right", ncols=2)

    return draw
