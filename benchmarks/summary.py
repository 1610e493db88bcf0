"""The README's measured tables, rendered from benchmarks/results/h200.

python -m benchmarks.summary            # writes them into README.md
python -m benchmarks.summary --print    # only shows them
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "h200"
BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"
LAYERS = {"deepseek-r1-dep8": "DeepSeek-R1, dep8", "qwen3-235b-dep2": "Qwen3-235B-A22B, dep2"}
FORMAT_CASES = {
    "qwen3-235b:dep2": "Qwen3-235B-A22B, dep2",
    "deepseek-r1:dep8": "DeepSeek-R1, dep8",
    "gpt-oss-120b:tp1": "gpt-oss-120b, tp1",
}
WHOLE_CALL = "layer(x, logits): the whole call"
GEMM_ROWS = ("1", "16", "64", "128", "256", "1024")


def tables() -> str:
    environment = load("gemm")["environment"]
    driver = environment["driver"].split()[0]  # results of hosts with several GPUs name it once for each
    machine = f"One {environment['gpu']}, driver {driver}, CUDA {environment['cuda']}"
    lines = [
        f"{machine}, torch {environment['torch']}; median microseconds of",
        "CUDA-graph replays. A whole layer, one rank's share, balanced routing with ready top-k ids, beside",
        "vLLM 0.33's tuned Triton layer on the same workload:",
        "",
        "| tokens per rank | " + " | ".join(f"{name}: us (vLLM)" for name in LAYERS.values()) + " |",
        "|---|" + "---|" * len(LAYERS),
    ]
    layers = [load(f"layer-{key}")["results"] for key in LAYERS]
    for tokens in sorted({int(n) for layer in layers for n in layer}):
        lines.append(f"| {tokens} | " + " | ".join(_layer_cell(layer.get(str(tokens))) for layer in layers) + " |")
    units = "TB/s of weights up to 64 rows, TFLOP/s above."
    lines += ["", f"The fastest grouped GEMM by rows per expert{_older('gemm')}: {units}", ""]
    gemms = load("gemm")["results"]
    lines += ["| GEMM | " + " | ".join(GEMM_ROWS) + " |", "|---|" + "---|" * len(GEMM_ROWS)]
    for name, gemm in gemms.items():
        cells = (_gemm_cell(rows, gemm["by_rows_per_expert"][rows]) for rows in GEMM_ROWS)
        lines.append(f"| {name} ({gemm['groups']} x {gemm['N']} x {gemm['K']}) | " + " | ".join(cells) + " |")
    lines += ["", *_format_tables(), "", *_peer_tables(), "", *_model_table(), "", *_regime_table()]
    roofs = load("gemm")["roofs"]
    lines += [
        "",
        f"Roofs in the same run: {roofs['read_TBps']} TB/s read, {roofs['copy_TBps']:.2f} TB/s copied, "
        f"{roofs['cublas_fp8_TFLOPS']:.0f} TFLOP/s for cuBLAS' dense FP8.",
        f"The host spends {load('host_overhead')['us'][WHOLE_CALL]:.0f} us on one eager call.",
        "Raw numbers, with every variant's time: `benchmarks/results/h200/`.",
    ]
    return "\n".join(lines)


def _format_tables() -> list[str]:
    """Microseconds of a layer in each format, by tokens per rank."""
    results = load("formats")
    rates = results["dense_tflops"]
    lines = [
        "A layer in each format by tokens per rank, us, with the fastest tactics, timed without rests. cuBLAS' dense",
        f"rates in that run are {rates['bf16']:.0f} TFLOP/s in bf16, which all formats but fp8_block multiply in, and",
        f"{rates['e4m3']:.0f} in FP8.",
    ]
    for case, title in FORMAT_CASES.items():
        points = [point for point in results["points"] if point["case"] == case]
        tokens = sorted({point["tokens"] for point in points})
        lines += ["", f"| {title} | " + " | ".join(map(str, tokens)) + " |", "|---|" + "---|" * len(tokens)]
        for format in dict.fromkeys(point["format"] for point in points):
            us = {point["tokens"]: point["us"] for point in points if point["format"] == format}
            lines.append(f"| `{format}` | " + " | ".join(f"{us[count]:.0f}" for count in tokens) + " |")
    return lines


def _peer_tables() -> list[str]:
    """Layers with MXFP4 weights beside other libraries'."""
    results = load("formats_peers")
    arms = {"bf16_mxfp4": "ours", "triton-kernels": "triton_kernels", "marlin": "Marlin"}
    lines = [
        "A layer with MXFP4 weights and bf16 tokens beside triton_kernels and Marlin, both of vLLM 0.33, in turns, us;",
        f"all activate as gpt-oss does, which triton_kernels fuses{_older('formats_peers')}.",
    ]
    for case, title in FORMAT_CASES.items():
        points = [point for point in results["points"] if point["case"] == case]
        lines += ["", f"| {title} | " + " | ".join(str(point["tokens"]) for point in points) + " |"]
        lines.append("|---|" + "---|" * len(points))
        for arm, name in arms.items():
            us = (point["us"].get(arm) for point in points)
            lines.append(f"| {name} | " + " | ".join("" if each is None else f"{each:.0f}" for each in us) + " |")
    return lines


