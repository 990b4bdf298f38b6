"""A gated MLP against fp64; what autograd keeps; what nobody wants is not made; the products of Hopper."""

from __future__ import annotations

import itertools
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses import FakeTensorMode
from torch.utils.checkpoint import checkpoint

import packops
from cuda_streams import capture, no_host_sync
from packops import reference
from packops.ops import gated_mlp
from packops.testing import assert_close, assert_no_worse_than

ACTIVATIONS = ("silu", "gelu_tanh", "gelu")
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
OPS = torch.ops.packops
NAMES = ("x", "gate_weight", "up_weight", "down_weight", "gate_bias", "up_bias", "down_bias")


def problem(dtype=torch.float32, device="cpu", rows=(3, 5), features=12, columns=24, results=10, bias=True):
    """Inputs in the order of the arguments."""

    def some(*shape, size=1.0):
        return (size * torch.randn(shape, device=device)).to(dtype).requires_grad_()

    wide = [some(columns, features, size=features**-0.5) for _ in range(2)]
    biases = [some(columns), some(columns), some(results)] if bias else []
    return [some(*rows, features, size=2), *wide, some(results, columns, size=max(columns, 1) ** -0.5), *biases]


def copies(tensors, dtype=None):
    return [x.detach().to(dtype or x.dtype).clone().requires_grad_(x.requires_grad) for x in tensors]


def results(call, inputs, grad):
    """The result and all gradients that anybody wants."""
    out = call(*inputs)
    wanted = [x for x in inputs if x.requires_grad]
    return [out.detach(), *(torch.autograd.grad(out, wanted, grad.to(out.dtype)) if wanted else ())]


def compare(inputs, grad, activation="silu", call=packops.gated_mlp):
    """With fp64 of the same roundings: gate and up are rounded once."""
    ours = results(partial(call, activation=activation), inputs, grad)
    theirs = results(partial(reference.gated_mlp, activation=activation), copies(inputs, torch.float64), grad.to(inputs[0].dtype))
    assert ours[0].dtype == inputs[0].dtype
    assert ours[0].is_contiguous()
    names = ["result", *(name for name, x in zip(NAMES, inputs, strict=False) if x.requires_grad)]
    for name, a, b in zip(names, ours, theirs, strict=True):  # sums of terms of both signs, of numbers that were rounded before
        assert_close(a, b, scale=8 * max(1.0, float(b.abs().max())), name=name)


