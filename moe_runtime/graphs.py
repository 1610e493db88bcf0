"""Calls of a layer as CUDA graphs, one for each size that a decode loop meets."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .errors import InvalidArgument
from .executors.base import check_tensor
from .layer import FusedMoE

if TYPE_CHECKING:
    from torch.cuda import _POOL_HANDLE


class GraphedMoE:
    """A layer captured once for each of several numbers of tokens, and replayed in the smallest that holds a call.

    A call of T tokens is padded to its bucket with absent rows, of id -1, which reach no expert and read no weights.
    Buckets share one set of inputs, one output, and the memory pool that their workspaces come from.

    What runs is fixed at capture: the kernels that the layer's plan names for a bucket, and the addresses of weights,
    which are kept alive. Another plan comes as another layer, leaves these graphs as they are, and is captured anew.

    On the CPU, which has no graphs, a replay is a call of the layer on the padded inputs.
    """

    def __init__(self, layer: FusedMoE, sizes: Iterable[int], pool: _POOL_HANDLE | None = None) -> None:
        """sizes: tokens of each bucket, which under dep<N> count the rows of x, of all ranks.

        pool: of torch.cuda.graph_pool_handle(), so that the layers of a model, which replay in turn, share workspaces;
        by default the layer has its own. Raises InvalidArgument for no sizes, or one below 1.
        """
        self.sizes = sorted(set(sizes))
        if not self.sizes or self.sizes[0] < 1:
            raise InvalidArgument("sizes", self.sizes, "one or more numbers of tokens, each 1 or more")
        config, device, largest = layer.problem.config, layer.device, self.sizes[-1]
        self._x = torch.zeros(largest, config.hidden_size, dtype=torch.bfloat16, device=device)
        self._ids = torch.full((largest, config.top_k), -1, dtype=torch.int32, device=device)
        self._weights = torch.zeros(largest, config.top_k, device=device)
        self._output = torch.zeros_like(self._x)
        self._layer, self._pool = layer, pool
        if pool is None and device.type == "cuda":
            self._pool = torch.cuda.graph_pool_handle()
        # The largest first: what it takes from the pool then serves all others.
        self._replays = {size: self._capture(size) for size in reversed(self.sizes)}

    def __call__(self, x: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> Tensor:
        """x [T, H] bf16, topk_ids [T, k] int32 and topk_weights [T, k] f32, as FusedMoE has them -> [T, H] bf16.

        The result is the graphs' own output: the next call overwrites it. Raises InvalidArgument for more tokens than
        the largest bucket has, and for a wrong shape, dtype or device.
        """
        tokens = x.shape[0]
        if tokens > self.sizes[-1]:
            hint = "Capture a larger one, or call the layer itself."
            raise InvalidArgument("x", f"{tokens} tokens", f"at most the largest bucket's {self.sizes[-1]}", hint)
        for name, given, own in (
            ("x", x, self._x),
            ("topk_ids", topk_ids, self._ids),
            ("topk_weights", topk_weights, self._weights),
        ):
            check_tensor(name, given, (tokens, own.shape[1]), (own.dtype,), own.device, contiguous=False)
            own[:tokens].copy_(given)
        if tokens:
            size = self.bucket(tokens)
            self._ids[tokens:size].fill_(-1)
            self._replays[size]()
        return self._output[:tokens]

    def bucket(self, num_tokens: int) -> int:
        """Tokens of the bucket that a call of num_tokens takes, which at most the largest has."""
        return self.sizes[bisect_left(self.sizes, num_tokens)]

    def _capture(self, size: int) -> Callable[[], object]:
        def call() -> Tensor:
            ids, weights = self._ids[:size], self._weights[:size]
            return self._layer(self._x[:size], topk_ids=ids, topk_weights=weights, output=self._output[:size])

        call()  # loads the kernels and settles the tactics, neither of which a capture may do
        if self._x.device.type != "cuda":
            return call
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(self._x.device), torch.cuda.graph(graph, pool=self._pool):
            call()
        return graph.replay
