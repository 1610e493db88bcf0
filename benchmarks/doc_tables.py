"""The tables of docs/, rendered from benchmarks/results/h200, the registry of formats and the kernels' catalogue.

python -m benchmarks.doc_tables            # writes them into docs/*.md
python -m benchmarks.doc_tables --print    # only shows them
"""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Annotated, Any

import typer

from benchmarks.ranks import worst_error
from benchmarks.summary import FORMAT_CASES, RESULTS, ROOT, load, tables
from codegen.arch import ARCHES
from codegen.catalogue import select
from codegen.rules import NOT_ON_BLACKWELL
from moe_runtime.formats import FORMATS, Extra, Tokens, Weights

DOCS = ROOT / "docs"
MARK = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)

WEIGHTS = {
    Weights.FP8_BLOCK: "e4m3, fp32 per 128x128",
    Weights.MXFP4: "e2m1, ue8m0 per 32",
    Weights.NVFP4: "e2m1, e4m3 per 16, fp32 per expert",
    Weights.BF16: "bf16",
}
TOKENS = {
    Tokens.FP8_BLOCK: "e4m3, fp32 per 1x128",
    Tokens.BF16: "bf16",
    Tokens.FP8: "e4m3, one fp32",
    Tokens.MXFP8: "e4m3, ue8m0 per 32",
    Tokens.NVFP4: "e2m1, e4m3 per 16, one fp32",
}
EXTRAS = {
    Extra.BIAS: "bias",
    Extra.ALPHA: "alpha",
    Extra.BETA: "beta",
    Extra.CLAMP: "clamp",
    Extra.OUTPUT_SCALES: "output scales",
}


def table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def encodings() -> str:
    return table(
        ("format", "weights", "bytes a weight", "tokens", "per expert beside them", "sizes are multiples of"),
        (
            (
                f"`{name}`",
                WEIGHTS[format.weights],
                f"{format.weights.bytes_per_value:.4g}",
                TOKENS[format.tokens],
                ", ".join(words for extra, words in EXTRAS.items() if extra in format.extras) or "none",
                str(format.multiple),
            )
            for name, format in FORMATS.items()
        ),
    )


def archs() -> str:
    """Kernels of each format and arch; those that are not linked into a library have never run."""

    def cell(name: str, arch: str) -> str:
        if ARCHES[arch].links:
            kernels = select(arch, FORMATS[name].weight_layout.name.lower())
            return f"layers run, kernels: {sum(not entry.yardstick for entry in kernels)}"
        kernels = select(arch, name)
        return f"compiled only, kernels: {len(kernels)}" if kernels else "none of its own"

    return table(("format", *ARCHES), ((f"`{name}`", *(cell(name, arch) for arch in ARCHES)) for name in FORMATS))


def not_on_blackwell() -> str:
    return "\n".join(f"- `{format}`: {reason}." for format, reason in NOT_ON_BLACKWELL.items())


def accuracy() -> str:
    points = load("formats")["points"]

    def row(name: str) -> tuple[str, ...]:
        errors = [point["error"] for point in points if point["format"] == name]
        return f"`{name}`", str(len(errors)), f"{statistics.median(errors):.1e}", f"{max(errors):.1e}"

    return table(("format", "layers", "median error", "worst error"), map(row, FORMATS))


def roofs() -> str:
    """The better of both shares: bytes bound a layer of few tokens, products one of many."""
    points = load("formats")["points"]
    parts = []
    for case, title in FORMAT_CASES.items():
        shares: dict[str, dict[int, float]] = {}
        for point in points:
            if point["case"] == case:
                share = max(point["byte_roof"], point["rate_roof"])
                shares.setdefault(point["format"], {})[point["tokens"]] = share
        counts = sorted({count for by_tokens in shares.values() for count in by_tokens})
        rows = ((f"`{name}`", *(f"{by_tokens[n]:.0%}" for n in counts)) for name, by_tokens in shares.items())
        parts.append(table((title, *map(str, counts)), rows))
    return "\n\n".join(parts)


def tuner() -> str:
    rows = []
    for name in ("tuner-qwen3-235b", "tuner-deepseek-r1"):
        for case, found in load(name)["cases"].items():
            regret, default, flips = found["regret"], found["default"], found["flips"]
            rows.append(
                (
                    case.replace(":", ", "),
                    f"{found['tune_seconds']:.0f} s, {len(found['buckets'])} buckets",
                    f"{regret['mean']:.1%} / {regret['worst']:.1%}",
                    f"{default['mean']:+.1%} / {default['worst']:+.1%}",
                    f"{len(flips['flipped'])} of {flips['places']}, {flips['lost_on_average']:.2%}",
                )
            )
    headings = (
        "layer, random routing",
        "tuning",
        "loss to the best, mean / worst",
        "gain over the default, mean / worst",
        "winners that differ in a second tune, loss by it",
    )
    return table(headings, rows)