@pytest.mark.parametrize("call", [packops.gated_mlp, OPS.gated_mlp], ids=["function", "op"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_matches_fp64(device, dtype, activation, bias, call):
    for rows in ((16,), (3, 5), (1,), ()):
        compare(problem(dtype, device, rows, bias=bias), torch.randn(*rows, 10, device=device), activation, call)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_no_less_accurate_than_eager(device, activation):
    inputs = problem(torch.bfloat16, device, (1000,), 64, 96, 64)
    grad = torch.randn(1000, 64, device=device)

    def eager(x, gate, up, down, gate_bias, up_bias, down_bias):
        g = F.linear(x, gate, gate_bias)
        act = F.silu(g) if activation == "silu" else F.gelu(g, approximate="tanh" if activation == "gelu_tanh" else "none")
        return F.linear(act * F.linear(x, up, up_bias), down, down_bias)

    ours = results(partial(packops.gated_mlp, activation=activation), inputs, grad)
    theirs = results(eager, copies(inputs), grad)
    exact = results(partial(reference.gated_mlp, activation=activation), copies(inputs, torch.float64), grad.bfloat16())
    for a, b, c in zip(ours, theirs, exact, strict=True):
        assert_no_worse_than(a, b, c, factor=1.05 if a.dim() > 1 else 1.3)  # a bias's few numbers scatter


def test_gradcheck():
    for activation in ACTIVATIONS:
        inputs = copies(problem(rows=(3,), features=4, columns=5, results=2), torch.float64)
        for call in (packops.gated_mlp, OPS.gated_mlp):
            assert torch.autograd.gradcheck(partial(call, activation=activation), inputs)


def test_gradients_and_inputs_of_every_stride(device):
    dense = torch.randn(3, 5, 10, device=device)
    for grad in (
        torch.ones((), device=device).expand(3, 5, 10),
        dense[:1].expand(3, 5, 10),
        dense.transpose(0, 2).contiguous().transpose(0, 2),
        torch.randn(3, 5, 20, device=device)[..., ::2],
    ):
        compare(problem(device=device), grad)
    x, gate, up, down = problem(device=device, bias=False)
    x = torch.randn(5, 3, 24, device=device)[..., ::2].transpose(0, 1).requires_grad_()
    both = torch.cat([gate, up]).detach()
    halves = [half.detach().requires_grad_() for half in both.chunk(2)]
    compare([x, *halves, down.detach().t().contiguous().t().requires_grad_()], dense)


def test_frozen_parts(device):
    """Every subset of what may need a gradient."""
    for wanted in itertools.product((False, True), repeat=7):
        inputs = problem(device=device)
        for x, flag in zip(inputs, wanted, strict=True):
            x.requires_grad_(flag)
        compare(inputs, torch.randn(3, 5, 10, device=device))
    assert not packops.gated_mlp(*(x.detach() for x in inputs)).requires_grad


@pytest.mark.parametrize(
    ("wanted", "products"),
    [
        ((), 3),
        (("x",), 3 + 3),
        (("gate_weight",), 3 + 2),
        (("gate_weight", "up_weight"), 3 + 3),
        (("up_bias",), 3 + 1),
        (("down_weight",), 3 + 1),
        (("down_bias",), 3),
        (("x", "down_weight"), 3 + 4),
        (NAMES, 9),
    ],
)
def test_what_nobody_wants_costs_no_product(wanted, products):
    inputs = problem(rows=(15,))
    for name, x in zip(NAMES, inputs, strict=True):
        x.requires_grad_(name in wanted)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        out = packops.gated_mlp(*inputs)
        if wanted:
            out.sum().backward()
    ran = (event.count for event in profile.key_averages() if event.key in ("aten::mm", "aten::addmm", "aten::addmm_"))
    assert sum(ran) == products


def test_what_autograd_keeps(device):
    """x, gate, up, the weights and their biases; eager code keeps act(gate) and the product, too."""
    storages = {}

    def pack(x):
        storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    inputs = problem(torch.bfloat16, device, rows=(64,))
    for call in (packops.gated_mlp, OPS.gated_mlp):
        storages.clear()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            out = call(*inputs)
        assert sum(storages.values()) == 2 * (64 * 12 + 2 * 64 * 24 + 2 * 24 * 12 + 10 * 24 + 2 * 24)
        del out


@pytest.mark.parametrize("call", [packops.gated_mlp, OPS.gated_mlp], ids=["function", "op"])
def test_the_result_may_be_changed_in_place(device, call):
    inputs, grad = problem(device=device), torch.randn(3, 5, 10, device=device)
    want = results(call, copies(inputs), grad)
    out = call(*inputs)
    out += 1.0
    out.backward(grad)
    assert all(torch.equal(a, b) for a, b in zip((out - 1, *(x.grad for x in inputs)), (want[0] + 1 - 1, *want[1:]), strict=True))


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpoint(device, use_reentrant):
    inputs, grad = problem(device=device), torch.randn(3, 5, 10, device=device)
    want = results(packops.gated_mlp, copies(inputs), grad)
    out = checkpoint(packops.gated_mlp, *inputs, use_reentrant=use_reentrant)
    out.backward(grad)
    assert all(torch.equal(a, b) for a, b in zip((out, *(x.grad for x in inputs)), want, strict=True))


def test_autocast(device):
    """As linear layers: fp32 inputs are cast, gradients come back in fp32; the result of the casts to the bit."""
    inputs = problem(device=device)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        out, op = packops.gated_mlp(*inputs), OPS.gated_mlp(*inputs)
        mixed = packops.gated_mlp(inputs[0].bfloat16(), *inputs[1:])  # as under a patched model
    casts = copies(inputs, torch.bfloat16)
    want = packops.gated_mlp(*casts)
    assert all(torch.equal(x, want) for x in (out, op, mixed))
    ours, theirs = (torch.autograd.grad(y.float().square().sum(), x) for y, x in ((out, inputs), (want, casts)))
    assert all(a.dtype == torch.float32 and torch.equal(a, b.float()) for a, b in zip(ours, theirs, strict=True))


def test_backward_under_autocast_of_what_was_computed_without():
    """An island of fp32 in a region of bf16, whose backward runs in that region."""
    inputs, grad = problem(), torch.randn(3, 5, 10)
    want = results(packops.gated_mlp, inputs, grad)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with torch.autocast("cpu", enabled=False):
            out = packops.gated_mlp(*inputs)
        found = torch.autograd.grad(out, inputs, grad)
    assert all(torch.equal(a, b) for a, b in zip((out, *found), want, strict=True))


def test_opcheck(device):
    for bias in (False, True):
        inputs = problem(device=device, bias=bias)
        torch.library.opcheck(OPS.gated_mlp.default, tuple(inputs), {"activation": "gelu_tanh"})
        plain = [x.detach() for x in inputs]
        torch.library.opcheck(OPS._gated_mlp.default, (*plain, *(None,) * (7 - len(plain)), "silu"))
        kept = OPS._gated_mlp(*plain, *(None,) * (7 - len(plain)), "silu")[1:]
        for needs in ([True] * 7, [False, True] * 3 + [False], [False] * 7):
            torch.library.opcheck(
                OPS._gated_mlp_backward.default, (torch.ones(3, 5, 10, device=device), *plain[:4], *kept, "silu", needs)
            )


@pytest.mark.parametrize("frozen", [False, True])
def test_compile(device, frozen):
    torch._dynamo.reset()
    pairs = [problem(device=device)]
    for x in pairs[0][1:4]:
        x.requires_grad_(not frozen)
    pairs.append(copies(pairs[0]))
    grad = torch.randn(3, 5, 10, device=device)
    want = results(packops.gated_mlp, pairs[0], grad)
    got = results(torch.compile(packops.gated_mlp, fullgraph=True), pairs[1], grad)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)
    torch._dynamo.reset()


def test_fake_tensors_outside_their_mode():
    """Of a GPU, and as many as its products take; there need not be one."""
    with FakeTensorMode():
        x, wide, down = (torch.empty(shape, dtype=torch.bfloat16, device="cuda") for shape in ((2000, 64), (96, 64), (32, 96)))
        inside = packops.gated_mlp(x, wide, wide, down)
    for call in (packops.gated_mlp, OPS.gated_mlp):
        found = call(x, wide, wide, down)
        assert (found.shape, found.dtype, found.device) == (inside.shape, inside.dtype, inside.device)


@pytest.mark.parametrize(("rows", "columns"), [((0,), 24), ((3, 0), 24), ((4,), 0)])
def test_empty(device, rows, columns):
    inputs = problem(device=device, rows=rows, columns=columns)
    ours = results(packops.gated_mlp, inputs, torch.ones(*rows, 10, device=device))
    theirs = results(reference.gated_mlp, copies(inputs), torch.ones(*rows, 10, device=device))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b.float())


