"""torch.compile of every op: lengths that change, and errors."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import packops
from op_table import OPS, Op, T, flatten

ROWS = (257, 129, 65, 33)
ONE_PROCESS = [name for name, op in OPS.items() if op.plain is None]


def longer(op: Op, rows: int) -> tuple[list[Any], dict[str, Any]]:
    """The inputs of the table for so many rows. Tables of cosines stay as long as the longest needs."""

    def repeated(name: str, x: Any) -> Any:
        if name == "total_tokens":
            return rows
        if not isinstance(x, Tensor) or not x.dim() or x.shape[0] != T:
            return x
        wanted = max(ROWS) + 3 if name in ("cos", "sin") else rows
        return x.repeat(-(-wanted // T), *(1,) * (x.dim() - 1))[:wanted].clone()

    return [repeated(name, x) for name, x in op.tensors.items()], {name: repeated(name, x) for name, x in op.always.items()}


def step(op: Op, function: Any, tensors: list[Any], options: dict[str, Any]) -> list[Tensor]:
    names = list(op.tensors)
    leaves = [
        x.requires_grad_() if isinstance(x, Tensor) and x.is_floating_point() and name not in op.constant else x
        for name, x in zip(names, tensors, strict=True)
    ]
    outputs = flatten(function(*leaves, **options))
    wanted = [x for x in leaves if isinstance(x, Tensor) and x.requires_grad]
    differentiable = [x for x in outputs if x.requires_grad]
    grads = torch.autograd.grad([x.sum() for x in differentiable], wanted, allow_unused=True) if differentiable else []
    return [*(x.detach() for x in outputs), *(g for g in grads if g is not None)]


@pytest.mark.parametrize("dynamic", [True, None], ids=["dynamic", "automatic"])
@pytest.mark.parametrize("name", ONE_PROCESS)
def test_at_most_two_graphs(name, dynamic):
    """A packed loop has another number of tokens at every step."""
    op = OPS[name]
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    graphs = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    compiled = torch.compile(op.function, fullgraph=True, dynamic=dynamic, backend=backend)
    for rows in ROWS:
        found = step(op, compiled, *longer(op, rows))
        want = step(op, op.function, *longer(op, rows))
        for x, y in zip(found, want, strict=True):
            assert torch.equal(x, y)
    assert len(graphs) <= 2
    assert torch._dynamo.utils.counters["aot_autograd"]["total"] <= 2


@pytest.mark.parametrize("count", ["int"])  # torch makes a graph for every float
def test_number_of_items_makes_no_graph_of_its_own(count):
    torch._dynamo.reset()
    graphs = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    compiled = torch.compile(lambda x, y, n: packops.cross_entropy(x, y, num_items=n), backend=backend)
    x, y = torch.randn(5, 9), torch.arange(5)
    for number in (7, 11, 13, 17, 19):
        n = number if count == "int" else number + 0.5
        assert torch.equal(compiled(x, y, n), packops.cross_entropy(x, y, num_items=n))
    assert len(graphs) <= 2


@pytest.mark.parametrize(
    "function",
    [
        lambda h, w, y, cu: packops.linear_cross_entropy(h, w, y, num_valid=(y >= 0).sum().item()),
        lambda h, w, y, cu: packops.packed_metadata(cu, cu[-1].item())[0],
    ],
)
def test_an_int_that_was_read_off_a_tensor(function):
    torch._dynamo.reset()
    inputs = torch.randn(7, 5), torch.randn(11, 5), torch.tensor([0, 1, -100, 3, 4, 5, 6]), torch.tensor([0, 2, 7])
    with torch._dynamo.config.patch(capture_scalar_outputs=True):
        assert torch.equal(torch.compile(function, backend="aot_eager", fullgraph=True)(*inputs), function(*inputs))


@pytest.mark.parametrize(
    "function",
    [
        lambda h, w, y: packops.linear_log_probs(h, w, y),
        lambda h, w, y: packops.linear_cross_entropy(h, w, y, return_stats=True),
    ],
)
def test_an_exported_program_that_returns_named_results_is_saved(function):
    class Model(torch.nn.Module):
        def forward(self, *inputs: Tensor) -> Any:
            return function(*inputs)

    inputs = torch.randn(7, 5), torch.randn(11, 5), torch.tensor([0, 1, -100, 3, 4, 5, 6])
    file = io.BytesIO()
    torch.export.save(torch.export.export(Model(), inputs), file)
    file.seek(0)
    for found, want in zip(flatten(torch.export.load(file).module()(*inputs)), flatten(function(*inputs)), strict=True):
        assert torch.equal(found, want)


def test_errors_have_their_types():
    """The same types as eager, from within a graph."""
    torch._dynamo.reset()
    loss = torch.compile(packops.cross_entropy, backend="aot_eager", fullgraph=True)
    x = torch.randn(3, 5, requires_grad=True)
    with pytest.raises(IndexError, match=r"packops\.cross_entropy: label 9 at position 2"):
        loss(x, torch.tensor([0, 1, 9]))
    with pytest.raises(IndexError, match=r"packops\.cross_entropy: label 9 at position 2"):
        loss(x.detach(), torch.tensor([0, 1, 9]))
    norm = torch.compile(packops.rms_norm, backend="aot_eager", fullgraph=True)
    for y in (x, x.detach()):
        with pytest.raises(ValueError, match=r"packops\.rms_norm: weight must"):
            norm(y, torch.ones(4), eps=1e-6)
        with pytest.raises(TypeError, match=r"packops\.rms_norm: weight must"):
            norm(y, torch.ones(5, dtype=torch.float64), eps=1e-6)
    rope = torch.compile(packops.apply_rope, backend="aot_eager", fullgraph=True)
    with pytest.raises(IndexError, match=r"packops\.rope"):
        rope(torch.randn(4, 1, 8), None, *packops.rope_table(8, 2))


@pytest.mark.parametrize("name", ["cross_entropy", "linear_cross_entropy", "rope", "qk_norm_rope"])
def test_constants_that_need_a_gradient(name):
    op = OPS[name]
    for argument in op.constant or ("token_weight", "class_weight"):
        torch._dynamo.reset()
        value = (op.tensors[argument] if op.constant else op.options[argument].value).clone().requires_grad_()
        compiled = torch.compile(op.function, backend="aot_eager")
        values = {**op.tensors, **op.always, argument: value}
        tensors = [values.pop(key) for key in op.tensors]
        with pytest.raises(ValueError, match=f"{argument} needs a gradient"):
            compiled(*tensors, **values)


@pytest.mark.parametrize("name", [name for name in ONE_PROCESS if OPS[name].lower])
def test_autocast_inside_a_graph(name):
    op = OPS[name]
    torch._dynamo.reset()

    def under_autocast(*tensors: Any, **options: Any) -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            return op.function(*tensors, **options)

    want = flatten(under_autocast(*op.tensors.values(), **op.always))
    got = flatten(torch.compile(under_autocast, backend="aot_eager", fullgraph=True)(*op.tensors.values(), **op.always))
    for x, y in zip(got, want, strict=True):
        assert x.dtype == y.dtype
        assert torch.equal(x, y)


def test_over_ranks_leaves_the_graph(tmp_path):
    """It communicates: outside fullgraph the call runs between two graphs."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        torch._dynamo.reset()
        x, y = torch.randn(5, 9), torch.arange(5)
        loss = torch.compile(lambda x: packops.vocab_parallel_cross_entropy(x * 2, y) * 3, backend="aot_eager")
        torch.testing.assert_close(loss(x), packops.cross_entropy(x * 2, y) * 3)
    finally:
        dist.destroy_process_group()
