"""Every script of examples/ runs to its end, on the CPU and on a GPU, and says what it is to show."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).parent.parent / "examples"
SAYS = {
    "layer": r"rank 1: experts 8 to 15, output \[32, 512\] torch\.bfloat16\n"
    r"relative error against unquantised torch: 0\.0\d+$",
    "load_checkpoint": r"rank 1 holds experts 4 to 7\nrows with a local expert: \[True, True, True, False\]$",
    "record_and_tune": r"recorded 0\.gate, 1\.gate\nbalanced: 32 rows .*\nrecorded: \d+ rows .*\n(\d tokens .*\n?){4}$",
    "tune_and_run": r"8 tokens per rank, \d+ GEMM rows: .*\n10 rows ran .*\[10, 256\]\nep2: plan: tuned for regime dep",
}


def test_every_example_is_run() -> None:
    assert {path.stem for path in EXAMPLES.iterdir() if path.suffix == ".py"} == SAYS.keys()


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("name", SAYS)
def test_example(name: str, device: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: device == "cuda")
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    said = capsys.readouterr().out.strip()
    assert re.search(SAYS[name], said), said
    source = (EXAMPLES / f"{name}.py").read_text()
    assert f"\n    python examples/{name}.py\n" in source, "its docstring says how to run it"