def test_errors_name_the_argument():
    x, gate, up, down, gate_bias, up_bias, down_bias = problem()
    for change, error, message in (
        ({"x": x[..., :3]}, ValueError, r"gate_weight must have shape \(columns, 3\) for x \(3, 5, 3\), got \(24, 12\)"),
        ({"x": torch.tensor(1.0)}, ValueError, r"x must have shape \(..., features\), got a 0-d tensor"),
        ({"gate_weight": gate[0]}, ValueError, "gate_weight must have shape"),
        ({"up_weight": up[:3]}, ValueError, r"up_weight must have shape \(24, 12\), got \(3, 12\)"),
        ({"down_weight": gate}, ValueError, r"down_weight must have shape \(results, 24\)"),
        ({"gate_bias": down_bias}, ValueError, r"gate_bias must have shape \(24,\), got \(10,\)"),
        ({"up_bias": up_bias[:, None]}, ValueError, "up_bias must have shape"),
        ({"down_bias": up_bias}, ValueError, r"down_bias must have shape \(10,\), got \(24,\)"),
        ({"up_weight": up.double()}, TypeError, "up_weight must have the dtype of x, torch.float32, got torch.float64"),
        ({"down_weight": down.to("meta")}, ValueError, "meta"),
        ({"gate_weight": None}, TypeError, "gate_weight must be a tensor, got None"),
        ({"activation": "relu"}, ValueError, "activation must be 'silu', 'gelu_tanh' or 'gelu', got 'relu'"),
    ):
        given = dict(zip(NAMES, (x, gate, up, down, gate_bias, up_bias, down_bias), strict=True), activation="silu") | change
        with pytest.raises(error, match=message):
            packops.gated_mlp(**given)


