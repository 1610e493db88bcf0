"""Expert weights of one rank in the fp8_block format: quantised here, read from a checkpoint, or random."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .config import FP8_BLOCK, MoEConfig
from .errors import InvalidArgument
from .executors.base import MoEProblem, check_tensor
from .formats import fp8_block
from .parallel import Parallel

_INDEX = "model.safetensors.index.json"


# eq=False: two sets of weights are the same only if they are one object, and comparing tensors is no bool.
@dataclass(frozen=True, eq=False)
class FP8BlockWeights:
    """The L local experts of one layer. Contiguous, on one device, and not changed after the first call.

    I is the rank's intermediate size: under tensor parallelism its slice of each expert's.

    gate_up: [L, 2I, H] e4m3, rows [gate; up], or [up; gate] with gate_first=False.
    gate_up_scale: [L, 2I/128, H/128] f32.
    down: [L, H, I] e4m3.
    down_scale: [L, H/128, I/128] f32.
    """

    gate_up: Tensor
    gate_up_scale: Tensor
    down: Tensor
    down_scale: Tensor
    gate_first: bool = True

    @property
    def device(self) -> torch.device:
        return self.gate_up.device

    def check(
        self,
        config: MoEConfig,
        num_local_experts: int,
        gate_up: str = "gate_up",
        down: str = "down",
        *,
        tp_size: int = 1,
    ) -> None:
        """Raises InvalidArgument for a wrong shape, dtype, device or layout.

        gate_up, down: what the caller's caller knows the tensors as. tp_size: ranks that share each expert.
        """
        hidden, inter = config.hidden_size, config.intermediate_size // tp_size
        self._check_pair(gate_up, self.gate_up, self.gate_up_scale, (num_local_experts, 2 * inter, hidden))
        self._check_pair(down, self.down, self.down_scale, (num_local_experts, hidden, inter))

    def _check_pair(self, name: str, values: Tensor, scale: Tensor, shape: tuple[int, int, int]) -> None:
        blocks = (shape[0], shape[1] // FP8_BLOCK, shape[2] // FP8_BLOCK)
        check_tensor(name, values, shape, (torch.float8_e4m3fn,), self.device)
        check_tensor(f"{name}_scale", scale, blocks, (torch.float32,), self.device)

    def to(self, device: torch.device | str) -> FP8BlockWeights:
        moved: dict[str, Any] = {field.name: getattr(self, field.name) for field in fields(self)}
        for name, value in moved.items():
            if isinstance(value, Tensor):
                moved[name] = value.to(device)
        return FP8BlockWeights(**moved)

    @classmethod
    def quantise_bf16(cls, gate_up: Tensor, down: Tensor, gate_first: bool = True) -> FP8BlockWeights:
        """gate_up [L, 2I, H] and down [L, H, I], bf16 or f32, to fp8_block."""
        for name, tensor in (("gate_up", gate_up), ("down", down)):
            if tensor.ndim != 3 or tensor.dtype not in (torch.bfloat16, torch.float32):
                got = f"{tensor.dtype} of shape {list(tensor.shape)}"
                raise InvalidArgument(name, got, "a bfloat16 or float32 tensor of three dimensions")
        return _stack(
            [fp8_block.quantise_blocks(w) for w in gate_up], [fp8_block.quantise_blocks(w) for w in down], gate_first
        )

    @classmethod
    def random(
        cls,
        config: MoEConfig,
        num_local_experts: int,
        seed: int = 0,
        device: torch.device | str = "cpu",
        *,
        tp_size: int = 1,
    ) -> FP8BlockWeights:
        """Every finite e4m3 code alike, scaled so that a row of unit variance keeps about that through a GEMM.

        tp_size: ranks that share each expert; the weights are one rank's, of 1 / tp_size of the intermediate size.
        """
        generator = torch.Generator(device).manual_seed(seed)

        def draw(rows: int, columns: int) -> tuple[Tensor, Tensor]:
            shape = (num_local_experts, rows, columns)
            values = torch.randint(0, 254, shape, dtype=torch.uint8, device=device, generator=generator)
            values += values >= 127  # 127 and 255 are the two NaNs
            scale_shape = (num_local_experts, rows // FP8_BLOCK, columns // FP8_BLOCK)
            spread = torch.rand(scale_shape, device=device, generator=generator) + 0.5
            return values.view(torch.float8_e4m3fn), spread / (_CODE_RMS * math.sqrt(columns))

        inter = config.intermediate_size // tp_size
        gate_up, gate_up_scale = draw(2 * inter, config.hidden_size)
        down, down_scale = draw(config.hidden_size, inter)
        return cls(gate_up, gate_up_scale, down, down_scale)

    @classmethod
    def from_safetensors(cls, path: str | Path, layer: int, config: MoEConfig, parallel: Parallel) -> FP8BlockWeights:
        """Reads the rank's share of one layer's experts from a checkpoint with DeepSeek's names.

        Under tensor parallelism rows of gate and up, and columns of down, are cut with their blocks of scales.

        path: a .safetensors file, or a checkpoint folder with one or with an index.
        Names: model.layers.{layer}.mlp.experts.{expert}.{gate_proj,up_proj,down_proj}.weight; e4m3 weights come with
        .weight_scale_inv [N/128, K/128], bf16 weights are quantised.
        Raises InvalidArgument for a path, a tensor or a shape that does not fit.
        """
        with ExitStack() as stack:
            read = _reader(Path(path), stack)

            def load(expert: int, projection: str, shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
                name = f"model.layers.{layer}.mlp.experts.{expert}.{projection}.weight"
                weight, cpu = read(name), torch.device("cpu")
                check_tensor(name, weight, shape, (torch.float8_e4m3fn, torch.bfloat16), cpu)
                if weight.dtype == torch.bfloat16:
                    return fp8_block.quantise_blocks(weight)
                scale = read(f"{name}_scale_inv")
                blocks = (shape[0] // FP8_BLOCK, shape[1] // FP8_BLOCK)
                check_tensor(f"{name}_scale_inv", scale, blocks, (torch.float32,), cpu)
                return weight, scale

            hidden, inter = config.hidden_size, config.intermediate_size
            local = parallel.local_intermediate_size(inter)
            gate_up, down = [], []
            for expert in parallel.shard(config.num_experts):
                gate, up = (
                    _slice(load(expert, projection, (inter, hidden)), 0, parallel.tp_rank, local)
                    for projection in ("gate_proj", "up_proj")
                )
                gate_up.append((_cat(gate[0], up[0]), torch.cat([gate[1], up[1]])))
                down.append(_slice(load(expert, "down_proj", (hidden, inter)), 1, parallel.tp_rank, local))
            return _stack(gate_up, down, gate_first=True)


def random_weights(problem: MoEProblem, seed: int = 0, device: torch.device | str = "cpu") -> FP8BlockWeights:
    """`FP8BlockWeights.random` of one rank's share of a layer."""
    return FP8BlockWeights.random(
        problem.config, problem.num_local_experts, seed, device, tp_size=problem.parallel.tp_size
    )


