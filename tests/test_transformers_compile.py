"""Experts of transformers under torch.compile: whole, for all numbers of tokens, and on the parameters of the day."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from moe_runtime.integrations import transformers as integration
from moe_runtime.integrations.transformers import layers

from .test_transformers_experts import inputs, make_experts, swiglu
from .transformers_models import experts_of, make_model, prompts, stock_logits, to_fp8, typical_error


@pytest.fixture(autouse=True)
def registered() -> None:
    integration.register()
    torch._dynamo.reset()


class Graphs(list[torch.fx.GraphModule]):
    """A backend that keeps what it is given."""

    def __call__(self, graph: torch.fx.GraphModule, _: Any) -> Any:
        self.append(graph)
        return graph.forward

    def calls(self, target: object) -> int:
        return sum(node.target == target for graph in self for node in graph.graph.nodes)


@pytest.mark.parametrize("fp8", [False, True], ids=["bf16", "fp8"])
@torch.no_grad()
def test_a_whole_model_is_one_graph(fp8: bool) -> None:
    model, ids = make_model("qwen3-moe", hidden=128, inter=128), prompts()
    if fp8:
        to_fp8(model)
    expected, graphs = model(ids).logits, Graphs()
    compiled = torch.compile(model, backend=graphs, fullgraph=True)
    assert torch.equal(compiled(ids).logits, expected)
    assert len(graphs) == 1
    assert graphs.calls(torch.ops.moe_runtime.transformers_experts.default) + graphs.calls(
        torch.ops.moe_runtime.transformers_experts
    ) == len(list(experts_of(model)))


@pytest.mark.parametrize("name", ["qwen3-moe", "deepseek-v3", "mixtral", "gpt-oss"])
@torch.no_grad()
def test_a_block_takes_any_number_of_tokens(name: str) -> None:
    model = make_model(name)
    block = model.model.layers[-1].mlp
    rows = {n: torch.randn(1, n, 64, generator=torch.Generator().manual_seed(n)).bfloat16() for n in (3, 5, 8, 13)}
    expected = {n: block(x) for n, x in rows.items()}
    graphs = Graphs()
    compiled = torch.compile(block, backend=graphs, fullgraph=True, dynamic=True)
    for n, x in rows.items():
        torch.testing.assert_close(compiled(x), expected[n], rtol=0, atol=0)
    assert len(graphs) == 1


@torch.no_grad()
def test_aot_autograd_and_inductor_s_own_passes() -> None:
    module, given = make_experts(), inputs(9)
    expected, made = module(*given), layers._made[module.gate_up_proj].layer
    compiled = torch.compile(module, backend="aot_eager_decomp_partition", fullgraph=True)
    assert torch.equal(compiled(*given), expected)
    assert layers._made[module.gate_up_proj].layer is made


@torch.no_grad()
def test_compiled_code_sees_parameters_change() -> None:
    module, given = make_experts(), inputs(9)
    before, graphs = module(*given), Graphs()
    compiled = torch.compile(module, backend=graphs, fullgraph=True)
    assert torch.equal(compiled(*given), before)
    module.down_proj.mul_(2)
    assert torch.equal(compiled(*given), 2 * before)
    module.down_proj = torch.nn.Parameter(module.down_proj / 4)
    assert torch.equal(compiled(*given), before / 2)


@torch.no_grad()
def test_modules_of_one_class_keep_their_constants() -> None:
    class Limited:
        limit = 0.1

        def __call__(self, rows: torch.Tensor) -> torch.Tensor:
            return swiglu(rows, self.limit)

    module, given, results = make_experts(gate := Limited(), limit=0.1), inputs(9), []
    module(*given)
    compiled = torch.compile(type(module).forward, backend="eager", fullgraph=True)
    results.append((compiled(module, *given), module(*given)))
    gate.limit = 0.4
    twin = make_experts(gate, limit=0.4)
    twin.__class__ = type(module)
    twin(*given)
    results.append((compiled(twin, *given), twin(*given)))
    assert all(torch.equal(found, expected) for found, expected in results)
    assert not torch.equal(results[0][0], results[1][0])


@torch.no_grad()
def test_before_a_first_call_the_graph_breaks_once_and_says_why() -> None:
    module, given = make_experts(), inputs(9)
    with pytest.raises(torch._dynamo.exc.Unsupported, match="call the model before compiling it"):
        torch.compile(module, backend="eager", fullgraph=True)(*given)
    torch._dynamo.reset()
    graphs = Graphs()
    compiled = torch.compile(module, backend=graphs)
    first = compiled(*given)
    graphs.clear()
    assert torch.equal(compiled(*given), first) and torch.equal(module(*given), first)
    assert len(graphs) == 1


@torch.no_grad()
def test_what_is_left_to_transformers_is_compiled_with_the_rest() -> None:
    module, (x, ids, weights) = make_experts(act="gelu"), inputs(9)
    expected, graphs = module(x, ids, weights), Graphs()
    compiled = torch.compile(module, backend=graphs, fullgraph=True)
    assert torch.equal(compiled(x, ids, weights), expected)
    assert graphs.calls(torch.ops.moe_runtime.transformers_experts) == 0 and len(graphs) == 1


@torch.no_grad()
def test_compiled_generation() -> None:
    model, ids = make_model("qwen3-moe"), prompts()
    settings = {"max_new_tokens": 4, "do_sample": False}
    expected = model.generate(ids, **settings)
    model.forward = torch.compile(model.forward, backend="eager")
    assert torch.equal(model.generate(ids, **settings), expected)
    assert typical_error(model(ids).logits, stock_logits(model, ids)) <= 2e-2