# ---- Hopper -------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def hopper(monkeypatch):
    """A device whose code has the products, which small calls take, too."""
    device = torch.device("cuda")
    x = torch.zeros(8, 8, device=device, dtype=torch.bfloat16)
    if OPS._gated_mlp_products(x, x, x, "silu")[0] is None:
        pytest.skip("neither this GPU nor the loaded code has wgmma, and without it there are no such products")
    monkeypatch.setattr(gated_mlp, "LEAST_TOKENS", 1)
    return device


@pytest.mark.gpu
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_products_match_fp64(hopper, dtype, activation):
    """Sizes that fill no tile, one token, several turns of each consumer and of the ring."""
    for tokens, features, columns in ((1, 8, 8), (129, 72, 200), (300, 136, 96), (5, 8, 4000), (2000, 520, 1032)):
        inputs = problem(dtype, hopper, (tokens,), features, columns, features, bias=False)
        x, gate, up, down = (x.detach() for x in inputs)
        found = OPS._gated_mlp_products(x, gate, up, activation)
        for a, weight in zip(found, (gate, up), strict=False):
            assert_close(a, F.linear(x.double(), weight.double()), scale=2)
        assert_close(found[2], reference.gated_activation(*found[:2], activation=activation))
        alone = OPS._gated_mlp_products(x, gate, up, activation, False)
        assert alone[:2] == (None, None)
        assert torch.equal(alone[2], found[2])
        grad = torch.randn(tokens, features, device=hopper).to(dtype)
        made = OPS._gated_mlp_products_backward(grad, down, *found[:2], activation, True)
        leaves = [y.double().requires_grad_() for y in found[:2]]
        inner = grad.double() @ down.double()
        want = torch.autograd.grad(reference.gated_activation(*leaves, activation=activation), leaves, inner)
        assert torch.equal(made[0], found[2]), "both passes make the same product"
        for a, b in zip(made[1:], want, strict=True):
            assert_close(a, b, scale=4 * max(1.0, float(b.abs().max())))
        compare(inputs, grad, activation)


@pytest.mark.gpu
def test_a_row_has_the_same_bits_in_any_company(hopper):
    x, gate, up, down = (x.detach() for x in problem(torch.bfloat16, hopper, (700,), 200, 520, 200, bias=False))
    grad = torch.randn_like(x)
    whole = OPS._gated_mlp_products(x, gate, up, "silu")
    back = OPS._gated_mlp_products_backward(grad, down, *whole[:2], "silu", True)
    for begin, end in ((0, 1), (3, 130), (500, 700)):
        part = OPS._gated_mlp_products(x[begin:end], gate, up, "silu")
        assert all(torch.equal(a, b[begin:end]) for a, b in zip(part, whole, strict=True))
        part = OPS._gated_mlp_products_backward(grad[begin:end], down, *part[:2], "silu", True)
        assert all(torch.equal(a, b[begin:end]) for a, b in zip(part, back, strict=True))


