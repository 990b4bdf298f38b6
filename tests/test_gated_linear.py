"""The gate of a gated MLP, and gate and projection in one, against fp64; what autograd keeps; what nobody wants is not made."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

import packops
from cuda_streams import capture, no_host_sync
from packops import reference
from packops.ops import gated_linear
from packops.testing import assert_close, assert_no_worse_than

ACTIVATIONS = ("silu", "gelu_tanh", "gelu")
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
OPS = torch.ops.packops
CALLS = pytest.mark.parametrize("call", [packops.gated_activation, OPS.gated_activation], ids=["function", "op"])


def act(gate, activation):
    """As transformers' modules compute it."""
    return F.silu(gate) if activation == "silu" else F.gelu(gate, approximate="tanh" if activation == "gelu_tanh" else "none")


def halves(rows, columns, dtype, device):
    """The halves of one fused projection: rows that lie 2 * columns apart."""
    return (2 * torch.randn(rows, 2 * columns, device=device)).to(dtype).chunk(2, dim=-1)


def leaves_of(*tensors):
    """Leaves that lie in memory as the tensors do."""
    return [x.detach().requires_grad_() for x in tensors]


def gradients(call, inputs, grad):
    return torch.autograd.grad(call(*inputs), inputs, grad.to(inputs[0].dtype))


def check(gate, up, activation, *, call=packops.gated_activation):
    """Value and gradients, each within one rounding of fp64."""
    inputs, doubles = leaves_of(gate, up), leaves_of(gate.double(), up.double())
    out, want = call(*inputs, activation=activation), reference.gated_activation(*doubles, activation=activation)
    assert out.is_contiguous()
    assert out.dtype == gate.dtype
    scale = 4.0 if gate.dtype == torch.float32 else 1.0  # e^x and what is made of it
    assert_close(out, want, scale=scale, name="product")
    grad = torch.randn(gate.shape, device=gate.device).to(gate.dtype)
    for name, a, b in zip(
        ("grad_gate", "grad_up"),
        torch.autograd.grad(out, inputs, grad),
        torch.autograd.grad(want, doubles, grad.double()),
        strict=True,
    ):
        assert_close(a, b, scale=scale, name=name)


@CALLS
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_matches_fp64(device, dtype, activation, call):
    for shape in ((64, 96), (3, 5, 8193), (7, 1), (1, 7), (33,), (5, 4, 8)):
        gate, up = (2 * torch.randn(2, *shape, device=device)).to(dtype)
        check(gate, up, activation, call=call)


@pytest.mark.parametrize("dtype", FLOATS)
def test_rows_of_every_stride(device, dtype):
    """Halves of a fused projection, odd and even; every second row; gate and up of different strides; three dimensions."""
    for columns in (1, 7, 8, 48, 520, 1023):
        gate, up = halves(9, columns, dtype, device)
        check(gate, up, "silu")
        check(gate[::2], up[::2], "gelu_tanh")
        check(gate, up.contiguous(), "silu")
        check(gate.unflatten(0, (3, 3)), up.unflatten(0, (3, 3)), "silu")
        check(gate.unflatten(0, (3, 3)).transpose(0, 1), up.unflatten(0, (3, 3)).transpose(0, 1), "silu")  # copied
        check(gate[:1].expand(9, columns), up, "silu")


@pytest.mark.parametrize("dtype", FLOATS)
def test_misaligned_storage(device, dtype):
    for offset in (1, 3, 8):
        for shape in ((7, 40), (3, 33)):
            count = shape[0] * shape[1]
            gate, up = ((2 * torch.randn(count + offset, device=device)).to(dtype)[offset:].view(shape) for _ in range(2))
            check(gate, up, "silu")
            check(gate, up.clone(), "gelu")


