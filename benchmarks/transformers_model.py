"""Does a model of transformers run faster with our experts than with its own?

    python -m benchmarks.transformers_model --json FILE [--layers 4] [--small]

Qwen3-30B-A3B by its published sizes, with random weights and fewer layers, in bf16 and with FP8 experts: tokens/s of a
decode step, with a static cache of 512 tokens per sequence, and of a prefill. The arms are our experts in both formats
and each implementation of transformers that runs here; where one does not, the reason is kept. Arms take turns within a
repeat, medians count. `eager` is a call as a user makes it, in which the host may take longer than the GPU; `graph` is
the same decode step replayed from a CUDA graph, where an arm can be captured. In FP8 transformers has only experts that
the package `kernels` downloads, so the ratio is to the fastest bf16 arm of transformers' own where there is none.

`--small` does all this on the CPU with a model that it can time in seconds.
"""

from __future__ import annotations

import dataclasses
import gc
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import transformers
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM, StaticCache
from transformers.integrations.finegrained_fp8 import ALL_FP8_EXPERTS_FUNCTIONS, FP8Experts
from transformers.integrations.moe import use_experts_implementation

from benchmarks.common import time_graphs, write_json
from benchmarks.tuner import environment
from moe_runtime.executors import get_executor
from moe_runtime.formats import Weights
from moe_runtime.formats.weights import quantise_experts
from moe_runtime.integrations.transformers import NAME, register

OTHERS = ("grouped_mm", "batched_mm", "deepgemm")
BATCHED_TOKENS = 256
"""Beyond so many tokens batched_mm is not run: it copies the weights of each token's every expert."""


@dataclass(frozen=True)
class Size:
    """A model, and how it is timed: sequences of a decode step, tokens of a prefill, tokens in the cache."""

    config: dict[str, int]
    decode: tuple[int, ...]
    prefill: tuple[int, ...]
    context: int
    repeats: int


FULL = Size(
    {
        "vocab_size": 151936,
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "moe_intermediate_size": 768,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "num_experts": 128,
        "num_experts_per_tok": 8,
    },
    decode=(1, 8, 32),
    prefill=(512, 1024, 2048, 4096, 8192),
    context=512,
    repeats=30,
)
SMALL = Size(
    {
        "vocab_size": 256,
        "hidden_size": 128,
        "intermediate_size": 256,
        "moe_intermediate_size": 128,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "num_experts": 8,
        "num_experts_per_tok": 2,
    },
    decode=(1, 4),
    prefill=(32,),
    context=16,
    repeats=3,
)


@dataclass(frozen=True)
class Arm:
    """One of the models with one implementation of its experts."""

    model: Any
    implementation: str

    def select(self) -> None:
        self.model.set_experts_implementation(self.implementation)


@torch.no_grad()
def make_model(size: Size, layers: int, device: str, fp8: bool) -> Any:
    config = Qwen3MoeConfig(**size.config, num_hidden_layers=layers, norm_topk_prob=True)
    torch.manual_seed(0)
    with torch.device(device):
        model = Qwen3MoeForCausalLM._from_config(config, dtype=torch.bfloat16).eval()
    for layer in model.model.layers if fp8 else ():
        layer.mlp.experts = _fp8_experts(config, layer.mlp.experts)
    return model


def _fp8_experts(config: Any, experts: Any) -> Any:
    kind = use_experts_implementation(FP8Experts, experts_interface=ALL_FP8_EXPERTS_FUNCTIONS)
    with torch.device("meta"):
        made = kind(config, block_size=(128, 128))
    made = made.to_empty(device=experts.down_proj.device)
    for name in ("gate_up_proj", "down_proj"):
        values, scale, _ = quantise_experts(Weights.FP8_BLOCK, getattr(experts, name), name)
        getattr(made, name).copy_(values)
        getattr(made, f"{name}_scale_inv").copy_(scale)
    return made


def decode_step(model: Any, size: Size, sequences: int) -> Callable[[], Tensor]:
    """One step of all sequences, after which the cache is as it was."""
    device = model.device
    cache = StaticCache(config=model.config, max_cache_len=size.context + 8)
    context = torch.randint(size.config["vocab_size"], (sequences, size.context), device=device)
    model(context, past_key_values=cache, logits_to_keep=1)
    ids = context[:, :1].contiguous()
    positions = torch.full((sequences, 1), size.context, device=device)

    def step() -> Tensor:
        logits: Tensor = model(ids, past_key_values=cache, position_ids=positions).logits
        cache.crop(-1)
        return logits

    return step


def prefill(model: Any, size: Size, tokens: int) -> Callable[[], Tensor]:
    ids = torch.randint(size.config["vocab_size"], (1, tokens), device=model.device)
    return lambda: model(ids, use_cache=False, logits_to_keep=1).logits