@pytest.mark.gpu
def test_what_the_products_cannot_take(hopper):
    """None, and then the op does without."""
    for change in (
        {"features": 12},
        {"columns": 20},
        {"dtype": torch.float32},
        {"bias": True},
    ):
        inputs = problem(**{"dtype": torch.bfloat16, "device": hopper, "rows": (40,), "features": 16, "bias": False} | change)
        if "bias" not in change:
            assert OPS._gated_mlp_products(*inputs[:3], "silu") == (None, None, None)
        compare(inputs, torch.randn(40, 10, device=hopper))
    x, gate, up, down = (x.detach() for x in problem(torch.bfloat16, hopper, (40,), 16, bias=False))
    wide = torch.randn(40, 32, device=hopper).bfloat16()
    off = torch.randn(24 * 16 + 1, device=hopper).bfloat16()[1:].view(24, 16)
    for a, b, c in ((wide[:, :16], gate, up), (wide[:, ::2], gate, up), (x, gate.t().contiguous().t(), up), (x, gate, off)):
        assert OPS._gated_mlp_products(a, b, c, "silu") == (None, None, None)
        inputs = [y.detach().requires_grad_() for y in (a, b, c, down)]
        compare(inputs, torch.randn(40, 10, device=hopper))
    assert OPS._gated_mlp_products(x, gate, up, "gelu") == (None, None, None)
    gate, up = OPS._gated_mlp_products(x, gate, up, "silu")[:2]
    grad = torch.randn(40, 16, device=hopper).bfloat16()
    down = torch.randn(16, 24, device=hopper).bfloat16()
    assert OPS._gated_mlp_products_backward(grad, down, gate, up, "silu", False)[0] is None
    assert OPS._gated_mlp_products_backward(grad, down, gate, up, "silu", False)[1] is not None
    for changed in (
        (grad[:1].expand(40, 16), down, gate, up),
        (grad, down, gate[:, :16], up),
        (grad, down.t().contiguous().t(), gate, up),
    ):
        assert OPS._gated_mlp_products_backward(*changed, "silu", True) == (None, None, None)


@pytest.mark.gpu
def test_in_a_graph_without_waiting(hopper):
    inputs = problem(torch.bfloat16, hopper, (300,), 64, 136, 64, bias=False)
    grad = torch.randn(300, 64, device=hopper).bfloat16()
    with no_host_sync():
        results(packops.gated_mlp, inputs, grad)
    graph, found = capture(lambda: results(packops.gated_mlp, inputs, grad))
    with torch.no_grad():
        for x in inputs:
            x.copy_(torch.randn_like(x) * 0.1)
    graph.replay()
    for a, b in zip(found, results(packops.gated_mlp, copies(inputs), grad), strict=True):
        assert torch.equal(a, b)


@pytest.mark.gpu
@pytest.mark.large(gib=40)
def test_more_elements_than_2_to_31(hopper):
    tokens, columns, features = 2**18 + 40, 8200, 16
    x, gate, up, down = (x.detach() for x in problem(torch.bfloat16, hopper, (tokens,), features, columns, features, bias=False))
    found = OPS._gated_mlp_products(x, gate, up, "silu")
    last = OPS._gated_mlp_products(x[-100:], gate, up, "silu")
    assert all(torch.equal(a[-100:], b) for a, b in zip(found, last, strict=True))
    grad = torch.randn_like(x)
    made = OPS._gated_mlp_products_backward(grad, down, *found[:2], "silu", False)
    last = OPS._gated_mlp_products_backward(grad[-100:], down, *last[:2], "silu", False)
    assert all(torch.equal(a[-100:], b) for a, b in zip(made[1:], last[1:], strict=True))
