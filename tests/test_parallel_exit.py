"""A script of ranks ends cleanly, with a layer still alive."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

SCRIPT = """
import torch, torch.distributed as dist
from moe_runtime import FP8BlockWeights, MoEConfig, Parallel, ParallelMoE
dist.init_process_group("gloo")
rank = dist.get_rank()
config = MoEConfig("small", 256, 128, 8, 2)
layer = ParallelMoE(config, Parallel.parse("dep2", rank), FP8BlockWeights.random(config, 4, rank), timeout_seconds=30)
rows = layer(torch.randn(5 + rank, 256).bfloat16(), torch.randn(5 + rank, 8))
assert rows.shape == (5 + rank, 256) and rows.isfinite().all()
dist.destroy_process_group()
"""


def test_ranks_that_destroy_their_process_group_exit_without_an_abort(tmp_path: Path) -> None:
    script = tmp_path / "ranks.py"
    script.write_text(SCRIPT)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)]
    root = Path(__file__).parent.parent
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=root, env=None)
    assert done.returncode == 0, done.stderr[-2000:]