def test_an_element_has_the_same_bits_wherever_it_lies(device):
    """In a vector, at the end of a row, in a misaligned row."""
    for dtype in FLOATS:
        for activation in ACTIVATIONS:
            gate, up = (2 * torch.randn(2, 4, 100, device=device)).to(dtype)
            grad = torch.randn_like(gate)
            whole = OPS._gated_activation_backward(grad, gate, up, activation)
            for begin, end in ((0, 99), (1, 100), (3, 40), (57, 58)):
                part = OPS._gated_activation_backward(*(x[:, begin:end] for x in (grad, gate, up)), activation)
                assert all(torch.equal(a, b[:, begin:end]) for a, b in zip(part, whole, strict=True))
                assert torch.equal(packops.gated_activation(gate[:, begin:end], up[:, begin:end], activation=activation), part[0])


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_no_less_accurate_than_eager(device, activation):
    for dtype in FLOATS:
        gate, up, grad = (2 * torch.randn(3, 64, 200, device=device)).to(dtype)

        def eager(gate, up):
            return act(gate, activation) * up

        inputs, doubles = leaves_of(gate, up), leaves_of(gate.double(), up.double())
        want = reference.gated_activation(*doubles, activation=activation)
        ours, theirs = (call(*inputs) for call in (lambda *x: packops.gated_activation(*x, activation=activation), eager))
        factor = 1.02 if dtype != torch.float32 else 2.0
        assert_no_worse_than(ours, theirs, want, factor=factor)
        grads = [torch.autograd.grad(y, inputs, grad) for y in (ours, theirs)]
        for a, b, c in zip(*grads, torch.autograd.grad(want, doubles, grad.double()), strict=True):
            assert_no_worse_than(a, b, c, factor=factor)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [*FLOATS, torch.float64])
def test_huge_infinite_and_nan(device, dtype, activation):
    """The limits where there are limits. At infinities and NaN what torch has."""
    if dtype == torch.float64 and device.type == "cuda":
        pytest.skip("fp64 is for the CPU")
    biggest = torch.finfo(dtype).max
    values = [0.0, -0.0, 1e-30, 15.0, -15.0, 40.0, -40.0, 90.0, -90.0, 1e4, -1e4, biggest, -biggest]
    gate = torch.tensor(values, dtype=dtype, device=device).requires_grad_()
    up = torch.full_like(gate, 0.5).requires_grad_()
    out = packops.gated_activation(gate, up, activation=activation)
    grad_gate, grad_up = torch.autograd.grad(out, (gate, up), torch.ones_like(out))
    want = reference.gated_activation(gate, up, activation=activation)
    assert_close(out[:9], want[:9])
    for place, value in enumerate(values[9:], start=9):
        assert grad_gate[place] == (0.5 if value > 0 else 0)
        assert out[place] == (gate[place] * 0.5 if value > 0 else 0)
        assert grad_up[place] == (gate[place] if value > 0 else 0)

    def results(call, gate, up):
        inputs = leaves_of(gate, up)
        y = call(*inputs)
        return [y.detach(), *torch.autograd.grad(y, inputs, torch.ones_like(y))]

    inf, nan = float("inf"), float("nan")
    gate, up = torch.tensor([[inf, -inf, nan, 1, 1, 1, 0], [1, 1, 1, inf, -inf, nan, inf]], dtype=dtype, device=device)
    ours = results(lambda g, u: packops.gated_activation(g, u, activation=activation), gate, up)
    theirs = results(lambda g, u: act(g, activation) * u, gate, up)
    if activation == "gelu":  # torch's gelu of infinity is NaN where its vectors are wide
        theirs[0][0] = theirs[2][0] = inf
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, equal_nan=True)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_16_bit_number(device, activation):
    """A saturated or subnormal value of any kind is the limit, not NaN."""
    for dtype in (torch.bfloat16, torch.float16):
        gate = torch.arange(-(2**15), 2**15, dtype=torch.int32, device=device).to(torch.int16).view(dtype)
        gate = gate[gate.isfinite()]
        up, grad = torch.full_like(gate, 0.75), torch.full_like(gate, 0.5)
        doubles = leaves_of(gate.double(), up.double())
        want = reference.gated_activation(*doubles, activation=activation)
        slopes = torch.autograd.grad(want, doubles, grad.double())
        product, grad_gate, grad_up = OPS._gated_activation_backward(grad, gate, up, activation)
        assert_close(product, want)
        assert_close(grad_gate, slopes[0])
        assert_close(grad_up, slopes[1])


def test_gradcheck():
    for activation in ACTIVATIONS:
        gate, up = (torch.randn(3, 10, dtype=torch.float64).chunk(2, dim=-1)[i].requires_grad_() for i in range(2))
        weight, bias = (torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in ((4, 5), (4,)))
        for call in (packops.gated_activation, OPS.gated_activation):
            assert torch.autograd.gradcheck(partial(call, activation=activation), (gate, up))
        assert torch.autograd.gradcheck(partial(packops.gated_linear, activation=activation), (gate, up, weight, bias))


# ---- with the projection ----------------------------------------------------------------------------------------------------


