"""Recordings: written by hooks on a model's routers, read back, refused where they do not fit."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from typer.testing import CliRunner

from moe_runtime.cli import app
from moe_runtime.config import MoEConfig, RoutingMethod
from moe_runtime.distributions import draw, parse
from moe_runtime.errors import InvalidArgument
from moe_runtime.parallel import Parallel
from moe_runtime.recording import ROUTERS, record
from moe_runtime.workload import make_workload
from tests import reference

CONFIG = MoEConfig("test", 128, 128, 8, 2)
GROUPED = MoEConfig("grouped", 128, 128, 8, 2, RoutingMethod.DeepSeekV3, 4, 2)
IDS = torch.tensor([[0, 1], [2, 3], [7, 4], [5, 6], [0, 7]])


def drawn(path: Path, tokens: int = 200, seed: int = 0, config: MoEConfig = CONFIG) -> Tensor:
    return draw(parse(f"recorded:{path}"), config, tokens, seed)


def rows(ids: Tensor) -> set[tuple[int, ...]]:
    return {tuple(row) for row in ids.tolist()}


def write(path: Path, content: Any) -> Path:
    if path.suffix == ".npy":
        np.save(path, content.numpy())
    elif path.suffix == ".pt":
        torch.save(content, path)
    else:
        save_file(content if isinstance(content, dict) else {"ids": content}, path)
    return path


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8])
@pytest.mark.parametrize("suffix", ["npy", "pt", "safetensors"])
def test_recorded_ids(tmp_path: Path, suffix: str, dtype: torch.dtype) -> None:
    """Tokens of the workload are tokens of the recording, each as likely."""
    path = write(tmp_path / f"a.{suffix}", IDS.to(dtype))
    ids = drawn(path, 2000)
    assert rows(ids) == rows(IDS)
    assert all(int((ids == row).all(1).sum()) == pytest.approx(400, rel=0.25) for row in IDS)
    assert torch.equal(ids, drawn(path, 2000)) and not torch.equal(ids, drawn(path, 2000, seed=1))


@pytest.mark.parametrize("suffix", ["npy", "pt", "safetensors"])
def test_recorded_histogram(tmp_path: Path, suffix: str) -> None:
    """Experts get the share of slots that the histogram says, although a token takes each only once."""
    histogram = torch.tensor([400, 50, 150, 100, 0, 100, 100, 100])
    ids = drawn(write(tmp_path / f"a.{suffix}", histogram), 20_000)
    share = ids.flatten().bincount(minlength=8) / ids.numel()
    assert share.tolist() == pytest.approx((histogram / histogram.sum()).tolist(), abs=0.012)
    assert (ids[:, 0] != ids[:, 1]).all()


@pytest.mark.parametrize("many", [torch.stack([IDS, 7 - IDS]), {"l.10": 7 - IDS, "l.9": IDS}, [IDS, 7 - IDS]], ids=type)
def test_the_seed_chooses_the_layer(tmp_path: Path, many: Any) -> None:
    path = write(tmp_path / "a.pt", many)
    assert rows(drawn(path, seed=0)) == rows(drawn(path, seed=4)) == rows(IDS)
    assert rows(drawn(path, seed=1)) == rows(7 - IDS)


def test_histograms_of_layers(tmp_path: Path) -> None:
    path = write(tmp_path / "a.npy", torch.tensor([[1.0] * 4 + [0.0] * 4, [0.0] * 4 + [1.0] * 4]))
    assert drawn(path, seed=0).max() < 4 <= drawn(path, seed=1).min()


def test_padding_is_left_out(tmp_path: Path) -> None:
    path = write(tmp_path / "a.pt", torch.cat([IDS, torch.full((9, 2), -1)]))
    assert rows(drawn(path)) == rows(IDS)


def test_a_changed_file_is_read_again(tmp_path: Path) -> None:
    assert rows(drawn(write(tmp_path / "a.pt", IDS))) == rows(IDS)
    assert rows(drawn(write(tmp_path / "a.pt", IDS[:2]))) == rows(IDS[:2])


@pytest.mark.parametrize("dispatch", ["compact", "alltoall", "allgather", "masked"])
def test_a_workload_of_a_recording(tmp_path: Path, dispatch: str) -> None:
    """Rank 1 of two holds experts 4 to 7; of the recorded tokens one has two of its slots there, two have one."""
    path = write(tmp_path / "a.pt", IDS[[0, 2, 4]])
    text = f"recorded:{path}"
    shards = [make_workload(CONFIG, Parallel("dep", 2, rank), 50, text, 0, dispatch) for rank in range(2)]
    assert sum(workload.local_slots for workload in shards) == 2 * 50 * 2
    assert shards[1].distribution == text
    assert shards[1].rows_per_expert[[1, 2]].tolist() == [0, 0]
    if dispatch == "alltoall":
        assert rows(shards[1].topk_ids) == {(7, 4), (-1, 7)}


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.npy", torch.ones(9), r"shape \[9\].*histograms \[num_experts = 8\] or integer ids"),
        ("a.pt", torch.ones(3, 4, 8), r"float32 of shape \[3, 4, 8\]"),
        ("a.pt", torch.zeros(5, 3, dtype=torch.int64), r"shape \[5, 3\]"),
        ("a.pt", torch.zeros(5, 2), r"float32 of shape \[5, 2\]"),
        ("a.pt", torch.tensor([[0, 8]]), r"ids from 0 to 8.*ids below num_experts = 8"),
        ("a.pt", torch.tensor([[0, -2]]), r"ids from -2 to 0"),
        ("a.pt", torch.tensor([[3, 3]]), r"a token with one expert twice"),
        ("a.pt", torch.full((4, 2), -1), r"ids of no token"),
        ("a.pt", torch.tensor([1.0] + [0.0] * 7), r"top_k = 2 or more above 0"),
        ("a.pt", torch.tensor([1.0, torch.nan] + [1.0] * 6), r"other counts"),
        ("a.pt", torch.tensor([1.0, -1.0] + [1.0] * 6), r"other counts"),
        ("a.pt", [], r"no tensors"),
        ("a.pt", "text", r"something else than tensors"),
        ("a.pt", torch.tensor(3), r"shape \[\]"),
        ("a.pt", Path("x"), r"an undamaged file of tensors"),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path: Path, name: str, content: Any, reason: str) -> None:
    path = write(tmp_path / name, content)
    with pytest.raises(InvalidArgument, match=rf"^distribution: got recorded:{path} \(.*{reason}"):
        drawn(path)


@pytest.mark.parametrize("name", ["a.npy", "a.pt", "a.safetensors", "a.bin"])
def test_damaged_and_missing_files(tmp_path: Path, name: str) -> None:
    with pytest.raises(InvalidArgument, match=r"^distribution: got .*No such file"):
        drawn(tmp_path / name)
    (tmp_path / name).write_bytes(b"\x00 not a recording")
    with pytest.raises(InvalidArgument, match=r"^distribution: got "):
        drawn(tmp_path / name)
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(InvalidArgument, match=r"^distribution: got "):
        drawn(tmp_path / name)


class _Harm:
    def __reduce__(self) -> Any:
        return sys.exit, (3,)


@pytest.mark.parametrize("suffix", ["pt", "npy"])
def test_nothing_in_a_file_is_executed(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a.{suffix}"
    if suffix == "pt":
        torch.save({"ids": _Harm()}, path)
    else:
        np.save(path, np.array([_Harm()], dtype=object), allow_pickle=True)
    with pytest.raises(InvalidArgument, match="undamaged"):
        drawn(path)


class Router(nn.Module):
    """A router of each kind that models have."""

    def __init__(self, returns: str, bias: Tensor | None = None) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 8)
        self.returns = returns
        if bias is not None:
            self.register_buffer("e_score_correction_bias", bias)

    def forward(self, x: Tensor) -> Any:
        logits = self.linear(x)
        scores, ids = logits.topk(2)
        return {
            "logits": logits,
            "logits first": (logits, scores, ids),
            "ids first": (ids, scores),
            "logits and none": (logits, None),
            "scores": scores,
        }[self.returns]


class Model(nn.Module):
    def __init__(self, returns: str = "logits", bias: Tensor | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList([nn.ModuleDict({"gate": Router(returns, bias)}) for _ in range(11)])
        self.head = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Any:
        return [layer["gate"](x) for layer in self.layers]


@pytest.mark.parametrize("returns", ["logits", "logits first", "ids first", "logits and none"])
@pytest.mark.parametrize("shape", [(5, 16), (2, 3, 16)])
def test_record(tmp_path: Path, returns: str, shape: tuple[int, ...]) -> None:
    model = Model(returns)
    calls = [torch.randn(shape) for _ in range(2)]
    with record(model, CONFIG) as recording:
        for x in calls:
            model(x)
    model(calls[0])  # no longer recorded
    recording.save(tmp_path / "new" / "a.safetensors")
    tensors = load_file(tmp_path / "new" / "a.safetensors")
    assert sorted(tensors) == sorted(f"layers.{i}.gate" for i in range(11))
    for i, layer in enumerate(model.layers):
        logits = torch.cat([layer["gate"].linear(x).flatten(end_dim=-2) for x in calls])
        expected, _ = reference.route(CONFIG, logits.detach())
        assert tensors[f"layers.{i}.gate"].tolist() == expected
        # Read back, the tenth layer is the tenth, not the one after the first.
        assert rows(drawn(tmp_path / "new" / "a.safetensors", 500, seed=i)) == {tuple(row) for row in expected}


def test_record_routes_with_groups_and_bias(tmp_path: Path) -> None:
    bias = torch.randn(8, generator=torch.Generator().manual_seed(0))
    model, x = Model("logits", bias), torch.randn(30, 16)
    with record(model, GROUPED) as recording:
        model(x)
    logits = model.layers[3]["gate"].linear(x).detach()
    assert recording.layers["layers.3.gate"][0].tolist() == reference.route(GROUPED, logits, bias)[0]


def test_record_a_histogram(tmp_path: Path) -> None:
    model = Model()
    with record(model, CONFIG, r"layers\.[02]\.gate") as recording:
        model(torch.randn(40, 16))
    recording.save(tmp_path / "a.safetensors", histogram=True)
    tensors = load_file(tmp_path / "a.safetensors")
    assert sorted(tensors) == ["layers.0.gate", "layers.2.gate"]
    ids = recording.layers["layers.0.gate"][0].flatten().tolist()
    assert tensors["layers.0.gate"].tolist() == [ids.count(expert) for expert in range(8)]
    assert drawn(tmp_path / "a.safetensors", 10).shape == (10, 2)


def test_record_needs_routers() -> None:
    with (
        pytest.raises(InvalidArgument, match=r"routers: got '.*experts'; accepted: .* names of Model"),
        record(Model(), CONFIG, ".*experts"),
    ):
        pass
    scores = Model("scores")
    with (
        pytest.raises(InvalidArgument, match=r"layers.0.gate, which returned \[\[4, 2\]\]; accepted: integer ids"),
        record(scores, CONFIG),
    ):
        scores(torch.randn(4, 16))


def test_save_says_what_is_wrong(tmp_path: Path) -> None:
    model = Model()
    with record(model, CONFIG) as recording:
        with pytest.raises(InvalidArgument, match="model: got no call of its routers"):
            recording.save(tmp_path / "a.safetensors")
        model(torch.randn(4, 16))
    with pytest.raises(InvalidArgument, match=r"output: .* ends in .safetensors"):
        recording.save(tmp_path / "a.pt")
    (tmp_path / "file").touch()
    with pytest.raises(InvalidArgument, match=r"output: .* a file in a folder that can be written"):
        recording.save(tmp_path / "file" / "a.safetensors")


SCRIPT = """
import torch
from tests.test_recording import Model

