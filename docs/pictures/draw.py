"""Draws the pictures of docs/concepts.md as SVG, from what the package itself computes.

python docs/pictures/draw.py    # writes them beside this file
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path

from codegen.catalogue import default_entries
from moe_runtime import MoEConfig, Parallel
from moe_runtime.distributions import draw, parse
from moe_runtime.executors.base import MoEProblem
from moe_runtime.tuning.buckets import propose
from moe_runtime.workload import kernel_rows, make_workload

RANKS, TOKENS = 4, 4
SMALL = MoEConfig("picture", hidden_size=128, intermediate_size=128, num_experts=8, top_k=2)
COLOURS = ("#0f766e", "#b45309", "#6d28d9", "#be123c")
INK, PALE, LINE = "#1f2937", "#f3f4f6", "#9ca3af"
CELL = 22


def text(
    x: float, y: float, words: str, size: int = 14, *, anchor: str = "start", fill: str = INK, bold: bool = False
) -> str:
    weight = ' font-weight="600"' if bold else ""
    where = f'x="{x:g}" y="{y:g}" font-size="{size}" text-anchor="{anchor}"'
    return f'<text {where} fill="{fill}"{weight}>{escape(words)}</text>'


def box(x: float, y: float, width: float, height: float, fill: str = PALE, stroke: str = LINE) -> str:
    return f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="4" fill="{fill}" stroke="{stroke}"/>'


def line(x1: float, y1: float, x2: float, y2: float, colour: str, width: float = 1.5) -> str:
    return f'<line x1="{x1:g}" y1="{y1:g}" x2="{x2:g}" y2="{y2:g}" stroke="{colour}" stroke-width="{width:g}"/>'


def arrow(x1: float, y1: float, x2: float, y2: float, colour: str = LINE) -> str:
    angle = math.atan2(y2 - y1, x2 - x1)
    wings = (f"{x2 - 9 * math.cos(angle + turn):.1f},{y2 - 9 * math.sin(angle + turn):.1f}" for turn in (-0.4, 0.4))
    return line(x1, y1, x2, y2, colour) + f'<polygon points="{x2:g},{y2:g} {" ".join(wings)}" fill="{colour}"/>'


def picture(width: int, height: int, title: str, parts: Sequence[str]) -> str:
    """White behind all, so that it is legible on a dark page too."""
    begin = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img"'
    head = (
        f'{begin} font-family="Helvetica, Arial, sans-serif">',
        f"<title>{escape(title)}</title>",
        f'<rect width="{width}" height="{height}" fill="#ffffff"/>',
        text(20, 30, title, 17, bold=True),
    )
    return "\n".join([*head, *parts, "</svg>\n"])


def regime(parallel: Parallel, title: str, formula: str) -> str:
    """Tokens on the left, each expert's rows on the right."""
    experts, k, local = SMALL.num_experts, SMALL.top_k, SMALL.num_experts // RANKS
    ids = draw(parse("balanced"), SMALL, kernel_rows(TOKENS, parallel), 0).tolist()
    rows = [[index for index, chosen in enumerate(ids) if expert in chosen] for expert in range(experts)]
    seen = make_workload(SMALL, parallel, TOKENS, "balanced", dispatch="alltoall").rows_per_expert.tolist()
    assert [len(each) for each in rows[:local]] == seen, "the picture shows what rank 0's kernels see"

    def tokens(x: float, y: float, indices: Sequence[int]) -> list[str]:
        """Lettered and coloured by the rank that they are from; under ep all ranks have the same."""
        parts = []
        for place, index in enumerate(indices):
            home, own = divmod(index, TOKENS)
            colour, letter = (COLOURS[home], "abcd"[home]) if parallel.use_dp else (INK, "t")
            left = x + CELL * place
            parts += [box(left, y, CELL - 2, CELL - 2, colour, colour)]
            parts += [text(left + CELL / 2 - 1, y + 15, f"{letter}{own}", 10, anchor="middle", fill="#ffffff")]
        return parts

    parts = [
        text(20, 52, f"n = {TOKENS} tokens per rank, top_k k = {k}, {experts} experts E, {RANKS} ranks"),
        text(20, 84, "what attention leaves on each rank", 12),
        text(430, 84, "what each rank's experts multiply", 12),
    ]
    tops = [96 + 84 * rank for rank in range(RANKS)]
    for rank, top in enumerate(tops):
        parts += [box(20, top, 180, 68), text(30, top + 20, f"rank {rank}", 13, bold=True)]
        first = rank * TOKENS if parallel.use_dp else 0
        parts += tokens(30, top + 34, range(first, first + TOKENS))
        parts += [box(430, top, 310, 68), text(440, top + 20, f"rank {rank}", 13, bold=True)]
        for place in range(local):
            expert, left = rank * local + place, 440 + 150 * place
            parts += [text(left, top + 50, f"expert {expert}", 11), *tokens(left + 52, top + 34, rows[expert])]
        if parallel.use_dp:
            parts += [arrow(202, top + 34, 426, other + 34, COLOURS[rank]) for other in tops]
        else:
            parts += [arrow(202, top + 34, 426, top + 34, INK)]
            parts += [text(314, top + 26, "skips other ids", 12, anchor="middle")]
    parts.append(text(20, tops[-1] + 98, f"rows per local expert: {formula} = {len(rows[0])}", 15, bold=True))
    return picture(760, tops[-1] + 116, title, parts)


