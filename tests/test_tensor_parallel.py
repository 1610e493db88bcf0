"""Slices of experts: cut from a checkpoint, and partial sums that make up the whole layer."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from moe_runtime.checkpoints import load_experts
from moe_runtime.config import MoEConfig
from moe_runtime.errors import InvalidArgument
from moe_runtime.formats import fp8_block
from moe_runtime.layer import FusedMoE
from moe_runtime.parallel import Parallel
from moe_runtime.weights import FP8BlockWeights
from tests import reference

CONFIG = MoEConfig("small", 256, 512, 4, 2)
WHOLE = Parallel.parse("ep1")


def load(checkpoint: Path, parallel: Parallel) -> FP8BlockWeights:
    weights = load_experts(checkpoint, 0, CONFIG, parallel)
    assert isinstance(weights, FP8BlockWeights)
    return weights


@pytest.fixture(scope="module", params=[torch.float8_e4m3fn, torch.bfloat16], ids=str)
def checkpoint(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    generator, tensors = torch.Generator().manual_seed(0), {}
    for expert in range(CONFIG.num_experts):
        for projection, shape in {"gate_proj": (512, 256), "up_proj": (512, 256), "down_proj": (256, 512)}.items():
            name = f"model.layers.0.mlp.experts.{expert}.{projection}.weight"
            tensors[name] = torch.randn(shape, generator=generator).bfloat16() / 16
            if request.param == torch.float8_e4m3fn:
                tensors[name], tensors[f"{name}_scale_inv"] = fp8_block.quantise_blocks(tensors[name])
    path: Path = tmp_path_factory.mktemp("checkpoint") / "model.safetensors"
    save_file(tensors, path)
    return path


@pytest.mark.parametrize("text", ["tp4", "ep2tp2", "dep2tp4"])
def test_slices_put_together_are_the_checkpoint(checkpoint: Path, text: str) -> None:
    whole = load(checkpoint, WHOLE)
    tp_size, size = Parallel.parse(text).tp_size, Parallel.parse(text).size
    inter, experts = 512 // tp_size, 4 // size
    for rank in range(size * tp_size):
        parallel = Parallel.parse(text, rank)
        part = load(checkpoint, parallel)
        part.check(CONFIG, experts, tp_size=tp_size)
        local = slice(rank // tp_size * experts, (rank // tp_size + 1) * experts)
        first = rank % tp_size * inter
        for block, mine, of_scale in (
            (1, part.gate_up, whole.gate_up),
            (128, part.gate_up_scale, whole.gate_up_scale),
        ):
            gate, up = mine.float().chunk(2, dim=1)
            all_gate, all_up = of_scale[local].float().chunk(2, dim=1)
            cut = slice(first // block, (first + inter) // block)
            assert torch.equal(gate, all_gate[:, cut]) and torch.equal(up, all_up[:, cut])
        assert torch.equal(part.down.float(), whole.down[local, :, first : first + inter].float())
        blocks = slice(first // 128, (first + inter) // 128)
        assert torch.equal(part.down_scale, whole.down_scale[local, :, blocks])


@pytest.mark.parametrize("text", ["tp2", "tp4", "ep2tp2", "dep4tp2"])
def test_partial_sums_add_up_to_the_whole(checkpoint: Path, text: str) -> None:
    x = torch.randn(9, 256, generator=torch.Generator().manual_seed(1)).bfloat16()
    logits = torch.randn(9, 4, generator=torch.Generator().manual_seed(2))

    def run(parallel: Parallel) -> torch.Tensor:
        weights = load(checkpoint, parallel)
        return FusedMoE(CONFIG, parallel, weights)(x, logits).double()

    total = torch.stack([run(Parallel.parse(text, rank)) for rank in range(Parallel.parse(text).world_size)]).sum(0)
    assert reference.relative_error(total, run(WHOLE)) <= 5e-3


def test_weights_of_another_slice_are_refused() -> None:
    parallel = Parallel.parse("ep2tp2")
    FusedMoE(CONFIG, parallel, FP8BlockWeights.random(CONFIG, 2, tp_size=2))
    with pytest.raises(InvalidArgument, match=r"gate_up: got shape \[2, 1024, 256\]; accepted: shape \[2, 512, 256\]"):
        FusedMoE(CONFIG, parallel, FP8BlockWeights.random(CONFIG, 2))


def test_a_checkpoint_is_not_cut_within_a_block(checkpoint: Path) -> None:
    with pytest.raises(InvalidArgument, match="parallel: got tp8"):
        load(checkpoint, Parallel.parse("tp8"))


def test_uneven_shards_are_refused() -> None:
    with pytest.raises(InvalidArgument, match="parallel: got ep3"):
        FusedMoE(CONFIG, Parallel.parse("ep3"), FP8BlockWeights.random(CONFIG, 2))


def test_compiled_layer_of_a_slice() -> None:
    parallel = Parallel.parse("ep2tp2", 3)
    layer = FusedMoE(CONFIG, parallel, FP8BlockWeights.random(CONFIG, 2, tp_size=2))
    x, logits = torch.randn(5, 256).bfloat16(), torch.randn(5, 4)
    compiled = torch.compile(lambda rows, scores: layer(rows, scores), fullgraph=True, backend="eager")
    assert torch.equal(compiled(x, logits), layer(x, logits))