def load():
    return Model(), [{"x": torch.randn(6, 16)}, torch.randn(4, 16)]

def stopped():
    def batches():
        yield torch.randn(3, 16)
        raise KeyboardInterrupt
    return Model(), batches()

def wrong():
    return Model()
"""


@pytest.fixture
def script(tmp_path: Path) -> Iterator[str]:
    (tmp_path / "script.py").write_text(SCRIPT)
    yield str(tmp_path / "script.py")


@pytest.mark.parametrize(("function", "tokens", "status"), [("load", 10, 0), ("stopped", 3, 130)])
def test_command(script: str, tmp_path: Path, function: str, tokens: int, status: int) -> None:
    output = tmp_path / "a.safetensors"
    result = CliRunner().invoke(
        app, ["record", f"{script}:{function}", "--model", "mixtral-8x7b", "-o", str(output), "--routers", ROUTERS]
    )
    assert result.exit_code == status, result.output
    assert {tuple(ids.shape) for ids in load_file(output).values()} == {(tokens, 2)}


@pytest.mark.parametrize(
    ("target", "reason"),
    [
        ("{script}:wrong", "which returned Model"),
        ("{script}:absent", "no function 'absent'"),
        ("{script}x.py:load", "no file"),
        ("no.such.module:load", "No module named"),
        ("load", "TARGET: got 'load'"),
    ],
)
def test_command_names_the_target(script: str, tmp_path: Path, target: str, reason: str) -> None:
    arguments = [target.format(script=script), "--model", "mixtral-8x7b", "-o", str(tmp_path / "a.safetensors")]
    result = CliRunner().invoke(app, ["record", *arguments])
    assert isinstance(result.exception, InvalidArgument) and reason in str(result.exception)