def time_eager(arms: Mapping[str, Arm], calls: Mapping[str, Callable[[], Tensor]], repeats: int) -> dict[str, float]:
    """Median microseconds of a call from its start on the host to the end of its work."""
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            arms[name].select()
            call()
            _wait()
            begin = time.perf_counter()
            call()
            _wait()
            samples[name].append((time.perf_counter() - begin) * 1e6)
    return {name: statistics.median(times) for name, times in samples.items()}


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def time_captured(
    arms: Mapping[str, Arm], calls: Mapping[str, Callable[[], Tensor]]
) -> tuple[dict[str, float], dict[str, str]]:
    """Median microseconds of a call in a CUDA graph by arm, and why others have none."""
    refused: dict[str, str] = {}

    def selecting(name: str) -> Callable[[], Tensor]:
        def call() -> Tensor:
            arms[name].select()
            return calls[name]()

        return call

    capturable = {}
    for name in calls:
        try:
            time_graphs({name: selecting(name)}, repeats=1)
            capturable[name] = selecting(name)
        except RuntimeError as error:
            refused[name] = _first_line(error)
            torch.cuda.synchronize()
    return time_graphs(capturable), refused


def measure(
    arms: Mapping[str, Arm], size: Size, what: str, count: int, captured: bool
) -> tuple[dict[str, Any], dict[str, str]]:
    """Microseconds and tokens/s by arm, and why arms are absent."""
    calls: dict[str, Callable[[], Tensor]] = {}
    absent: dict[str, str] = {}
    for name, arm in arms.items():
        if arm.implementation == "batched_mm" and count > BATCHED_TOKENS:
            continue
        arm.select()
        try:
            call = decode_step(arm.model, size, count) if what == "decode" else prefill(arm.model, size, count)
            call()
            calls[name] = call
        except Exception as error:  # whatever their kernels find missing
            absent[name] = _first_line(error)
    result: dict[str, Any] = {"eager": _rates(time_eager(arms, calls, size.repeats), count)}
    if captured and what == "decode":
        times, refused = time_captured(arms, calls)
        result["graph"] = _rates(times, count)
        result["not_captured"] = refused
    return result, absent


def _rates(times: Mapping[str, float], tokens: int) -> dict[str, Any]:
    theirs = {name: us for name, us in times.items() if not name.endswith(NAME)}
    rates: dict[str, Any] = {}
    for name, us in times.items():
        rates[name] = {"us": round(us, 2), "tokens_per_s": round(tokens / us * 1e6, 1)}
        if name not in theirs and theirs:
            alike = {other: least for other, least in theirs.items() if other.split()[0] == name.split()[0]} or theirs
            fastest = min(alike, key=alike.__getitem__)
            rates[name] |= {"to": fastest, "ratio": round(alike[fastest] / us, 3)}
    return rates


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"


@torch.no_grad()
def main(
    json: Annotated[Path | None, typer.Option()] = None,
    layers: Annotated[int, typer.Option(min=1)] = 4,
    small: Annotated[bool, typer.Option("--small")] = False,
) -> None:
    register()
    size, device = (SMALL, "cpu") if small else (FULL, "cuda")
    models = {"bf16": make_model(size, layers, device, fp8=False), "fp8": make_model(size, layers, device, fp8=True)}
    gc.collect()
    arms = {f"{key} {name}": Arm(model, name) for key, model in models.items() for name in (NAME, *OTHERS)}
    payload: dict[str, Any] = {
        "benchmark": "transformers_model",
        "small": small,
        "layers": layers,
        "size": dataclasses.asdict(size),
        "environment": environment(get_executor(device)) | {"transformers": transformers.__version__},
        "decode": {},
        "prefill": {},
        "absent": {},
    }
    table = Table("", "tokens", "arm", "us", "tokens/s", "faster than the fastest of transformers")
    for what, counts in (("decode", size.decode), ("prefill", size.prefill)):
        for count in counts:
            result, absent = measure(arms, size, what, count, captured=not small)
            payload[what][str(count)] = result
            payload["absent"] |= absent
            write_json(json, payload)
            for way in ("eager", "graph"):
                for name, found in result.get(way, {}).items():
                    ratio = f"{found['ratio']:.3f} ({found['to']})" if "ratio" in found else ""
                    cells = f"{found['us']:.0f}", f"{found['tokens_per_s']:.0f}", ratio
                    table.add_row(f"{what}, {way}", str(count), name, *cells)
    console = Console(width=150)
    console.print(table)
    for name, reason in payload["absent"].items():
        console.print(f"{name} does not run here: {reason}")


if __name__ == "__main__":
    typer.run(main)