def problem(dtype=torch.float32, device="cpu", rows=(3, 5), columns=24, features=10, bias=True):
    gate, up = torch.randn(2, *rows, columns, device=device).to(dtype)
    weight = torch.randn(features, columns, device=device).div(columns**0.5).to(dtype)
    inputs = [gate, up, weight, *([torch.randn(features, device=device).to(dtype)] if bias else [])]
    return leaves_of(*inputs)


def compare(inputs, grad, activation="silu"):
    """gated_linear with fp64; the result and all gradients that anybody wants."""
    doubles = [x.detach().double().requires_grad_(x.requires_grad) for x in inputs]
    out, want = packops.gated_linear(*inputs, activation=activation), reference.gated_linear(*doubles, activation=activation)
    dtype = inputs[0].dtype
    assert out.dtype == dtype
    wanted = [i for i, x in enumerate(inputs) if x.requires_grad]
    ours = torch.autograd.grad(out, [inputs[i] for i in wanted], grad.to(dtype))
    theirs = torch.autograd.grad(want, [doubles[i] for i in wanted], grad.to(dtype).double())
    names = ["result", *(("grad_gate", "grad_up", "grad_weight", "grad_bias")[i] for i in wanted)]
    for name, a, b in zip(names, (out, *ours), (want, *theirs), strict=True):  # sums of terms of both signs, so of the largest
        assert_close(a, b, scale=4 * max(1.0, float(b.abs().max())), name=name)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_linear_matches_fp64(device, dtype, activation, bias):
    for rows in ((16,), (3, 5), (1,), ()):
        inputs = problem(dtype, device, rows, bias=bias)
        compare(inputs, torch.randn(*rows, 10, device=device), activation)


def test_linear_takes_gradients_of_every_stride(device):
    inputs = problem(device=device)
    dense = torch.randn(3, 5, 10, device=device)
    for grad in (
        torch.ones((), device=device).expand(3, 5, 10),
        dense[:1].expand(3, 5, 10),
        dense.transpose(0, 2).contiguous().transpose(0, 2),
        torch.randn(3, 5, 20, device=device)[..., ::2],
    ):
        compare(inputs, grad)


@CALLS
def test_activation_takes_gradients_of_every_stride(device, call):
    gate, up = problem(device=device)[:2]
    dense = torch.randn(3, 5, 24, device=device)
    doubles = leaves_of(gate.double(), up.double())
    for grad in (
        torch.ones((), device=device).expand(3, 5, 24),
        dense[:1].expand(3, 5, 24),
        dense.transpose(0, 2).contiguous().transpose(0, 2),
        torch.randn(3, 5, 48, device=device)[..., ::2],
    ):
        for a, b in zip(gradients(call, (gate, up), grad), gradients(reference.gated_activation, doubles, grad), strict=True):
            assert_close(a, b, scale=4.0)


def test_frozen_parts(device):
    """Every subset of what may need a gradient; what needs none is not made."""
    for wanted in range(1, 16):
        inputs = problem(device=device)
        for i, x in enumerate(inputs):
            x.requires_grad_(bool(wanted >> i & 1))
        compare(inputs, torch.randn(3, 5, 10, device=device))
        out = packops.gated_linear(*inputs)
        out.sum().backward()
        assert [x.grad is not None for x in inputs] == [x.requires_grad for x in inputs]
    assert not packops.gated_linear(*(x.detach() for x in inputs)).requires_grad
    with torch.no_grad():
        assert not packops.gated_linear(*problem(device=device)).requires_grad
    gate, up = (x.detach() for x in inputs[:2])
    for flags in ((True, False, False), (False, True, False), (False, False, True), (False, False, False)):
        made = OPS._gated_activation_backward(gate, gate, up, "silu", *flags)
        assert tuple(x is not None for x in made) == flags
    for i in range(2):
        pair = [x.detach().requires_grad_(j == i) for j, x in enumerate((gate, up))]
        for call in (packops.gated_activation, OPS.gated_activation):
            (grad,) = torch.autograd.grad(call(*pair).sum(), pair[i])
            assert_close(grad, torch.autograd.grad(reference.gated_activation(*pair).sum(), pair[i])[0].double(), scale=4.0)