def crossed() -> str:
    """Whole layers with a plan that was tuned for something else and with their own, by tokens per rank."""
    parts = []
    for name in ("tuner-qwen3-235b", "tuner-deepseek-r1"):
        for model, comparisons in load(name)["cross"].items():
            for title, points in comparisons.items():
                counts = [str(point["tokens"]) for point in points]
                before, after = ([f"{point['us'][side]:.0f}" for point in points] for side in (0, 1))
                gains = [f"{point['delta']:+.1%}" for point in points]
                rows = (("before: us", *before), ("after: us", *after), ("more tokens/s", *gains))
                parts.append(table((f"{model}, {title}", *counts), rows))
    return "\n\n".join(parts)


def ranks() -> str:
    """Layers over several GPUs, in microseconds of the slowest one."""
    parts = []
    for path in sorted(RESULTS.glob("ranks-*.json")):
        found = load(path.stem)
        rows = (_ranks_row(tokens, point) for tokens, point in found["results"].items())
        headings = (
            f"{found['model']}, {found['parallel']}: tokens per rank",
            "error",
            "dispatch, experts, combine",
            "fixed size",
            "in 2 chunks (overlap saves)",
            "dispatch GB/s (of NCCL's)",
            "combine GB/s (of NCCL's)",
        )
        parts.append(table(headings, rows))
    return "\n\n".join(parts)


def _ranks_row(tokens: str, point: Mapping[str, Any]) -> tuple[str, ...]:
    exchange, chunks = point["exchange"], point["chunks"].get("2")
    speeds = ("", "")
    if exchange is not None:
        speeds = (
            f"{exchange['GBps']['exchange']:.3g} ({exchange['of_nccl']:.2f})",
            f"{exchange['GBps']['back']:.3g} ({exchange['back_of_nccl']:.2f})",
        )
    return (
        tokens,
        f"{worst_error(point):.1e}",
        ", ".join(f"{us:.0f}" for us in point["us"].values()),
        f"{point['fixed_us']:.0f}",
        "" if chunks is None else f"{chunks['overlapped']:.0f} ({chunks['gained']:.0%})",
        *speeds,
    )


def host() -> str:
    return table(("one eager call", "us"), ((what, f"{us:.1f}") for what, us in load("host_overhead")["us"].items()))


def peers() -> str:
    """Time of ours over time of theirs: below 1 ours is faster."""
    results = load("peers")["results"]
    names = dict.fromkeys(name for point in results for name in point["ratios"])
    rows = (
        (
            point["label"],
            str(point["rows_per_expert"]),
            f"{point['us']:.0f}",
            *(f"{point['ratios'][name]:.2f}" if name in point["ratios"] else "" for name in names),
        )
        for point in results
    )
    return table(("GEMM", "rows per expert", "ours: us", *names), rows)


def provenance() -> str:
    rows = []
    for path in sorted(RESULTS.glob("*.json")):
        found = json.loads(path.read_text())["environment"]
        rows.append((f"`{path.name}`", found["gpu"], found["torch"], found["commit"], found["library_hash"]))
    return table(("file", "GPU", "torch", "kernels of commit", "library"), rows)


SECTIONS: Mapping[str, Callable[[], str]] = {
    "encodings": encodings,
    "archs": archs,
    "not_on_blackwell": not_on_blackwell,
    "accuracy": accuracy,
    "measured": tables,
    "roofs": roofs,
    "tuner": tuner,
    "crossed": crossed,
    "ranks": ranks,
    "host": host,
    "peers": peers,
    "provenance": provenance,
}


def with_sections(page: str) -> str:
    """A page's text with what stands between `<!-- table: NAME -->` and `<!-- end -->` replaced."""
    return MARK.sub(lambda found: f"{found[1]}{SECTIONS[found[2]]()}\n{found[3]}", page)


def main(show: Annotated[bool, typer.Option("--print", help="Show the tables and write nothing.")] = False) -> None:
    if show:
        print("\n\n".join(section() for section in SECTIONS.values()))
        return
    for path in sorted(DOCS.rglob("*.md")):
        path.write_text(with_sections(path.read_text()))


if __name__ == "__main__":
    typer.run(main)