def _model_table() -> list[str]:
    """Tokens per second of a transformers model."""
    results = load("transformers")
    version, layers = results["environment"]["transformers"], results["layers"]
    columns = {f"decode {batch}": runs["graph"] for batch, runs in results["decode"].items()}
    columns |= {f"prefill {count}": runs["eager"] for count, runs in results["prefill"].items()}
    arms = dict.fromkeys(arm for column in columns.values() for arm in column)
    lines = [
        f"{layers} layers of Qwen3-30B-A3B in transformers {version}, thousands of tokens/s by",
        "`experts_implementation`: decode of so many sequences from a CUDA graph, prefill as called.",
        "",
        "| experts | " + " | ".join(columns) + " |",
        "|---|" + "---|" * len(columns),
    ]
    for arm in arms:
        rates = (column.get(arm, {}).get("tokens_per_s") for column in columns.values())
        lines.append(f"| {arm} | " + " | ".join("" if rate is None else f"{rate / 1000:.1f}" for rate in rates) + " |")
    return lines


def _regime_table() -> list[str]:
    """What a plan of the other layout costs, in the form of tokens, before, after, delta; and how good a plan is."""
    headline, case = load("headline"), load("tuner-qwen3-235b")["cases"]["qwen3-235b:dep2"]
    regret, default, best = case["regret"], case["default"], max(point["gain"] for point in case["points"])
    wrong, right = (headline["tuned_for"][arm] for arm in ("wrong", "right"))
    lines = [
        f"Why a plan belongs to a layout: {headline['layers']} MoE layers of Qwen3-235B-A22B, with the projections of",
        f"its attention, on {headline['environment']['ranks']} GPUs under {right}{_older('headline')}.",
        f"Tokens/s of each GPU with the plan tuned for {wrong} and with that tuned for {right}:",
        "",
        f"| tokens per rank | plan of {wrong} | plan of {right} | gain |",
        "|---|---|---|---|",
    ]
    for tokens, point in headline["results"].items():
        before, after = (point["tokens_per_second_per_gpu"][arm] for arm in ("wrong", "right"))
        lines.append(f"| {tokens} | {before:,.0f} | {after:,.0f} | {point['gain']:+.1%} |")
    return [
        *lines,
        "",
        f"Tuning took {case['tune_seconds']:.0f} s for {len(case['buckets'])} buckets{_older('tuner-qwen3-235b')}.",
        f"Measured anew on other seeds, the plan's GEMMs lose {regret['mean']:.1%} on average and",
        f"{regret['worst']:.1%} at worst to the best of all kernels at each size, with hindsight at most",
        f"{regret['worst_bound']:.1%}; over the default they gain {default['mean']:.1%} on average, {best:.0%} at best",
        f"and {default['worst']:.1%} at worst.",
        "",
    ]


def with_tables(readme: str) -> str:
    """The README's text with what stands between the two marks replaced."""
    before, rest = readme.split(BEGIN)
    _, after = rest.split(END)
    return f"{before}{BEGIN}\n{tables()}\n{END}{after}"


def load(name: str) -> dict[str, Any]:
    result: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text())
    return result


def _older(name: str) -> str:
    """What to say of results of other kernels than the layers'. A library that holds CUTLASS' as well has another hash,
    but is of the same commit."""
    mine, layers = (load(each)["environment"] for each in (name, f"layer-{next(iter(LAYERS))}"))
    same = any(mine[key] == layers[key] for key in ("library_hash", "commit"))
    return "" if same else f" (by the kernels of commit {mine['commit']})"


def _layer_cell(point: dict[str, Any] | None) -> str:
    if point is None:
        return ""
    return f"{point['us']['layer']:.0f} ({point['vllm_us']:.0f})"


def _gemm_cell(rows: str, point: dict[str, Any]) -> str:
    return f"{point['weights_TBps']:.2f} TB/s" if int(rows) <= 64 else f"{point['TFLOPS']:.0f}"


def main(show: Annotated[bool, typer.Option("--print", help="Show the tables and write nothing.")] = False) -> None:
    if show:
        print(tables())
        return
    path = ROOT / "README.md"
    path.write_text(with_tables(path.read_text()))


if __name__ == "__main__":
    typer.run(main)