def test_what_nobody_wants_is_not_made(monkeypatch):
    """The kernel is asked for exactly the gradients that have somewhere to go, and for the product if the weight's has."""
    asked = []
    op = gated_linear._OPS["packops"][0]
    raw = op.raw_backward

    def spy(grad, gate, up, activation, *flags):
        asked.append(flags)
        return raw(grad, gate, up, activation, *flags)

    monkeypatch.setattr(op, "raw_backward", spy)
    for gate, up, weight in ((1, 1, 1), (1, 1, 0), (1, 0, 1), (0, 1, 0), (0, 0, 1)):
        inputs = problem(bias=False)
        for x, wanted in zip(inputs, (gate, up, weight), strict=True):
            x.requires_grad_(bool(wanted))
        asked.clear()
        packops.gated_linear(*inputs).sum().backward()
        assert asked == ([(bool(weight), bool(gate), bool(up))] if gate or up else []), (
            "the product alone is the forward kernel's"
        )
        if gate or up:
            packops.gated_activation(*inputs[:2]).sum().backward()
            assert asked[1:] == [(False, bool(gate), bool(up))]


def saved_bytes(call):
    """By storage, since views of one tensor keep it once."""
    storages = {}

    def pack(x):
        storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        out = call()
    return sum(storages.values()), out


@pytest.mark.parametrize("fused", [False, True], ids=["two projections", "one"])
def test_what_autograd_keeps(device, fused):
    """gate, up and weight; eager code keeps act(gate) and the product, too."""
    gate, up, weight, bias = problem(torch.bfloat16, device, rows=(64,), columns=32)
    if fused:
        gate, up = leaves_of(torch.randn(64, 64, device=device).to(torch.bfloat16))[0].chunk(2, dim=-1)
    matrix, parameters = 64 * 32 * 2, 10 * 32 * 2
    assert saved_bytes(lambda: packops.gated_linear(gate, up, weight, bias))[0] == 2 * matrix + parameters
    assert saved_bytes(lambda: packops.gated_activation(gate, up))[0] == 2 * matrix
    assert saved_bytes(lambda: OPS.gated_activation(gate, up))[0] == 2 * matrix
    assert saved_bytes(lambda: F.linear(F.silu(gate) * up, weight, bias))[0] == 4 * matrix + parameters


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpoint(device, use_reentrant):
    inputs = problem(device=device)

    def function(*x):
        return checkpoint(packops.gated_linear, *x, use_reentrant=use_reentrant)

    grad = torch.randn(3, 5, 10, device=device)
    want, got = (torch.autograd.backward(call(*x), grad) or x for call, x in
                 ((packops.gated_linear, leaves_of(*inputs)), (function, leaves_of(*inputs))))  # fmt: skip
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(got, want, strict=True))


def test_autocast(device):
    """As a linear layer: fp32 inputs are cast, gradients come back in fp32; the loss of the casts to the bit."""
    inputs = problem(device=device)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        out = packops.gated_linear(*inputs)
        mixed = packops.gated_linear(inputs[0].bfloat16(), inputs[1].bfloat16(), *inputs[2:])  # as under a patched model
    casts = [x.detach().bfloat16().requires_grad_() for x in inputs]
    want = packops.gated_linear(*casts)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, want)
    assert torch.equal(mixed, want)
    ours, theirs = (torch.autograd.grad(y.float().square().sum(), x) for y, x in ((out, inputs), (want, casts)))
    assert all(a.dtype == torch.float32 and torch.equal(a, b.float()) for a, b in zip(ours, theirs, strict=True))
    # Compiled, too.
    torch._dynamo.reset()
    with torch.autocast(device.type, dtype=torch.bfloat16):
        torch.testing.assert_close(torch.compile(packops.gated_linear, fullgraph=True)(*inputs), want)
    torch._dynamo.reset()
    if device.type == "cpu":
        doubles = [x.detach().double() for x in inputs]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert packops.gated_linear(*doubles).dtype == torch.float64


@pytest.mark.parametrize("call", [packops.gated_linear, OPS.gated_linear], ids=["function", "op"])
def test_the_result_may_be_changed_in_place(device, call):
    inputs = problem(device=device)
    want = torch.autograd.grad(call(*inputs).sum(), inputs)
    out = call(*inputs)
    out += 1.0
    for a, b in zip(torch.autograd.grad(out.sum(), inputs), want, strict=True):
        assert torch.equal(a, b)


def test_the_second_derivative_is_an_error(device):
    for call in (
        packops.gated_activation,
        OPS.gated_activation,
        lambda *x: packops.gated_linear(*x, torch.ones(3, 24, device=device)),
    ):
        gate, up = problem(device=device)[:2]
        (grad,) = torch.autograd.grad(call(gate, up).square().sum(), gate, create_graph=True)
        with pytest.raises(RuntimeError, match="differentiable once"):
            grad.sum().backward()


