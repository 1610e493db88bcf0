"""What benchmarks/tuner.py found, as tables."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.table import Table


def tables(name: str, result: Mapping[str, Any]) -> Iterable[Table | str]:
    yield (
        f"{name}: tuned {len(result['buckets'])} buckets in {result['tune_seconds']:.0f} s; "
        f"regret {_sentence(result['regret'])}; between buckets {_sentence(result['transfer'])}; "
        f"{len(result['flips']['flipped'])} of {result['flips']['places']} winners flipped, "
        f"which loses {result['flips']['lost']:.2%} there and {result['flips']['lost_on_average']:.2%} on average"
    )
    headings = ("tokens", "default us", "plan us", "gain", "best us", "regret", "bound")
    table = Table(*headings, title=f"{name}: against the default")
    for point in result["points"]:
        times = [f"{point[key]:.1f}" for key in ("default_us", "us", "best_us")]
        gain, regret, bound = f"{point['gain']:+.2%}", f"{point['regret']:+.2%}", f"{point['bound']:.2%}"
        table.add_row(str(point["tokens"]), times[0], times[1], gain, times[2], regret, bound)
    yield table
    for distribution, points in result["skew"].items():
        yield comparison(f"{name}: {distribution}, tuned on balanced and on it", points)
    yield timing(name, result["seconds"], result["skipped"])


def timing(name: str, seconds: Mapping[str, float], skipped: Sequence[str]) -> str:
    parts = [f"{part} {took:.0f} s" for part, took in seconds.items()]
    return f"{name}: " + ", ".join(parts + [f"{part} skipped for lack of time" for part in skipped])


def _sentence(summary: Mapping[str, float]) -> str:
    mean, worst = summary["mean"], summary["worst"]
    return f"mean {mean:.2%} (at most {summary['mean_bound']:.2%}), worst {worst:.2%} ({summary['worst_bound']:.2%})"


def comparison(title: str, points: Sequence[Mapping[str, Any]]) -> Table:
    table = Table("tokens", "before us", "after us", "delta", "tokens/s a GPU", title=title)
    for point in points:
        before, after = (f"{us:.1f}" for us in point["us"])
        rate = f"{point['tokens_per_second_per_gpu'][1]:,.0f}"
        table.add_row(str(point["tokens"]), before, after, f"{point['delta']:+.2%}", rate)
    return table