# Root mean square of the 254 finite e4m3 codes.
_CODE_RMS = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).double().square().mean().sqrt().item()


def _slice(weight: tuple[Tensor, Tensor], dimension: int, index: int, size: int) -> tuple[Tensor, Tensor]:
    """The index-th part, `size` long, of values [N, K] and scale [N/128, K/128] along a dimension."""
    values, scale = weight
    blocks = size // FP8_BLOCK
    return values.narrow(dimension, index * size, size), scale.narrow(dimension, index * blocks, blocks)


def _cat(*tensors: Tensor) -> Tensor:
    # As bytes: torch implements few operations on e4m3 itself.
    return torch.cat([tensor.view(torch.uint8) for tensor in tensors]).view(torch.float8_e4m3fn)


def _stack(
    gate_up: list[tuple[Tensor, Tensor]], down: list[tuple[Tensor, Tensor]], gate_first: bool
) -> FP8BlockWeights:
    def stack(experts: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        values = torch.stack([value.view(torch.uint8) for value, _ in experts])
        return values.view(torch.float8_e4m3fn), torch.stack([scale for _, scale in experts])

    return FP8BlockWeights(*stack(gate_up), *stack(down), gate_first=gate_first)


def _reader(path: Path, stack: ExitStack) -> Callable[[str], Tensor]:
    """A function that reads one tensor by name; the files it opens close with the stack."""
    from safetensors import SafetensorError, safe_open

    opened: dict[Path, Any] = {}

    def file(name: Path) -> Any:
        if name not in opened:
            try:
                opened[name] = stack.enter_context(safe_open(name, framework="pt"))
            except (OSError, SafetensorError) as error:
                raise InvalidArgument("path", f"{name} ({error})", "a readable .safetensors file") from None
        return opened[name]

    weight_map: dict[str, str] | None = None
    if path.is_dir():
        if (path / _INDEX).exists():
            weight_map = json.loads((path / _INDEX).read_text())["weight_map"]
        else:
            found = sorted(path.glob("*.safetensors"))
            if len(found) != 1:
                accepted = f"a folder with {_INDEX} or exactly one .safetensors file"
                raise InvalidArgument("path", f"{path} with {len(found)} of them", accepted)
            path = found[0]

    def read(name: str) -> Tensor:
        if weight_map is not None and name not in weight_map:
            raise InvalidArgument("path", f"{path / _INDEX}", f"an index that lists {name}")
        source = file(path if weight_map is None else path / weight_map[name])
        try:
            tensor: Tensor = source.get_tensor(name)
        except SafetensorError:
            raise InvalidArgument("path", path, f"a checkpoint that holds {name}") from None
        return tensor

    return read