def dep() -> str:
    local = SMALL.num_experts // RANKS
    formula = f"n·k / local experts L = {TOKENS}·{SMALL.top_k} / {local}"
    return regime(Parallel("dep", RANKS), f"dep{RANKS}: every rank has tokens of its own", formula)


def ep() -> str:
    formula = f"n·k / experts E = {TOKENS}·{SMALL.top_k} / {SMALL.num_experts}"
    return regime(Parallel("ep", RANKS), f"ep{RANKS}: every rank has the same tokens", formula)


def buckets() -> str:
    """The buckets of a real layer, and which of them serves a call."""
    problem, most, call = MoEProblem(MoEConfig.preset("qwen3-235b"), Parallel.parse("dep2")), 8192, 600
    kernels = [entry.variant for entry in default_entries("sm_90a") if entry.variant.format == "fp8_block"]
    tiles = sorted({kernel.token_tile for kernel in kernels})
    found = propose(problem, most, tiles)
    serving = max(bucket for bucket in found if bucket <= call)

    def at(tokens: float) -> float:
        return round(40 + 860 * math.log2(tokens) / math.log2(most), 1)

    parts = [text(20, 52, "A bucket's tactics serve every call up to the next bucket.")]
    for index, (bucket, end) in enumerate(zip(found, (*found[1:], most), strict=True)):
        chosen = bucket == serving
        parts.append(box(at(bucket), 108, max(at(end) - at(bucket), 3), 30, "#99f6e4" if chosen else PALE))
        parts.append(text(at(bucket), 156 + 16 * (index % 2), str(bucket), 12, anchor="middle", bold=chosen))
    called = f"a call of {call} tokens per rank takes bucket {serving}"
    parts += [
        arrow(at(call), 84, at(call), 106, COLOURS[3]),
        text(at(call), 78, called, 13, anchor="middle", fill=COLOURS[3]),
        text(900, 196, "tokens per rank, logarithmic", 12, anchor="end"),
    ]
    for tile in tiles:
        full = at(tile / problem.mean_rows(kernel_rows(1, problem.parallel)))
        parts += [line(full, 206, full, 222, COLOURS[2], 2)]
        parts += [text(full, 238, str(tile), 12, anchor="middle", fill=COLOURS[2])]
    parts.append(
        text(20, 262, "Violet: here the rows of an expert fill a tile of so many; beyond, they overflow it.", 13)
    )
    title = f"Buckets of Qwen3-235B under {problem.parallel}, balanced routing, up to {most} tokens per rank"
    return picture(940, 280, title, parts)


# A step, two lines on it, and what becomes of those that leave.
STEPS = (
    ("every tactic", "of one GEMM", "in one bucket", ""),
    ("can it run?", "shape, activation,", "weights", "refused"),
    ("can it win?", "cost model: least", "possible time", "pruned"),
    ("is it right?", "in a worker process,", "against a reference", "quarantined"),
    ("heats", "by turns; the faster", "half, until 3 stay", "slower"),
    ("final", "those few again,", "more rounds", ""),
    ("the rule", "surely faster by 1 %,", "or the default stays", ""),
)


def race() -> str:
    parts = []
    for index, (head, first, second, leaves) in enumerate(STEPS):
        left = 20 + 152 * index
        middle = left + 66
        parts += [box(left, 50, 132, 74), text(middle, 72, head, 14, anchor="middle", bold=True)]
        parts += [text(middle, 92, first, 12, anchor="middle"), text(middle, 109, second, 12, anchor="middle")]
        if index:
            parts.append(arrow(left - 19, 87, left - 2, 87, INK))
        if leaves:
            parts += [arrow(middle, 126, middle, 150), text(middle, 166, leaves, 12, anchor="middle", fill="#6b7280")]
    parts += [
        text(
            20, 200, "The default tactic is never pruned and stays in every heat. Where several tactics of a GEMM", 13
        ),
        text(20, 218, "are about as fast, pairs for both GEMMs race on the whole layer by the same rule.", 13),
    ]
    return picture(1086, 236, "How one GEMM's tactic is chosen", parts)


PICTURES: dict[str, Callable[[], str]] = {"dep.svg": dep, "ep.svg": ep, "buckets.svg": buckets, "race.svg": race}


def main() -> None:
    for name, drawn in PICTURES.items():
        (Path(__file__).parent / name).write_text(drawn())


if __name__ == "__main__":
    main()
