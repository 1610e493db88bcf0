"""The report's sections: words, figures and the tables that say the same in numbers."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ..executors.base import GEMMS, Gemm
from ..roofs import ROOFS, Roofs
from ..tables import short_name
from ..tuning import GemmChoice, Plan
from . import figures
from .facts import Tuned, comparable, cost_of_other, gain, layer_gain, letters, named, regret
from .figures import Panel
from .parts import Column, Section, Table, percent, us
from .placement import placement_section


@dataclass(frozen=True)
class Report:
    """letters: by tactic that some plan chose."""

    tuned: Sequence[Tuned]
    letters: figures.Letters
    sections: Sequence[Section]

    @classmethod
    def of(cls, plans: Sequence[Plan]) -> Report:
        tuned = named(plans)
        chosen = letters(tuned)
        sections = [
            _plans(tuned),
            _tactics(tuned, chosen),
            _map(tuned, chosen),
            _gains(tuned, chosen),
            _times(tuned, chosen),
            _regret(tuned, chosen),
            _roofline(tuned),
            _workload(tuned),
            *placement_section(tuned),
        ]
        return cls(tuned, chosen, sections)


TOKENS, GEMM, PLAN, TACTIC = (
    Column("tokens"),
    Column("GEMM", False),
    Column("plan", False),
    Column("tactic", False),
)


def _named(tactic: str, one: Tuned, chosen: figures.Letters) -> str:
    """A tactic in a table: its letter, where it has one, and what tells it apart."""
    short = short_name(tactic)
    return f"{chosen[tactic]}  {short}" if tactic in chosen else short


def _plans(tuned: Sequence[Tuned]) -> Section:
    words = [sentence for one in tuned for sentence in _findings(one)]
    facts = [
        [
            ("GPU", key.device),
            ("layer", f"hidden {key.hidden_size:,}, intermediate {key.intermediate_size:,}, {key.format}"),
            ("experts", f"{key.num_experts}, top {key.top_k}, {one.problem.num_local_experts} on this rank"),
            ("routing", key.routing),
            ("dispatch", key.dispatch),
            ("distribution", f"{key.distribution}, samples per bucket: {one.plan.samples}, seed {one.plan.seed}"),
            ("placement", f"{key.placement} ({key.placement_digest})" if key.placement else "none"),
            ("buckets", f"{len(one.plan.entries)} of {len(one.plan.buckets)} tuned, up to {key.tune_max_num_tokens:,}"),
            ("time of a tactic", f"{key.objective} over samples, interval at {one.plan.confidence:.0%}"),
            ("replaces the default", f"when faster by {one.plan.margin:.1%} or more"),
            ("library", key.library_hash),
            ("tuned", one.plan.created),
        ]
        for one, key in ((one, one.plan.key) for one in tuned)
    ]
    cells = [[rows[0][0], *(value for _, value in rows)] for rows in zip(*facts, strict=True)]
    headings = [Column("", False), *(Column(one.label, False) for one in tuned)]
    tables = [Table("What the plans were tuned for", headings, cells)]
    faults = [[one.label, tactic, reason] for one in tuned for tactic, reason in one.plan.quarantined.items()]
    if faults:
        columns = [PLAN, TACTIC, Column("reason", False)]
        tables.append(Table("Quarantined: tactics that faulted while the plan was tuned", columns, faults))
    rejected = [[one.label, *row] for one in tuned for row in _rejections(one)]
    if rejected:
        columns = [PLAN, GEMM, TACTIC, Column("reason", False), Column("buckets")]
        tables.append(Table("Rejected: cannot run here, or computed a wrong result", columns, rejected, folded=True))
    return Section("plans", "Plans", words, (), tables)


def _findings(one: Tuned) -> Iterator[str]:
    if not one.plan.complete:
        left = [bucket for bucket in one.plan.buckets if bucket not in {entry.bucket for entry in one.plan.entries}]
        yield f"{one.label} is not complete: calls in the buckets {_listed(left)} run the default tactics."
    moved = [(bucket, gemm) for bucket, gemm, choice in one.every_choice() if choice.tactic != choice.default_tactic]
    layers = {entry.bucket: layer_gain(one, entry.bucket) for entry in one.plan.entries}
    known = {bucket: value for bucket, value in layers.items() if value is not None}
    words = f"{one.label}: {len(moved)} of {2 * len(one.plan.entries)} choices are not the default tactic."
    if known:
        mean = math.exp(sum(math.log1p(value) for value in known.values()) / len(known)) - 1
        best = max(known, key=lambda bucket: known[bucket])
        words += f" Both GEMMs together gain {percent(mean)} over the default in the geometric mean over buckets"
        words += f", at most {percent(known[best])} at {best:,} tokens." if known[best] > 0 else "."
    yield words
    slower = [
        f"{bucket:,} tokens {gemm}"
        for bucket, gemm, choice in one.every_choice()
        if (found := gain(choice)) is not None and found.high < 0
    ]
    if slower:
        yield f"{one.label}: slower than the default beyond its interval at {_listed(slower)}."


def _rejections(one: Tuned) -> list[list[str]]:
    """GEMM, tactic, reason and number of buckets."""
    counts: dict[tuple[str, str, str], int] = {}
    for _, gemm, choice in one.every_choice():
        for tactic, reason in choice.rejected.items():
            counts[gemm, tactic, reason] = counts.get((gemm, tactic, reason), 0) + 1
    return [[*found, str(count)] for found, count in counts.items()]


def _listed(items: Sequence[object]) -> str:
    return ", ".join(map(str, items))


def _tactics(tuned: Sequence[Tuned], chosen: figures.Letters) -> Section:
    every = [choice for one in tuned for _, _, choice in one.every_choice()]
    cells = [
        [
            letter,
            tactic,
            str(sum(choice.tactic == tactic for choice in every)),
            str(sum(choice.default_tactic == tactic for choice in every)),
        ]
        for tactic, letter in chosen.items()
    ]
    columns = [Column("letter", False), TACTIC, Column("chosen in"), Column("default in")]
    words = [
        f"Letters stand for tactics in every figure and table below. There are {len(every)} places to choose for: each "
        "GEMM in each bucket of each plan."
    ]
    return Section("tactics", "Chosen tactics", words, (), [Table("Tactics that a plan chose", columns, cells)])


def _map(tuned: Sequence[Tuned], chosen: figures.Letters) -> Section:
    points = sorted({bucket for one in tuned for bucket in one.plan.buckets})
    bars = [(one, gemm) for one in tuned for gemm in GEMMS]
    cells = []
    for tokens in points:
        row = [one.choice_at(tokens, gemm) for one, gemm in bars]
        names = ["not tuned" if choice is None else chosen[choice.tactic] for choice in row]
        cells.append([f"{tokens:,}", *names])
    columns = [TOKENS, *(Column(f"{one.label} {gemm}", False) for one, gemm in bars)]
    alt = "Tactic by tokens per rank, a bar a plan and GEMM; the table below holds the same."
    draw = figures.tactic_map(tuned, chosen)
    panel = Panel("map", "Tactic by plan and tokens", alt, draw, wide=True, height=0.9 + 0.42 * len(bars))
    words = [
        "Which tactic serves a call with that many tokens per rank. A call takes the largest bucket that is not above "
        "its tokens, and the smallest bucket below that."
    ]
    return Section("map", "Tactic map", words, [panel], [Table("Tactics by bucket", columns, cells, folded=True)])


def _gains(tuned: Sequence[Tuned], chosen: figures.Letters) -> Section:
    panels = [
        Panel(f"gain{index}", f"{one.label}: gain over the default", _gain_alt(one), figures.gains(one))
        for index, one in enumerate(tuned)
    ]
    columns = [TOKENS, Column("rows")]
    for gemm in GEMMS:
        columns += [Column(gemm, False), Column("us"), Column("default us"), Column("gain")]
    tables = []
    for one in tuned:
        cells = []
        for entry in one.plan.entries:
            row = [f"{entry.bucket:,}", f"{entry.rows:,}"]
            for choice in (entry.gemm1, entry.gemm2):
                found = gain(choice)
                times = [us(choice.us), us(choice.default_us), percent(None if found is None else found.value)]
                row += [chosen[choice.tactic], *times]
            cells.append([*row, percent(layer_gain(one, entry.bucket))])
        caption = f"{one.label}: chosen and default tactics, microseconds"
        tables.append(Table(caption, [*columns, Column("both")], cells))
    words = [
        "Time of the default tactic over time of the chosen one, minus 1. Whiskers take the worst and the best ends of "
        "both intervals; a cross marks what was not timed. Zero: the default was kept."
    ]
    return Section("gain", "Gain over the default tactic", words, panels, tables)


def _gain_alt(one: Tuned) -> str:
    found = [value.value for _, _, choice in one.every_choice() if (value := gain(choice)) is not None]
    spread = f"from {percent(min(found))} to {percent(max(found))}" if found else "not known"
    return f"Gain of each GEMM over its default tactic by bucket under {one.label}: {spread}."


def _times(tuned: Sequence[Tuned], chosen: figures.Letters) -> Section:
    panels, tables = [], []
    for index, one in enumerate(tuned):
        for gemm in GEMMS:
            if all(choice.us is None for _, choice in one.choices(gemm)):
                continue
            for close in (False, True):
                what = "near the chosen" if close else "time of every tactic"
                alt = f"{what} against tokens per rank, {gemm} under {one.label}; the table below holds the numbers."
                draw = figures.times(one, gemm, chosen, close)
                name = f"time{index}-{gemm}-{'close' if close else 'all'}"
                panels.append(Panel(name, f"{one.label} {gemm}: {what}", alt.capitalize(), draw))
            tables.append(_time_table(one, gemm, chosen))
    words = [
        "First the microseconds of each tactic that was timed; then the same over the chosen tactic's time, so that "
        f"what nearly won can be seen, cut off at {figures.SLOWEST_SHOWN:g} times. Letters are tactics that are chosen "
        "somewhere, on a disc where they are, with their confidence bands; the broad line follows the choice, the "
        "dashed one the default."
    ]
    return Section("times", "Time against tokens", words, panels, tables)


def _time_table(one: Tuned, gemm: Gemm, chosen: figures.Letters) -> Table:
    """A row a tactic and a column a bucket."""
    timed = one.choices(gemm)
    tactics = dict.fromkeys([*chosen, *(tactic for _, choice in timed for tactic in choice.timings)])
    seen = [tactic for tactic in tactics if any(tactic in choice.timings for _, choice in timed)]
    cells = [[_named(tactic, one, chosen), *(_time_cell(choice, tactic) for _, choice in timed)] for tactic in seen]
    columns = [TACTIC, *(Column(f"{bucket:,}") for bucket, _ in timed)]
    caption = f"{one.label} {gemm}: microseconds with interval by tokens per rank; * chosen, d default, - not timed"
    return Table(caption, columns, cells, folded=True)


def _time_cell(choice: GemmChoice, tactic: str) -> str:
    found = choice.timings.get(tactic)
    if found is None:
        return "-"
    marks = "*" * (tactic == choice.tactic) + "d" * (tactic == choice.default_tactic)
    return f"{us(found.us)} [{us(found.low)}, {us(found.high)}] {marks}".rstrip()


def _regret(tuned: Sequence[Tuned], chosen: figures.Letters) -> Section:
    words, cells, tables, panels = [], [], [], []
    for one in tuned:
        known = [(b, g, c, lost) for b, g, c in one.every_choice() if (lost := regret(c)) is not None]
        if not known:
            continue
        losses = [lost for *_, lost in known]
        words.append(f"{one.label}: mean {sum(losses) / len(losses):.2%}, worst {max(losses):.2%}.")
        for bucket, gemm, choice, lost in known:
            if lost > 0:
                fastest = min(choice.timings, key=lambda tactic: choice.timings[tactic].us)
                names = [_named(tactic, one, chosen) for tactic in (choice.tactic, fastest)]
                cells.append([one.label, f"{bucket:,}", gemm, *names, f"{lost:.2%}"])
    intro = (
        "How much slower the chosen tactic is than the fastest that was timed beside it: what the margin keeps from "
        "tactics whose lead is within the noise, and the layer's time from those that only lead alone. Tactics "
        "that were not timed may be faster still; only an exhaustive "
        "second measurement knows."
    )
    headings = [Column("chosen", False), Column("fastest timed", False), Column("regret")]
    if cells:
        tables.append(Table("Where the fastest was not chosen", [PLAN, TOKENS, GEMM, *headings], cells, folded=True))
    for index, one in enumerate(tuned):
        others = [other for other in tuned if other is not one and comparable(one, other)]
        if others:
            title = f"{one.label}: slower with another plan's tactics"
            alt = f"How much slower {one.label} would run with the tactics of {_listed([at.label for at in others])}."
            panels.append(Panel(f"regret{index}", title, alt, figures.foreign_costs(one, others)))
            tables.append(_foreign_table(one, others))
    if panels:
        words.append(
            "The figures tell what it would cost to run one plan's workload with another plan's tactics, both GEMMs "
            "together, by the first plan's own times. A cross: the other's tactic was not timed there."
        )
    return Section("regret", "Regret", [intro, *words], panels, tables)


def _foreign_table(one: Tuned, others: Sequence[Tuned]) -> Table:
    cells = [
        [f"{entry.bucket:,}", *(percent(cost_of_other(one, other, entry.bucket)) for other in others)]
        for entry in one.plan.entries
    ]
    columns = [TOKENS, *(Column(f"with {other.label}") for other in others)]
    return Table(f"{one.label}: slower by, with another plan's tactics", columns, cells, folded=True)


def _roofline(tuned: Sequence[Tuned]) -> Section:
    devices = {one.plan.key.device for one in tuned}
    roofs = ROOFS.get(next(iter(devices))) if len(devices) == 1 else None
    words = [
        "The chosen tactics: work done per byte that the GEMM must move at least, and the rate achieved; a marker a "
        "bucket, few tokens on the left."
    ]
    if roofs is not None:
        words.append(
            f"Roofs as measured on one {next(iter(devices))}: {roofs.read_tbps} TB/s of memory read and "
            f"{roofs.dense_tflops:,.0f} TFLOP/s of cuBLAS' dense FP8."
        )
    else:
        words.append(f"No roofs are drawn: none were measured for {' beside '.join(sorted(devices))}.")
    words += [f"{one.label} is left out: {one.workload_error}" for one in tuned if one.workload_error]
    cells = [
        [
            one.label,
            gemm,
            f"{at.bucket:,}",
            f"{at.intensity:,.1f}",
            _rate(at.tflops),
            *_of_roof(at.intensity, at.tflops, roofs),
        ]
        for one in tuned
        for gemm in GEMMS
        for at in one.roofline(gemm)
    ]
    columns = [PLAN, GEMM, TOKENS, Column("FLOP / byte"), Column("TFLOP/s")] + [Column("of the roof")] * (
        roofs is not None
    )
    alt = "Achieved TFLOP/s against FLOP per byte of {}, a line a plan; the table holds the numbers."
    panels = [
        Panel(f"roofline-{gemm}", f"Roofline of {gemm}", alt.format(gemm), figures.roofline(tuned, gemm, roofs))
        for gemm in GEMMS
        if any(one.roofline(gemm) for one in tuned)
    ]
    return Section("roofline", "Roofline", words, panels, [Table("Roofline points", columns, cells, folded=True)])


def _rate(tflops: float) -> str:
    return f"{tflops:,.3g}" if tflops < 100 else f"{tflops:,.0f}"


def _of_roof(intensity: float, tflops: float, roofs: Roofs | None) -> list[str]:
    return [] if roofs is None else [f"{tflops / min(intensity * roofs.read_tbps, roofs.dense_tflops):.0%}"]


def _workload(tuned: Sequence[Tuned]) -> Section:
    drawn = [one for one in tuned if one.workload_error is None]
    words = [
        "What arrives at the GEMMs of rank 0, made again from each plan's key and seed (the first sample). The band "
        "reaches from the idlest local expert to the busiest."
    ]
    words += [f"{one.label} cannot be drawn: {one.workload_error}" for one in tuned if one not in drawn]
    if not drawn:
        return Section("workload", "Rows per expert", words)
    cells = [
        [
            one.label,
            f"{bucket:,}",
            f"{int(rows.sum()):,}",
            f"{int((rows > 0).sum())} of {rows.numel()}",
            f"{int(rows.min()):,}",
            f"{rows.float().mean():,.2f}",
            f"{int(rows.max()):,}",
        ]
        for one in drawn
        for bucket, rows in one.rows_per_expert.items()
    ]
    headings = ["rows", "experts with rows", "fewest", "mean", "most"]
    columns = [PLAN, TOKENS, *(Column(heading) for heading in headings)]
    panels = [
        Panel(
            "rows-tokens",
            "Rows per expert against tokens",
            "Mean rows per local expert against tokens per rank, a line a plan; the table below holds the numbers.",
            figures.rows_against_tokens(drawn),
        )
    ]
    shared = set.intersection(*({entry.bucket for entry in one.plan.entries} for one in drawn))
    if shared:
        tokens = sorted(shared)[len(shared) * 3 // 4]
        title = f"Rows by expert at {tokens:,} tokens"
        alt = f"Rows of each local expert at {tokens:,} tokens per rank, the busiest first, a line a plan."
        panels.append(Panel("rows-expert", title, alt, figures.rows_by_expert(drawn, tokens)))
    table = Table("Rows per local expert", columns, cells, folded=True)
    return Section("workload", "Rows per expert", words, panels, [table])