def test_opcheck(device):
    for activation in ACTIVATIONS:
        gate, up = leaves_of(*halves(6, 20, torch.float32, device))
        torch.library.opcheck(OPS.gated_activation.default, (gate, up), {"activation": activation})
        gate, up = gate.detach(), up.detach()
        torch.library.opcheck(OPS._gated_activation.default, (gate, up, activation))
        for flags in ((), (False, True, True), (True, False, True), (False, False, True)):
            torch.library.opcheck(OPS._gated_activation_backward.default, (torch.ones_like(gate), gate, up, activation, *flags))


@pytest.mark.parametrize("frozen", [False, True])
def test_compile(device, frozen):
    """In one graph, which keeps what eager code of ours keeps."""
    torch._dynamo.reset()

    def function(x, gate, up, weight, bias):
        return packops.gated_linear(x @ gate, x @ up, weight, bias) + packops.gated_activation(x, x, activation="gelu").sum()

    tensors = [torch.randn(*shape, device=device) for shape in ((7, 16), (16, 24), (16, 24), (10, 24), (10,))]
    inputs = [leaves_of(*tensors) for _ in range(2)]
    for x in inputs:
        x[3].requires_grad_(not frozen)
    want, got = function(*inputs[0]), torch.compile(function, fullgraph=True)(*inputs[1])
    torch.testing.assert_close(got, want)
    for y in (want, got):
        y.square().sum().backward()
    for a, b in zip(*inputs, strict=True):
        assert (a.grad is None) == (b.grad is None)
        assert a.grad is None or (b.grad - a.grad).abs().max() <= 1e-4 * a.grad.abs().max()
    torch._dynamo.reset()


def test_compile_keeps_gate_and_up_only():
    torch._dynamo.reset()
    inputs = leaves_of(*(torch.randn(*shape) for shape in ((64, 32), (32, 32), (32, 32), (10, 32))))

    def function(x, a, b, weight):
        return packops.gated_linear(x @ a, x @ b, weight)

    kept, _ = saved_bytes(lambda: torch.compile(function, fullgraph=True, backend="aot_eager")(*inputs))
    assert kept == (3 * 64 + 2 * 32 + 10) * 32 * 4  # x, gate, up, and the three weights
    torch._dynamo.reset()


@pytest.mark.parametrize("shape", [(0, 8), (3, 0, 8), (4, 0)])
def test_empty(device, shape):
    gate, up = leaves_of(torch.empty(shape, device=device), torch.empty(shape, device=device))
    weight = torch.randn(5, shape[-1], device=device, requires_grad=True)
    out = packops.gated_linear(gate, up, weight)
    out.sum().backward()
    assert out.shape == (*shape[:-1], 5)
    assert (out == 0).all()
    assert (weight.grad == 0).all()
    assert gate.grad.shape == shape
    assert packops.gated_activation(gate, up).shape == shape


def test_the_same_bits_at_every_run(device):
    inputs = problem(torch.bfloat16, device, rows=(3000,))[:2]
    threads = torch.get_num_threads()
    runs = []
    for run in range(3):
        torch.set_num_threads(1 if run == 1 else threads)
        runs.append([packops.gated_activation(*inputs), *gradients(packops.gated_activation, inputs, inputs[0].detach())])
    torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(run, runs[0], strict=True))


def test_errors(device):
    gate, up = torch.randn(2, 4, 6, device=device)
    weight = torch.randn(3, 6, device=device)

    def raises(kind, message, *arguments, call=packops.gated_activation, **options):
        for grad in (False, True):
            with pytest.raises(kind, match=r"^packops\." + message):
                call(*(x.requires_grad_(grad) if x.is_floating_point() and x.is_leaf else x for x in arguments), **options)

    raises(ValueError, r"gated_activation: up must have the shape of gate, \(4, 6\), got \(4, 5\)", gate, up[:, :5])
    raises(TypeError, "gated_activation: up must have the dtype of gate, Float, got Half", gate, up.half())
    raises(TypeError, "gated_activation: gate must be float32, float16 or bfloat16 .*got Int", gate.int(), up.int())
    raises(
        ValueError,
        "gated_activation: the last dimension of up must be contiguous, got stride 4",
        gate,
        torch.randn(6, 4, device=device).t(),
    )
    raises(
        ValueError, "gated_activation: activation must be 'silu', 'gelu_tanh' or 'gelu', got 'relu'", gate, up, activation="relu"
    )
    raises(ValueError, "gated_activation: gate must have shape .*0-d", gate[0, 0], up[0, 0])
    if device.type == "cuda":
        raises(TypeError, "gated_activation: gate must be float32, .*got Double", gate.double(), up.double())
        raises(ValueError, r"gated_activation: up must be on the device of gate, cuda:0, got cpu", gate, up.cpu())

    def linear(message, *arguments, kind=ValueError, **options):
        raises(kind, "gated_linear: " + message, gate, up, *arguments, call=packops.gated_linear, **options)

    linear(r"weight must have shape \(features, 6\) for gate \(4, 6\), got \(3, 5\)", weight[:, :5])
    linear(r"weight must have shape \(features, 6\) for gate \(4, 6\), got \(6,\)", weight[0])
    linear("weight must have the dtype of gate, torch.float32, got torch.float16", weight.half(), kind=TypeError)
    linear(r"bias must have shape \(3,\), got \(2,\)", weight, weight[:2, 0].clone())
    linear("bias must have the dtype of gate, torch.float32, got torch.float64", weight, weight[:, 0].double(), kind=TypeError)
    raises(ValueError, "gated_linear: activation must be", gate, up, weight, call=packops.gated_linear, activation="tanh")


# ---- on a GPU ---------------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
def test_no_host_sync_and_graph_capture():
    inputs = problem(torch.bfloat16, "cuda", rows=(200,))
    grad = torch.randn(200, 10, device="cuda", dtype=torch.bfloat16)

    def step():
        for leaf in inputs:
            leaf.grad = None
        out = packops.gated_linear(*inputs)
        out.backward(grad)
        return out, *(leaf.grad for leaf in inputs)

    step()
    with no_host_sync():
        step()
    graph, captured = capture(step)
    with torch.no_grad():
        inputs[0].copy_(torch.randn_like(inputs[0]))
    graph.replay()
    replayed = [x.clone() for x in captured]
    assert all(torch.equal(a, b) for a, b in zip(replayed, step(), strict=True))


@pytest.mark.gpu
def test_peak_memory():
    """Backward: the gradient of the product, the product, and the gradients of gate and up."""
    from device_memory import peak_memory

    inputs = problem(torch.bfloat16, "cuda", rows=(4096,), columns=2048, features=64, bias=False)
    grad = torch.randn(4096, 64, device="cuda", dtype=torch.bfloat16)
    torch.autograd.grad(packops.gated_linear(*inputs), inputs, grad)  # cuBLAS's workspace
    matrix = 4096 * 2048 * 2
    assert peak_memory(lambda: torch.autograd.grad(packops.gated_linear(*inputs), inputs, grad)) < 4.2 * matrix


@pytest.mark.gpu
@pytest.mark.large(gib=40)
def test_more_than_two_to_the_31_elements():
    rows, columns = 2**18 + 3, 8193
    gate = torch.zeros(rows, columns, device="cuda", dtype=torch.bfloat16)
    gate[-5:] = torch.randn(5, columns, device="cuda")
    product, grad_gate, grad_up = OPS._gated_activation_backward(gate, gate, gate, "silu")
    last = gate[-5:].clone()
    for whole, part in zip((product, grad_gate, grad_up), OPS._gated_activation_backward(last, last, last, "silu"), strict=True):
        assert torch.equal(whole[-5:], part)
        assert (whole[:-5] == 0).all()
    # Strides beyond 2^31.
    far = torch.as_strided(gate, (2, 64), (gate.numel() - 64, 1))
    assert torch.equal(packops.gated_activation(far, far), packops.gated_activation(far.contiguous(), far.contiguous()))


def test_backward_under_autocast_of_what_was_computed_without():
    """An island of fp32 in a region of bf16, whose backward runs in that region."""
    gate, up, weight = (torch.randn(n, 8, requires_grad=True) for n in (3, 3, 5))
    inputs = (gate, up, weight)
    want = torch.autograd.grad(packops.gated_linear(*inputs).square().sum(), inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with torch.autocast("cpu", enabled=False):
            loss = packops.gated_linear(*inputs).square().sum()
        found = torch.autograd.grad(loss, inputs)
    assert all(torch.equal(a, b) for a, b in zip(found, want, strict=True))
